//! Data goes to standard output, conversation to standard error. Nobody else writes to them.

use std::io::{self, ErrorKind, Write};

/// Whoever read our output has seen enough, as `| head` does. A command that meets this ends quietly; a connection to the
/// engine that breaks is another matter, though the kernel calls both a broken pipe.
#[derive(Debug)]
struct NobodyReads;

impl std::fmt::Display for NobodyReads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nobody reads the output any more")
    }
}

impl std::error::Error for NobodyReads {}

/// Whether it was for want of a reader of our output that something failed.
pub(crate) fn is_unread(error: &anyhow::Error) -> bool {
    let inner = |cause: &io::Error| cause.get_ref().is_some_and(|inner| inner.is::<NobodyReads>());
    error.chain().any(|cause| cause.downcast_ref().is_some_and(inner))
}

/// One of this process's standard streams.
struct Stream<W>(W);

impl<W> Stream<W> {
    fn checked<T>(result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => io::Error::new(ErrorKind::BrokenPipe, NobodyReads),
            _ => error,
        })
    }
}

impl<W: Write> Write for Stream<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::checked(self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Self::checked(self.0.flush())
    }
}

/// Standard output, for data.
pub(crate) fn stdout() -> impl Write {
    Stream(io::stdout().lock())
}

/// Standard error, for what a container writes there.
pub(crate) fn stderr() -> impl Write {
    Stream(io::stderr().lock())
}

/// One line of data.
pub(crate) fn line(line: &str) -> io::Result<()> {
    text(&format!("{line}\n"))
}

/// Data as it is.
pub(crate) fn text(text: &str) -> io::Result<()> {
    let mut stdout = stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// One line for the person. Nothing depends on it being read.
pub(crate) fn note(text: &str) {
    let _unread = writeln!(stderr(), "{text}");
}

/// Asks as Docker does; anything but `y` or `yes` is a no.
pub(crate) fn confirm(warning: &str) -> io::Result<bool> {
    note(warning);
    note("Are you sure you want to continue? [y/N]");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}

/// A column of the docker CLI takes at least this much, and ends in this many spaces.
const COLUMN_WIDTH_MIN: usize = 10;
const COLUMN_GAP: usize = 3;

/// Rows under headings, in columns as wide as the docker CLI makes them.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        let longest = cells.chain([headings[column].len()]).max().unwrap_or(0);
        COLUMN_WIDTH_MIN.max(longest + COLUMN_GAP)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let heading = headings.iter().map(|heading| (*heading).to_owned()).collect();
    let mut text = String::new();
    for row in std::iter::once(&heading).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!("{cell:<width$}");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// `5 minutes`, `About an hour`: how Docker tells ages.
pub(crate) fn age(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match () {
        () if seconds < 1 => "Less than a second".into(),
        () if seconds == 1 => "1 second".into(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".into(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours <= 1 => "About an hour".into(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

/// `1.23MB`: three digits, powers of 1000, as Docker tells sizes of images.
pub(crate) fn size(bytes: i64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    scaled(bytes as f64, 1000.0, ["B", "kB", "MB", "GB", "TB", "PB"], 3)
}

/// `1.234MiB`: four digits, powers of 1024, as Docker tells memory.
pub(crate) fn binary_size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "four digits are shown")]
    scaled(bytes as f64, 1024.0, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 4)
}

fn scaled(mut value: f64, step: f64, units: [&str; 6], digits: usize) -> String {
    let mut units = units.into_iter();
    let mut unit = units.next().unwrap_or_default();
    while value >= step {
        let Some(larger) = units.next() else { break };
        value /= step;
        unit = larger;
    }
    let whole_digits = match value {
        value if value >= 1000.0 => 4,
        value if value >= 100.0 => 3,
        value if value >= 10.0 => 2,
        _ => 1,
    };
    let decimals = digits.saturating_sub(whole_digits);
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

/// The first twelve digits of an id.
pub(crate) fn short_id(id: &str) -> &str {
    let digits = id.strip_prefix("sha256:").unwrap_or(id);
    digits.get(..12).unwrap_or(digits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn only_output_that_nobody_reads_ends_quietly() {
        let broken = || io::Result::<()>::Err(ErrorKind::BrokenPipe.into());
        let written = Stream::<Vec<u8>>::checked(broken()).context("cannot write to standard output");
        assert!(is_unread(&written.unwrap_err()));
        let sent = broken().context("the daemon does not take the request");
        assert!(!is_unread(&sent.unwrap_err()));
        let full = Stream::<Vec<u8>>::checked::<()>(Err(ErrorKind::StorageFull.into()));
        assert!(!is_unread(&full.unwrap_err().into()));
    }

    #[test]
    fn columns_are_as_wide_as_dockers() {
        let rows = vec![vec!["a".into(), "long cell".into(), "x".into()]];
        assert_eq!(table(&["ID", "B", "C"], &rows), "ID        B           C\na         long cell   x\n");
    }

    #[test]
    fn ages_and_sizes_read_like_dockers() {
        for (seconds, text) in [
            (0, "Less than a second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (3599, "59 minutes"),
            (3600, "About an hour"),
            (2 * 3600, "2 hours"),
            (47 * 3600, "47 hours"),
            (48 * 3600, "2 days"),
            (400 * 24 * 3600, "13 months"),
        ] {
            assert_eq!(age(seconds), text, "{seconds}");
        }
        for (bytes, text) in
            [(0, "0B"), (999, "999B"), (1_500, "1.5kB"), (77_800_000, "77.8MB"), (1_234_000_000, "1.23GB")]
        {
            assert_eq!(size(bytes), text);
        }
        for (bytes, text) in [(0, "0B"), (1536, "1.5KiB"), (7_900_000, "7.534MiB"), (1023 << 20, "1023MiB")] {
            assert_eq!(binary_size(bytes), text);
        }
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789ab");
    }
}

//! The guest's console: a log file of bounded size, the last lines, and the sight of a dying kernel.
//!
//! A guest writes to its console what it likes and as much as it likes. The file keeps the beginning of the boot
//! ([`HEAD_BYTES`]) and the newest output, and never exceeds [`FILE_BYTES_MAX`] by more than one write. When it is
//! full, the middle is cut out in place, so that a program which follows the file keeps following it. The log of the
//! boot before is kept beside it as `<name>.1`.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The log file's largest size.
pub const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// The beginning of a boot that is never cut out.
pub const HEAD_BYTES: u64 = 256 * 1024;
/// What is kept of the newest output when the middle is cut out.
const KEPT_BYTES: u64 = 256 * 1024;
/// Lines in a failure message.
pub const TAIL_LINES: usize = 50;
/// Memory for those lines; also their bound in a control message.
const TAIL_BYTES_MAX: usize = 16 * 1024;
/// The part of a line that is looked at for a panic.
const LINE_BYTES_MAX: usize = 512;

/// The console's log.
#[derive(Debug)]
pub struct ConsoleLog {
    file: Option<File>,
    length: u64,
    tail: VecDeque<u8>,
    line: Vec<u8>,
}

impl ConsoleLog {
    /// Begins a new log, keeping the previous one as `<path>.1`.
    pub fn create(path: &Path) -> io::Result<Self> {
        match std::fs::rename(path, previous(path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(Self { file: Some(file), length: 0, tail: VecDeque::new(), line: Vec::new() })
    }

    /// Takes output of the guest. Returns the kernel's panic line if there is one in it.
    ///
    /// A log that cannot be written (no space) is given up with one warning; the machine goes on.
    pub fn write(&mut self, bytes: &[u8]) -> Option<String> {
        if let Some(file) = &mut self.file
            && let Err(error) = append(file, &mut self.length, bytes)
        {
            tracing::warn!(%error, "cannot write the console log; it ends here");
            self.file = None;
        }
        self.tail.extend(bytes);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL_BYTES_MAX));
        self.scan(bytes)
    }

    /// The last lines, cleaned of control characters.
    pub fn tail(&self) -> String {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        last_lines(&bytes, TAIL_LINES)
    }

    fn scan(&mut self, bytes: &[u8]) -> Option<String> {
        let mut panic = None;
        for &byte in bytes {
            if byte == b'\n' {
                panic = panic.or_else(|| panic_line(&self.line));
                self.line.clear();
            } else if self.line.len() < LINE_BYTES_MAX {
                self.line.push(byte);
            }
        }
        panic
    }
}

/// Where the log of the boot before is.
fn previous(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Appends, cutting out the middle when the file is full.
fn append(file: &mut File, length: &mut u64, bytes: &[u8]) -> io::Result<()> {
    if *length > HEAD_BYTES && *length + bytes.len() as u64 > FILE_BYTES_MAX {
        let kept_from = length.saturating_sub(KEPT_BYTES).max(HEAD_BYTES);
        let mut kept = vec![0; (*length - kept_from) as usize];
        file.read_exact_at(&mut kept, kept_from)?;
        let marker = format!("\n[… {} bytes left out …]\n", kept_from - HEAD_BYTES);
        file.set_len(HEAD_BYTES)?;
        file.seek(SeekFrom::Start(HEAD_BYTES))?;
        file.write_all(marker.as_bytes())?;
        file.write_all(&kept)?;
        *length = HEAD_BYTES + (marker.len() + kept.len()) as u64;
    }
    file.write_all(bytes)?;
    *length += bytes.len() as u64;
    Ok(())
}

/// The message of a kernel panic, if this line is the kernel's (it begins with a time stamp).
fn panic_line(line: &[u8]) -> Option<String> {
    let line = clean(line);
    let line = line.trim();
    let at = line.find("Kernel panic - not syncing")?;
    line.starts_with('[').then(|| line[at..].to_owned())
}

/// Text without carriage returns and terminal control sequences' escape characters.
fn clean(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|&letter| letter == '\n' || letter == '\t' || !letter.is_control()).collect()
}

fn last_lines(bytes: &[u8], count: usize) -> String {
    let text = clean(bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// The last lines of a console log file, cleaned of control characters; empty if there is no such file.
pub fn tail_of(path: &Path) -> io::Result<String> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        file => file?,
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES_MAX as u64)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(last_lines(&bytes, TAIL_LINES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> (tempfile::TempDir, PathBuf, ConsoleLog) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let log = ConsoleLog::create(&path).unwrap();
        (folder, path, log)
    }

    #[test]
    fn the_beginning_and_the_end_of_much_output_are_kept() {
        let (_folder, path, mut log) = log();
        for number in 0..200_000 {
            log.write(format!("line {number:06} of the guest\n").as_bytes());
            assert!(log.length <= FILE_BYTES_MAX);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.len() as u64, log.length);
        assert!(
            text.starts_with("line 000000 of the guest\n") && text.ends_with("line 199999 of the guest\n")
        );
        assert_eq!(text.matches("bytes left out").count(), 1);
        assert!(tail_of(&path).unwrap().ends_with("line 199999 of the guest"));
    }

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config { cases: 16, failure_persistence: None, ..Default::default() })]
        #[test]
        fn the_file_is_bounded_whatever_is_written(chunks in proptest::collection::vec((0_u8..=255, 0_usize..60_000), 0..80)) {
            let (_folder, path, mut log) = log();
            let mut all = Vec::new();
            for (byte, length) in chunks {
                let chunk = vec![byte; length];
                log.write(&chunk);
                all.extend(&chunk);
                let file = std::fs::read(&path).unwrap();
                proptest::prop_assert!(file.len() as u64 <= FILE_BYTES_MAX);
                proptest::prop_assert_eq!(file.len() as u64, log.length);
                let head = all.len().min(HEAD_BYTES as usize);
                proptest::prop_assert_eq!(&file[..head], &all[..head]);
                let newest = all.len().min(KEPT_BYTES as usize / 2).min(file.len() - head);
                proptest::prop_assert!(file.ends_with(&all[all.len() - newest..]));
            }
        }
    }

    #[test]
    fn one_huge_write_does_not_break_the_log() {
        let (_folder, path, mut log) = log();
        log.write(&vec![b'x'; 3 * FILE_BYTES_MAX as usize]);
        log.write(b"after\n");
        assert!(std::fs::metadata(&path).unwrap().len() <= FILE_BYTES_MAX);
        assert!(log.tail().ends_with("after"));
    }

    #[test]
    fn the_boot_before_is_kept() {
        let (_folder, path, mut log) = log();
        log.write(b"first\n");
        ConsoleLog::create(&path).unwrap().write(b"second\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"second\n");
        assert_eq!(std::fs::read(previous(&path)).unwrap(), b"first\n");
    }

    #[test]
    fn the_tail_is_bounded_and_clean() {
        let (_folder, path, mut log) = log();
        for number in 0..1000 {
            log.write(format!("\x1b[0mline {number}\r\n\r\n").as_bytes());
        }
        log.write(b"\xff\xfe unfinished");
        let tail = log.tail();
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.contains("[0mline 999\n") && tail.ends_with("unfinished"), "{tail}");
        assert!(!tail.contains(['\r', '\x1b']));
        assert_eq!(tail_of(&path).unwrap(), tail);
        assert_eq!(tail_of(Path::new("/nonexistent/console.log")).unwrap(), "");
    }

    #[test]
    fn a_kernel_panic_is_seen_across_writes() {
        let (_folder, _path, mut log) = log();
        assert_eq!(log.write(b"[    1.2] Kernel pan"), None);
        let line = log.write(b"ic - not syncing: No working init found.\r\nmore");
        assert_eq!(line.unwrap(), "Kernel panic - not syncing: No working init found.");
    }

    #[test]
    fn other_text_about_a_panic_is_not_one() {
        let (_folder, _path, mut log) = log();
        assert_eq!(log.write(b"echo Kernel panic - not syncing\n[  1.0] no kernel panic here\n"), None);
    }
}

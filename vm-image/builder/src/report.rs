//! What the builder tells the person who runs it: steps on stderr, the result on stdout.

use std::fmt;
use std::io::{self, Write};

/// Announces a step that may take longer than a second.
pub(crate) fn step(message: fmt::Arguments<'_>) {
    write(io::stderr(), format_args!("vm-image: {message}"));
}

/// Prints one line of the result.
pub(crate) fn line(message: fmt::Arguments<'_>) {
    write(io::stdout(), message);
}

fn write(mut stream: impl Write, message: fmt::Arguments<'_>) {
    // A reader that has gone away is no reason to stop building.
    let _: io::Result<()> = writeln!(stream, "{message}");
}

/// A size as people read it.
pub(crate) fn size(bytes: u64) -> String {
    if bytes < 1024 * 1024 {
        format!("{} KiB", bytes.div_ceil(1024))
    } else {
        format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
    }
}

//! `BoundedLog`: a log file that never takes more than twice its bound: when full it becomes `<name>.1`.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub(crate) struct BoundedLog {
    path: PathBuf,
    file: File,
    written_bytes: u64,
    bytes_max: u64,
}

impl BoundedLog {
    /// Appends to the file at `path`, mode 0600.
    pub(crate) fn open(path: &Path, bytes_max: u64) -> io::Result<Self> {
        let file = File::options().create(true).append(true).mode(0o600).open(path)?;
        let written_bytes = file.metadata()?.len();
        Ok(Self { path: path.to_path_buf(), file, written_bytes, bytes_max })
    }

    pub(crate) fn rotated(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(".1");
        PathBuf::from(name)
    }
}

impl Write for BoundedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.written_bytes >= self.bytes_max {
            std::fs::rename(&self.path, Self::rotated(&self.path))?;
            *self = Self::open(&self.path, self.bytes_max)?;
        }
        let written = self.file.write(bytes)?;
        self.written_bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_the_newest_and_stays_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("engine.log");
        let mut log = BoundedLog::open(&path, 100).unwrap();
        for number in 0..1000 {
            writeln!(log, "line {number}").unwrap();
        }
        let newest = std::fs::read_to_string(&path).unwrap();
        assert!(newest.ends_with("line 999\n"));
        let total = newest.len() as u64 + std::fs::metadata(BoundedLog::rotated(&path)).unwrap().len();
        assert!(total < 240, "{total}");
    }
}

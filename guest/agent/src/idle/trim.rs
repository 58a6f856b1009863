//! Free space of the data disk that the host still holds.
//!
//! What is deleted is discarded as soon as its deletion is on the disk (`disk::mount`). What was on its way when a machine died
//! is not, and neither is what somebody filled who copied the disk's file without its holes. So each start of the machine looks
//! through all that is free, once, part by part, in idle moments.
//!
//! Linux `fs/ext4/mballoc.c`, `ext4_trim_fs`.

use std::fs::File;
use std::io;
use std::path::Path;

use tracing::{debug, info};

use crate::sys;

/// Looked through in one idle moment.
const PART_BYTES: u64 = 16 << 30;
/// Free pieces below this are not worth a request.
const PIECE_BYTES: u64 = 64 << 10;
/// What `statfs` calls ext4.
const EXT4_MAGIC: i64 = 0xef53;

/// How far the disk has been looked through.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Trim {
    next: u64,
    freed: u64,
    done: bool,
}

impl Trim {
    /// Looks through the next part of the file system mounted at `path`; `true` when another is left. Blocks for as long as the
    /// disk takes.
    pub fn part(&mut self, path: &Path) -> bool {
        if self.done {
            return false;
        }
        // Not mounted yet is no reason to give up.
        let is_ours = rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == EXT4_MAGIC);
        match File::open(path) {
            Ok(folder) if is_ours => {
                self.part_with(&|start, length| sys::trim(&folder, start, length, PIECE_BYTES))
            }
            _ => false,
        }
    }

    fn part_with(&mut self, trim: &dyn Fn(u64, u64) -> io::Result<u64>) -> bool {
        match trim(self.next, PART_BYTES) {
            Ok(bytes) => {
                self.freed += bytes;
                self.next += PART_BYTES;
            }
            Err(error) => {
                self.done = true;
                // That is how a file system says that it ends before the part begins.
                match error.raw_os_error() {
                    Some(libc::EINVAL) if self.next > 0 => {
                        info!(bytes = self.freed, "the machine is idle: free space of the disk given back");
                    }
                    _ => debug!(%error, next = self.next, "free space of the disk cannot be given back"),
                }
            }
        }
        !self.done
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn every_part_is_looked_through_once() {
        let size = 2 * PART_BYTES + 1;
        let asked = RefCell::new(Vec::new());
        let disk = |start: u64, length: u64| {
            asked.borrow_mut().push(start);
            match start < size {
                true => Ok(length.min(size - start)),
                false => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            }
        };
        let mut trim = Trim::default();
        let parts = std::iter::repeat_with(|| trim.part_with(&disk)).take_while(|more| *more).count();
        assert_eq!((parts, trim.freed), (3, size));
        assert_eq!(*asked.borrow(), [0, 1, 2, 3].map(|part| part * PART_BYTES));
        assert!(!trim.part(Path::new("/")), "once is enough");
    }

    #[test]
    fn a_disk_that_cannot_is_left_alone() {
        for error in [libc::EOPNOTSUPP, libc::EINVAL, libc::EROFS] {
            let mut trim = Trim::default();
            assert!(!trim.part_with(&|_, _| Err(io::Error::from_raw_os_error(error))));
            assert!(trim.done);
        }
    }

    #[test]
    fn a_disk_that_is_not_mounted_yet_is_asked_again() {
        let mut trim = Trim::default();
        assert!(!trim.part(Path::new("/proc")) && !trim.part(Path::new("/nonexistent")));
        assert_eq!(trim, Trim::default());
    }
}

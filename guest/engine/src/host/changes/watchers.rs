//! Who in the machine watches which files: repeating a change that nobody hears of would be work for nothing.
//!
//! The kernel tells of each inotify descriptor which inodes it watches (`proc_pid_fdinfo(5)`).

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use guest_protocol::changes::{Change, What};

/// The inodes of one device that are watched.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Watchers {
    inodes: HashSet<u64>,
    /// Somebody watches in another way, perhaps everything.
    all: bool,
}

impl Watchers {
    /// Looks through all processes.
    pub fn find(proc: &Path, device: u64) -> Self {
        let mut found = Self::default();
        // Processes come and go: what cannot be read has gone.
        for process in fs::read_dir(proc).into_iter().flatten().flatten() {
            let number = process.file_name();
            if !number.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            for descriptor in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
                match fs::read_link(descriptor.path()) {
                    Ok(target) if target == Path::new("anon_inode:[fanotify]") => found.all = true,
                    Ok(target) if is_inotify(&target) => {
                        let info = process.path().join("fdinfo").join(descriptor.file_name());
                        if let Ok(info) = fs::read(info) {
                            found.inodes.extend(watched(&info, device));
                        }
                    }
                    _ => {}
                }
            }
        }
        found
    }

    /// Whether anybody would hear of a change.
    pub fn hear(&self, change: &Change) -> bool {
        let to = match &change.what {
            What::Renamed { to, .. } => to.inode,
            _ => change.at.inode,
        };
        self.all || [change.at.inode, change.inode, to].iter().any(|inode| self.inodes.contains(inode))
    }
}

fn is_inotify(target: &Path) -> bool {
    ["anon_inode:inotify", "anon_inode:[inotify]"].iter().any(|name| target == Path::new(name))
}

/// The inodes in lines like `inotify wd:1 ino:2f sdev:800013 mask:800 …`, numbers in hexadecimal.
pub fn watched(info: &[u8], device: u64) -> Vec<u64> {
    // The kernel's own way of writing a device number.
    let device = u64::from(rustix::fs::major(device)) << 20 | u64::from(rustix::fs::minor(device));
    let lines = info.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    let watches = lines.filter_map(|line| {
        let words = line.strip_prefix("inotify ")?;
        let value = |key: &str| {
            let word = words.split_ascii_whitespace().find_map(|word| word.strip_prefix(key))?;
            u64::from_str_radix(word, 16).ok()
        };
        (value("sdev:")? == device).then(|| value("ino:")).flatten()
    });
    watches.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_protocol::changes::{Spot, Touch};
    use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

    #[test]
    fn lines_of_the_kernel_are_read() {
        let info = b"pos:\t0\nflags:\t02000000\ninotify wd:2 ino:1f sdev:2c mask:3c0 ignored_mask:0 fhandle-bytes:8\n\
                     inotify wd:1 ino:2 sdev:800013 mask:800\ninotify wd:3 ino:x sdev:2c\ninotify\n";
        assert_eq!(watched(info, rustix::fs::makedev(0, 0x2c)), [0x1f]);
        assert_eq!(watched(info, rustix::fs::makedev(8, 0x13)), [2]);
    }

    #[test]
    fn a_watch_of_ours_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let stat = rustix::fs::stat(folder.path()).unwrap();
        let ours = inotify::init(CreateFlags::CLOEXEC).unwrap();
        let change = |inode: u64| {
            let at = Spot { inode, folder: Vec::new(), name: b"x".to_vec() };
            Change { at, inode: 0, what: What::Touched(Touch::default()) }
        };
        inotify::add_watch(&ours, folder.path(), WatchFlags::CREATE).unwrap();
        let proc = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/proc/self", proc.path().join("1")).unwrap();
        let found = Watchers::find(proc.path(), stat.st_dev);
        assert!(found.hear(&change(stat.st_ino)));
        assert!(!found.hear(&change(stat.st_ino + 1)) || found.all);
    }
}

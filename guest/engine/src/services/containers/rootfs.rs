//! Looking into a container's mounted root file system without being led out of it: every path is resolved by the
//! kernel inside that root (`openat2` with `RESOLVE_IN_ROOT`), so a symbolic link in an image cannot name our files.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// Longest file read: /etc/passwd of a directory service's export, say.
const FILE_MAX_BYTES: u64 = 4 << 20;

/// Opens the root, to look for more in it than is offered here.
pub fn open(root: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The text of a file in `root`; empty when there is none.
pub fn read_text(root: &Path, path: &str) -> io::Result<String> {
    let root = open(root)?;
    // Not a FIFO that would block us.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(String::new()),
        other => File::from(other?),
    };
    if !file.metadata()?.is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::store::tests::folder;

    #[test]
    fn links_stay_in_the_root() {
        let base = folder();
        let root = base.join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(base.join("secret"), "outside").unwrap();
        symlink("../../secret", root.join("etc/passwd")).unwrap();
        assert_eq!(read_text(&root, "/etc/passwd").unwrap(), "", "`..` stops at the root");
        std::fs::write(root.join("secret"), "inside").unwrap();
        assert_eq!(read_text(&root, "/etc/passwd").unwrap(), "inside");
        assert_eq!(read_text(&root, "/etc/group").unwrap(), "");
        assert_eq!(read_text(&root, "/etc").unwrap(), "");
        std::fs::remove_dir_all(base).unwrap();
    }
}

//! Looking into a container's mounted root file system without being led out of it: every path is resolved by the
//! kernel inside that root (`openat2` with `RESOLVE_IN_ROOT`), so a symbolic link in an image cannot name our files.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

/// Longest file read: /etc/passwd of a directory service's export, say.
const FILE_MAX_BYTES: u64 = 4 << 20;

fn open_root(root: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The text of a file in `root`; empty when there is none.
pub fn read_text(root: &Path, path: &str) -> io::Result<String> {
    let root = open_root(root)?;
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

/// Makes a folder in `root`, and those above it. One that is there, or anything else of that name, is left alone.
pub fn make_folders(root: &Path, path: &Path) -> io::Result<()> {
    let root = open_root(root)?;
    let mut walked = PathBuf::from("/");
    let find = |path: &Path| {
        openat2(&root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
    };
    for component in path.components() {
        match component {
            Component::Normal(name) => {
                let parent = find(&walked)?;
                walked.push(name);
                match find(&walked) {
                    Err(Errno::NOENT) => match mkdirat(&parent, name, Mode::from(0o755)) {
                        // A link that leads nowhere, or somebody was faster.
                        Err(Errno::EXIST) => return Ok(()),
                        other => other?,
                    },
                    Err(Errno::NOTDIR) => return Ok(()),
                    other => drop(other?),
                }
            }
            Component::ParentDir => _ = walked.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(())
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

        symlink("/elsewhere", root.join("link")).unwrap();
        std::fs::create_dir(root.join("elsewhere")).unwrap();
        make_folders(&root, Path::new("/link/a/../b/c")).unwrap();
        assert!(root.join("elsewhere/b/c").is_dir());
        assert!(!Path::new("/elsewhere").exists());
        make_folders(&root, Path::new("/link/b/c")).unwrap();
        make_folders(&root, Path::new("/secret/x")).unwrap();
        std::fs::remove_dir_all(base).unwrap();
    }
}

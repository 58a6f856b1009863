//! Unix sockets at any depth.
//!
//! A socket address holds 108 bytes; a data root may be longer. Both ends go through an open descriptor of the folder:
//! `/proc/self/fd/N/shim.sock` names the same file in a few bytes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// An open folder and the short path of a name in it.
///
/// The path is valid while this value lives, in this process only.
#[derive(Debug)]
pub struct ShortPath {
    _folder: File,
    path: PathBuf,
}

impl ShortPath {
    /// The short path of `name` in `folder`, which must exist.
    pub fn new(folder: &Path, name: &str) -> io::Result<Self> {
        let file = File::open(folder)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", file.as_raw_fd()));
        Ok(Self { _folder: file, path })
    }

    /// The path to hand to `bind` or `connect`.
    pub fn as_path(&self) -> &Path {
        &self.path
    }
}

/// Listens on `folder/name`, which must not exist.
pub fn bind(folder: &Path, name: &str) -> io::Result<UnixListener> {
    UnixListener::bind(ShortPath::new(folder, name)?.as_path())
}

/// Connects to `folder/name`.
pub fn connect(folder: &Path, name: &str) -> io::Result<UnixStream> {
    UnixStream::connect(ShortPath::new(folder, name)?.as_path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_three_hundred_bytes_deep_can_be_reached() {
        let folder = std::env::temp_dir().join(format!("shim-socket-{}", std::process::id()));
        let deep = folder.join("d".repeat(150)).join("e".repeat(150));
        std::fs::create_dir_all(&deep).unwrap();
        let listener = bind(&deep, "shim.sock").unwrap();
        let client = connect(&deep, "shim.sock").unwrap();
        let (_server, _) = listener.accept().unwrap();
        drop(client);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

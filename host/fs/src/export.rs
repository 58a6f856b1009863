//! One shared folder: its root, its name, and the rules for what is in it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};

use crate::owner::Owners;

/// A folder to share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSpec {
    /// Its name in the made-up root: one path component.
    pub name: String,
    /// The folder on the host. Links in it are followed once, when it is added.
    pub path: PathBuf,
    /// Whether nothing in it may be changed from the guest.
    pub read_only: bool,
    /// For how long the guest may believe what it was told.
    pub cache: CachePolicy,
    /// Whose the files are.
    pub owners: Owners,
}

/// For how long the guest's kernel may answer from memory. The data of a file are always checked when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachePolicy {
    /// What a name leads to.
    pub names: Duration,
    /// What a file is: size, times, owner.
    pub attributes: Duration,
}

impl Default for CachePolicy {
    /// Short enough that a change on the host seems to be there at once, long enough for the bursts of questions about
    /// one file that programs ask.
    fn default() -> Self {
        Self { names: Duration::from_millis(100), attributes: Duration::from_millis(100) }
    }
}

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The name is no single path component, or taken.
    #[error("`{0}` cannot be the name of a shared folder: it is taken or no name of a folder")]
    Name(String),
    /// The folder cannot be opened.
    #[error("cannot share `{}`", .path.display())]
    Open {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A shared folder.
#[derive(Debug)]
pub struct Export {
    pub spec: ExportSpec,
    /// `O_PATH`.
    pub root: OwnedFd,
    /// Its name in `identity`.
    pub number: u32,
    /// No longer shared: whatever is still known of it is stale.
    pub removed: AtomicBool,
}

impl Export {
    pub fn open(spec: ExportSpec, number: u32) -> Result<Self, ExportError> {
        let name = spec.name.as_bytes();
        if name.is_empty() || name.len() > 255 || name.contains(&b'/') || name.contains(&0) || name[0] == b'.'
        {
            return Err(ExportError::Name(spec.name));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &spec.path, flags, Mode::empty())
            .map_err(|error| ExportError::Open { path: spec.path.clone(), source: error.into() })?;
        Ok(Self { spec, root, number, removed: AtomicBool::new(false) })
    }
}

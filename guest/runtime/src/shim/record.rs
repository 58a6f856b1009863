//! The files a shim leaves in its folder. Each appears by a rename, so a reader sees all of it or nothing.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use super::spec::ExternalRuntime;
use crate::sys::ProcessStamp;

/// The name of the [`StateRecord`].
pub const STATE_FILE: &str = "state.json";
/// The name of the file holding init's [`Exit`](super::Exit).
pub const EXIT_FILE: &str = "exit.json";

/// What must be cleaned up when the shim cannot do it itself. Written before the shim listens, again with `cgroup` before
/// the container is made, and with `init` once it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateRecord {
    /// The container's id.
    pub container: String,
    /// The shim.
    pub shim: ProcessStamp,
    /// The container's init, once there is one.
    pub init: Option<ProcessStamp>,
    /// The container's cgroup below the root of each hierarchy, once it may exist.
    pub cgroup: Option<PathBuf>,
    /// The other runtime that makes the container and knows how to remove it, if it is one.
    #[serde(default)]
    pub runtime: Option<ExternalRuntime>,
}

/// A descriptor of the living shim of a folder (readable when it ends, as of `pidfd_open`), or `None` when there is none.
///
/// The one sure sign: a connection may outlive its shim in a process that was being forked when it died.
pub fn shim_process(folder: &Path) -> Result<Option<OwnedFd>, RecordError> {
    let Some(state) = read::<StateRecord>(folder, STATE_FILE)? else { return Ok(None) };
    state.shim.open().map_err(|source| RecordError::File { path: folder.join(STATE_FILE), source })
}

/// Why a record could not be written or read.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The file system refused.
    #[error("cannot access {path}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content is not what it should be.
    #[error("{path} does not hold a valid record")]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Writes a record so that it appears whole.
pub fn write<T: Serialize>(folder: &Path, name: &str, record: &T) -> Result<(), RecordError> {
    let path = folder.join(name);
    let temporary = folder.join(format!("{name}.new"));
    let bytes =
        serde_json::to_vec(record).map_err(|source| RecordError::Content { path: path.clone(), source })?;
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, &path))
        .map_err(|source| RecordError::File { path, source })
}

/// Reads a record; `None` when there is no such file.
pub fn read<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<Option<T>, RecordError> {
    let path = folder.join(name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RecordError::File { path, source }),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|source| RecordError::Content { path, source })
}

//! What a saved machine keeps of its shared folders: which files the guest knows and has open.
//!
//! Nothing of it is believed: a file is found again by its name, in a folder that was found again, below an export of this
//! server, and only if it is still the same file. What is not is stale for the guest. So is what has no name any more,
//! for its descriptor goes with the process.

use serde::{Deserialize, Serialize};

/// All of it. Guest-visible numbers stay what they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Devices of the host in the order in which they were met.
    pub(crate) devices: Vec<u64>,
    /// Files the guest knows, and the last number given.
    pub(crate) files: Vec<SavedFile>,
    pub(crate) last_file: u64,
    /// What it has open, and the last number given.
    pub(crate) handles: Vec<SavedHandle>,
    pub(crate) last_handle: u64,
}

/// One file that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedFile {
    pub number: u64,
    /// The name of its export.
    pub export: String,
    /// On the host's disk.
    pub device: u64,
    pub inode: u64,
    /// The bits of `st_mode` that say what it is.
    pub kind: u32,
    pub lookups: u64,
    /// The number of the folder that it is found in, and its name there, without a zero.
    pub place: (u64, Vec<u8>),
}

/// One file or folder that the guest has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedHandle {
    pub number: u64,
    /// The file's number; the made-up root's for that.
    pub file: u64,
    /// How a file is open (`open(2)`); `None` for a folder.
    pub flags: Option<u32>,
}

/// A state that no server has saved.
#[derive(Debug, thiserror::Error)]
#[error("the saved state of the shared folders makes no sense: {0}")]
pub struct SavedError(pub(crate) &'static str);

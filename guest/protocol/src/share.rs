//! Folders of the host in the guest: where they are, and what is asked about them.
//!
//! The host offers a few folders (the user's home, say) on one file system. A container's bind names a path of the host;
//! before it starts, the engine asks where in the guest that path is, and the host says so or says why not. Nothing is
//! held for a container: what is offered is there as long as the machine runs.

use serde::{Deserialize, Serialize};

/// The file system's name, by which the guest mounts it.
pub const TAG: &str = "host";

/// Where the guest mounts it. Each folder that is offered is a folder in there.
pub const MOUNT: &str = "/run/host";

/// The folder in [`MOUNT`] that has a folder for each registry with certificates of its own (`certs.d`, read-only). No
/// container can bind it.
pub const CERTIFICATES: &str = "certs.d";

/// The source of a bind, as the user named it on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindSource {
    /// An absolute path of the host.
    pub path: String,
    /// Make a folder there, as the host's user, if there is nothing.
    pub create: bool,
}

/// Where the source of a bind is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum BindPlace {
    /// At this path of the guest, below [`MOUNT`].
    At {
        /// The path; links of the host are followed in it.
        path: String,
    },
    /// There is no such file or folder on the host.
    Missing {
        /// Where it would be in the guest.
        path: String,
    },
    /// There is no such file or folder on the host, nor may one be made there: it would not be shared.
    Nowhere {
        /// Why it would not be, and what to do, as a sentence.
        why: String,
    },
    /// It is the host's socket of the Docker API, which the guest has one of its own for.
    Engine,
    /// It is not shared with the guest, or cannot be.
    Refused {
        /// Why, and what to do, as a sentence.
        why: String,
    },
}

//! What can be mounted into a container, and local volumes: the mechanism below the volume service.
//!
//! [`Specification`] is one mount as asked for, in either spelling (`-v` or the long form), checked by Docker's rules.
//! [`LocalVolumes`] owns the folders of volumes and what their options mount there; [`fill`] copies an image's files into
//! an empty one; [`used_bytes`] counts what one holds.
//!
//! This crate knows no container, keeps no metadata (which volumes there are is the caller's record) and counts no users.
//! Paths inside a volume or a root file system are resolved by the kernel within it (`openat2`): no link in an image or a
//! volume can name anything outside. All calls block.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod copy;
mod local;
mod options;
mod path;
mod propagation;
mod size;
mod specification;
mod tmpfs;

pub use copy::{CopyError, fill};
pub use local::{LocalVolumes, Problems, Recovered, VolumeError};
pub use options::{DriverOptions, OptionError};
pub use path::{clean, make_folders, open_beneath, open_within};
pub use propagation::{PropagationError, check_shared, check_slave};
pub use size::used_bytes;
pub use specification::{
    PROPAGATION_DEFAULT, Specification, SpecificationError, VolumesFrom, check_tmpfs_destination,
    read_hostile,
};
pub use tmpfs::{TmpfsError, merge as merge_tmpfs_options};

//! Images: what they are called, where they come from, how they lie on disk, and how they become a root folder.
//!
//! The vocabulary is containerd's, verb for verb:
//!
//! - [`Reference`]: a name a person types, normalised by Docker's rules.
//! - [`ContentStore`]: immutable blobs named by their sha256.
//! - [`Snapshotter`]: unpacked layers, and writable folders on top of them, over overlayfs.
//! - [`Images`]: the index of images, and the operations on it: pull, push, load, list, resolve, tag, remove.
//!
//! This crate owns everything below the folder it is given, and its own tables (all named `images_…`) in the database it
//! is given. It does not own containers: whoever has them says which images are in use when one is removed. It knows
//! no HTTP API; its errors are kinds with Docker's sentences.
//!
//! # What survives what
//!
//! The database is the only truth. A blob or a layer that has no row there is a leftover: it is swept at
//! [`Images::open`], or picked up again by the next pull. Rows are written in one transaction per image, after one
//! `syncfs`, so an acknowledged image is whole after a power cut, and an image that was not acknowledged is not there.
//!
//! # Threads
//!
//! Everything that touches the disk for longer than a look-up runs on tokio's blocking threads, with bounds. Methods
//! that are not `async` block for a few system calls.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod archive;
mod changes;
mod check;
mod compose;
mod compression;
mod content;
mod credentials;
mod database;
mod digest;
mod download;
mod error;
mod extract;
mod image;
mod images;
pub mod instructions;
mod lease;
mod load;
pub mod manifest;
mod overlay;
mod pack;
mod places;
mod platform;
mod progress;
mod pull;
mod push;
pub mod reference;
mod registry;
mod remote;
mod removal;
mod save;
mod seal;
mod snapshot;
mod sweep;
mod tarball;
pub mod unpack;

pub use changes::{Change, ChangeKind, MountPoint};
pub use check::{Findings, check};
pub use compose::Draft;
pub use content::ContentStore;
pub use credentials::{Credentials, Secret};
pub use digest::{ChainId, Digest, DigestError, Hasher};
pub use error::{Error, Kind, Result};
pub use image::{
    Config, Deleted, Healthcheck, History, Image, ImageConfig, ImageId, ImageLayer, InUse, LoadedImage,
    PulledImage, RemoveOptions, Rootfs,
};
pub use images::{DiskUsage, Images, Limits, Options};
pub use platform::Platform;
pub use progress::{LayerProgress, Progress, UploadProgress};
pub use reference::{AnyReference, Reference, ReferenceError};
#[doc(hidden)]
pub use registry::challenge::fuzz as fuzz_registry_answer;
pub use registry::{Proxies, SearchResult};
pub use remote::RemoteManifest;
pub use save::Saving;
pub use snapshot::{Mounts, SnapshotInfo, Snapshotter, Usage};

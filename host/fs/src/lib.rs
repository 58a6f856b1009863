//! A FUSE server over folders of the host, which are shared with the machine.
//!
//! Owns: the FUSE protocol (`request`, `reply`), which files the guest knows (`node`), what it has open (`handle`), the
//! folders that are shared (`export`), whose the files in them are (`owner`), what changes in them on the host (`watch`) and
//! what of all this a saved machine keeps (`saved`). Does not own: the device that carries requests, guest memory, or the
//! decision which folder may be shared. It starts no thread: [`Server::handle`] may be called from several at a time, and
//! blocks for as long as the host's file system takes; [`Server::follow`] wants one of its own.
//!
//! One server shows one file system: a made-up root, whose folders are the exports. They come and go while it is mounted.
//!
//! # The wall
//!
//! A guest names files by numbers we gave out and by single path components. A component is looked up beneath a folder
//! that is already known (`openat2`, `RESOLVE_BENEATH`), never `..`, never through a link: symbolic links are shown to the
//! guest, which follows them in its own tree. So the files it can name are those below an export's root, and those that
//! were there when it learnt of them. Device nodes are neither made nor opened.
//!
//! Rules: `Documentation/filesystems/fuse.rst` and `include/uapi/linux/fuse.h` of Linux, protocol 7.38.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod export;
pub mod fuzz;
mod handle;
mod node;
mod owner;
mod reply;
mod request;
mod saved;
mod server;
mod watch;

pub use export::{CachePolicy, ExportError, ExportSpec};
pub use owner::Owners;
pub use reply::Reply;
pub use request::{HEADER_BYTES, REQUEST_BYTES_MAX, WRITE_HEAD_BYTES, is_slow, is_write};
pub use rustix::io::Errno;
pub use saved::{Saved, SavedError};
pub use server::{Payload, Room, Server};
pub use watch::FollowError;

//! OCI spec to process.
//!
//! One shim program per container owns everything that must outlive a restart of the engine: the container's init, its
//! pipes or terminal, its log file and its exit status. This library is what the engine and the shim share: the words
//! they exchange ([`shim`]), Docker's default profile ([`defaults`]), and the clean-up after a shim that was killed
//! ([`reap()`]), and copies of a mount namespace ([`apart`]). It does not own images, mounts of layers or networks: the root
//! file system is a mounted folder and the network a path to a namespace, both named in the OCI spec.
//!
//! Nothing here starts threads. `libcontainer` is called only by the shim program, which has exactly one thread: in a
//! threaded process its raw clones deadlock.

#![warn(missing_docs)]
#![deny(unsafe_code)]

pub mod apart;
pub mod cgroup;
pub mod defaults;
pub mod device_filter;
pub mod external;
pub mod lookup;
pub mod reap;
pub mod seccomp_profile;
pub mod shim;
pub mod sys;

pub use reap::reap;

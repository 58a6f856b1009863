//! What is mounted into a container: from what a client asked for ([`wanted`]) over the record ([`MountPoint`]) and its
//! volumes ([`hold`]) to what the runtime gets when it starts ([`ready`]).
//!
//! The record names sources by what they are; nothing of a container is mounted on the host while it does not run. What
//! a start has to mount for a moment (part of a volume, an image) is below `mounts` in the run folder, and gone once the
//! container has it.

mod hold;
mod point;
mod ready;
mod temporary;
mod wanted;

pub use hold::{give_back, keep_volumes, populate, release, restore, sources, sweep_snapshots, take};
pub use point::MountPoint;
#[cfg(test)]
pub use ready::ReadyMount;
pub use ready::{Ready, end, make_ready};
pub use temporary::clear;
pub use wanted::{Wanted, adapt, wanted};

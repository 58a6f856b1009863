//! Device models of the machine, written once for every transport.
//!
//! Owns: what a device does with its queues and its configuration space (`virtio/block`, `virtio/vsock`, …), the
//! contract between a model and its transport (`virtio/device`), and the transports: registers in the address space of
//! a guest of ours (`virtio/mmio`), and QEMU's way (`virtio/vhost_user`). Does not own: guest memory (the transport
//! brings it), host sockets' other ends, files' names and locks, or any thread of a virtual CPU.
//!
//! A guest is hostile until proven otherwise: every byte it wrote is bounded and checked before use, a broken queue
//! stops alone, and nothing a guest does may panic or allocate without limit.
//!
//! Unsafe code lives only in [`virtio::buffers`] and [`virtio::vhost_user`], at the edges where guest memory meets
//! the kernel.

#![warn(missing_docs)]
#![deny(unsafe_code)]

pub mod counter;
pub mod fuzz;
pub mod throttle;
pub mod virtio;

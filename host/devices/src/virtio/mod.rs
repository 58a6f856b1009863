//! Virtio device models and the transports that carry them (virtio 1.3).

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod console;
pub mod device;
pub mod fs;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod rng;
pub mod vhost_user;
pub mod vsock;

mod config;
#[cfg(test)]
mod driver;
mod life;
pub(crate) mod ring;
mod threaded;
pub(crate) mod worker;

pub use device::{
    DeviceError, DeviceKind, DeviceState, Interrupt, Memory, QueueResources, QueueState, VirtioDevice,
};
pub use life::Life;

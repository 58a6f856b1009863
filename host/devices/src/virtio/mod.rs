//! Virtio device models and the transports that carry them (virtio 1.3).

pub mod block;
pub mod buffers;
pub mod device;
pub mod mmio;
pub mod vhost_user;
pub mod vsock;

#[cfg(test)]
mod driver;
pub(crate) mod ring;
pub(crate) mod worker;

pub use device::{
    DeviceError, DeviceKind, DeviceState, Interrupt, Memory, QueueResources, QueueState, VirtioDevice,
};

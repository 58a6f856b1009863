//! What a saved machine keeps of a device in a window of registers.

use std::io;

use serde::{Deserialize, Serialize};

use crate::virtio::device::{DeviceError, DeviceKind, DeviceState};
use crate::virtio::ring::Addresses;

/// The registers of a device, where its queues were, and the model's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTransport {
    /// The virtio device id.
    pub device: u32,
    /// The device status, DEVICE_NEEDS_RESET included.
    pub status: u32,
    /// Interrupts raised and not yet acknowledged.
    pub interrupt_status: u32,
    /// The selected page of the offered features.
    pub device_features_page: u32,
    /// The selected page of the driver's features.
    pub driver_features_page: u32,
    /// The driver's features, in pages of 32.
    pub driver_features: [u32; 4],
    /// The selected queue.
    pub selected_queue: u32,
    /// The queues, by index.
    pub queues: Vec<SavedQueue>,
    /// How often configuration space had changed.
    pub config_generation: u32,
    /// The model's own.
    pub model: DeviceState,
}

/// One queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// How many entries the driver wants.
    pub size: u32,
    /// Where it lies.
    pub addresses: Addresses,
    /// Whether the driver has finished setting it up.
    pub ready: bool,
    /// The next entry of the available ring that the device takes.
    pub next_available: u16,
    /// The next entry of the used ring that the device writes.
    pub next_used: u16,
}

/// A device's state cannot be saved.
#[derive(Debug, thiserror::Error)]
#[error("the {kind} device cannot be saved")]
pub struct SaveError {
    /// The device.
    pub kind: DeviceKind,
    /// Why.
    #[source]
    pub source: DeviceError,
}

/// A device cannot go on from its saved state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No descriptor for a kick.
    #[error("cannot make the kicks of a device that is restored")]
    Kick(#[source] io::Error),
    /// Another kind of device was saved.
    #[error("the saved state is of a virtio device {saved}, not of the {kind} device")]
    OtherDevice {
        /// The device at hand.
        kind: DeviceKind,
        /// The id in the state.
        saved: u32,
    },
    /// Another number of queues was saved.
    #[error("the saved {kind} device had {saved} queues, this one has {count}")]
    OtherQueues {
        /// The device at hand.
        kind: DeviceKind,
        /// How many were saved.
        saved: usize,
        /// How many there are.
        count: usize,
    },
    /// A driver cannot have brought a device to this.
    #[error("the saved state of the {kind} device is none that it can be in: {what}")]
    Impossible {
        /// The device at hand.
        kind: DeviceKind,
        /// What is wrong, as a clause.
        what: &'static str,
    },
    /// The driver uses a feature that is not offered any more.
    #[error("the driver of the saved {kind} device uses features that are not offered: {features:#x}")]
    Features {
        /// The device at hand.
        kind: DeviceKind,
        /// Those that are missing.
        features: u128,
    },
    /// The model refused its part.
    #[error("cannot restore the model of the {kind} device")]
    Model {
        /// The device at hand.
        kind: DeviceKind,
        /// Why.
        #[source]
        source: DeviceError,
    },
}

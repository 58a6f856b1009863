//! The contract between a device model and whatever carries it to the guest.
//!
//! A transport (virtio-mmio in the VM process, vhost-user towards QEMU) owns feature negotiation, queue addresses and
//! interrupts' wiring. A model owns features, configuration space and the work on its queues. They meet in
//! [`VirtioDevice`]: the transport starts and stops one queue at a time, and both verbs may be repeated.
//!
//! ```text
//!             ack_features          start_queue            stop_queue
//!   Reset ───────────────▶ Negotiated ─────────▶ Running ─────────────▶ Negotiated (queue state handed back)
//!     ▲                                             │
//!     └───────────────── reset ◀────────────────────┘   (from every state)
//! ```
//!
//! A model answers these calls from the transport's thread while its own thread works on the queues; when
//! `stop_queue` returns, the model no longer touches that queue or its memory.

use std::fmt;
use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub use virtio_queue::QueueState;

use crate::virtio::life::Life;

/// Guest memory as models see it: a snapshot is taken per unit of work, so the transport may swap the map at any time.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// What a device is (virtio 1.3 §5), by its device id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DeviceKind {
    /// A network card (§5.1).
    Net = 1,
    /// A disk (§5.2).
    Block = 2,
    /// A console (§5.3).
    Console = 3,
    /// A source of randomness (§5.4).
    Rng = 4,
    /// A memory balloon (§5.5).
    Balloon = 5,
    /// A socket device (§5.10).
    Vsock = 19,
    /// Memory that comes and goes (§5.15).
    Mem = 24,
    /// A file system (§5.11).
    FileSystem = 26,
}

impl DeviceKind {
    /// The virtio device id, as a transport shows it to the driver.
    pub fn id(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Mem => "mem",
            Self::FileSystem => "fs",
        })
    }
}

/// How a model tells the driver that something has happened: one per queue, handed over with it.
///
/// The transport decides what it becomes: an eventfd for QEMU, an interrupt status bit and an irqfd on virtio-mmio.
pub trait Interrupt: Send + Sync {
    /// Raises the interrupt of this queue. Does not block. Called only when the driver wants to hear of it.
    fn signal_used(&self) -> io::Result<()>;

    /// Tells the driver that configuration space has changed; whose queue is used for it does not matter. Does not
    /// block. Without effect on transports that cannot tell.
    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }

    /// Tells the driver that this queue is broken and that only a reset helps (virtio 1.3 §2.1.2). Does not block.
    /// Without effect on transports that cannot tell.
    fn needs_reset(&self) {}
}

/// What a saved machine keeps of a model, beside the features and the queues: those are the transport's.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeviceState {
    /// Configuration space as the driver could read it.
    pub config: Vec<u8>,
    /// What only a model of this kind reads; most keep nothing.
    pub model: Vec<u8>,
}

/// Everything a model needs to work on one queue.
pub struct QueueResources {
    /// Guest memory, in which the queue and its buffers lie.
    pub memory: Memory,
    /// The queue: sizes and addresses set and validated by the transport, marked ready, positions restored.
    pub queue: Queue,
    /// Becomes readable when the driver has made buffers available.
    pub kick: EventFd,
    /// Called by the model when it has used buffers.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a model refused a queue.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The transport named a queue that this device does not have.
    #[error("the {kind} device has {count} queues, not a queue {index}")]
    NoSuchQueue {
        /// The device asked.
        kind: DeviceKind,
        /// The index asked for.
        index: usize,
        /// How many queues there are.
        count: usize,
    },
    /// The rings do not lie in guest memory, or the queue was not marked ready.
    #[error("queue {index} of the {kind} device does not lie in guest memory")]
    InvalidQueue {
        /// The device asked.
        kind: DeviceKind,
        /// The index of the queue.
        index: usize,
    },
    /// The device's thread could not watch the queue's kick.
    #[error("cannot watch the kick of queue {index} of the {kind} device")]
    Watch {
        /// The device asked.
        kind: DeviceKind,
        /// The index of the queue.
        index: usize,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The model has state that cannot be saved.
    #[error("the state of the {kind} device cannot be saved: {reason}")]
    Unsaved {
        /// The device asked.
        kind: DeviceKind,
        /// Why not, as a clause.
        reason: String,
    },
    /// Saved state that this device cannot have written, or that does not fit what it is given now.
    #[error("the {kind} device cannot go on from its saved state: {reason}")]
    InvalidState {
        /// The device asked.
        kind: DeviceKind,
        /// Why not, as a clause.
        reason: String,
    },
    /// The device's thread has ended.
    #[error("the thread of the {kind} device has ended")]
    Gone {
        /// The device asked.
        kind: DeviceKind,
    },
}

/// A device model, without any knowledge of the transport that carries it.
///
/// All calls come from one thread at a time. None blocks for longer than the work on one descriptor chain takes.
pub trait VirtioDevice: Send {
    /// What the device is.
    fn kind(&self) -> DeviceKind;

    /// The features offered, `VIRTIO_F_VERSION_1` and ring features included.
    fn features(&self) -> u64;

    /// The largest size of each queue, one entry per queue; powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Counts the changes that the device itself has made to configuration space, so that a driver notices when it has
    /// read half of one (virtio 1.3 §2.5.1).
    fn config_generation(&self) -> u32 {
        0
    }

    /// Writes configuration space. What is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Tells which of the offered features the driver took. Comes before the first [`Self::start_queue`].
    fn ack_features(&mut self, features: u64);

    /// Starts work on a queue; buffers that are already available are served at once.
    ///
    /// A running queue is stopped first, so the call may be repeated with new resources.
    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), DeviceError>;

    /// Stops work on a queue and hands back its state, from which it may be started again.
    ///
    /// `None` when the queue was not running or does not exist, so the call may be repeated.
    fn stop_queue(&mut self, index: usize) -> Option<QueueState>;

    /// Stops every queue and forgets everything the driver did: negotiated features, connections.
    fn reset(&mut self);

    /// The device's thread, for who must know when it fails. A device without one never does.
    fn life(&self) -> Life {
        Life::default()
    }

    /// What a machine that is saved keeps of the device, beside features and queues. Called while no queue runs.
    fn save(&self) -> Result<DeviceState, DeviceError> {
        Ok(DeviceState::default())
    }

    /// Goes on from what [`Self::save`] returned; the state may be anybody's. Comes once, before [`Self::ack_features`].
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        match *state == DeviceState::default() {
            true => Ok(()),
            false => {
                let reason = "it keeps nothing".to_owned();
                Err(DeviceError::InvalidState { kind: self.kind(), reason })
            }
        }
    }
}

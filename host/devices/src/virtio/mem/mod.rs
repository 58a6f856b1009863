//! Memory that a running guest gets and gives back (virtio 1.3 §5.15, virtio-mem).
//!
//! The device owns a range of guest addresses in blocks of [`BLOCK_BYTES`]. The host says how much of it the guest is to
//! have ([`Handle::request`]); the driver plugs and unplugs blocks, with requests on its one queue, until it has that. The
//! contents of an unplugged block go to [`Backend::discard`] at once.
//!
//! Configuration space, little-endian: the size of a block, a node (not offered), the first address, the bytes of the
//! range, of its usable beginning, of what is plugged, and of what is requested.

mod blocks;
mod queue;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::Arc;

use vm_memory::GuestAddress;

pub(crate) use self::queue::Queues;
use crate::counter::Counter;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceKind;
use crate::virtio::threaded::{Front, Threaded};
use crate::virtio::worker::Mailbox;

/// Bytes of a block: what Linux hands out at once on most processors, a transparent huge page.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// Linux sends one request at a time.
const QUEUE_SIZE: u16 = 64;

// Feature bits (§5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u32 = 1;

// Offsets in configuration space (§5.15.4), each of eight bytes.
const BLOCK: usize = 0;
const ADDRESS: usize = 16;
const REGION: usize = 24;
const USABLE: usize = 32;
const PLUGGED: usize = 40;
const REQUESTED: usize = 48;
const CONFIG_BYTES: usize = 56;

/// What the device needs from outside.
pub struct Backend {
    /// Where its range begins, at a whole block.
    pub start: GuestAddress,
    /// How long its range is. A rest that is no whole block is not used.
    pub bytes: u64,
    /// Gives the host back what it holds of a range, whose contents are of no value any more. The range is of whole blocks
    /// and lies in what the guest was ever given to use. Called on the device's thread.
    pub discard: Box<dyn FnMut(GuestAddress, u64) + Send>,
}

impl fmt::Debug for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Backend")
            .field("start", &self.start)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Blocks plugged.
    pub plugged: Counter,
    /// Blocks unplugged.
    pub unplugged: Counter,
    /// Requests to plug more than was requested, which happens when the host changes its mind.
    pub refused: Counter,
    /// Requests for blocks that are outside, or not as the driver believes, or of an unknown kind.
    pub errors: Counter,
    /// Chains that were no requests at all.
    pub malformed: Counter,
}

/// Who is told how many bytes the guest has of the device's memory, once it has what it was to have or comes no nearer.
type Told = Box<dyn FnOnce(u64) + Send>;

/// What the thread is asked for: the guest is to have so much.
pub struct Message {
    bytes: u64,
    usable: u64,
    told: Told,
}

/// Asks the guest to have more or less memory, from any thread.
#[derive(Clone)]
pub struct Handle {
    mailbox: Mailbox<Message>,
}

impl Handle {
    /// Wants the guest to have this many bytes, rounded up to whole blocks, of the first `usable` of the range. The driver
    /// follows as it can.
    ///
    /// `told` is called with what it has: when that is what was wanted, when another wish comes, when no driver is there, or
    /// when nothing has changed for ten seconds; the driver may get further even then. It is called on the device's
    /// thread, and dropped when that ends or has ended.
    pub fn request(&self, bytes: u64, usable: u64, told: impl FnOnce(u64) + Send + 'static) {
        // Whoever waits for an answer of a thread that has ended sees that by what was dropped.
        let _ended = self.mailbox.send(Message { bytes, usable, told: Box::new(told) });
    }
}

/// The device.
pub struct Mem {
    counters: Arc<Counters>,
    front: Front<Message>,
}

impl Mem {
    /// Makes a device of which nothing is plugged or usable, and its thread.
    pub fn new(backend: Backend) -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        let config = config_space(&backend);
        let model = Queues::new(backend, config.clone(), Arc::clone(&counters));
        let features = 1 << F_UNPLUGGED_INACCESSIBLE;
        let front = Front::spawn(DeviceKind::Mem, features, vec![QUEUE_SIZE], config, |_registry| model)?;
        Ok(Self { counters, front })
    }

    /// A handle to ask with.
    pub fn handle(&self) -> Handle {
        Handle { mailbox: self.front.mailbox() }
    }

    /// What the device has done.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

fn config_space(backend: &Backend) -> ConfigSpace {
    let mut bytes = vec![0; CONFIG_BYTES];
    let region = backend.bytes / BLOCK_BYTES * BLOCK_BYTES;
    for (offset, value) in [(BLOCK, BLOCK_BYTES), (ADDRESS, backend.start.0), (REGION, region)] {
        bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
    ConfigSpace::with_writable(bytes, Vec::new(), Some(USABLE..CONFIG_BYTES))
}

/// The model without a thread, for fuzz targets.
pub(crate) fn model(backend: Backend) -> Queues {
    let config = config_space(&backend);
    Queues::new(backend, config, Arc::default())
}

/// A wish of nobody in particular, for fuzz targets.
pub(crate) fn wish(bytes: u64, usable: u64) -> Message {
    Message { bytes, usable, told: Box::new(|_| {}) }
}

impl Threaded for Mem {
    type Message = Message;

    fn front(&self) -> &Front<Message> {
        &self.front
    }
}

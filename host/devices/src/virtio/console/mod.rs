//! The console (virtio 1.3 §5.3): one port between the guest and a stream socket of the host.
//!
//! What the guest writes goes to the socket; what its other end does not take at once waits in a bounded buffer, and
//! what does not fit there is dropped and counted: a driver waits for its output in a loop that nothing interrupts, so a
//! reader that sleeps must not hold it. What comes from the socket waits there until the driver offers buffers.
//!
//! Configuration space: columns and rows, u16 each; the other fields belong to features that are not offered.

mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use mio::Registry;

pub(crate) use self::queue::Queues;
use crate::counter::Counter;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceKind;
use crate::virtio::threaded::{Front, Threaded};
use crate::virtio::worker::Mailbox;

/// To the guest, and from it.
const QUEUE_SIZES: [u16; 2] = [64, 64];
/// Feature bit: the size in configuration space means something (§5.3.3).
const F_SIZE: u32 = 0;
const CONFIG_BYTES: usize = 12;
/// Columns and rows, at the beginning of it.
const SIZE_BYTES: usize = 4;

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes the guest has written.
    pub output_bytes: Counter,
    /// Those of them that nobody took in time.
    pub dropped_bytes: Counter,
    /// Bytes given to the guest.
    pub input_bytes: Counter,
    /// Chains of the wrong direction.
    pub malformed: Counter,
}

/// What the thread is asked for.
pub enum Message {
    /// The size has changed.
    Resized,
}

/// Changes the console's size, from any thread.
#[derive(Clone)]
pub struct Handle {
    config: ConfigSpace,
    mailbox: Mailbox<Message>,
}

impl Handle {
    /// Says how large the terminal is; the driver is told.
    pub fn resize(&self, columns: u16, rows: u16) {
        let [columns, rows] = [columns, rows].map(u16::to_le_bytes);
        self.config.set(0, &[columns, rows].concat());
        // A device that is gone has no driver to tell.
        let _gone = self.mailbox.send(Message::Resized);
    }
}

/// The console.
pub struct Console {
    counters: Arc<Counters>,
    config: ConfigSpace,
    front: Front<Message>,
}

impl Console {
    /// Makes a console of a connected socket, and its thread. A socket that closes leaves a console that nobody reads.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        // A restored console is as large as it was until it is resized.
        let config = ConfigSpace::with_writable(vec![0; CONFIG_BYTES], Vec::new(), Some(0..SIZE_BYTES));
        let shared = Arc::clone(&counters);
        let front = Front::try_spawn(
            DeviceKind::Console,
            1 << F_SIZE,
            QUEUE_SIZES.to_vec(),
            config.clone(),
            |registry| Queues::new(stream, &registry, shared),
        )?;
        Ok(Self { counters, config, front })
    }

    /// A handle to change its size with.
    pub fn handle(&self) -> Handle {
        Handle { config: self.config.clone(), mailbox: self.front.mailbox() }
    }

    /// What the device has done.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

/// The model without a thread, for fuzz targets.
pub(crate) fn model(stream: UnixStream, registry: &Registry) -> io::Result<Queues> {
    Queues::new(stream, registry, Arc::default())
}

impl Threaded for Console {
    type Message = Message;

    fn front(&self) -> &Front<Message> {
        &self.front
    }
}

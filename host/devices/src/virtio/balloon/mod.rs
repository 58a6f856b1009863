//! The memory balloon (virtio 1.3 §5.5): the guest's way of giving memory back.
//!
//! Three ways, each its own queue: pages the driver puts into the balloon because the host asked
//! ([`Handle::set_target`]), pages it takes out again, and pages that are free in the guest and of no value until it
//! touches them (free-page reporting, which needs nobody to ask). Every page of the first and third kind goes to
//! [`Backend::discard`] at once. On a fourth the driver answers questions about how its memory is used.
//!
//! Configuration space, little-endian words: the target in pages of 4 KiB, what the driver has given, nothing, and what
//! the guest's kernel fills free pages with. A guest that fills them with anything but zeroes expects to find that
//! again, so its reports are ignored.
//!
//! A queue exists when its feature was taken, in this order: in, out, statistics (2, or none), reporting (3, or 2). That
//! is how Linux and QEMU count.

mod queue;
mod statistics;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestAddress;

pub use self::statistics::Statistics;

pub(crate) use self::queue::Queues;
use crate::counter::Counter;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceKind;
use crate::virtio::threaded::{Front, Threaded};
use crate::virtio::worker::Mailbox;

/// Bytes of a page, in the balloon's count (§5.5.6).
pub const PAGE_BYTES: u64 = 4096;

const QUEUE_SIZES: [u16; 4] = [128, 128, 16, 128];

// Feature bits (§5.5.3).
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_POISON: u32 = 4;
const F_PAGE_REPORTING: u32 = 5;

// Offsets in configuration space (§5.5.4).
const TARGET: usize = 0;
const ACTUAL: usize = 4;
const POISON: usize = 12;
const CONFIG_BYTES: usize = 16;

/// What the device needs from outside.
pub struct Backend {
    /// Gives the host back what it can of a range of guest memory, whose contents are of no value any more; it reads as
    /// zeroes, or as what it was, when the guest touches it next.
    ///
    /// The range lies in guest memory and is of any alignment: the host can only give back its own whole pages in it.
    /// Called on the device's thread: the next range waits for it.
    pub discard: Box<dyn FnMut(GuestAddress, u64) + Send>,
}

impl fmt::Debug for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Backend").finish_non_exhaustive()
    }
}

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Pages of 4 KiB put into the balloon.
    pub inflated: Counter,
    /// Pages of 4 KiB taken out.
    pub deflated: Counter,
    /// Bytes reported as free.
    pub reported_bytes: Counter,
    /// Bytes reported as free that the guest wants to find as they were.
    pub ignored_bytes: Counter,
    /// Pages and ranges outside of guest memory, and chains of a wrong shape.
    pub malformed: Counter,
}

/// What the thread is asked for.
pub enum Message {
    /// The target has changed.
    Retarget,
    /// Somebody wants to know how memory is used.
    Ask,
}

#[derive(Debug, Default)]
struct Answers(Mutex<(u64, Statistics)>);

impl Answers {
    fn put(&self, statistics: Statistics) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *answers = (answers.0 + 1, statistics);
    }
}

/// Asks the guest for memory and how it is used, from any thread, for as long as the device lives.
#[derive(Clone)]
pub struct Handle {
    config: ConfigSpace,
    answers: Arc<Answers>,
    mailbox: Mailbox<Message>,
}

impl Handle {
    /// Wants this many bytes in the balloon, in whole pages of 4 KiB; the driver follows as it can. Returns at once.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.config.set(TARGET, &pages.to_le_bytes());
        // A device that is gone has no driver to tell.
        let _gone = self.mailbox.send(Message::Retarget);
    }

    /// How many bytes are in the balloon, as the driver says.
    pub fn actual(&self) -> u64 {
        u64::from(self.config.word(ACTUAL)) * PAGE_BYTES
    }

    /// Asks the driver how memory is used. Returns at once; the answer is in [`Self::statistics`] when its number grows.
    pub fn ask(&self) {
        let _gone = self.mailbox.send(Message::Ask);
    }

    /// The last answer of the driver, and how many there have been. The first comes by itself.
    pub fn statistics(&self) -> (u64, Statistics) {
        *self.answers.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The balloon.
pub struct Balloon {
    counters: Arc<Counters>,
    config: ConfigSpace,
    answers: Arc<Answers>,
    front: Front<Message>,
}

impl Balloon {
    /// Makes an empty balloon, and its thread.
    pub fn new(backend: Backend) -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        let config = config_space();
        let answers = Arc::new(Answers::default());
        let features = 1 << F_STATS_VQ | 1 << F_DEFLATE_ON_OOM | 1 << F_PAGE_POISON | 1 << F_PAGE_REPORTING;
        let model = Queues::new(backend, config.clone(), Arc::clone(&answers), Arc::clone(&counters));
        let front =
            Front::spawn(DeviceKind::Balloon, features, QUEUE_SIZES.to_vec(), config.clone(), |_registry| {
                model
            })?;
        Ok(Self { counters, config, answers, front })
    }

    /// A handle to ask with.
    pub fn handle(&self) -> Handle {
        Handle {
            config: self.config.clone(),
            answers: Arc::clone(&self.answers),
            mailbox: self.front.mailbox(),
        }
    }

    /// What the device has done.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

fn config_space() -> ConfigSpace {
    let writable = vec![ACTUAL..ACTUAL + 4, POISON..POISON + 4];
    ConfigSpace::with_writable(vec![0; CONFIG_BYTES], writable, Some(TARGET..TARGET + 4))
}

/// The model without a thread, for fuzz targets.
pub(crate) fn model(backend: Backend) -> Queues {
    Queues::new(backend, config_space(), Arc::default(), Arc::default())
}

impl Threaded for Balloon {
    type Message = Message;

    fn front(&self) -> &Front<Message> {
        &self.front
    }
}

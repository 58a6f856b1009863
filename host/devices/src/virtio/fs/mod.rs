//! The file system device (virtio 1.3 §5.11): carries FUSE requests between the guest's kernel and a server.
//!
//! Owns: its queues, and who works on a request. Does not own: what a request says; that is the back end's, which takes
//! the bytes the driver wrote and fills the room it left.
//!
//! Most requests are served by the device's own thread (`fs`), in turn. Those that the back end calls slow (it waits for
//! a disk) go to a few threads beside it, so that others pass them; their answers may come in any order. A queue that
//! is stopped first waits for what is under way. There are two queues: one for requests that must not wait behind
//! others, one for all the rest. Files: `queue` the rings, `pool` the threads.

mod pool;
mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use self::queue::Queues;
use crate::counter::Counter;
use crate::virtio::buffers::Buffers;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceKind;
use crate::virtio::threaded::{Front, Threaded};

/// The high-priority queue and one for requests.
const QUEUES: usize = 2;
/// Size of each queue: a request of 1 MiB has a descriptor for each page of 4 KiB.
const QUEUE_SIZE: u16 = 1024;
/// Threads for slow requests.
const SLOW_THREADS: usize = 4;
/// Length of the name in configuration space, padded with zeroes.
const TAG_BYTES: usize = 36;

/// What serves the requests.
pub trait Backend: Send + Sync + 'static {
    /// Whether the request that begins like this may wait for long.
    fn is_slow(&self, readable: &Buffers<'_>) -> bool;

    /// Serves one request: reads it, writes the answer, and returns how many bytes were written. Called from several
    /// threads at a time.
    fn serve(&self, readable: Buffers<'_>, writable: Buffers<'_>) -> u32;

    /// The driver starts over: forget what it knew.
    fn reset(&self);

    /// What the driver knows and has open, for a saved machine; `Err` is why it cannot be said, as a clause. No request is
    /// being served.
    fn save(&self) -> Result<Vec<u8>, String>;

    /// Goes on from what [`Self::save`] returned, which may be anybody's; `Err` is why it cannot, as a clause. Comes before
    /// the first request.
    fn restore(&self, state: &[u8]) -> Result<(), String>;
}

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests served.
    pub requests: Counter,
    /// Those among them that were called slow.
    pub slow: Counter,
    /// Bytes written into answers.
    pub answered_bytes: Counter,
}

/// The device.
pub struct Fs {
    counters: Arc<Counters>,
    front: Front<()>,
}

impl Fs {
    /// Makes a device that the guest finds by `tag` (at most 36 bytes; more are cut off), and its threads.
    pub fn new(tag: &str, backend: Arc<dyn Backend>) -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        let config = ConfigSpace::new(config_space(tag));
        let shared = Arc::clone(&counters);
        let sizes = vec![QUEUE_SIZE; QUEUES];
        let front = Front::try_spawn(DeviceKind::FileSystem, 0, sizes, config, move |registry| {
            Queues::new(backend, &registry, shared)
        })?;
        Ok(Self { counters, front })
    }

    /// What the device has done.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

/// The configuration space (virtio 1.3 §5.11.4): the tag and the number of request queues.
fn config_space(tag: &str) -> Vec<u8> {
    let mut config = tag.as_bytes()[..tag.len().min(TAG_BYTES)].to_vec();
    config.resize(TAG_BYTES, 0);
    config.extend((QUEUES as u32 - 1).to_le_bytes());
    config
}

impl Threaded for Fs {
    type Message = ();

    fn front(&self) -> &Front<()> {
        &self.front
    }
}

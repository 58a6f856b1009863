//! The source of randomness (virtio 1.3 §5.4): the host's, byte for byte.
//!
//! One queue of buffers to fill, served by the device's own thread (`rng`). No configuration space, no features, no
//! state: a machine that goes on from a saved state gets other bytes than the one it was saved from.

mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

pub(crate) use self::queue::Queues;
use crate::counter::Counter;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceKind;
use crate::virtio::threaded::{Front, Threaded};

/// Linux keeps one buffer in it.
const QUEUE_SIZE: u16 = 64;

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes given.
    pub bytes: Counter,
    /// Chains without room for a single byte.
    pub malformed: Counter,
}

/// The source of randomness.
pub struct Rng {
    counters: Arc<Counters>,
    front: Front<()>,
}

impl Rng {
    /// Makes the device and its thread.
    pub fn new() -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        let shared = Arc::clone(&counters);
        let front =
            Front::spawn(DeviceKind::Rng, 0, vec![QUEUE_SIZE], ConfigSpace::default(), move |_registry| {
                Queues::new(shared)
            })?;
        Ok(Self { counters, front })
    }

    /// What the device has done.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

/// The model without a thread, for fuzz targets.
pub(crate) fn model() -> Queues {
    Queues::new(Arc::default())
}

impl Threaded for Rng {
    type Message = ();

    fn front(&self) -> &Front<()> {
        &self.front
    }
}

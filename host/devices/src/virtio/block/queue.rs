//! The work on the disk's queues: requests in turn from every queue that was kicked.

use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use tracing::{debug, warn};

use super::file::Backend;
use super::request::{RequestError, serve};
use super::{Counters, Message};
use crate::throttle::Throttle;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceState;
use crate::virtio::ring::{Ring, Round};
use crate::virtio::worker::{Model, Rings, keeps_nothing};

/// Where the disk's capacity is in configuration space (virtio 1.3 §5.2.4).
const CAPACITY: usize = 0;
/// Requests taken from one queue before the next has its turn.
const BUDGET: usize = 32;

/// The model, on the device's thread.
pub(crate) struct Queues {
    backend: Backend,
    config: ConfigSpace,
    counters: Arc<Counters>,
    kicked: Vec<bool>,
    /// The driver does not know yet that the disk has grown.
    untold: bool,
    throttle: Throttle,
}

impl Queues {
    pub fn new(backend: Backend, config: ConfigSpace, queues: usize, counters: Arc<Counters>) -> Self {
        let (kicked, throttle) = (vec![false; queues], Throttle::default());
        Self { backend, config, counters, kicked, untold: false, throttle }
    }

    /// Serves requests of one queue; `true` when there may be more.
    fn serve(&mut self, ring: &mut Ring) -> bool {
        let round = ring.serve(BUDGET, |chain| {
            let served = serve(&self.backend, &self.counters, chain.readable, chain.writable);
            let Some((length, result)) = served else {
                self.counters.malformed.add(1);
                return Some(0);
            };
            if let Err(error) = result {
                self.failed(&error);
            }
            Some(length)
        });
        round == Round::HasMore
    }

    fn failed(&mut self, error: &RequestError) {
        match error {
            RequestError::Unsupported(_) | RequestError::Flags(_) => {
                self.counters.unsupported.add(1);
                debug!(%error, "a request was refused");
                return;
            }
            RequestError::Malformed(_) => self.counters.malformed.add(1),
            _ => {}
        }
        self.counters.errors.add(1);
        if error.is_no_space() {
            self.counters.no_space.add(1);
        }
        if let Some(suppressed) = self.throttle.admit(Instant::now()) {
            let source = std::error::Error::source(error).map(tracing::field::display);
            match error.is_no_space() {
                true => {
                    warn!(suppressed, %error, source, "the host's disk is full; the guest sees I/O errors")
                }
                false => warn!(suppressed, %error, source, "a disk request failed"),
            }
        }
    }
}

impl Model for Queues {
    type Message = Message;

    fn ack_features(&mut self, _features: u64) {
        // What the driver did not take it does not ask for; asking anyway does no harm.
    }

    fn kicked(&mut self, queue: usize) {
        if let Some(kicked) = self.kicked.get_mut(queue) {
            *kicked = true;
        }
    }

    fn event(&mut self, _event: &Event) {
        // Nothing is registered: files are always ready.
    }

    fn message(&mut self, message: Message) {
        let Message::Grow { size_bytes, told } = message;
        let grown = self.backend.grow(size_bytes);
        if grown.is_ok() {
            self.config.set(CAPACITY, &self.backend.sectors().to_le_bytes());
            self.untold = true;
        }
        told(grown);
    }

    fn run(&mut self, rings: &mut Rings) -> bool {
        if self.untold
            && let Some(ring) = rings.iter_mut().flatten().next()
        {
            self.untold = false;
            ring.signal_config();
        }
        let mut more = false;
        for (index, ring) in rings.iter_mut().enumerate() {
            if !std::mem::take(&mut self.kicked[index]) {
                continue;
            }
            if let Some(ring) = ring {
                let left = self.serve(ring);
                ring.flush();
                self.kicked[index] = left;
                more |= left;
            }
        }
        more
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        keeps_nothing(state)?;
        // The file may have grown meanwhile, and the driver is told. It uses all that it once saw.
        let known = state.config.first_chunk().map_or(0, |capacity| u64::from_le_bytes(*capacity));
        let sectors = self.backend.sectors();
        match known <= sectors {
            true => Ok(()),
            false => Err(format!("the driver uses {known} sectors, and the disk has {sectors}")),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        self.kicked.fill(false);
    }
}

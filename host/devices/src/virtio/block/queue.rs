//! The work on the disk's queues: requests in turn from every queue that was kicked.

use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use tracing::{debug, warn};

use super::Counters;
use super::file::Backend;
use super::request::{RequestError, serve};
use crate::throttle::Throttle;
use crate::virtio::ring::{Ring, Round};
use crate::virtio::worker::{Model, Rings};

/// Requests taken from one queue before the next has its turn.
const BUDGET: usize = 32;

/// The model, on the device's thread.
pub(crate) struct Queues {
    backend: Backend,
    counters: Arc<Counters>,
    kicked: Vec<bool>,
    throttle: Throttle,
}

impl Queues {
    pub fn new(backend: Backend, queues: usize, counters: Arc<Counters>) -> Self {
        Self { backend, counters, kicked: vec![false; queues], throttle: Throttle::default() }
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
    type Message = ();

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

    fn message(&mut self, (): ()) {}

    fn run(&mut self, rings: &mut Rings) -> bool {
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

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        self.kicked.fill(false);
    }
}

//! The work on the queue: buffers filled one after the other.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use rustix::rand::{GetRandomFlags, getrandom};
use tracing::warn;

use super::Counters;
use crate::throttle::Throttle;
use crate::virtio::buffers::Buffers;
use crate::virtio::ring::Round;
use crate::virtio::worker::{Model, Rings};

/// The most given for one buffer. A driver that wants more asks again.
const BYTES_MAX: usize = 4096;
/// Buffers filled before others have a turn.
const BUDGET: usize = 16;

/// The model, on the device's thread.
pub(crate) struct Queues {
    counters: Arc<Counters>,
    kicked: bool,
    throttle: Throttle,
}

impl Queues {
    pub(super) fn new(counters: Arc<Counters>) -> Self {
        Self { counters, kicked: false, throttle: Throttle::default() }
    }

    /// Fills a buffer; says with how many bytes.
    fn give(&mut self, mut buffer: Buffers<'_>) -> Option<u32> {
        let mut bytes = [0; BYTES_MAX];
        let wanted = buffer.len().min(BYTES_MAX);
        if let Err(error) = fill(&mut bytes[..wanted]) {
            // A used buffer must hold at least a byte (§5.4.6.2), so this one waits for the next kick.
            if let Some(suppressed) = self.throttle.admit(Instant::now()) {
                warn!(suppressed, %error, "the host has no randomness for the guest");
            }
            return None;
        }
        let given = buffer.copy_in(&bytes[..wanted]);
        match given {
            0 => self.counters.malformed.add(1),
            given => self.counters.bytes.add(given as u64),
        }
        Some(given as u32)
    }
}

fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => bytes = &mut bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Model for Queues {
    type Message = ();

    fn ack_features(&mut self, _features: u64) {
        // There are none of its own.
    }

    fn kicked(&mut self, _queue: usize) {
        self.kicked = true;
    }

    fn event(&mut self, _event: &Event) {
        // Nothing is registered.
    }

    fn message(&mut self, (): ()) {}

    fn run(&mut self, rings: &mut Rings) -> bool {
        if let Some(ring) = &mut rings[0]
            && std::mem::take(&mut self.kicked)
        {
            let round = ring.serve(BUDGET, |chain| self.give(chain.writable));
            self.kicked = round == Round::HasMore;
            if round == Round::Stopped {
                // What is there already comes with the next, too.
                let _more = ring.enable_kicks();
            }
            ring.flush();
            return self.kicked;
        }
        false
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        self.kicked = false;
    }
}

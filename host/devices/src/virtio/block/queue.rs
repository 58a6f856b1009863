//! The work on the disk's queues: requests in turn from every queue that was kicked, and those that wait for space on the host's
//! disk.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::event::Event;
use tracing::{debug, info, warn};

use super::file::Backend;
use super::request::{RequestError, serve};
use super::{Counters, Message, Watcher};
use crate::throttle::Throttle;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceState;
use crate::virtio::ring::{OwnedChain, Ring, Round};
use crate::virtio::worker::{Model, Rings, keeps_nothing};

/// Where the disk's capacity is in configuration space (virtio 1.3 §5.2.4).
const CAPACITY: usize = 0;
/// Requests taken from one queue before the next has its turn.
const BUDGET: usize = 32;
/// Between two looks whether the host's disk has space again.
const SPACE_LOOK: Duration = Duration::from_secs(1);

/// The model, on the device's thread.
pub(crate) struct Queues {
    backend: Backend,
    config: ConfigSpace,
    counters: Arc<Counters>,
    kicked: Vec<bool>,
    /// The driver does not know yet that the disk has grown.
    untold: bool,
    throttle: Throttle,
    /// Requests that wait for space on the host's disk, each with its queue, in the order of their coming.
    waiting: VecDeque<(usize, OwnedChain)>,
    /// When they are tried again.
    look_at: Option<Instant>,
    watcher: Option<Watcher>,
}

impl Queues {
    pub fn new(backend: Backend, config: ConfigSpace, queues: usize, counters: Arc<Counters>) -> Self {
        let (kicked, throttle) = (vec![false; queues], Throttle::default());
        let (waiting, look_at, watcher) = (VecDeque::new(), None, None);
        Self { backend, config, counters, kicked, untold: false, throttle, waiting, look_at, watcher }
    }

    /// Serves requests of one queue; `true` when there may be more.
    fn serve(&mut self, index: usize, ring: &mut Ring) -> bool {
        // More than a queue holds come from a driver that gives the same ones again and again.
        let limit = usize::from(ring.size());
        if self.waiting.len() >= limit {
            return false;
        }
        let round = ring.serve_owned(BUDGET, |ring, chain| {
            if let Err(chain) = self.carry_out(ring, chain) {
                self.wait(index, chain);
            }
            match self.waiting.len() < limit {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        round == Round::HasMore
    }

    /// Carries one request out and hands it back to the driver; `Err` is one that the host's disk has no space for.
    fn carry_out(&mut self, ring: &mut Ring, chain: OwnedChain) -> Result<(), OwnedChain> {
        let served = match chain.buffers() {
            Ok((readable, writable)) => serve(&self.backend, &self.counters, readable, writable),
            Err(error) => {
                ring.malformed(&error);
                None
            }
        };
        let length = match served {
            Some((_, Err(error))) if error.wants_space() => return Err(chain),
            Some((length, result)) => {
                if let Err(error) = result {
                    self.failed(&error);
                }
                length
            }
            None => {
                self.counters.malformed.add(1);
                0
            }
        };
        let memory = ring.memory();
        ring.complete(&memory, chain.head(), length);
        Ok(())
    }

    fn wait(&mut self, index: usize, chain: OwnedChain) {
        self.counters.no_space.add(1);
        self.waiting.push_back((index, chain));
        if self.look_at.is_none() {
            self.look_at = Some(Instant::now() + SPACE_LOOK);
            warn!("the host's disk is full: what the guest writes waits for space");
            self.tell(true);
        }
    }

    /// Tries what waits again, up to the first that has to wait on.
    fn look_for_space(&mut self, rings: &mut Rings) {
        while let Some((index, chain)) = self.waiting.pop_front() {
            let Some(ring) = rings.get_mut(index).and_then(Option::as_mut) else { continue };
            let tried = self.carry_out(ring, chain);
            ring.flush();
            if let Err(chain) = tried {
                self.waiting.push_front((index, chain));
                self.look_at = Some(Instant::now() + SPACE_LOOK);
                return;
            }
        }
        self.nothing_waits();
        // A queue whose requests all waited was not looked at any more.
        self.kicked.fill(true);
    }

    fn nothing_waits(&mut self) {
        if self.look_at.take().is_some() {
            info!("what the guest writes waits for space no more");
            self.tell(false);
        }
    }

    fn tell(&self, waits: bool) {
        if let Some(watcher) = &self.watcher {
            watcher(waits);
        }
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
        if let Some(suppressed) = self.throttle.admit(Instant::now()) {
            let source = std::error::Error::source(error).map(tracing::field::display);
            warn!(suppressed, %error, source, "a disk request failed");
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
        match message {
            Message::Grow { size_bytes, told } => {
                let grown = self.backend.grow(size_bytes);
                if grown.is_ok() {
                    self.config.set(CAPACITY, &self.backend.sectors().to_le_bytes());
                    self.untold = true;
                }
                told(grown);
            }
            Message::Watch(watcher) => {
                self.watcher = Some(watcher);
                if self.look_at.is_some() {
                    self.tell(true);
                }
            }
            #[cfg(test)]
            Message::Replace(file) => self.backend.replace_file(file),
        }
    }

    fn run(&mut self, rings: &mut Rings) -> bool {
        if self.untold
            && let Some(ring) = rings.iter_mut().flatten().next()
        {
            self.untold = false;
            ring.signal_config();
        }
        if self.look_at.is_some_and(|at| at <= Instant::now()) {
            self.look_for_space(rings);
        }
        let mut more = false;
        for (index, ring) in rings.iter_mut().enumerate() {
            if !std::mem::take(&mut self.kicked[index]) {
                continue;
            }
            if let Some(ring) = ring {
                let left = self.serve(index, ring);
                ring.flush();
                self.kicked[index] = left;
                more |= left;
            }
        }
        more
    }

    /// Who stops a queue waits for it, and space may never come: what waits has failed.
    fn stopping(&mut self, index: usize, ring: &mut Ring) {
        let memory = ring.memory();
        self.waiting.retain(|(queue, chain)| {
            let mine = *queue == index;
            if mine {
                // Its status is the failed try's.
                ring.complete(&memory, chain.head(), 1);
                self.counters.errors.add(1);
            }
            !mine
        });
        if self.waiting.is_empty() {
            self.nothing_waits();
        }
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
        self.look_at
    }

    fn reset(&mut self) {
        self.kicked.fill(false);
    }
}

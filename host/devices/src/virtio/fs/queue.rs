//! The work on the device's queues.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use vmm_sys_util::eventfd::EventFd;

use super::pool::{self, Done, Job, Pool};
use super::{Backend, Counters, QUEUES, SLOW_THREADS};
use crate::virtio::device::DeviceState;
use crate::virtio::ring::{OwnedChain, Ring, Round};
use crate::virtio::worker::{Model, Rings};

/// Requests taken from one queue before the next has its turn.
const BUDGET: usize = 32;
/// Something was done by a thread of the pool.
const DONE: Token = Token(0);

/// The model, on the device's thread.
pub(super) struct Queues {
    backend: Arc<dyn Backend>,
    pool: Pool,
    wake: EventFd,
    counters: Arc<Counters>,
    kicked: [bool; QUEUES],
    /// Requests that the pool has, by queue.
    away: [usize; QUEUES],
    /// Served requests of one queue that came while another was being stopped.
    late: Vec<Done>,
}

impl Queues {
    pub fn new(backend: Arc<dyn Backend>, registry: &Registry, counters: Arc<Counters>) -> io::Result<Self> {
        let pool = Pool::new(SLOW_THREADS, Arc::clone(&backend))?;
        let wake = pool.wake()?;
        registry.register(&mut SourceFd(&wake.as_raw_fd()), DONE, Interest::READABLE)?;
        let (kicked, away) = ([false; QUEUES], [0; QUEUES]);
        Ok(Self { backend, pool, wake, counters, kicked, away, late: Vec::new() })
    }

    /// Serves requests of one queue; `true` when there may be more.
    fn serve(&mut self, index: usize, ring: &mut Ring) -> bool {
        let round = ring.serve_owned(BUDGET, |ring, chain| {
            self.take(index, ring, chain);
            ControlFlow::Continue(())
        });
        round == Round::HasMore
    }

    /// Answers one request, or gives it to the pool, which answers later.
    fn take(&mut self, index: usize, ring: &mut Ring, chain: OwnedChain) {
        self.counters.requests.add(1);
        let head = chain.head();
        let length = match chain.buffers() {
            Ok((readable, _)) if self.backend.is_slow(&readable) => {
                self.counters.slow.add(1);
                drop(readable);
                match self.pool.submit(Job { queue: index, chain }) {
                    Ok(()) => {
                        self.away[index] += 1;
                        return;
                    }
                    Err(job) => pool::serve(&*self.backend, &job.chain),
                }
            }
            Ok((readable, writable)) => self.backend.serve(readable, writable),
            Err(error) => {
                ring.malformed(&error);
                0
            }
        };
        self.answer(ring, head, length);
    }

    /// Gives an answer to the driver, and tells it at once: whoever waits for this one goes on while the next is served, and what
    /// it asks then is found without a kick.
    fn answer(&self, ring: &mut Ring, head: u16, length: u32) {
        self.counters.answered_bytes.add(u64::from(length));
        let memory = ring.memory();
        ring.complete(&memory, head, length);
        ring.flush();
    }

    fn finish(&mut self, ring: Option<&mut Ring>, Done { queue, head, length }: Done) {
        self.away[queue] -= 1;
        match ring {
            Some(ring) => self.answer(ring, head, length),
            None => self.counters.answered_bytes.add(u64::from(length)),
        }
    }
}

impl Model for Queues {
    type Message = ();

    fn ack_features(&mut self, _features: u64) {
        // None of the device's own is offered.
    }

    fn kicked(&mut self, queue: usize) {
        if let Some(kicked) = self.kicked.get_mut(queue) {
            *kicked = true;
        }
    }

    fn event(&mut self, _event: &Event) {
        // Empty when another look at the pool came first.
        let _count = self.wake.read();
    }

    fn message(&mut self, (): ()) {}

    fn run(&mut self, rings: &mut Rings) -> bool {
        let mut finished = std::mem::take(&mut self.late);
        finished.extend(self.pool.finished());
        for done in finished {
            self.finish(rings[done.queue].as_mut(), done);
        }
        let mut more = false;
        for (index, ring) in rings.iter_mut().enumerate() {
            if !std::mem::take(&mut self.kicked[index]) {
                continue;
            }
            if let Some(ring) = ring {
                self.kicked[index] = self.serve(index, ring);
                more |= self.kicked[index];
            }
        }
        more
    }

    fn stopping(&mut self, queue: usize, ring: &mut Ring) {
        let (mine, others) = std::mem::take(&mut self.late).into_iter().partition(|done| done.queue == queue);
        self.late = others;
        for done in mine {
            self.finish(Some(ring), done);
        }
        while self.away[queue] > 0 {
            match self.pool.wait() {
                Some(done) if done.queue == queue => self.finish(Some(ring), done),
                Some(done) => {
                    self.late.push(done);
                    // The thread may be waiting for kicks next: it has to look at this one as well.
                    let _signalled = self.wake.write(1);
                }
                None => return,
            }
        }
    }

    fn save(&self) -> Result<Vec<u8>, String> {
        self.backend.save()
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        self.backend.restore(&state.model)
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        self.kicked.fill(false);
        self.backend.reset();
    }
}

//! The work on the balloon's queues.

use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::statistics::{ENTRY_BYTES, Statistics};
use super::{
    Answers, Backend, Counters, F_PAGE_POISON, F_PAGE_REPORTING, F_STATS_VQ, Message, PAGE_BYTES, POISON,
};
use crate::virtio::buffers::Buffers;
use crate::virtio::config::ConfigSpace;
use crate::virtio::ring::Ring;
use crate::virtio::worker::{Model, Rings};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Queues there can be.
const QUEUES: usize = 4;

/// Chains taken from one queue before the next has its turn.
const BUDGET: usize = 16;
/// The most page numbers looked at in one chain; Linux sends 256.
const PAGES_MAX: usize = 16 * 1024;
/// The most of an answer that is read.
const ANSWER_MAX: usize = 64 * ENTRY_BYTES;

/// What a queue is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The model, on the device's thread.
pub(crate) struct Queues {
    backend: Backend,
    config: ConfigSpace,
    answers: Arc<Answers>,
    counters: Arc<Counters>,
    features: u64,
    kicked: [bool; QUEUES],
    /// The target has changed and the driver has not been told.
    untold: bool,
    /// The driver's buffer for the next answer.
    answer: Option<u16>,
    /// The next answer is wanted.
    asked: bool,
}

impl Queues {
    pub(super) fn new(
        backend: Backend,
        config: ConfigSpace,
        answers: Arc<Answers>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            backend,
            config,
            answers,
            counters,
            features: 0,
            kicked: [false; QUEUES],
            untold: false,
            answer: None,
            asked: false,
        }
    }

    fn role(&self, queue: usize) -> Option<Role> {
        let has = |feature: u32, role| (self.features & 1 << feature != 0).then_some(role);
        match queue {
            INFLATE => Some(Role::Inflate),
            DEFLATE => Some(Role::Deflate),
            _ => [has(F_STATS_VQ, Role::Statistics), has(F_PAGE_REPORTING, Role::Reporting)]
                .into_iter()
                .flatten()
                .nth(queue - 2),
        }
    }

    /// Serves one queue; `true` when there may be more.
    fn serve(&mut self, role: Role, ring: &mut Ring) -> bool {
        let memory = ring.memory();
        ring.disable_kicks();
        for _ in 0..BUDGET {
            let served = match role {
                Role::Inflate | Role::Deflate => self.pages(role, ring, &memory),
                Role::Statistics => self.answered(ring, &memory),
                Role::Reporting => self.reported(ring, &memory),
            };
            if !served && !ring.enable_kicks() {
                return false;
            }
        }
        true
    }

    /// One chain of page numbers; `false` when there is none.
    fn pages(&mut self, role: Role, ring: &mut Ring, memory: &GuestMemoryMmap) -> bool {
        let Some(chain) = ring.take(memory) else { return false };
        let mut numbers = chain.readable;
        if numbers.is_empty() || !numbers.len().is_multiple_of(4) || numbers.len() > 4 * PAGES_MAX {
            self.counters.malformed.add(1);
        }
        numbers.truncate(4 * PAGES_MAX);
        match role {
            Role::Inflate => self.inflate(memory, numbers),
            _ => self.counters.deflated.add((numbers.len() / 4) as u64),
        }
        ring.complete(memory, chain.head, 0);
        true
    }

    /// Gives back pages, neighbours together.
    fn inflate(&mut self, memory: &GuestMemoryMmap, mut numbers: Buffers<'_>) {
        let mut run: Option<(u64, u64)> = None;
        let mut bytes = [0; 1024];
        loop {
            let count = numbers.copy_out(&mut bytes);
            let (words, _cut_off) = bytes[..count].as_chunks();
            for word in words {
                let page = u64::from(u32::from_le_bytes(*word));
                run = match run {
                    // Linux fills the array from its end, so runs go downwards as often as upwards.
                    Some((first, count)) if page == first + count => Some((first, count + 1)),
                    Some((first, count)) if page + 1 == first => Some((page, count + 1)),
                    other => {
                        self.give_back_pages(memory, other);
                        Some((page, 1))
                    }
                };
            }
            if count < bytes.len() {
                return self.give_back_pages(memory, run);
            }
        }
    }

    fn give_back_pages(&mut self, memory: &GuestMemoryMmap, run: Option<(u64, u64)>) {
        let Some((first, count)) = run else { return };
        if self.give_back(memory, GuestAddress(first * PAGE_BYTES), count * PAGE_BYTES) {
            self.counters.inflated.add(count);
        }
    }

    /// Gives back a range, if it lies in guest memory.
    fn give_back(&mut self, memory: &GuestMemoryMmap, start: GuestAddress, length: u64) -> bool {
        let inside = usize::try_from(length).is_ok_and(|length| memory.check_range(start, length));
        match inside && length > 0 {
            true => (self.backend.discard)(start, length),
            false => self.counters.malformed.add(1),
        }
        inside && length > 0
    }

    /// One chain of free ranges; `false` when there is none.
    fn reported(&mut self, ring: &mut Ring, memory: &GuestMemoryMmap) -> bool {
        let Some((head, ranges)) = ring.take_ranges(memory) else { return false };
        let poisoned = self.features & 1 << F_PAGE_POISON != 0 && self.config.word(POISON) != 0;
        if ranges.is_empty() {
            self.counters.malformed.add(1);
        }
        for (start, length) in ranges {
            let length = u64::from(length);
            if poisoned {
                self.counters.ignored_bytes.add(length);
            } else if self.give_back(memory, start, length) {
                self.counters.reported_bytes.add(length);
            }
        }
        ring.complete(memory, head, 0);
        true
    }

    /// One answer; `false` when there is none. The buffer stays here until the next is wanted (§5.5.6.3).
    fn answered(&mut self, ring: &mut Ring, memory: &GuestMemoryMmap) -> bool {
        let Some(mut chain) = ring.take(memory) else { return false };
        let mut bytes = [0; ANSWER_MAX];
        let count = chain.readable.copy_out(&mut bytes);
        if count < ENTRY_BYTES {
            self.counters.malformed.add(1);
        }
        self.answers.put(Statistics::parse(&bytes[..count]));
        // There should be one buffer at a time; of several, the newest is kept.
        if let Some(older) = self.answer.replace(chain.head) {
            ring.complete(memory, older, 0);
        }
        true
    }

    /// Gives the driver its buffer, which asks for the next answer.
    fn ask(&mut self, ring: &mut Ring) {
        if let Some(head) = self.answer.take() {
            self.asked = false;
            let memory = ring.memory();
            ring.complete(&memory, head, 0);
            ring.flush();
        }
    }
}

impl Model for Queues {
    type Message = Message;

    fn ack_features(&mut self, features: u64) {
        self.features = features;
    }

    fn kicked(&mut self, queue: usize) {
        if let Some(kicked) = self.kicked.get_mut(queue) {
            *kicked = true;
        }
        // A driver that has just come reads the target by itself; one that was there before may have missed a change.
    }

    fn event(&mut self, _event: &Event) {
        // Nothing is registered.
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Retarget => self.untold = true,
            Message::Ask => self.asked = true,
        }
    }

    fn run(&mut self, rings: &mut Rings) -> bool {
        if self.untold
            && let Some(ring) = &mut rings[INFLATE]
        {
            self.untold = false;
            ring.signal_config();
        }
        let mut more = false;
        for (index, ring) in rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            let Some(role) = self.role(index) else { continue };
            if std::mem::take(&mut self.kicked[index]) {
                self.kicked[index] = self.serve(role, ring);
                more |= self.kicked[index];
                ring.flush();
            }
            if role == Role::Statistics && self.asked {
                self.ask(ring);
            }
        }
        more
    }

    fn stopping(&mut self, index: usize, ring: &mut Ring) {
        // Whoever starts the queue again finds the buffer available, and the answer in it.
        if self.role(index) == Some(Role::Statistics) && self.answer.take().is_some() {
            ring.untake(1);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        self.features = 0;
        self.kicked = [false; QUEUES];
        self.answer = None;
    }
}

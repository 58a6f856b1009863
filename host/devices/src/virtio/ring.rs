//! One running queue as a model sees it: take a chain, hand it back, tell the driver.
//!
//! Everything the driver can get wrong ends here as a count and one throttled log line. A ring whose own structure is
//! broken (indexes that run away, rings outside of memory) stops until the driver sets it up again.

use std::ops::{ControlFlow, Deref};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tracing::warn;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::throttle::Throttle;
use crate::virtio::buffers::{Buffers, ChainError, MAX_DESCRIPTORS};
use crate::virtio::device::{DeviceKind, Interrupt, Memory, QueueResources};

/// One chain taken from a ring.
pub(crate) struct Chain<'a> {
    /// Names the chain when it is handed back.
    pub head: u16,
    /// What the driver wrote for us. Empty when the chain was malformed.
    pub readable: Buffers<'a>,
    /// Where we write for the driver. Empty when the chain was malformed.
    pub writable: Buffers<'a>,
}

/// How a round of [`Ring::serve`] or [`Ring::serve_owned`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// No chain is left; the driver kicks when it adds one.
    Empty,
    /// The budget is used up, only to let others have a turn.
    HasMore,
    /// A chain could not be served now, or no more are wanted; whoever stopped knows when to go on.
    Stopped,
}

/// A queue of at most `maximum` entries, with this size and these guest addresses, from its beginning.
///
/// Fails on sizes and alignments that no driver may choose. Whether the rings lie in memory is not looked at.
pub(crate) fn queue(
    maximum: u16,
    size: u16,
    addresses: Addresses,
    event_idx: bool,
) -> Result<Queue, virtio_queue::Error> {
    let mut queue = Queue::new(maximum)?;
    queue.try_set_size(size)?;
    queue.try_set_desc_table_address(GuestAddress(addresses.descriptors))?;
    queue.try_set_avail_ring_address(GuestAddress(addresses.available))?;
    queue.try_set_used_ring_address(GuestAddress(addresses.used))?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    Ok(queue)
}

/// Where the parts of a queue lie in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Addresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The driver's ring of available chains.
    pub available: u64,
    /// The device's ring of used chains.
    pub used: u64,
}

/// Whether the driver's mark lies among the last `count` entries before `next`: it wants to hear when its entry is used
/// (virtio 1.3 §2.7.7).
fn is_passed(mark: u16, next: u16, count: u32) -> bool {
    u32::from(next.wrapping_sub(mark).wrapping_sub(1)) < count
}

/// One chain taken from a ring, with the memory it lies in: it can be worked on elsewhere.
pub(crate) struct OwnedChain {
    memory: GuestMemoryLoadGuard<GuestMemoryMmap>,
    chain: DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>,
}

impl OwnedChain {
    /// Names the chain when it is handed back.
    pub fn head(&self) -> u16 {
        self.chain.head_index()
    }

    /// The buffers as the driver has them now: those the device reads, then those it writes.
    pub fn buffers(&self) -> Result<(Buffers<'_>, Buffers<'_>), ChainError> {
        Buffers::of_chain(&self.memory, self.chain.clone())
    }
}

/// A running queue.
pub(crate) struct Ring {
    kind: DeviceKind,
    index: usize,
    queue: Queue,
    memory: Memory,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    /// Chains handed back since the driver was last told.
    used: u32,
    broken: bool,
    throttle: Throttle,
}

impl Ring {
    pub fn new(kind: DeviceKind, index: usize, resources: QueueResources) -> Self {
        let QueueResources { memory, queue, kick, interrupt } = resources;
        Self {
            kind,
            index,
            queue,
            memory,
            kick,
            interrupt,
            used: 0,
            broken: false,
            throttle: Throttle::default(),
        }
    }

    /// Whether the rings lie in guest memory.
    pub fn is_valid(&self) -> bool {
        self.queue.is_valid(&*self.memory.memory())
    }

    /// A snapshot of guest memory for one batch of work.
    pub fn memory(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.memory.memory()
    }

    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Takes the next available chain.
    pub fn take<'a>(&mut self, memory: &'a GuestMemoryMmap) -> Option<Chain<'a>> {
        let chain = self.next(memory)?;
        let head = chain.head_index();
        let (readable, writable) = Buffers::of_chain(memory, chain).unwrap_or_else(|error| {
            self.malformed(&error);
            Default::default()
        });
        Some(Chain { head, readable, writable })
    }

    /// Hands every available chain to `one`, up to `budget` of them. It returns how many bytes it wrote into the chain,
    /// which then goes back to the driver, or `None` to leave that chain where it was and end the round.
    ///
    /// Kicks are off meanwhile. The driver is told by [`Self::flush`], which is the caller's.
    pub fn serve(&mut self, budget: usize, mut one: impl FnMut(Chain<'_>) -> Option<u32>) -> Round {
        let memory = self.memory();
        self.round(budget, |ring| {
            let chain = ring.take(&memory)?;
            let head = chain.head;
            match one(chain) {
                Some(length) => ring.complete(&memory, head, length),
                None => {
                    ring.untake(1);
                    return Some(ControlFlow::Break(()));
                }
            }
            Some(ControlFlow::Continue(()))
        })
    }

    /// As [`Self::serve`], but `one` keeps the chain it is given: it hands it back to the driver itself, now or later, and says
    /// whether it takes more.
    pub fn serve_owned(
        &mut self,
        budget: usize,
        mut one: impl FnMut(&mut Self, OwnedChain) -> ControlFlow<()>,
    ) -> Round {
        self.round(budget, |ring| ring.take_owned().map(|chain| one(ring, chain)))
    }

    /// Calls `one` up to `budget` times, until it finds no chain or wants no more.
    fn round(&mut self, budget: usize, mut one: impl FnMut(&mut Self) -> Option<ControlFlow<()>>) -> Round {
        self.disable_kicks();
        for _ in 0..budget {
            match one(self) {
                Some(ControlFlow::Continue(())) => {}
                Some(ControlFlow::Break(())) => return Round::Stopped,
                // One that was added before kicks were on again comes without a kick.
                None if self.enable_kicks() => {}
                None => return Round::Empty,
            }
        }
        Round::HasMore
    }

    /// Takes the next available chain, to work on it beside the ring.
    fn take_owned(&mut self) -> Option<OwnedChain> {
        let memory = self.memory.memory();
        let chain = self.next(memory.clone())?;
        Some(OwnedChain { memory, chain })
    }

    /// Takes the next available chain of a queue whose buffers are not data: the guest's ranges of memory that the device
    /// might write. They may lie anywhere.
    pub fn take_ranges(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, Vec<(GuestAddress, u32)>)> {
        let chain = self.next(memory)?;
        let head = chain.head_index();
        let ranges =
            chain.writable().take(MAX_DESCRIPTORS).map(|range| (range.addr(), range.len())).collect();
        Some((head, ranges))
    }

    fn next<M>(&mut self, memory: M) -> Option<DescriptorChain<M>>
    where
        M: Deref<Target = GuestMemoryMmap> + Clone,
    {
        if self.broken {
            return None;
        }
        match self.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Takes note of a chain that makes no sense.
    pub fn malformed(&mut self, error: &ChainError) {
        if let Some(suppressed) = self.throttle.admit(Instant::now()) {
            warn!(device = %self.kind, queue = self.index, suppressed, %error, "malformed chain");
        }
    }

    /// Tells the driver that configuration space has changed.
    pub fn signal_config(&mut self) {
        if let Err(error) = self.interrupt.signal_config()
            && let Some(suppressed) = self.throttle.admit(Instant::now())
        {
            warn!(device = %self.kind, queue = self.index, suppressed, %error, "cannot interrupt the driver");
        }
    }

    /// Gives back the last `count` chains taken, as if they had not been taken.
    pub fn untake(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Hands a chain back to the driver with `length` bytes written into it.
    pub fn complete(&mut self, memory: &GuestMemoryMmap, head: u16, length: u32) {
        match self.queue.add_used(memory, head, length) {
            Ok(()) => self.used += 1,
            Err(error) => self.fail(&error),
        }
    }

    /// Hands several chains back at once: the driver sees all of them or none. A frame in several buffers needs that
    /// (virtio 1.3 §5.1.6.4.1).
    pub fn complete_all(&mut self, memory: &GuestMemoryMmap, chains: &[(u16, u32)]) {
        let Some(((head, length), before)) = chains.split_last() else { return };
        let next = self.queue.next_used();
        for (position, (head, length)) in before.iter().enumerate() {
            let slot = next.wrapping_add(position as u16) % self.queue.size();
            let entry = self.queue.used_ring() + 4 + 8 * u64::from(slot);
            let [id, length] = [u32::from(*head), *length].map(u32::to_le_bytes);
            if let Err(error) = memory.write_slice(&[id, length].concat(), GuestAddress(entry)) {
                return self.fail(&virtio_queue::Error::GuestMemory(error));
            }
        }
        // The index that makes them visible is stored with the last.
        self.queue.set_next_used(next.wrapping_add(before.len() as u16));
        self.used += before.len() as u32;
        self.complete(memory, *head, *length);
    }

    /// How many chains there can be at most.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Tells the driver about chains handed back, if it wants to know.
    pub fn flush(&mut self) {
        let used = std::mem::take(&mut self.used);
        if used == 0 {
            return;
        }
        let memory = self.memory.memory();
        let wanted = match self.queue.event_idx_enabled() {
            // The library counts chains handed back one by one only, so the count is ours.
            true => {
                std::sync::atomic::fence(Ordering::SeqCst);
                let event = self.queue.avail_ring() + 4 + 2 * u64::from(self.queue.size());
                memory
                    .load::<u16>(GuestAddress(event), Ordering::Relaxed)
                    .map(|event| is_passed(u16::from_le(event), self.queue.next_used(), used))
                    .map_err(virtio_queue::Error::GuestMemory)
            }
            // The library leaves the driver's flag to us; the fence it needs is in the release store of the index.
            false => {
                std::sync::atomic::fence(Ordering::SeqCst);
                memory
                    .load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                    .map(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
                    .map_err(virtio_queue::Error::GuestMemory)
            }
        };
        match wanted {
            Ok(false) => {}
            Ok(true) => {
                if let Err(error) = self.interrupt.signal_used()
                    && let Some(suppressed) = self.throttle.admit(Instant::now())
                {
                    warn!(device = %self.kind, queue = self.index, suppressed, %error, "cannot interrupt the driver");
                }
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Asks the driver to kick for new chains; `true` if some came meanwhile, which need no kick.
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory.memory()) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// Tells the driver that it need not kick for new chains.
    pub fn disable_kicks(&mut self) {
        if self.broken {
            return;
        }
        if let Err(error) = self.queue.disable_notification(&*self.memory.memory()) {
            self.fail(&error);
        }
    }

    fn fail(&mut self, error: &virtio_queue::Error) {
        if !self.broken {
            self.broken = true;
            self.interrupt.needs_reset();
            warn!(device = %self.kind, queue = self.index, %error, "broken queue; stopped until it is set up again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::{self, DriverQueue, Piece};

    #[test]
    fn a_mark_is_passed_once() {
        let check = |mark, next, count, expected| assert_eq!(is_passed(mark, next, count), expected);
        check(0, 1, 1, true);
        check(0, 2, 1, false);
        check(1, 1, 1, false);
        check(3, 5, 2, true);
        check(2, 5, 2, false);
        check(u16::MAX, 0, 1, true);
        check(u16::MAX - 1, 1, 3, true);
        check(7, 7, 1 << 16, true);
    }

    #[test]
    fn a_round_ends_with_the_chains_the_budget_or_a_chain_that_waits() {
        let memory = driver::memory(1 << 20);
        let mut driver = DriverQueue::new(&memory, 0x1000, 8, true);
        let mut ring = Ring::new(DeviceKind::Rng, 0, driver.resources());
        let piece = Piece { address: 0x8000, length: 64, writable: true };
        let heads: Vec<u16> = (0..5).map(|_| driver.add(&[piece])).collect();
        let mut seen = Vec::new();
        let mut round = |ring: &mut Ring, budget, stop_at: usize| {
            ring.serve(budget, |chain| {
                let served = (seen.len() < stop_at).then_some(7);
                if served.is_some() {
                    seen.push(chain.head);
                }
                served
            })
        };
        assert_eq!(round(&mut ring, 2, 9), Round::HasMore);
        assert_eq!(round(&mut ring, 8, 3), Round::Stopped);
        assert_eq!(round(&mut ring, 8, 9), Round::Empty);
        assert_eq!(seen, heads, "the chain that waited came again, and none came twice");
        let used: Vec<_> = std::iter::from_fn(|| driver.take_used()).collect();
        assert_eq!(used, heads.iter().map(|head| (*head, 7)).collect::<Vec<_>>());
    }

    #[test]
    fn chains_handed_back_together_come_in_order_over_the_end_of_the_ring() {
        let memory = driver::memory(1 << 20);
        let mut driver = DriverQueue::new(&memory, 0x1000, 8, true);
        let mut ring = Ring::new(DeviceKind::Net, 0, driver.resources());
        let piece = Piece { address: 0x8000, length: 64, writable: true };
        for round in 0..10u32 {
            let heads: Vec<u16> = (0..5).map(|_| driver.add(&[piece])).collect();
            let taken: Vec<(u16, u32)> =
                (0..5).map(|length| (ring.take(&memory).unwrap().head, round + length)).collect();
            assert_eq!(taken.iter().map(|(head, _)| *head).collect::<Vec<_>>(), heads);
            ring.complete_all(&memory, &taken);
            ring.flush();
            assert_eq!(driver.call.read().ok(), Some(1), "round {round}");
            let used: Vec<_> = std::iter::from_fn(|| driver.take_used()).collect();
            assert_eq!(used, taken);
        }
    }
}

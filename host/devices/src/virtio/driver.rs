//! The driver's side of a queue, for tests: it goes on for as long as a real driver does.
//!
//! Laid out by `virtio-queue`'s mock, which by itself serves one round of the ring.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::device::{Interrupt, Memory, QueueResources};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

/// Guest memory of `bytes` at address 0, shared by queues and device.
pub fn memory(bytes: usize) -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
}

struct EventInterrupt {
    call: EventFd,
    config: EventFd,
}

impl Interrupt for EventInterrupt {
    fn signal_used(&self) -> io::Result<()> {
        self.call.write(1)
    }

    fn signal_config(&self) -> io::Result<()> {
        self.config.write(1)
    }
}

/// The driver's side of one queue.
pub struct DriverQueue {
    pub memory: Arc<GuestMemoryMmap>,
    pub size: u16,
    pub descriptors: GuestAddress,
    pub available: GuestAddress,
    pub used: GuestAddress,
    pub kick: EventFd,
    pub call: EventFd,
    /// Written when configuration space has changed.
    pub config: EventFd,
    event_idx: bool,
    free: Vec<u16>,
    /// Length of the chain that starts at each descriptor.
    chains: Vec<Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

impl DriverQueue {
    pub fn new(memory: &Arc<GuestMemoryMmap>, start: u64, size: u16, event_idx: bool) -> Self {
        let layout = MockSplitQueue::create(&**memory, GuestAddress(start), size);
        // The mock places the used ring as if entries of the available ring were one byte long.
        let available = layout.avail_addr();
        let used = GuestAddress((available.0 + 6 + 2 * u64::from(size) + 3) & !3);
        memory.write_slice(&vec![0; 6 + 8 * usize::from(size)], used).unwrap();
        Self {
            memory: Arc::clone(memory),
            size,
            descriptors: layout.desc_table_addr(),
            available,
            used,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            config: EventFd::new(EFD_NONBLOCK).unwrap(),
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next_available: 0,
            next_used: 0,
        }
    }

    /// What a transport would start the queue with.
    pub fn resources(&self) -> QueueResources {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.try_set_desc_table_address(self.descriptors).unwrap();
        queue.try_set_avail_ring_address(self.available).unwrap();
        queue.try_set_used_ring_address(self.used).unwrap();
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        QueueResources {
            memory: Memory::from(Arc::clone(&self.memory)),
            queue,
            kick: self.kick.try_clone().unwrap(),
            interrupt: Arc::new(EventInterrupt {
                call: self.call.try_clone().unwrap(),
                config: self.config.try_clone().unwrap(),
            }),
        }
    }

    /// The same as [`Self::resources`], going on where the device left off.
    pub fn resume(&self, state: virtio_queue::QueueState) -> QueueResources {
        QueueResources { queue: Queue::try_from(state).unwrap(), ..self.resources() }
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn store(&self, index: u16, piece: Piece, flags: u16, next: u16) {
        let flags = flags | if piece.writable { WRITE } else { 0 };
        let descriptor = Descriptor::new(piece.address, piece.length, flags, next);
        let address = GuestAddress(self.descriptors.0 + 16 * u64::from(index));
        self.memory.write_obj(RawDescriptor::from(descriptor), address).unwrap();
    }

    /// Makes a chain available; the device hears of it at the next [`Self::notify`].
    pub fn add(&mut self, pieces: &[Piece]) -> u16 {
        let indexes: Vec<u16> = pieces.iter().map(|_| self.free.pop().unwrap()).collect();
        for (position, piece) in pieces.iter().enumerate() {
            match indexes.get(position + 1) {
                Some(next) => self.store(indexes[position], *piece, NEXT, *next),
                None => self.store(indexes[position], *piece, 0, 0),
            }
        }
        let head = indexes[0];
        self.chains[usize::from(head)] = indexes;
        self.publish(head);
        head
    }

    /// Puts a descriptor into the available ring, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let entry = self.available.0 + 4 + 2 * u64::from(self.next_available % self.size);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.memory
            .store(self.next_available, GuestAddress(self.available.0 + 2), Ordering::Release)
            .unwrap();
    }

    /// Kicks the device.
    pub fn notify(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain the device has used, and how much it wrote.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.load(GuestAddress(self.used.0 + 2), Ordering::Acquire).unwrap();
        if index == self.next_used {
            if self.event_idx {
                let event = self.available.0 + 4 + 2 * u64::from(self.size);
                self.memory.store(self.next_used, GuestAddress(event), Ordering::SeqCst).unwrap();
                let again: u16 = self.memory.load(GuestAddress(self.used.0 + 2), Ordering::SeqCst).unwrap();
                if again != index {
                    return self.take_used();
                }
            }
            return None;
        }
        let entry = self.used.0 + 4 + 8 * u64::from(self.next_used % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let head = head as u16;
        self.free.append(&mut self.chains[usize::from(head)]);
        Some((head, length))
    }

    /// Waits for a used chain.
    pub fn wait_used(&mut self) -> (u16, u32) {
        for _ in 0..100 {
            if let Some(used) = self.take_used() {
                return used;
            }
            wait(&[&self.call], Duration::from_millis(100));
        }
        panic!("the device has not used a buffer within ten seconds");
    }

    /// Serves one chain and waits for it.
    pub fn run(&mut self, pieces: &[Piece]) -> u32 {
        let head = self.add(pieces);
        self.notify();
        let (used, length) = self.wait_used();
        assert_eq!(used, head);
        length
    }
}

/// Waits until one of the events is signalled, and clears them all.
pub fn wait(events: &[&EventFd], timeout: Duration) {
    use std::os::fd::{AsRawFd, BorrowedFd};
    let descriptors: Vec<BorrowedFd<'_>> = events
        .iter()
        .map(|event| {
            #[expect(unsafe_code, reason = "the crate's event type cannot be borrowed otherwise")]
            // SAFETY: the event is borrowed for as long as the descriptor is.
            unsafe {
                BorrowedFd::borrow_raw(event.as_raw_fd())
            }
        })
        .collect();
    let mut polled: Vec<PollFd<'_>> =
        descriptors.iter().map(|descriptor| PollFd::new(descriptor, PollFlags::IN)).collect();
    let timeout = Timespec::try_from(timeout).unwrap();
    let _count_or_interrupted = poll(&mut polled, Some(&timeout));
    for event in events {
        let _empty = event.read();
    }
}

/// The memory as a transport holds it.
pub fn atomic(memory: &Arc<GuestMemoryMmap>) -> GuestMemoryAtomic<GuestMemoryMmap> {
    Memory::from(Arc::clone(memory))
}

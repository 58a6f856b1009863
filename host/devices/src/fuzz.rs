//! Entries for the fuzz targets: a device against guest memory and rings of somebody else's making.
//!
//! The devices run on the caller's thread, without kicks: one run of the model after each packet or request.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::device::{
    DeviceError, DeviceKind, DeviceState, Interrupt, Memory, QueueResources, QueueState, VirtioDevice,
};
use crate::virtio::mmio::{MmioDevice, SavedQueue, SavedTransport};
use crate::virtio::ring::{Addresses, Ring};
use crate::virtio::worker::{Model, Rings};
use crate::virtio::{balloon, block, console, mem, net, rng, vsock};

const MEMORY_BYTES: usize = 1 << 18;
const SIZE: u16 = 16;
/// Each queue's rings lie at a multiple of this; data begins behind the last of them.
const QUEUE_BYTES: u64 = 0x1000;
const DATA: u64 = 0x8000;
/// A model that still has work after so many runs does not end its passes.
const RUNS_MAX: usize = 10_000;

struct Silent;

impl Interrupt for Silent {
    fn signal_used(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest's memory and the rings a device has running in it.
struct Guest {
    memory: Arc<GuestMemoryMmap>,
    rings: Vec<Option<Ring>>,
    published: Vec<u16>,
}

impl Guest {
    /// With rings that begin at this entry. `None` when the host has no memory or descriptors left.
    fn new(kind: DeviceKind, queues: usize, event_idx: bool, entry: u16) -> Option<Self> {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).ok()?);
        let mut rings = Vec::new();
        for index in 0..queues {
            let start = index as u64 * QUEUE_BYTES;
            let mut queue = Queue::new(SIZE).ok()?;
            queue.try_set_desc_table_address(GuestAddress(start)).ok()?;
            queue.try_set_avail_ring_address(GuestAddress(start + 0x400)).ok()?;
            queue.try_set_used_ring_address(GuestAddress(start + 0x800)).ok()?;
            queue.set_event_idx(event_idx);
            queue.set_next_avail(entry);
            queue.set_next_used(entry);
            queue.set_ready(true);
            let resources = QueueResources {
                memory: Memory::from(Arc::clone(&memory)),
                queue,
                kick: EventFd::new(EFD_NONBLOCK).ok()?,
                interrupt: Arc::new(Silent),
            };
            rings.push(Some(Ring::new(kind, index, resources)));
        }
        Some(Self { memory, rings, published: vec![entry; queues] })
    }

    /// Writes bytes into guest memory; what does not fit is not written.
    fn write(&self, address: u64, bytes: &[u8]) {
        let _cut_off = self.memory.write(bytes, GuestAddress(address));
    }

    /// Makes a chain of these pieces (address, length, writable) available, in the first descriptors.
    fn publish(&mut self, queue: usize, first: u16, pieces: &[(u64, u32, bool)]) {
        let start = queue as u64 * QUEUE_BYTES;
        for (position, &(address, length, writable)) in pieces.iter().enumerate() {
            let index = (first + position as u16) % SIZE;
            let more = position + 1 < pieces.len();
            let flags = u16::from(more) | if writable { 2 } else { 0 };
            let descriptor = RawDescriptor::from(Descriptor::new(address, length, flags, (index + 1) % SIZE));
            let _in_memory = self.memory.write_obj(descriptor, GuestAddress(start + 16 * u64::from(index)));
        }
        let published = self.published[queue];
        let entry = start + 0x404 + 2 * u64::from(published % SIZE);
        self.write(entry, &(first % SIZE).to_le_bytes());
        self.published[queue] = published.wrapping_add(1);
        self.write(start + 0x402, &self.published[queue].to_le_bytes());
    }

    fn run(&mut self, model: &mut impl Model) {
        let rings: &mut Rings = &mut self.rings;
        for _ in 0..RUNS_MAX {
            if !model.run(rings) {
                return;
            }
        }
        panic!("the device finds no end");
    }
}

/// Splits a byte off the front of `data`; zero when there is none.
fn byte(data: &mut &[u8]) -> u8 {
    match data.split_first() {
        Some((first, rest)) => {
            *data = rest;
            *first
        }
        None => 0,
    }
}

/// Feeds a socket device, either with packets in well-formed chains or with memory and rings as they come.
pub fn vsock(mut data: &[u8]) {
    let mode = byte(&mut data);
    let Some(mut guest) = Guest::new(DeviceKind::Vsock, 3, mode & 2 != 0, 0) else { return };
    let Ok(poll) = mio::Poll::new() else { return };
    let Ok(registry) = poll.registry().try_clone() else { return };
    let sockets = Arc::new(Mutex::new(Vec::<OwnedFd>::new()));
    let kept = Arc::clone(&sockets);
    let backend = vsock::Backend {
        ports: [1024, 1025].into(),
        accepted: Box::new(move |_, socket| {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
        }),
    };
    let mut model = vsock::model(vsock::Cid(3), registry, backend);
    if let Ok((near, far)) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None) {
        sockets.lock().unwrap_or_else(PoisonError::into_inner).push(near);
        model.connect(7, b"preface".to_vec(), far, Instant::now());
    }
    if mode & 1 == 0 {
        guest.write(0, data);
        model.kicked(0);
        model.kicked(1);
        guest.run(&mut model);
        return;
    }
    while !data.is_empty() {
        let shape = byte(&mut data);
        let length = usize::from(byte(&mut data)).min(data.len());
        let (packet, rest) = data.split_at(length);
        data = rest;
        guest.write(DATA, packet);
        let cut = u32::from(shape & 63).min(length as u32);
        let claimed = if shape & 64 == 0 { length as u32 } else { 70_000 };
        guest.publish(0, 0, &[(DATA + 0x2_0000, 64 * u32::from(shape >> 5), true)]);
        guest.publish(1, 0, &[(DATA, cut, false), (DATA + u64::from(cut), claimed - cut, false)]);
        model.kicked(0);
        model.kicked(1);
        if shape & 128 != 0 {
            // Somebody on the host says something, or leaves.
            let mut sockets = sockets.lock().unwrap_or_else(PoisonError::into_inner);
            match shape & 1 {
                0 => {
                    let half = sockets.len() / 2;
                    sockets.truncate(half);
                }
                _ => {
                    for socket in sockets.iter() {
                        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
                        let _full_or_closed = rustix::net::send(socket, b"hello", flags);
                    }
                }
            }
        }
        guest.run(&mut model);
    }
}

/// Feeds a disk, either with requests in well-formed chains or with memory and rings as they come.
pub fn block(mut data: &[u8]) {
    let mode = byte(&mut data);
    let Some(mut guest) = Guest::new(DeviceKind::Block, 1, mode & 2 != 0, 0) else { return };
    let Ok(file) = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC) else { return };
    let file = File::from(file);
    if file.set_len(1 << 16).is_err() {
        return;
    }
    let Ok(backend) = block::Backend::new(file, "fuzz", mode & 4 != 0) else { return };
    let mut model = block::model(backend, 1);
    if mode & 1 == 0 {
        guest.write(0, data);
        model.kicked(0);
        guest.run(&mut model);
        return;
    }
    while !data.is_empty() {
        let shape = byte(&mut data);
        let length = usize::from(byte(&mut data)).min(data.len());
        let (request, rest) = data.split_at(length);
        data = rest;
        guest.write(DATA, request);
        let cut = u32::from(shape & 31).min(length as u32);
        let room = 512 * u32::from(shape >> 5) + 1;
        guest.publish(
            0,
            0,
            &[
                (DATA, cut, false),
                (DATA + u64::from(cut), length as u32 - cut, false),
                (DATA + 0x1_0000, room, true),
            ],
        );
        model.kicked(0);
        guest.run(&mut model);
    }
}

/// Feeds a source of randomness.
pub fn rng(data: &[u8]) {
    feed(data, DeviceKind::Rng, 1, 0, &mut rng::model(), |_| {});
}

/// Feeds a console whose other end reads and writes, or sleeps.
pub fn console(data: &[u8]) {
    let Ok(poll) = mio::Poll::new() else { return };
    let Ok((host, guest)) = UnixStream::pair() else { return };
    let Ok(mut model) = console::model(guest, poll.registry()) else { return };
    let mut host = Some(host);
    feed(data, DeviceKind::Console, 2, 0, &mut model, |shape| {
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        match (shape & 3, &host) {
            (1, Some(socket)) => {
                let _full = rustix::net::send(socket, b"hello", flags);
            }
            (2, Some(socket)) => {
                let _empty = rustix::net::recv(socket, &mut [0; 4096][..], rustix::net::RecvFlags::DONTWAIT);
            }
            (3, _) => host = None,
            _ => {}
        }
    });
}

/// Feeds a network card, on a plain socket or one with offloads, whose other end sends frames too.
pub fn net(data: &[u8]) {
    let Ok(poll) = mio::Poll::new() else { return };
    let Ok((host, stream)) = UnixStream::pair() else { return };
    let offloads = data.first().is_some_and(|mode| mode & 4 != 0);
    let features = if data.first().is_some_and(|mode| mode & 8 != 0) { 0 } else { u64::MAX };
    let backend = net::Backend { stream, offloads, mac: [2, 0, 0, 0, 0, 2], mtu: 1500 };
    let Ok(mut model) = net::model(backend, poll.registry()) else { return };
    feed(data, DeviceKind::Net, 2, features, &mut model, |shape| {
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        let mut frame = vec![shape; 4 + 10 + 64];
        frame[..4].copy_from_slice(&74u32.to_be_bytes());
        frame[4..14].copy_from_slice(&[1, shape & 5, 0, 0, shape, 0, 34, 0, 16, 0]);
        frame[26..29].copy_from_slice(&[8, 0, 0x45]);
        let _full = rustix::net::send(&host, &frame, flags);
        let _empty = rustix::net::recv(&host, &mut [0; 4096][..], rustix::net::RecvFlags::DONTWAIT);
    });
}

/// Feeds a balloon; no range outside of guest memory may be given back.
pub fn balloon(data: &[u8]) {
    let discard = |start: GuestAddress, length| {
        let end = start.0.checked_add(length).expect("a range over the end of all addresses");
        assert!(length > 0 && end <= MEMORY_BYTES as u64, "not a range of guest memory");
    };
    let mut model = balloon::model(balloon::Backend { discard: Box::new(discard) });
    feed(data, DeviceKind::Balloon, 4, u64::MAX, &mut model, |_| {});
}

/// Feeds a device of memory that comes and goes; only what the guest may use is taken from it.
pub fn mem(mut data: &[u8]) {
    let (wanted, usable) = (byte(&mut data), byte(&mut data));
    let mut model = mem::model(mem_backend(usable.min(MEM_BLOCKS)));
    model.message(mem::wish(u64::from(wanted) * mem::BLOCK_BYTES, u64::from(usable) * mem::BLOCK_BYTES));
    feed(data, DeviceKind::Mem, 1, u64::MAX, &mut model, |_| {});
}

/// As many blocks as there are behind the guest's memory.
const MEM_BLOCKS: u8 = 200;

/// Of its blocks the first `usable` may be given back.
fn mem_backend(usable: u8) -> mem::Backend {
    const START: u64 = 1 << 32;
    let discard = move |start: GuestAddress, length| {
        let end = start.0.checked_add(length).expect("a range over the end of all addresses");
        let usable = START..=START + u64::from(usable) * mem::BLOCK_BYTES;
        assert!(length > 0 && usable.contains(&start.0) && usable.contains(&end), "not usable memory");
        assert!(start.0.is_multiple_of(mem::BLOCK_BYTES) && length.is_multiple_of(mem::BLOCK_BYTES));
    };
    let bytes = u64::from(MEM_BLOCKS) * mem::BLOCK_BYTES;
    mem::Backend { start: GuestAddress(START), bytes, discard: Box::new(discard) }
}

/// Feeds a device of `queues` queues, either with chains of two buffers or with memory and rings as they come. `meanwhile`
/// is what happens on the host between two chains.
fn feed(
    mut data: &[u8],
    kind: DeviceKind,
    queues: usize,
    features: u64,
    model: &mut impl Model,
    mut meanwhile: impl FnMut(u8),
) {
    let mode = byte(&mut data);
    let entry = if mode & 4 == 0 { 0 } else { u16::MAX - 2 };
    let Some(mut guest) = Guest::new(kind, queues, mode & 2 != 0, entry) else { return };
    model.ack_features(features);
    if mode & 1 == 0 {
        guest.write(0, data);
        (0..queues).for_each(|queue| model.kicked(queue));
        guest.run(model);
        return;
    }
    while !data.is_empty() {
        let shape = byte(&mut data);
        let length = usize::from(byte(&mut data)).min(data.len());
        let (content, rest) = data.split_at(length);
        data = rest;
        guest.write(DATA, content);
        let queue = usize::from(shape >> 4) % queues;
        let cut = u32::from(shape & 15).min(length as u32);
        let room = u32::from(shape) * 8;
        let readable = [(DATA, cut, false), (DATA + u64::from(cut), length as u32 - cut, false)];
        let writable = (DATA + 0x1_0000, room, true);
        guest.publish(queue, u16::from(shape), &[readable[0], readable[1], writable]);
        model.kicked(queue);
        meanwhile(shape);
        guest.run(model);
    }
    for (index, ring) in guest.rings.iter_mut().enumerate() {
        if let Some(ring) = ring {
            model.stopping(index, ring);
        }
    }
}

/// A device of two queues that does nothing, and knows whether its transport keeps the order of things.
#[derive(Default)]
struct Inert {
    negotiated: bool,
    running: [Option<QueueResources>; 2],
}

impl VirtioDevice for Inert {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        1 << 32 | 1 << 29
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 256]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn ack_features(&mut self, features: u64) {
        assert_eq!(features & !self.features(), 0, "features that were not offered");
        self.negotiated = true;
    }

    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), DeviceError> {
        assert!(self.negotiated, "a queue before the features");
        assert!(resources.queue.size() <= self.queue_sizes()[index], "a queue too large");
        self.running[index] = Some(resources);
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        self.running[index].take().map(|resources| resources.queue.state())
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        assert!(self.running.iter().all(Option::is_none), "saved while a queue runs");
        Ok(DeviceState::default())
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), DeviceError> {
        assert!(!self.negotiated, "restored after the features");
        Ok(())
    }
}

/// Feeds the registers of virtio-mmio with accesses: what, where, and up to eight bytes.
pub fn mmio(data: &[u8]) {
    let Ok(memory) = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]) else { return };
    let Ok(interrupt) = EventFd::new(EFD_NONBLOCK) else { return };
    let Ok(device) = MmioDevice::new(Box::new(Inert::default()), Memory::new(memory), interrupt) else {
        return;
    };
    access(&device, data);
}

/// Reads and writes registers of a device, and saves it.
fn access(device: &MmioDevice, mut data: &[u8]) {
    while !data.is_empty() {
        let shape = byte(&mut data);
        // Most registers lie in the first 256 bytes, on a multiple of four.
        let offset = match shape & 3 {
            0 => u64::from(byte(&mut data)) | u64::from(byte(&mut data)) << 8,
            _ => u64::from(byte(&mut data) & !3),
        };
        let width = if shape & 4 == 0 { 4 } else { usize::from(shape >> 5) + 1 };
        let mut value: Vec<u8> = (0..width).map(|_| byte(&mut data)).collect();
        match shape & 24 {
            0 => device.read(offset, &mut value),
            8 => {
                device.save().expect("a device that cannot fail is saved");
                device.resume();
            }
            _ => device.write(offset, &value),
        }
    }
}

/// Restores registers from a state of somebody else's making, and lets a driver go on with what came of it.
fn restore(mut data: &[u8]) {
    let Ok(memory) = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]) else { return };
    let Ok(interrupt) = EventFd::new(EFD_NONBLOCK) else { return };
    let data = &mut data;
    let (shape, count) = (byte(data), byte(data));
    let entry = |data: &mut &[u8]| u16::from_le_bytes([byte(data), byte(data)]);
    let mut queue = || SavedQueue {
        // One in eight is no power of two.
        size: if shape & 7 == 0 { entry(data).into() } else { 1 << (byte(data) % 10) },
        addresses: Addresses {
            descriptors: u64::from(entry(data)) << 4,
            available: u64::from(entry(data)) << 2,
            used: u64::from(entry(data)) << 2,
        },
        ready: byte(data) & 3 != 0,
        next_available: entry(data),
        next_used: entry(data),
    };
    let queues = (0..if count < 240 { 2 } else { count & 3 }).map(|_| queue()).collect();
    let state = SavedTransport {
        device: if shape & 8 == 0 { DeviceKind::Rng.id() } else { byte(data).into() },
        status: byte(data).into(),
        interrupt_status: byte(data).into(),
        device_features_page: byte(data).into(),
        driver_features_page: byte(data).into(),
        driver_features: [u32::from(byte(data)) << 24, byte(data).into(), 0, u32::from(shape >> 7)],
        selected_queue: byte(data).into(),
        queues,
        config_generation: byte(data).into(),
        model: DeviceState::default(),
    };
    let Ok(device) = MmioDevice::restore(Box::new(Inert::default()), Memory::new(memory), interrupt, &state)
    else {
        return;
    };
    // What was accepted is what is saved again, but that the driver is told of its configuration.
    let again = device.save().expect("a device that cannot fail is saved");
    assert_eq!(again.queues, state.queues, "queues are as they were");
    assert_eq!(again.driver_features, state.driver_features, "features are as they were");
    assert_eq!(
        again.interrupt_status & state.interrupt_status,
        state.interrupt_status,
        "an interrupt was lost"
    );
    device.resume();
    access(&device, data);
}

/// Feeds saved states: of the registers, or of a model, which then works on the rest.
pub fn saved(mut data: &[u8]) {
    let which = byte(&mut data);
    if which & 7 == 0 {
        return restore(data);
    }
    let mut part = |limit: u8| {
        let length = usize::from(byte(&mut data) % limit).min(data.len());
        let (part, rest) = data.split_at(length);
        data = rest;
        part.to_vec()
    };
    let state = DeviceState { config: part(64), model: part(33) };
    let Ok(poll) = mio::Poll::new() else { return };
    match which & 7 {
        1 | 2 => {
            let Ok(registry) = poll.registry().try_clone() else { return };
            let backend = vsock::Backend { ports: [1024].into(), accepted: Box::new(|_, _| {}) };
            let mut model = vsock::model(vsock::Cid(3), registry, backend);
            if model.restore(&state).is_ok() {
                feed(data, DeviceKind::Vsock, 3, 0, &mut model, |_| {});
            }
        }
        3 | 4 => {
            let Ok(file) = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC) else { return };
            let file = File::from(file);
            if file.set_len(1 << 16).is_err() {
                return;
            }
            let Ok(backend) = block::Backend::new(file, "fuzz", false) else { return };
            let mut model = block::model(backend, 1);
            if model.restore(&state).is_ok() {
                feed(data, DeviceKind::Block, 1, 0, &mut model, |_| {});
            }
        }
        5 => {
            let mut model = balloon::model(balloon::Backend { discard: Box::new(|_, _| {}) });
            if model.restore(&state).is_ok() {
                feed(data, DeviceKind::Balloon, 4, u64::MAX, &mut model, |_| {});
            }
        }
        6 => {
            let mut model = mem::model(mem_backend(MEM_BLOCKS));
            if model.restore(&state).is_ok() {
                feed(data, DeviceKind::Mem, 1, u64::MAX, &mut model, |_| {});
            }
        }
        _ => {
            let mut model = rng::model();
            if model.restore(&state).is_ok() {
                feed(data, DeviceKind::Rng, 1, 0, &mut model, |_| {});
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn devices_survive_any_bytes(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            vsock(&data);
            block(&data);
            rng(&data);
            console(&data);
            balloon(&data);
            mem(&data);
            net(&data);
            mmio(&data);
            saved(&data);
        }
    }

    #[test]
    fn a_frame_without_enough_buffers_waits_and_does_not_spin() {
        // A chain of 16 bytes for a frame of 64; with and without event indexes.
        net(&[1, 2, 0]);
        net(&[3, 2, 0]);
    }

    #[test]
    fn a_request_of_a_fuzz_target_reaches_the_disk() {
        // Well-formed chains, header and nothing else, room for one sector: type 0, sector 0.
        let mut data = vec![1, 1 << 5 | 16, 16];
        data.extend([0; 16]);
        block(&data);
    }
}

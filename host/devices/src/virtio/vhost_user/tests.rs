//! Sessions against the front end's side of the protocol.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::virtio::block::Block;
use crate::virtio::device::{DeviceError, DeviceKind};
use crate::virtio::driver::{DriverQueue, Piece};

const MEMORY_BYTES: usize = 4 << 20;
const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;

/// The front end's view of a guest: memory in a file, and the driver of queue 0.
struct Machine {
    front: Frontend,
    memory: Arc<GuestMemoryMmap>,
    queue: DriverQueue,
    server: Server,
    protocol: bool,
}

fn memory_file() -> Arc<GuestMemoryMmap> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY_BYTES as u64).unwrap();
    let offset = FileOffset::new(file, 0);
    Arc::new(
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY_BYTES, Some(offset))]).unwrap(),
    )
}

fn regions(memory: &GuestMemoryMmap) -> Vec<VhostUserMemoryRegionInfo> {
    memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
        })
        .collect()
}

impl Machine {
    fn new(device: Box<dyn VirtioDevice>, protocol: bool) -> Self {
        let (near, far) = UnixStream::pair().unwrap();
        let server = serve(device, far).unwrap();
        let memory = memory_file();
        let queue = DriverQueue::new(&memory, 0x1000, 64, true);
        let mut machine = Self { front: Frontend::from_stream(near, 16), memory, queue, server, protocol };
        machine.negotiate();
        machine.front.set_mem_table(&regions(&machine.memory)).unwrap();
        machine
    }

    fn negotiate(&mut self) {
        let front = &mut self.front;
        front.set_owner().unwrap();
        let features = front.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_ne!(features & protocol, 0);
        if !self.protocol {
            front.set_features(features & !protocol).unwrap();
            return;
        }
        let offered = front.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK;
        assert_eq!(offered & wanted, wanted);
        let wanted = wanted | offered & VhostUserProtocolFeatures::BACKEND_REQ;
        front.set_protocol_features(wanted).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        // A feature of QEMU's own transport comes along.
        front.set_features(features | 1 << 40).unwrap();
    }

    fn start(&mut self, base: u16) {
        let user = self.memory.iter().next().unwrap().as_ptr() as u64;
        let front = &mut self.front;
        front.set_vring_num(0, self.queue.size).unwrap();
        front.set_vring_base(0, base).unwrap();
        let addresses = VringConfigData {
            queue_max_size: self.queue.size,
            queue_size: self.queue.size,
            flags: 0,
            desc_table_addr: user + self.queue.descriptors.0,
            used_ring_addr: user + self.queue.used.0,
            avail_ring_addr: user + self.queue.available.0,
            log_addr: None,
        };
        front.set_vring_addr(0, &addresses).unwrap();
        front.set_vring_kick(0, &self.queue.kick).unwrap();
        front.set_vring_call(0, &self.queue.call).unwrap();
        if self.protocol {
            front.set_vring_enable(0, true).unwrap();
        }
    }

    /// Reads one sector of a disk; returns its first byte.
    fn read(&mut self, sector: u64) -> u8 {
        let header = [[0; 8], sector.to_le_bytes()].concat();
        self.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        let length = self.queue.run(&[
            Piece { address: HEADER, length: 16, writable: false },
            Piece { address: DATA, length: 512, writable: true },
            Piece { address: STATUS, length: 1, writable: true },
        ]);
        assert_eq!(length, 513);
        assert_eq!(self.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
        self.memory.read_obj(GuestAddress(DATA)).unwrap()
    }
}

fn disk() -> Box<dyn VirtioDevice> {
    Box::new(small_disk())
}

/// Of sixteen sectors, full of their numbers.
fn small_disk() -> Block {
    let bytes: Vec<u8> = (0..16u8).flat_map(|sector| [sector; 512]).collect();
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    Block::from_file(file, "disk", false, 2).unwrap()
}

#[test]
fn a_disk_is_read_through_the_socket() {
    let mut machine = Machine::new(disk(), true);
    assert_eq!(machine.front.get_queue_num().unwrap(), 2);
    let (_, config) = machine.front.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
    assert_eq!(config[..8], 16u64.to_le_bytes());
    assert_eq!(config[34..36], 2u16.to_le_bytes());
    machine.start(0);
    for sector in 0..16 {
        assert_eq!(machine.read(sector), sector as u8);
    }
    assert_eq!(machine.front.get_vring_base(0).unwrap(), 16);
    machine.start(16);
    assert_eq!(machine.read(5), 5);
    let Machine { front, server, .. } = machine;
    drop(front);
    server.join();
}

#[test]
fn a_front_end_hears_that_a_disk_has_grown() {
    let disk = small_disk();
    let handle = disk.handle();
    let mut machine = Machine::new(Box::new(disk), true);
    let grow = |size_bytes| {
        let (told, answer) = mpsc::channel();
        handle.grow(size_bytes, move |result| told.send(result).unwrap());
        answer.recv().unwrap().unwrap()
    };
    let capacity = |machine: &mut Machine| {
        let (_, config) = machine.front.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
        u64::from_le_bytes(config.try_into().unwrap())
    };
    machine.start(0);
    // A front end that has given no way back reads it when it likes.
    assert_eq!((grow(17 * 512), capacity(&mut machine)), (17 * 512, 17));
    let (ours, theirs) = UnixStream::pair().unwrap();
    machine.front.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    for sectors in [20, 4 << 20] {
        assert_eq!(grow(sectors * 512), sectors * 512);
        let mut request = [0; 12];
        (&ours).read_exact(&mut request).unwrap();
        // CONFIG_CHANGE_MSG in version 1, without a body and without a wish for an answer.
        assert_eq!(
            request.as_chunks().0.iter().copied().map(u32::from_ne_bytes).collect::<Vec<_>>(),
            [2, 1, 0]
        );
        assert_eq!(capacity(&mut machine), sectors);
    }
    assert_eq!((machine.read(5), machine.read((4 << 20) - 1)), (5, 0));
    // One that has hung up hears nothing, and loses nothing else.
    drop(ours);
    grow(5 << 30);
    assert_eq!(machine.read((10 << 20) - 1), 0);
}

#[test]
fn only_disks_ask_for_a_way_back() {
    let rng = Box::new(crate::virtio::rng::Rng::new().unwrap());
    for (device, expected) in [(disk(), true), (rng as Box<dyn VirtioDevice>, false)] {
        let mut machine = Machine::new(device, true);
        let offered = machine.front.get_protocol_features().unwrap();
        assert_eq!(offered.contains(VhostUserProtocolFeatures::BACKEND_REQ), expected);
        let (_ours, theirs) = UnixStream::pair().unwrap();
        assert_eq!(machine.front.set_backend_request_fd(&theirs).is_ok(), expected);
    }
}

#[test]
fn a_front_end_without_protocol_features_needs_no_enabling() {
    let mut machine = Machine::new(disk(), false);
    machine.start(0);
    assert_eq!(machine.read(3), 3);
}

#[test]
fn memory_is_replaced_while_the_queue_runs() {
    let mut machine = Machine::new(disk(), true);
    machine.start(0);
    assert_eq!(machine.read(1), 1);
    // The same file mapped once more, and then with a second region, as when QEMU maps a device's memory.
    for _ in 0..50 {
        machine.front.set_mem_table(&regions(&machine.memory)).unwrap();
        assert_eq!(machine.read(2), 2);
    }
    let more = memory_file();
    let mut both = regions(&machine.memory);
    both.extend(
        regions(&more)
            .into_iter()
            .map(|region| VhostUserMemoryRegionInfo { guest_phys_addr: 1 << 32, ..region }),
    );
    machine.front.set_mem_table(&both).unwrap();
    let header = [[0; 8], 9u64.to_le_bytes()].concat();
    machine.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
    let length = machine.queue.run(&[
        Piece { address: HEADER, length: 16, writable: false },
        Piece { address: (1 << 32) + DATA, length: 512, writable: true },
        Piece { address: STATUS, length: 1, writable: true },
    ]);
    assert_eq!(length, 513);
    assert_eq!(more.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 9);
}

#[test]
fn the_call_is_changed_while_the_queue_runs() {
    let mut machine = Machine::new(disk(), true);
    machine.start(0);
    assert_eq!(machine.read(1), 1);
    let other = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    machine.front.set_vring_call(0, &other).unwrap();
    let old = std::mem::replace(&mut machine.queue.call, other);
    // The buffer used before may have been seen before its call came.
    let _call_of_the_first = old.read();
    assert_eq!(machine.read(2), 2);
    assert!(old.read().is_err());
}

#[test]
fn nonsense_ends_the_connection() {
    let check = |nonsense: fn(&mut Machine) -> bool| {
        let mut machine = Machine::new(disk(), true);
        assert!(nonsense(&mut machine), "it was accepted");
        let Machine { server, .. } = machine;
        server.join();
    };
    check(|machine| machine.front.set_vring_num(0, 100).is_err());
    check(|machine| machine.front.set_vring_num(0, 512).is_err());
    check(|machine| machine.front.set_vring_num(7, 64).is_err());
    check(|machine| {
        machine.front.set_vring_kick(0, &machine.queue.kick).is_ok() && {
            // Started without addresses.
            machine.front.set_vring_enable(0, true).is_err()
        }
    });
    check(|machine| {
        let nowhere = VringConfigData { queue_size: 64, queue_max_size: 64, ..VringConfigData::default() };
        machine.front.set_vring_addr(0, &nowhere).is_err()
    });
    check(|machine| machine.front.set_vring_enable(2, true).is_err());
}

/// Counts what a transport does with a device.
#[derive(Default)]
struct Calls {
    started: AtomicUsize,
    stopped: AtomicUsize,
    reset: AtomicUsize,
}

struct Recorder(Arc<Calls>);

impl VirtioDevice for Recorder {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn features(&self) -> u64 {
        1 << 32
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn ack_features(&mut self, _features: u64) {}
    fn start_queue(&mut self, _index: usize, _resources: QueueResources) -> Result<(), DeviceError> {
        self.0.started.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn stop_queue(&mut self, _index: usize) -> Option<QueueState> {
        self.0.stopped.fetch_add(1, Ordering::SeqCst);
        None
    }
    fn reset(&mut self) {
        self.0.reset.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_driver_that_starts_over_finds_a_device_that_was_reset() {
    let calls = Arc::new(Calls::default());
    let mut machine = Machine::new(Box::new(Recorder(Arc::clone(&calls))), true);
    machine.start(0);
    assert_eq!((calls.started.load(Ordering::SeqCst), calls.reset.load(Ordering::SeqCst)), (1, 0));
    machine.front.get_vring_base(0).unwrap();
    machine.start(7);
    assert_eq!((calls.started.load(Ordering::SeqCst), calls.reset.load(Ordering::SeqCst)), (2, 0));
    machine.front.get_vring_base(0).unwrap();
    machine.start(0);
    assert_eq!((calls.started.load(Ordering::SeqCst), calls.reset.load(Ordering::SeqCst)), (3, 1));
}

#[test]
fn a_device_is_reset_when_the_front_end_goes() {
    let calls = Arc::new(Calls::default());
    let mut machine = Machine::new(Box::new(Recorder(Arc::clone(&calls))), true);
    machine.start(0);
    let Machine { front, server, .. } = machine;
    drop(front);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !server.is_finished() {
        assert!(Instant::now() < deadline, "the thread has not ended");
        thread::yield_now();
    }
    assert_eq!(calls.reset.load(Ordering::SeqCst), 1);
}

#[test]
fn stopping_closes_the_connection() {
    let machine = Machine::new(disk(), true);
    let Machine { front, server, .. } = machine;
    server.stop();
    assert!(front.get_features().is_err());
}

//! The disk against the driver's side of its queue.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::request::MAX_RANGE_SECTORS;
use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::driver::{self, DriverQueue, Piece};

const DISK_BYTES: u64 = 16 << 20;
const QUEUE: u64 = 0;
const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;

/// For what comes at once on a computer that has time.
const LIMIT: Duration = Duration::from_secs(30);

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

struct Disk {
    device: Block,
    queue: DriverQueue,
    memory: Arc<GuestMemoryMmap>,
    file: File,
}

impl Disk {
    fn new(read_only: bool) -> Self {
        Self::with(read_only, false, 1)
    }

    fn with(read_only: bool, event_idx: bool, queues: usize) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(DISK_BYTES).unwrap();
        Self::on(file, read_only, event_idx, queues)
    }

    fn on(file: File, read_only: bool, event_idx: bool, queues: usize) -> Self {
        let device = Block::from_file(file.try_clone().unwrap(), "serial-0", read_only, queues).unwrap();
        let memory = driver::memory(8 << 20);
        let queue = DriverQueue::new(&memory, QUEUE, 64, event_idx);
        let mut disk = Self { device, queue, memory, file };
        disk.device.ack_features(disk.device.features());
        disk.device.start_queue(0, disk.queue.resources()).unwrap();
        disk
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    }

    /// Runs a request whose data lies in one piece; returns its status and how much the device wrote.
    fn request(&mut self, kind: u32, sector: u64, data: u32) -> (u8, u32) {
        self.header(kind, sector);
        let device_writes = matches!(kind, 0 | 8);
        let mut pieces = vec![Piece { address: HEADER, length: 16, writable: false }];
        if data > 0 {
            pieces.push(Piece { address: DATA, length: data, writable: device_writes });
        }
        pieces.push(Piece { address: STATUS, length: 1, writable: true });
        let length = self.queue.run(&pieces);
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), length)
    }

    fn fill(&self, byte: u8, length: usize) {
        self.memory.write_slice(&vec![byte; length], GuestAddress(DATA)).unwrap();
    }

    fn data(&self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    /// A discard or write-zeroes request with these ranges.
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.request(kind, 0, bytes.len() as u32).0
    }

    fn host_blocks(&self) -> u64 {
        self.file.sync_all().unwrap();
        self.file.metadata().unwrap().blocks()
    }
}

#[test]
fn what_is_written_is_read_again() {
    let mut disk = Disk::new(false);
    disk.fill(0xa5, 1 << 20);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 8, 1 << 20), (OK, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, 0), (OK, 1));
    disk.fill(0, 1 << 20);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 8, 1 << 20), (OK, (1 << 20) + 1));
    assert!(disk.data(1 << 20).iter().all(|byte| *byte == 0xa5));
    let mut on_host = [0; 512];
    disk.file.read_exact_at(&mut on_host, 8 * 512).unwrap();
    assert_eq!(on_host, [0xa5; 512]);
    let counters = disk.device.counters();
    assert_eq!((counters.writes.get(), counters.reads.get(), counters.flushes.get()), (1, 1, 1));
    assert_eq!((counters.written_bytes.get(), counters.read_bytes.get()), (1 << 20, 1 << 20));
}

/// What became of a disk that was to be `size_bytes` large.
fn grow(disk: &Disk, size_bytes: u64) -> Result<u64, GrowError> {
    let (told, answer) = mpsc::channel();
    disk.device.handle().grow(size_bytes, move |result| told.send(result).unwrap());
    answer.recv().unwrap()
}

fn capacity(disk: &Disk) -> (u64, u32) {
    let mut bytes = [0; 8];
    disk.device.read_config(0, &mut bytes);
    (u64::from_le_bytes(bytes), disk.device.config_generation())
}

#[test]
fn a_disk_grows_while_it_is_used_and_the_driver_is_told() {
    let mut disk = Disk::new(false);
    let end = DISK_BYTES / 512;
    disk.fill(0xa5, 512);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, end - 1, 512), (OK, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, end, 512), (IOERR, 1));
    assert_eq!(capacity(&disk), (end, 0));
    assert_eq!(grow(&disk, 8 << 30).unwrap(), 8 << 30);
    driver::wait(&[&disk.queue.config], Duration::from_secs(60));
    assert_eq!(capacity(&disk), ((8 << 30) / 512, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, end, 512), (OK, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, end - 1, 1024), (OK, 1025));
    assert!(disk.data(1024).iter().all(|byte| *byte == 0xa5));
    let metadata = disk.file.metadata().unwrap();
    assert!(metadata.len() == 8 << 30 && metadata.blocks() < 2048, "{metadata:?}");
}

#[test]
fn a_disk_that_cannot_grow_stays_as_it_was() {
    let disk = Disk::new(false);
    let before = capacity(&disk);
    // More than any file may have.
    for size_bytes in [u64::MAX, 1 << 63] {
        let error = grow(&disk, size_bytes).unwrap_err();
        assert!(matches!(error, GrowError::File { .. }), "{error}");
        assert_eq!(error.to_string(), format!("the disk's file cannot be made {size_bytes} bytes large"));
    }
    let error = grow(&disk, DISK_BYTES - 512).unwrap_err().to_string();
    assert!(error.ends_with("never shrinks to 16776704"), "{error}");
    assert_eq!((capacity(&disk), disk.file.metadata().unwrap().len()), (before, DISK_BYTES));
    assert_eq!(disk.queue.config.read().ok(), None, "nobody was told anything");
    let handle = disk.device.handle();
    drop(disk.device);
    let (told, answer) = mpsc::channel();
    handle.grow(1 << 30, move |result| told.send(result).unwrap());
    assert!(matches!(answer.recv().unwrap(), Err(GrowError::Gone)));
}

#[test]
fn a_driver_that_comes_later_sees_the_new_size() {
    let mut disk = Disk::new(false);
    disk.device.reset();
    assert_eq!(grow(&disk, 1 << 30).unwrap(), 1 << 30);
    assert_eq!(capacity(&disk).0, (1 << 30) / 512);
    disk.queue = DriverQueue::new(&disk.memory, QUEUE, 64, false);
    disk.device.start_queue(0, disk.queue.resources()).unwrap();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, (1 << 21) - 1, 512), (OK, 513));
}

#[test]
fn a_request_may_be_cut_into_pieces_anywhere() {
    let mut disk = Disk::new(false);
    disk.file.write_all_at(&[7; 1024], 1024).unwrap();
    disk.header(VIRTIO_BLK_T_IN, 2);
    let readable = |address, length| Piece { address, length, writable: false };
    let writable = |address, length| Piece { address, length, writable: true };
    let length = disk.queue.run(&[
        readable(HEADER, 3),
        readable(HEADER + 3, 12),
        readable(HEADER + 15, 1),
        writable(DATA, 100),
        writable(DATA + 100, 412),
        // The last data and the status in one piece.
        writable(DATA + 512, 513),
    ]);
    assert_eq!(length, 1025);
    let data = disk.data(1025);
    assert!(data[..1024].iter().all(|byte| *byte == 7));
    assert_eq!(data[1024], OK);
}

#[test]
fn the_serial_number_is_padded() {
    let mut disk = Disk::new(false);
    disk.fill(0xff, 32);
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, 20), (OK, 21));
    assert_eq!(&disk.data(21), b"serial-0\0\0\0\0\0\0\0\0\0\0\0\0\xff");
}

#[test]
fn the_configuration_says_what_the_disk_can_do() {
    let disk = Disk::with(false, false, 4);
    let mut config = [0; 64];
    disk.device.read_config(0, &mut config);
    assert_eq!(config[..8], (DISK_BYTES / 512).to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[34..36], 4u16.to_le_bytes());
    assert_eq!(config[36..40], MAX_RANGE_SECTORS.to_le_bytes());
    assert_eq!(config[40..44], 32u32.to_le_bytes());
    assert_eq!(config[56], 1);
    assert_eq!(disk.device.queue_sizes(), [256; 4]);
    assert_ne!(disk.device.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(disk.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
}

#[test]
fn discarding_gives_the_blocks_back_to_the_host() {
    let mut disk = Disk::new(false);
    let empty = disk.host_blocks();
    disk.fill(1, 4 << 20);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, 4 << 20).0, OK);
    assert!(disk.host_blocks() >= empty + 8192);
    assert_eq!(disk.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 4096, 0), (4096, 4096, 0)]), OK);
    assert!(disk.host_blocks() < empty + 64, "the blocks are still there");
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 4096).0, OK);
    assert_eq!(disk.data(4096), [0; 4096]);
    assert_eq!(disk.file.metadata().unwrap().len(), DISK_BYTES);
}

#[test]
fn write_zeroes_frees_blocks_only_if_it_may() {
    let mut disk = Disk::new(false);
    disk.fill(1, 4 << 20);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, 4 << 20).0, OK);
    let full = disk.host_blocks();
    assert_eq!(disk.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 4096, 0)]), OK);
    let kept = disk.host_blocks();
    assert_eq!(disk.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 4096, 1)]), OK);
    assert!(disk.host_blocks() <= full - 4096 + 16);
    assert!(kept >= disk.host_blocks());
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 4096).0, OK);
    assert_eq!(disk.data(4096), [0; 4096]);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 4096, 512).0, OK);
    assert_eq!(disk.data(512), [1; 512]);
}

#[test]
fn what_a_disk_cannot_do_is_answered() {
    let last = DISK_BYTES / 512 - 1;
    let mut disk = Disk::new(false);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, last, 512).0, OK);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, last, 1024), (IOERR, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, last + 1, 512).0, IOERR);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, u64::MAX, 512).0, IOERR);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 511).0, IOERR);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, 0).0, IOERR);
    assert_eq!(disk.request(77, 0, 0).0, UNSUPP);
    assert_eq!(disk.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(disk.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 2)]), UNSUPP);
    assert_eq!(disk.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0), (last, 2, 0)]), IOERR);
    assert_eq!(disk.ranges(VIRTIO_BLK_T_DISCARD, &[(0, MAX_RANGE_SECTORS + 1, 0)]), IOERR);
    assert_eq!(disk.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, 0); 33]), IOERR);
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, 24).0, IOERR);
    let counters = disk.device.counters();
    assert_eq!(counters.unsupported.get(), 3);
    assert_eq!(counters.no_space.get(), 0);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let mut disk = Disk::new(true);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, 512).0, IOERR);
    assert_eq!(disk.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 512).0, OK);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, 0).0, OK);
    assert_ne!(disk.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(disk.device.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
}

/// A disk whose host has no space, and what its watcher is told.
fn full_disk() -> (Disk, mpsc::Receiver<bool>) {
    let disk = Disk::new(false);
    let (told, hears) = mpsc::channel();
    // The test may be over.
    disk.device.handle().watch(move |waits| told.send(waits).unwrap_or_default());
    // The kernel's own full disk: writing fails, and reading gives zeroes.
    disk.put(File::options().read(true).write(true).open("/dev/full").unwrap());
    (disk, hears)
}

impl Disk {
    fn put(&self, file: File) {
        self.device.front.mailbox().send(Message::Replace(file)).ok().unwrap();
    }

    /// Adds a request to write whose header and status are not where [`Disk::request`] has its own.
    fn add_write(&mut self, number: u64, sector: u64) -> u16 {
        let header = HEADER + 0x2000 * (1 + number);
        let bytes = [&VIRTIO_BLK_T_OUT.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write_slice(&bytes, GuestAddress(header)).unwrap();
        let head = self.queue.add(&[
            Piece { address: header, length: 16, writable: false },
            Piece { address: DATA, length: 4096, writable: false },
            Piece { address: header + 0x1000, length: 1, writable: true },
        ]);
        self.queue.notify();
        head
    }

    fn status(&self, number: u64) -> u8 {
        self.memory.read_obj(GuestAddress(HEADER + 0x2000 * (1 + number) + 0x1000)).unwrap()
    }
}

#[test]
fn what_is_written_while_the_hosts_disk_is_full_waits() {
    let (mut disk, hears) = full_disk();
    disk.fill(7, 4096);
    for number in 0..3 {
        disk.add_write(number, number * 8);
    }
    assert!(hears.recv_timeout(LIMIT).unwrap());
    // Others pass by.
    let (status, length) = disk.request(VIRTIO_BLK_T_IN, 0, 512);
    assert_eq!((status, length), (OK, 513));
    let counters = disk.device.counters();
    assert_eq!((counters.no_space.get(), counters.errors.get()), (3, 0));
    disk.fill(7, 4096);
    disk.put(disk.file.try_clone().unwrap());
    assert!(!hears.recv_timeout(LIMIT).unwrap());
    for number in 0..3 {
        assert!(disk.queue.take_used().is_some());
        assert_eq!(disk.status(number), OK);
    }
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 3 * 4096).0, OK);
    assert_eq!(disk.data(3 * 4096), [7; 3 * 4096]);
    assert!(hears.try_recv().is_err(), "only a change is told");
}

#[test]
fn what_waits_for_space_has_failed_when_its_queue_stops() {
    let (mut disk, hears) = full_disk();
    disk.add_write(0, 0);
    assert!(hears.recv_timeout(LIMIT).unwrap());
    let state = disk.device.stop_queue(0).unwrap();
    assert!(!hears.recv_timeout(LIMIT).unwrap());
    assert_eq!((state.next_used, disk.status(0)), (1, IOERR));
    assert_eq!(disk.device.counters().errors.get(), 1);
}

#[test]
fn no_more_waits_for_space_than_a_queue_holds() {
    let (mut disk, hears) = full_disk();
    let head = disk.add_write(0, 0);
    let counters = disk.device.counters();
    // The same one again and again, which no driver may do.
    (0..63).for_each(|_| disk.queue.publish(head));
    disk.queue.notify();
    let begun = Instant::now();
    while counters.no_space.get() < 64 {
        assert!(begun.elapsed() < LIMIT, "{} wait", counters.no_space.get());
        std::thread::sleep(Duration::from_millis(5));
    }
    (0..63).for_each(|_| disk.queue.publish(head));
    disk.queue.notify();
    assert!(hears.recv_timeout(LIMIT).unwrap());
    // A word through the mailbox comes after the kick.
    disk.put(disk.file.try_clone().unwrap());
    assert!(!hears.recv_timeout(LIMIT).unwrap());
    disk.device.stop_queue(0).unwrap();
    assert_eq!(counters.no_space.get(), 64);
}

#[test]
fn a_file_that_shrank_is_an_error_for_the_guest() {
    let mut disk = Disk::new(false);
    disk.file.set_len(4096).unwrap();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 4096).0, OK);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 4, 4096), (IOERR, 1));
}

#[test]
fn a_file_without_a_sector_is_no_disk() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(511).unwrap();
    let error = Backend::new(file, "", false).unwrap_err();
    assert_eq!(error.to_string(), "a disk of 511 bytes has not a single sector");
}

#[test]
fn hostile_chains_leave_the_disk_working() {
    let mut disk = Disk::new(false);
    let readable = |address, length| Piece { address, length, writable: false };
    let writable = |address, length| Piece { address, length, writable: true };
    // No status, no header, outside of memory, over the end of memory, four gigabytes, nothing at all.
    assert_eq!(disk.queue.run(&[readable(HEADER, 16)]), 0);
    assert_eq!(disk.queue.run(&[writable(STATUS, 1)]), 1);
    assert_eq!(disk.queue.run(&[readable(1 << 40, 16), writable(STATUS, 1)]), 0);
    assert_eq!(disk.queue.run(&[readable(HEADER, 16), writable((8 << 20) - 4, 8)]), 0);
    assert_eq!(disk.queue.run(&[readable(HEADER, 16), writable(DATA, u32::MAX), writable(STATUS, 1)]), 0);
    assert_eq!(disk.queue.run(&[readable(HEADER, 0), writable(DATA, 0)]), 0);
    // A chain that loops ends after as many descriptors as the queue has.
    disk.queue.store(60, readable(HEADER, 16), 1, 60);
    disk.queue.publish(60);
    disk.queue.notify();
    assert_eq!(disk.queue.wait_used(), (60, 0));
    // An indirect table that loops within itself.
    let table = 0x18_0000;
    let entry = [HEADER.to_le_bytes(), (16u64 | 1 << 32).to_le_bytes()].concat();
    disk.memory.write_slice(&entry, GuestAddress(table)).unwrap();
    disk.queue.store(61, readable(table, 16), 4, 0);
    disk.queue.publish(61);
    disk.queue.notify();
    assert_eq!(disk.queue.wait_used(), (61, 0));
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 512).0, OK);
}

#[test]
fn a_queue_whose_index_runs_away_stops_and_can_be_set_up_again() {
    let mut disk = Disk::new(false);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 512).0, OK);
    disk.memory.write_obj(0x7fffu16, GuestAddress(disk.queue.available.0 + 2)).unwrap();
    disk.queue.notify();
    let state = disk.device.stop_queue(0).unwrap();
    assert_eq!(state.next_avail, 1);
    assert!(disk.device.stop_queue(0).is_none());
    disk.device.reset();
    disk.queue = DriverQueue::new(&disk.memory, QUEUE, 64, false);
    disk.device.start_queue(0, disk.queue.resources()).unwrap();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 512).0, OK);
}

#[test]
fn a_stopped_queue_goes_on_where_it_was() {
    let mut disk = Disk::with(false, true, 1);
    for sector in 0..100 {
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, sector, 512).0, OK);
    }
    let state = disk.device.stop_queue(0).unwrap();
    assert_eq!((state.next_avail, state.next_used), (100, 100));
    disk.device.start_queue(0, disk.queue.resume(state)).unwrap();
    for sector in 0..100 {
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, sector, 512).0, OK);
    }
    assert!(disk.device.start_queue(1, disk.queue.resources()).is_err());
}

#[test]
fn queues_outside_of_memory_are_refused() {
    let mut disk = Disk::new(false);
    let mut resources = disk.queue.resources();
    resources.memory = driver::atomic(&driver::memory(1024));
    let error = disk.device.start_queue(0, resources).unwrap_err();
    assert_eq!(error.to_string(), "queue 0 of the block device does not lie in guest memory");
}

#[test]
fn several_queues_work_side_by_side() {
    let mut disk = Disk::with(false, true, 3);
    let mut others: Vec<DriverQueue> =
        (1..3).map(|index| DriverQueue::new(&disk.memory, index * 0x8000, 64, true)).collect();
    for (index, queue) in others.iter().enumerate() {
        disk.device.start_queue(index + 1, queue.resources()).unwrap();
    }
    disk.file.write_all_at(&[9; 512], 0).unwrap();
    disk.header(VIRTIO_BLK_T_IN, 0);
    for queue in &mut others {
        for slot in 0..20u64 {
            queue.add(&[
                Piece { address: HEADER, length: 16, writable: false },
                Piece { address: DATA + slot * 1024, length: 512, writable: true },
                Piece { address: DATA + slot * 1024 + 512, length: 1, writable: true },
            ]);
        }
        queue.notify();
    }
    for queue in &mut others {
        for _ in 0..20 {
            assert_eq!(queue.wait_used().1, 513);
        }
    }
    assert_eq!(disk.data(512), [9; 512]);
}

#[test]
fn the_file_handed_over_is_the_file_used() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[3; 1024]).unwrap();
    let mut disk = Disk::on(file.try_clone().unwrap(), false, false, 1);
    disk.fill(4, 512);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 1, 512).0, OK);
    drop(disk);
    file.rewind().unwrap();
    let mut all = Vec::new();
    file.read_to_end(&mut all).unwrap();
    assert_eq!((all.len(), all[511], all[512]), (1024, 3, 4));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_chain_is_answered(
        kind in prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
        sector in prop_oneof![0u64..40_000, any::<u64>()],
        pieces in prop::collection::vec((0u64..0x90_0000, 0u32..5000, any::<bool>()), 0..20),
    ) {
        let mut disk = Disk::new(false);
        disk.header(kind, sector);
        let mut chain = vec![Piece { address: HEADER, length: 16, writable: false }];
        // Beyond the rings, which lie in the first 64 KiB.
        chain.extend(pieces.iter().map(|&(address, length, writable)| Piece { address: address + 0x1_0000, length, writable }));
        disk.queue.run(&chain);
        prop_assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, 512).0, OK);
    }
}

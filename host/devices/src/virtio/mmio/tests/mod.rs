//! The registers against drivers, good and bad.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

mod saved;

use super::*;
use crate::virtio::block::Block;
use crate::virtio::device::{DeviceError, DeviceState, Interrupt, QueueResources, QueueState};
use crate::virtio::driver::{self, DriverQueue, Piece};

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

const STATUS: u64 = 0x70;
const HEADER: u64 = 0x10_0000;
const STATUS_BYTE: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;

/// What a transport has done with a device.
#[derive(Default)]
struct Log {
    features: Option<u64>,
    running: BTreeMap<usize, QueueResources>,
    config: Vec<u8>,
    resets: usize,
    generation: u32,
}

/// A device of two queues that does nothing but remember.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Log>>);

const RECORDER_FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 5;

impl Recorder {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap()
    }

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.log().running.values().next().expect("no queue runs").interrupt)
    }
}

impl VirtioDevice for Recorder {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn features(&self) -> u64 {
        RECORDER_FEATURES
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = (offset as u8).wrapping_add(index as u8);
        }
    }
    fn config_generation(&self) -> u32 {
        self.log().generation
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.log().config = [&offset.to_le_bytes(), data].concat();
    }
    fn ack_features(&mut self, features: u64) {
        self.log().features = Some(features);
    }
    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), DeviceError> {
        self.log().running.insert(index, resources);
        Ok(())
    }
    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        self.log().running.remove(&index).map(|resources| resources.queue.state())
    }
    fn reset(&mut self) {
        let mut log = self.log();
        let resets = log.resets + 1;
        *log = Log { resets, ..Log::default() };
    }
    fn save(&self) -> Result<DeviceState, DeviceError> {
        assert!(self.log().running.is_empty(), "saved while a queue runs");
        Ok(DeviceState { config: Vec::new(), model: vec![7] })
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let reason = || "it is not seven".to_owned();
        let fits = state.model == [7];
        fits.then_some(()).ok_or_else(|| DeviceError::InvalidState { kind: self.kind(), reason: reason() })
    }
}

/// A driver that knows the registers.
struct Machine {
    device: MmioDevice,
    irq: EventFd,
    memory: Arc<GuestMemoryMmap>,
}

impl Machine {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = driver::memory(4 << 20);
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = MmioDevice::new(device, driver::atomic(&memory), irq.try_clone().unwrap()).unwrap();
        Self { device, irq, memory }
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn features(&self) -> u64 {
        self.set(0x14, 0);
        let low = self.get(0x10);
        self.set(0x14, 1);
        u64::from(low) | u64::from(self.get(0x10)) << 32
    }

    /// Takes features; the status afterwards.
    fn negotiate(&self, features: u64) -> u32 {
        self.set(STATUS, ACKNOWLEDGE);
        self.set(STATUS, ACKNOWLEDGE | DRIVER);
        for (page, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(0x24, page);
            self.set(0x20, value);
        }
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.get(STATUS)
    }

    fn set_up(&self, index: u32, size: u32, [descriptors, available, used]: [u64; 3]) {
        self.set(0x30, index);
        self.set(0x38, size);
        for (register, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    fn set_up_queue(&self, index: u32, queue: &DriverQueue) {
        self.set_up(index, queue.size.into(), [queue.descriptors.0, queue.available.0, queue.used.0]);
    }

    fn go(&self) {
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }
}

const RINGS: [u64; 3] = [0x1000, 0x2000, 0x3000];

fn recorder() -> (Recorder, Machine) {
    let recorder = Recorder::default();
    (recorder.clone(), Machine::new(Box::new(recorder)))
}

fn running() -> (Recorder, Machine) {
    let (recorder, machine) = recorder();
    assert_eq!(machine.negotiate(1 << 32 | 1 << 29), 11);
    machine.set_up(0, 16, RINGS);
    machine.go();
    (recorder, machine)
}

fn disk(byte: u8) -> Box<dyn VirtioDevice> {
    Box::new(small_disk(byte))
}

fn small_disk(byte: u8) -> Block {
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[byte; 4096], 0).unwrap();
    Block::from_file(file, "disk", false, 2).unwrap()
}

/// Reads the first sector through `queue`; whoever kicks, kicks by register.
fn read_sector(machine: &Machine, queue: &mut DriverQueue) -> u8 {
    machine.memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    queue.add(&[
        Piece { address: HEADER, length: 16, writable: false },
        Piece { address: DATA, length: 512, writable: true },
        Piece { address: STATUS_BYTE, length: 1, writable: true },
    ]);
    machine.set(0x50, 0);
    assert_eq!(queue.wait_used().1, 513);
    machine.memory.read_obj(GuestAddress(DATA)).unwrap()
}

/// A driver's queue whose call is the device's interrupt.
fn queue_on(machine: &Machine, event_idx: bool) -> DriverQueue {
    let mut queue = DriverQueue::new(&machine.memory, 0x1000, 64, event_idx);
    queue.call = machine.irq.try_clone().unwrap();
    queue
}

#[test]
fn a_disk_is_found_negotiated_and_read() {
    let machine = Machine::new(disk(0x5a));
    assert_eq!([0, 4, 8].map(|offset| machine.get(offset)), [0x7472_6976, 2, 2]);
    assert_eq!(machine.device.kicks().len(), 2);
    let features = machine.features();
    assert_eq!(machine.negotiate(features), 11);
    assert_eq!(machine.get(0x34), 256);
    let mut queue = queue_on(&machine, true);
    machine.set_up_queue(0, &queue);
    assert_eq!(machine.get(0x44), 1);
    machine.go();
    let mut capacity = [0; 8];
    machine.device.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8);
    assert_eq!(read_sector(&machine, &mut queue), 0x5a);
    assert_eq!(machine.get(0x60), 1);
    machine.set(0x64, 1);
    assert_eq!(machine.get(0x60), 0);
    // The event that an ioeventfd writes does the same as the register.
    machine.memory.write_obj(0u8, GuestAddress(DATA)).unwrap();
    queue.add(&[
        Piece { address: HEADER, length: 16, writable: false },
        Piece { address: DATA, length: 512, writable: true },
        Piece { address: STATUS_BYTE, length: 1, writable: true },
    ]);
    machine.device.kicks()[0].write(1).unwrap();
    queue.wait_used();
    assert_eq!(machine.memory.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 0x5a);
}

#[test]
fn a_driver_may_start_over_at_any_time() {
    let machine = Machine::new(disk(1));
    for _ in 0..3 {
        let features = machine.features();
        assert_eq!(machine.negotiate(features), 11);
        let mut queue = queue_on(&machine, true);
        machine.set_up_queue(0, &queue);
        machine.go();
        assert_eq!(read_sector(&machine, &mut queue), 1);
        machine.set(STATUS, 0);
        assert_eq!([STATUS, 0x44, 0x60].map(|offset| machine.get(offset)), [0; 3]);
    }
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let (recorder, machine) = recorder();
    assert_eq!(machine.features(), RECORDER_FEATURES);
    assert_eq!(machine.negotiate(1 << 32 | 1 << 7), 3);
    // Without VERSION_1 the driver is a legacy one.
    assert_eq!(machine.negotiate(1 << 29), 3);
    assert_eq!(recorder.log().features, None);
    // DRIVER_OK means nothing before.
    machine.set_up(0, 16, RINGS);
    machine.go();
    assert_eq!(machine.get(STATUS), 3);
    assert!(recorder.log().running.is_empty());
    // Pages beyond the first two hold nothing that could be taken.
    machine.set(0x24, 2);
    machine.set(0x20, 1);
    assert_eq!(machine.negotiate(1 << 32), 3);
    machine.set(0x24, 2);
    machine.set(0x20, 0);
    machine.set(0x24, 1000);
    machine.set(0x20, 1);
    assert_eq!(machine.negotiate(1 << 32 | 1 << 5), 11);
    assert_eq!(recorder.log().features, Some(1 << 32 | 1 << 5));
    for page in [2, 3, u32::MAX] {
        machine.set(0x14, page);
        assert_eq!(machine.get(0x10), 0);
    }
}

#[test]
fn features_and_queues_are_settled_once_they_hold() {
    let (recorder, machine) = running();
    machine.set(0x24, 0);
    machine.set(0x20, 0xffff_ffff);
    machine.go();
    assert_eq!(recorder.log().features, Some(1 << 32 | 1 << 29));
    machine.set(0x38, 4);
    machine.set(0x80, 0xdead_0000);
    let saved = machine.device.save().unwrap();
    machine.device.resume();
    assert_eq!((saved.queues[0].size, saved.queues[0].addresses.descriptors), (16, 0x1000));
    // Taking bits back is not possible, only starting over.
    machine.set(STATUS, ACKNOWLEDGE);
    assert_eq!(machine.get(STATUS), 15);
}

#[test]
fn queues_run_from_driver_ok_until_they_are_stopped() {
    let (recorder, machine) = recorder();
    let running = || recorder.log().running.keys().copied().collect::<Vec<_>>();
    machine.negotiate(1 << 32);
    machine.set_up(1, 16, RINGS);
    assert_eq!((running(), machine.get(0x44)), (vec![], 1));
    machine.go();
    assert_eq!(running(), [1]);
    machine.set_up(0, 64, RINGS);
    assert_eq!(running(), [0, 1]);
    machine.set(0x44, 0);
    assert_eq!((running(), machine.get(0x44)), (vec![1], 0));
    machine.set(STATUS, FAILED);
    assert_eq!((running(), machine.get(STATUS)), (vec![], 15 | FAILED));
    machine.set(0x44, 1);
    assert_eq!(running(), [0usize; 0]);
    machine.set(STATUS, 0);
    assert_eq!((machine.get(STATUS), recorder.log().resets), (0, 1));
}

#[test]
fn a_queue_that_cannot_be_asks_for_a_reset() {
    let check = |index, size, rings: [u64; 3], ready| {
        let machine = Machine::new(disk(0));
        assert_eq!(machine.negotiate(1 << 32), 11);
        machine.set_up(index, size, rings);
        assert_eq!(machine.get(0x44), u32::from(ready));
        machine.go();
        assert_eq!(machine.get(STATUS), 15 | NEEDS_RESET, "{index} {size} {rings:x?}");
        machine.set(STATUS, 0);
        assert_eq!(machine.get(STATUS), 0);
    };
    check(0, 0, RINGS, false);
    check(0, 12, RINGS, false);
    check(0, 512, RINGS, false);
    check(0, 1 << 16 | 16, RINGS, false);
    check(1, 16, [0x1001, 0x2000, 0x3000], false);
    check(1, 16, [0x1000, 0x2001, 0x3000], false);
    check(1, 16, [0x1000, 0x2000, 0x3002], false);
    // Whether rings lie in memory is seen when the queue starts.
    check(0, 16, [1 << 40, 0x2000, 0x3000], true);
    check(0, 16, [0x1000, (4 << 20) - 4, 0x3000], true);
    check(0, 16, [0x1000, 0x2000, u64::MAX - 3], true);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_interrupts() {
    let machine = Machine::new(disk(0));
    machine.negotiate(1 << 32);
    let queue = queue_on(&machine, false);
    machine.set_up_queue(0, &queue);
    machine.go();
    // The index runs ahead by more than the queue has.
    machine.memory.write_obj(1000u16, GuestAddress(queue.available.0 + 2)).unwrap();
    machine.set(0x50, 0);
    driver::wait(&[&machine.irq], std::time::Duration::from_secs(60));
    assert_eq!((machine.get(STATUS), machine.get(0x60)), (15 | NEEDS_RESET, 2));
}

#[test]
fn configuration_changes_are_told_and_counted() {
    let (recorder, machine) = running();
    assert_eq!((machine.get(0xfc), machine.get(0x60)), (0, 0));
    recorder.log().generation = 5;
    recorder.interrupt().signal_config().unwrap();
    assert_eq!((machine.get(0xfc), machine.get(0x60)), (5, 2));
    assert_eq!(machine.irq.read().unwrap(), 1);
    recorder.interrupt().signal_used().unwrap();
    machine.set(0x64, 2);
    assert_eq!(machine.get(0x60), 1);
}

#[test]
fn a_disk_that_grows_raises_the_configuration_interrupt() {
    let disk = small_disk(0);
    let handle = disk.handle();
    let machine = Machine::new(Box::new(disk));
    machine.negotiate(1 << 32);
    let queue = queue_on(&machine, false);
    machine.set_up_queue(0, &queue);
    machine.go();
    let capacity = || u64::from(machine.get(0x100)) | u64::from(machine.get(0x104)) << 32;
    let (before, generation) = (capacity(), machine.get(0xfc));
    let (told, answer) = std::sync::mpsc::channel();
    handle.grow(before * 512 + (4 << 40), move |result| told.send(result.unwrap()).unwrap());
    assert_eq!(answer.recv().unwrap(), before * 512 + (4 << 40));
    driver::wait(&[&machine.irq], std::time::Duration::from_secs(60));
    assert_eq!((machine.get(0x60), machine.get(0xfc)), (2, generation + 1));
    assert_eq!(capacity(), before + (1 << 33));
}

#[test]
fn configuration_space_is_read_and_written_in_any_width() {
    let (recorder, machine) = recorder();
    let mut bytes = [0; 3];
    machine.device.read(0x105, &mut bytes);
    assert_eq!(bytes, [5, 6, 7]);
    machine.device.write(0x108, &[1, 2]);
    assert_eq!(recorder.log().config, [8, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
}

#[test]
fn accesses_of_another_shape_read_zero_and_write_nothing() {
    let (recorder, machine) = recorder();
    let mut eight = [0xff; 8];
    machine.device.read(0, &mut eight);
    assert_eq!(eight, [0; 8]);
    let mut one = [0xff];
    machine.device.read(0, &mut one);
    assert_eq!(one, [0]);
    let mut word = [0xff; 4];
    machine.device.read(2, &mut word);
    assert_eq!(word, [0; 4]);
    machine.device.write(STATUS, &[1]);
    machine.device.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    machine.device.write(STATUS - 1, &[1, 1, 1, 1]);
    assert_eq!(machine.get(STATUS), 0);
    // A register of the other direction, one that is not there, a queue that is not there.
    assert_eq!([0x20, 0x50, 0xc0, 0xf8].map(|offset| machine.get(offset)), [0; 4]);
    machine.set(0, 1);
    machine.set(0x30, 2);
    assert_eq!((machine.get(0x34), machine.get(0x44)), (0, 0));
    machine.set(0x44, 1);
    machine.set(0x50, 2);
    machine.set(0x50, u32::MAX);
    assert!(recorder.log().running.is_empty());
    // No shared memory.
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|offset| machine.get(offset)), [u32::MAX; 4]);
}

/// What a driver can do, with more weight on what means something.
fn action() -> impl Strategy<Value = (u64, u32)> {
    let register = prop_oneof![
        4 => prop::sample::select(vec![0x70u64]),
        8 => prop::sample::select(vec![0x14u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x44, 0x50, 0x64, 0x80, 0x90, 0xa0]),
        1 => (0u64..0x200).prop_map(|offset| offset & !3),
    ];
    let value = prop_oneof![
        6 => prop::sample::select(vec![0u32, 1, 1, 2, 3, 11, 15, 15, 16, 64, 128, 0x1000, 0x2000, 0x3000]),
        1 => any::<u32>(),
    ];
    (register, value)
}

proptest! {
    #[test]
    fn the_registers_hold_what_they_promise(actions in prop::collection::vec(action(), 0..120), begun in any::<bool>()) {
        let (recorder, machine) = if begun { running() } else { recorder() };
        for (offset, value) in actions {
            let before = machine.get(STATUS);
            machine.set(offset, value);
            let status = machine.get(STATUS);
            let log = recorder.log();
            if offset == STATUS && value == 0 {
                prop_assert_eq!(status, 0);
            } else {
                prop_assert_eq!(status & before, before, "bits were taken back");
            }
            prop_assert_eq!(status & !0xcf, 0, "an unknown bit");
            prop_assert!(status & DRIVER_OK == 0 || status & FEATURES_OK != 0);
            prop_assert_eq!(status & FEATURES_OK != 0, log.features.is_some());
            if let Some(features) = log.features {
                prop_assert_eq!(features & !RECORDER_FEATURES, 0);
                prop_assert!(features & 1 << 32 != 0);
            }
            prop_assert!(log.running.is_empty() || (status & DRIVER_OK != 0 && status & FAILED == 0));
            for (index, resources) in &log.running {
                use virtio_queue::QueueT;
                let maximum = [64, 16][*index];
                let size = resources.queue.size();
                prop_assert!(size.is_power_of_two() && size <= maximum);
            }
            let ran: Vec<usize> = log.running.keys().copied().collect();
            drop(log);
            let saved = machine.device.save().unwrap();
            prop_assert!(recorder.log().running.is_empty());
            machine.device.resume();
            for (index, queue) in saved.queues.iter().enumerate() {
                let runs = recorder.log().running.contains_key(&index);
                prop_assert_eq!(runs, ran.contains(&index), "a pause is all that it is");
                prop_assert!(!runs || queue.ready);
                prop_assert!(runs || !queue.ready || status & DRIVER_OK == 0 || status & FAILED != 0);
            }
        }
    }
}

//! The device against the driver's side of its queue.

use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use vm_memory::Bytes;

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::driver::{self, DriverQueue, Piece};

const DATA: u64 = 0x2_0000;
const ANSWER: u64 = 0x3_0000;
const START: u64 = 4 << 30;
const BLOCKS: u64 = 100;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

// Types of responses.
const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

struct Machine {
    device: Mem,
    queue: DriverQueue,
    discarded: Receiver<(u64, u64)>,
}

fn device() -> (Mem, Receiver<(u64, u64)>) {
    let (sender, discarded) = mpsc::channel();
    let discard = move |start: GuestAddress, length: u64| {
        sender.send(((start.0 - START) / BLOCK_BYTES, length / BLOCK_BYTES)).unwrap();
    };
    // A rest is not used.
    let bytes = BLOCKS * BLOCK_BYTES + 4096;
    let backend = Backend { start: GuestAddress(START), bytes, discard: Box::new(discard) };
    (Mem::new(backend).unwrap(), discarded)
}

fn machine() -> Machine {
    let (mut device, discarded) = device();
    device.ack_features(device.features());
    let queue = DriverQueue::new(&driver::memory(4 << 20), 0x1000, 16, true);
    device.start_queue(0, queue.resources()).unwrap();
    Machine { device, queue, discarded }
}

impl Machine {
    /// Wants the guest to have so many blocks of the first `usable`.
    fn request(&self, blocks: u64, usable: u64) -> Receiver<u64> {
        let (sender, told) = mpsc::channel();
        let bytes = (blocks * BLOCK_BYTES).saturating_sub(1);
        self.device.handle().request(bytes, usable * BLOCK_BYTES, move |bytes| {
            sender.send(bytes / BLOCK_BYTES).unwrap();
        });
        told
    }

    fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.queue.memory.write_slice(&request, GuestAddress(DATA)).unwrap();
        self.queue.memory.write_slice(&[0xff; 10], GuestAddress(ANSWER)).unwrap();
        let pieces = [
            Piece { address: DATA, length: 24, writable: false },
            Piece { address: ANSWER, length: 10, writable: true },
        ];
        assert_eq!(self.queue.run(&pieces), 10);
        let answer: [u16; 5] = self.queue.memory.read_obj(GuestAddress(ANSWER)).unwrap();
        assert_eq!(answer[1..4], [0; 3]);
        (u16::from_le(answer[0]), u16::from_le(answer[4]))
    }

    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        self.ask_at(kind, START + block * BLOCK_BYTES, count)
    }

    /// Usable, plugged and requested blocks, as the driver reads them.
    fn sizes(&self) -> [u64; 3] {
        [USABLE, PLUGGED, REQUESTED].map(|offset| {
            let mut bytes = [0; 8];
            self.device.read_config(offset as u64, &mut bytes);
            u64::from_le_bytes(bytes) / BLOCK_BYTES
        })
    }

    fn discarded(&self) -> Vec<(u64, u64)> {
        self.discarded.try_iter().collect()
    }
}

#[test]
fn the_driver_reads_where_the_memory_is() {
    let machine = machine();
    for (offset, expected) in [(BLOCK, BLOCK_BYTES), (ADDRESS, START), (REGION, BLOCKS * BLOCK_BYTES)] {
        let mut bytes = [0; 8];
        machine.device.read_config(offset as u64, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), expected);
    }
    assert_eq!(machine.sizes(), [0, 0, 0]);
    assert!(machine.device.features() & 1 << F_UNPLUGGED_INACCESSIBLE != 0);
}

#[test]
fn a_guest_gets_memory_and_gives_it_back() {
    let mut machine = machine();
    assert_eq!(machine.ask(PLUG, 0, 1), ERROR, "nothing is usable yet");
    let told = machine.request(10, 64);
    assert_eq!(machine.ask(PLUG, 0, 6), ACK);
    assert_eq!(machine.sizes(), [64, 6, 10]);
    assert!(told.try_recv().is_err(), "the guest has less than it is to have");
    assert_eq!(machine.ask(PLUG, 60, 5), ERROR, "the last is not usable");
    assert_eq!(machine.ask(PLUG, 59, 5), NACK, "one more than requested");
    assert_eq!(machine.ask(PLUG, 60, 4), ACK);
    assert_eq!(told.recv().unwrap(), 10);
    for (block, count, state) in [(0, 6, 0), (6, 54, 1), (5, 2, 2), (60, 4, 0), (0, 64, 2)] {
        assert_eq!(machine.ask(STATE, block, count), (0, state), "{count} blocks at {block}");
    }
    assert_eq!(machine.discarded(), []);

    let told = machine.request(3, 8);
    assert_eq!(machine.ask(UNPLUG, 0, 7), ERROR, "one of them is not plugged");
    assert_eq!(machine.ask(UNPLUG, 2, 4), ACK);
    assert_eq!(machine.ask(UNPLUG, 61, 3), ACK, "what was usable stays so");
    assert_eq!(told.recv().unwrap(), 3);
    assert_eq!(machine.discarded(), [(2, 4), (61, 3)]);
    assert_eq!(machine.sizes(), [64, 3, 3]);

    assert_eq!(machine.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(machine.discarded(), [(0, 2), (60, 1)]);
    assert_eq!(machine.sizes(), [64, 0, 3]);
    let counters = machine.device.counters();
    assert_eq!((counters.plugged.get(), counters.unplugged.get()), (10, 10));
    assert_eq!((counters.refused.get(), counters.errors.get()), (1, 3));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut machine = machine();
    drop(machine.request(BLOCKS, u64::MAX / BLOCK_BYTES));
    assert_eq!(machine.sizes(), [BLOCKS, 0, BLOCKS]);
    for (address, count) in [
        (START, 0),
        (START + 1, 1),
        (START + BLOCK_BYTES / 2, 1),
        (START - BLOCK_BYTES, 2),
        (0, 1),
        (u64::MAX, 1),
        (u64::MAX - BLOCK_BYTES + 1, u16::MAX),
        (START + BLOCKS * BLOCK_BYTES, 1),
        (START, BLOCKS as u16 + 1),
        (START, u16::MAX),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(machine.ask_at(kind, address, count), ERROR, "{kind} of {count} at {address:#x}");
        }
    }
    assert_eq!(machine.ask(4, 0, 1), ERROR);
    assert_eq!(machine.ask(u16::MAX, 0, 1), ERROR);
    assert_eq!(machine.ask(PLUG, 0, 2), ACK);
    assert_eq!(machine.ask(PLUG, 1, 1), ERROR, "it is plugged");
    assert_eq!(machine.ask(UNPLUG, 2, 1), ERROR, "it is not plugged");
    // Too short for a request, or for a response.
    for (request, response) in [(23, 10), (24, 9), (24, 0), (0, 10)] {
        let pieces: Vec<_> = [(DATA, request, false), (ANSWER, response, true)]
            .into_iter()
            .filter(|(_, length, _)| *length > 0)
            .map(|(address, length, writable)| Piece { address, length, writable })
            .collect();
        assert_eq!(machine.queue.run(&pieces), 0);
    }
    assert_eq!(machine.device.counters().malformed.get(), 4);
    assert_eq!(machine.sizes(), [BLOCKS, 2, BLOCKS]);
    assert_eq!(machine.discarded(), []);
}

#[test]
fn whoever_waits_is_told_when_it_can_get_no_better() {
    let (mut device, _discarded) = device();
    let ask = |device: &Mem, blocks: u64| {
        let (sender, told) = mpsc::channel();
        device.handle().request(blocks * BLOCK_BYTES, BLOCKS * BLOCK_BYTES, move |bytes| {
            sender.send(bytes).unwrap();
        });
        told
    };
    // No driver.
    assert_eq!(ask(&device, 5).recv().unwrap(), 0);
    let queue = DriverQueue::new(&driver::memory(4 << 20), 0x1000, 16, true);
    device.start_queue(0, queue.resources()).unwrap();
    // A driver that does nothing, and another wish.
    let first = ask(&device, 6);
    let second = ask(&device, 7);
    assert_eq!(first.recv().unwrap(), 0);
    assert!(second.recv_timeout(Duration::from_millis(50)).is_err());
    // The guest has what it is to have.
    assert_eq!(ask(&device, 0).recv().unwrap(), 0);
    assert_eq!(second.recv().unwrap(), 0);
    // A driver that does nothing, for long.
    let third = ask(&device, 7);
    assert_eq!(third.recv().unwrap(), 0);
    // A device that goes.
    let handle = device.handle();
    let last = ask(&device, 8);
    drop(device);
    assert!(last.recv().is_err());
    let (sender, told) = mpsc::channel();
    handle.request(1, 1, move |bytes| sender.send(bytes).unwrap());
    assert!(told.recv().is_err());
}

#[test]
fn memory_outlives_a_reset_and_a_saved_device() {
    let mut machine = machine();
    let told = machine.request(9, 64);
    assert_eq!(machine.ask(PLUG, 3, 9), ACK);
    assert_eq!(told.recv().unwrap(), 9);
    machine.device.stop_queue(0).unwrap();
    let state = machine.device.save().unwrap();
    machine.device.reset();
    assert_eq!(machine.sizes(), [64, 9, 9]);

    let (mut other, discarded) = device();
    other.restore(&state).unwrap();
    let queue = DriverQueue::new(&driver::memory(4 << 20), 0x1000, 16, true);
    other.start_queue(0, queue.resources()).unwrap();
    let mut machine = Machine { device: other, queue, discarded };
    assert_eq!(machine.sizes(), [64, 9, 9]);
    assert_eq!(machine.ask(STATE, 3, 9), (0, 0));
    assert_eq!(machine.ask(PLUG, 20, 1), NACK);
    assert_eq!(machine.ask(UNPLUG, 4, 8), ACK);
    assert_eq!(machine.discarded(), [(4, 8)]);

    // A state that does not fit is no state.
    let refused = |change: &dyn Fn(&mut crate::virtio::DeviceState)| {
        let mut state = state.clone();
        change(&mut state);
        device().0.restore(&state).unwrap_err().to_string()
    };
    assert!(refused(&|state| state.config[REGION + 3] ^= 1).contains("elsewhere"));
    assert!(refused(&|state| state.model.truncate(8)).contains("which blocks"));
    assert!(refused(&|state| state.model[0] ^= 1).contains("the sizes"));
    assert!(refused(&|state| state.config[USABLE + 3] = 0).contains("the sizes"));
    assert!(refused(&|state| state.config[USABLE + 7] = 1).contains("the sizes"));
    assert!(refused(&|state| state.config[REQUESTED + 3] = 0xff).contains("the sizes"));
}

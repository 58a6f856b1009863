//! The balloon against the driver's side of its queues.

use std::sync::mpsc;
use std::time::Duration;

use vm_memory::Bytes;

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::driver::{self, DriverQueue, Piece};

const DATA: u64 = 0x2_0000;
const MEMORY: u64 = 4 << 20;

struct Machine {
    device: Balloon,
    queues: Vec<DriverQueue>,
    discarded: mpsc::Receiver<(u64, u64)>,
}

fn device() -> (Balloon, mpsc::Receiver<(u64, u64)>) {
    let (sender, discarded) = mpsc::channel();
    let discard = move |start: GuestAddress, length| sender.send((start.0, length)).unwrap();
    (Balloon::new(Backend { discard: Box::new(discard) }).unwrap(), discarded)
}

/// A driver that takes all features but these.
fn machine(without: u64) -> Machine {
    let (mut device, discarded) = device();
    let memory = driver::memory(MEMORY as usize);
    let features = device.features() & !without;
    device.ack_features(features);
    let count = 2 + [F_STATS_VQ, F_PAGE_REPORTING].iter().filter(|bit| features & 1 << **bit != 0).count();
    let queues: Vec<DriverQueue> =
        (0..count as u64).map(|index| DriverQueue::new(&memory, 0x1000 + 0x4000 * index, 16, true)).collect();
    for (index, queue) in queues.iter().enumerate() {
        device.start_queue(index, queue.resources()).unwrap();
    }
    Machine { device, queues, discarded }
}

impl Machine {
    fn pages(&mut self, queue: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.queues[queue].memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let length = bytes.len() as u32;
        assert_eq!(self.queues[queue].run(&[Piece { address: DATA, length, writable: false }]), 0);
    }

    fn discarded(&self) -> Vec<(u64, u64)> {
        self.discarded.try_iter().collect()
    }

    fn answer(&self, free: u64) {
        let bytes = [&4u16.to_le_bytes()[..], &free.to_le_bytes()].concat();
        self.queues[2].memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
    }
}

#[test]
fn pages_in_the_balloon_are_given_back_neighbours_together() {
    let mut machine = machine(0);
    machine.pages(0, &[100, 101, 102, 200, 199, 198, 300]);
    assert_eq!(machine.discarded(), [(100 << 12, 3 << 12), (198 << 12, 3 << 12), (300 << 12, 1 << 12)]);
    let many: Vec<u32> = (0..900).collect();
    machine.pages(0, &many);
    assert_eq!(machine.discarded(), [(0, 900 << 12)]);
    machine.pages(1, &many);
    assert_eq!(machine.discarded(), []);
    let counters = machine.device.counters();
    assert_eq!((counters.inflated.get(), counters.deflated.get(), counters.malformed.get()), (907, 900, 0));
}

#[test]
fn pages_outside_of_memory_are_left_alone() {
    let mut machine = machine(0);
    let last = (MEMORY >> 12) as u32 - 1;
    machine.pages(0, &[u32::MAX, last, last + 1, 5]);
    // The run over the end of memory is no range of it.
    assert_eq!(machine.discarded(), [(5 << 12, 1 << 12)]);
    assert_eq!(machine.queues[0].run(&[Piece { address: DATA, length: 3, writable: false }]), 0);
    assert_eq!(machine.queues[0].run(&[Piece { address: DATA, length: 4, writable: true }]), 0);
    assert_eq!(machine.queues[0].run(&[Piece { address: 1 << 40, length: 4, writable: false }]), 0);
    assert_eq!(machine.discarded(), []);
    assert_eq!(machine.device.counters().malformed.get(), 5);
}

#[test]
fn free_ranges_are_given_back_without_being_asked_for() {
    // Reporting comes last, whether or not there are statistics.
    for (without, queue) in [(0, 3), (1 << F_STATS_VQ, 2)] {
        let mut machine = machine(without);
        let ranges = [(0x10_0000, 0x8_0000), (0x20_0000, 0x1000)];
        let pieces = ranges.map(|(address, length)| Piece { address, length, writable: true });
        assert_eq!(machine.queues[queue].run(&pieces), 0);
        assert_eq!(machine.discarded(), [(0x10_0000, 0x8_0000), (0x20_0000, 0x1000)]);
        let outside = Piece { address: MEMORY - 0x1000, length: 0x2000, writable: true };
        assert_eq!(machine.queues[queue].run(&[outside]), 0);
        assert_eq!(machine.queues[queue].run(&[Piece { address: 0, length: 0x1000, writable: false }]), 0);
        assert_eq!(machine.discarded(), []);
        let counters = machine.device.counters();
        assert_eq!((counters.reported_bytes.get(), counters.malformed.get()), (0x8_1000, 2));
    }
}

#[test]
fn a_guest_that_fills_free_pages_keeps_them() {
    let mut machine = machine(0);
    machine.device.write_config(POISON as u64, &0xaau32.to_le_bytes());
    let range = Piece { address: 0x10_0000, length: 0x1000, writable: true };
    assert_eq!(machine.queues[3].run(&[range]), 0);
    assert_eq!(machine.discarded(), []);
    assert_eq!(machine.device.counters().ignored_bytes.get(), 0x1000);
    machine.device.write_config(POISON as u64, &[0; 4]);
    assert_eq!(machine.queues[3].run(&[range]), 0);
    assert_eq!(machine.discarded(), [(0x10_0000, 0x1000)]);
}

#[test]
fn the_target_is_told_and_the_driver_follows() {
    let mut machine = machine(0);
    let handle = machine.device.handle();
    handle.set_target((1 << 20) + 100);
    driver::wait(&[&machine.queues[0].config], Duration::from_secs(60));
    let mut target = [0; 4];
    machine.device.read_config(0, &mut target);
    assert_eq!((u32::from_le_bytes(target), machine.device.config_generation()), (256, 1));
    machine.device.write_config(ACTUAL as u64, &256u32.to_le_bytes());
    machine.device.write_config(0, &[9; 4]);
    assert_eq!(handle.actual(), 1 << 20);
    // A saved machine keeps both.
    let (mut other, _) = device();
    other.restore(&machine.device.save().unwrap()).unwrap();
    assert_eq!(other.handle().actual(), 1 << 20);
    handle.set_target(u64::MAX);
    machine.device.read_config(0, &mut target);
    assert_eq!(target, [0xff; 4]);
    machine.device.reset();
    assert_eq!(handle.actual(), 0);
}

fn wait_answer(handle: &Handle, number: u64) -> Statistics {
    for _ in 0..1000 {
        let (count, statistics) = handle.statistics();
        if count >= number {
            return statistics;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no answer {number} within ten seconds");
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let mut machine = machine(0);
    let handle = machine.device.handle();
    machine.answer(1000);
    let buffer = [Piece { address: DATA, length: 10, writable: false }];
    machine.queues[2].add(&buffer);
    machine.queues[2].notify();
    assert_eq!(wait_answer(&handle, 1).free_bytes(), Some(1000));
    assert_eq!(machine.queues[2].take_used(), None);
    for round in 0..3 {
        handle.ask();
        machine.queues[2].wait_used();
        machine.answer(round);
        machine.queues[2].add(&buffer);
        machine.queues[2].notify();
        assert_eq!(wait_answer(&handle, 2 + round).free_bytes(), Some(round));
    }
    // The buffer that waits survives a stop of the queue.
    let state = machine.device.stop_queue(2).unwrap();
    assert_eq!(state.next_avail, 3);
    machine.device.start_queue(2, machine.queues[2].resume(state)).unwrap();
    assert_eq!(wait_answer(&handle, 5).free_bytes(), Some(2));
    handle.ask();
    machine.queues[2].wait_used();
}

#[test]
fn a_driver_with_too_many_answers_gets_all_but_one_back() {
    let mut machine = machine(0);
    machine.answer(7);
    let buffer = [Piece { address: DATA, length: 10, writable: false }];
    let heads: Vec<u16> = (0..4).map(|_| machine.queues[2].add(&buffer)).collect();
    machine.queues[2].notify();
    for head in &heads[..3] {
        assert_eq!(machine.queues[2].wait_used(), (*head, 0));
    }
    assert_eq!(machine.queues[2].take_used(), None);
    machine.device.handle().ask();
    assert_eq!(machine.queues[2].wait_used().0, heads[3]);
}

//! The source of randomness against the driver's side of its queue.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::driver::{self, DriverQueue, Piece};

const DATA: u64 = 0x2_0000;

fn machine(event_idx: bool) -> (Rng, DriverQueue) {
    let mut device = Rng::new().unwrap();
    let queue = DriverQueue::new(&driver::memory(1 << 20), 0x1000, 16, event_idx);
    device.ack_features(device.features());
    device.start_queue(0, queue.resources()).unwrap();
    (device, queue)
}

fn room(address: u64, length: u32) -> Piece {
    Piece { address, length, writable: true }
}

#[test]
fn buffers_are_filled_over_and_over_with_other_bytes() {
    for event_idx in [false, true] {
        let (device, mut queue) = machine(event_idx);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..100 {
            assert_eq!(queue.run(&[room(DATA, 30), room(DATA + 100, 34)]), 64);
            let mut bytes = [0; 134];
            queue.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
            assert!(bytes[30..100].iter().all(|byte| *byte == 0), "bytes outside of the buffers");
            assert!(seen.insert(bytes));
        }
        assert_eq!(device.counters().bytes.get(), 6400);
    }
}

#[test]
fn large_buffers_get_a_bounded_part() {
    let (_device, mut queue) = machine(true);
    assert_eq!(queue.run(&[room(DATA, 1 << 19)]), 4096);
}

#[test]
fn chains_without_room_are_handed_back() {
    let (device, mut queue) = machine(true);
    assert_eq!(queue.run(&[Piece { address: DATA, length: 64, writable: false }]), 0);
    assert_eq!(queue.run(&[room(1 << 40, 64)]), 0);
    assert_eq!(queue.run(&[room(u64::MAX, u32::MAX)]), 0);
    assert_eq!(device.counters().malformed.get(), 3);
    assert_eq!(queue.run(&[room(DATA, 64)]), 64);
}

#[test]
fn a_reset_and_a_new_start_find_it_working() {
    let (mut device, mut queue) = machine(true);
    assert_eq!(queue.run(&[room(DATA, 8)]), 8);
    let state = device.stop_queue(0).unwrap();
    assert_eq!((state.next_avail, state.next_used), (1, 1));
    device.start_queue(0, queue.resume(state)).unwrap();
    assert_eq!(queue.run(&[room(DATA, 8)]), 8);
    device.reset();
    assert!(device.stop_queue(0).is_none());
    assert!(device.start_queue(1, queue.resources()).is_err());
}

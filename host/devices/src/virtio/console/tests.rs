//! The console against the driver's side of its queues, and a host that reads or does not.

use std::io::{Read, Write};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::driver::{self, DriverQueue, Piece};

const OUT: u64 = 0x2_0000;
const IN: u64 = 0x8_0000;

struct Machine {
    device: Console,
    host: UnixStream,
    receive: DriverQueue,
    transmit: DriverQueue,
}

fn machine(event_idx: bool) -> Machine {
    let (host, guest) = UnixStream::pair().unwrap();
    let mut device = Console::new(guest).unwrap();
    let memory = driver::memory(1 << 20);
    let receive = DriverQueue::new(&memory, 0x1000, 16, event_idx);
    let transmit = DriverQueue::new(&memory, 0x4000, 16, event_idx);
    device.ack_features(device.features());
    device.start_queue(0, receive.resources()).unwrap();
    device.start_queue(1, transmit.resources()).unwrap();
    Machine { device, host, receive, transmit }
}

impl Machine {
    fn write(&mut self, bytes: &[u8]) {
        self.transmit.memory.write_slice(bytes, GuestAddress(OUT)).unwrap();
        let half = bytes.len() as u32 / 2;
        let length = self.transmit.run(&[
            Piece { address: OUT, length: half, writable: false },
            Piece { address: OUT + u64::from(half), length: bytes.len() as u32 - half, writable: false },
        ]);
        assert_eq!(length, 0);
    }
}

#[test]
fn what_the_guest_writes_is_read_on_the_host() {
    for event_idx in [false, true] {
        let mut machine = machine(event_idx);
        for round in 0..50 {
            let line = format!("line {round} of the guest\n");
            machine.write(line.as_bytes());
            let mut read = vec![0; line.len()];
            machine.host.read_exact(&mut read).unwrap();
            assert_eq!(read, line.as_bytes());
        }
        assert_eq!(machine.device.counters().dropped_bytes.get(), 0);
    }
}

#[test]
fn what_the_host_writes_is_read_in_the_guest() {
    let mut machine = machine(true);
    machine.host.write_all(b"hello").unwrap();
    assert_eq!(machine.receive.run(&[Piece { address: IN, length: 3, writable: true }]), 3);
    let rest = [(IN + 3, 1), (IN + 4, 9)].map(|(address, length)| Piece { address, length, writable: true });
    assert_eq!(machine.receive.run(&rest), 2);
    let mut bytes = [0; 6];
    machine.receive.memory.read_slice(&mut bytes, GuestAddress(IN)).unwrap();
    assert_eq!(&bytes, b"hello\0");
    // A buffer that waits is filled when something comes, and survives a stop of the queue.
    machine.receive.add(&[Piece { address: IN, length: 16, writable: true }]);
    machine.receive.notify();
    let state = machine.device.stop_queue(0).unwrap();
    assert_eq!(state.next_avail, 2);
    machine.device.start_queue(0, machine.receive.resume(state)).unwrap();
    machine.host.write_all(b"again").unwrap();
    assert_eq!(machine.receive.wait_used().1, 5);
}

#[test]
fn a_reader_that_sleeps_does_not_hold_the_guest() {
    let mut machine = machine(true);
    let piece = vec![b'x'; 32 * 1024];
    let mut written = 0;
    while machine.device.counters().dropped_bytes.get() == 0 {
        machine.write(&piece);
        written += piece.len() as u64;
        assert!(written < 64 << 20, "nothing is ever dropped");
    }
    let counters = machine.device.counters();
    assert_eq!(counters.output_bytes.get(), written);
    let kept = written - counters.dropped_bytes.get();
    let mut read = vec![0; kept as usize];
    machine.host.read_exact(&mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == b'x'));
    machine.write(b"and on it goes");
    let mut read = [0; 14];
    machine.host.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"and on it goes");
}

#[test]
fn a_console_that_nobody_reads_swallows() {
    let mut machine = machine(true);
    let (other, _) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut machine.host, other));
    machine.write(b"to nobody");
    machine.write(b"once more");
    assert_eq!(machine.device.counters().dropped_bytes.get(), 18);
}

#[test]
fn chains_of_the_wrong_direction_are_handed_back() {
    let mut machine = machine(true);
    machine.host.write_all(b"hello").unwrap();
    assert_eq!(machine.transmit.run(&[Piece { address: OUT, length: 8, writable: true }]), 0);
    assert_eq!(machine.receive.run(&[Piece { address: IN, length: 8, writable: false }]), 0);
    assert_eq!(machine.receive.run(&[Piece { address: 1 << 40, length: 8, writable: true }]), 0);
    assert_eq!(machine.device.counters().malformed.get(), 3);
    assert_eq!(machine.receive.run(&[Piece { address: IN, length: 8, writable: true }]), 5);
}

#[test]
fn a_new_size_is_told() {
    let machine = machine(true);
    machine.device.handle().resize(132, 43);
    let mut config = [0xff; 12];
    machine.device.read_config(0, &mut config);
    assert_eq!(config[..4], [132, 0, 43, 0]);
    assert_eq!(machine.device.config_generation(), 1);
    driver::wait(&[&machine.receive.config], std::time::Duration::from_secs(60));
    let saved = machine.device.save().unwrap();
    let (_, guest) = UnixStream::pair().unwrap();
    let mut other = Console::new(guest).unwrap();
    other.restore(&saved).unwrap();
    other.read_config(0, &mut config);
    assert_eq!(config[..4], [132, 0, 43, 0]);
}

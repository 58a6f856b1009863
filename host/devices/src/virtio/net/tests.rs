//! The card against the driver's side of its queues, and the other end of its socket.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::offload::tests::{frame, is_sound};
use super::offload::{Offload, Segmentation, complete};
use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::driver::{self, DriverQueue, Piece};

const OUT: u64 = 0x2_0000;
const IN: u64 = 0x10_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

struct Machine {
    device: Net,
    host: UnixStream,
    memory: Arc<GuestMemoryMmap>,
    receive: DriverQueue,
    transmit: DriverQueue,
    offloads: bool,
}

fn machine(offloads: bool, without: u64) -> Machine {
    let (host, stream) = UnixStream::pair().unwrap();
    host.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut device = Net::new(Backend { stream, offloads, mac: MAC, mtu: 1500 }).unwrap();
    let memory = driver::memory(4 << 20);
    let receive = DriverQueue::new(&memory, 0x1000, 64, true);
    let transmit = DriverQueue::new(&memory, 0x8000, 64, true);
    device.ack_features(device.features() & !without);
    device.start_queue(0, receive.resources()).unwrap();
    device.start_queue(1, transmit.resources()).unwrap();
    Machine { device, host, memory, receive, transmit, offloads }
}

impl Machine {
    /// Sends a frame from the guest, with its header split off and cut itself.
    fn send(&mut self, offload: Offload, frame: &[u8]) {
        let bytes = [&offload.to_bytes(0)[..], &[0, 0], frame].concat();
        self.memory.write_slice(&bytes, GuestAddress(OUT)).unwrap();
        let length = bytes.len() as u32;
        let cuts = [0, 5, 12.min(length), (length / 2).max(12).min(length), length];
        let pieces: Vec<Piece> = cuts
            .windows(2)
            .map(|cut| Piece { address: OUT + u64::from(cut[0]), length: cut[1] - cut[0], writable: false })
            .collect();
        assert_eq!(self.transmit.run(&pieces), 0);
    }

    /// Reads what the socket's other end gets.
    fn arrived(&mut self) -> Vec<u8> {
        let mut prefix = [0; 4];
        self.host.read_exact(&mut prefix).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(prefix) as usize];
        self.host.read_exact(&mut frame).unwrap();
        frame
    }

    /// Sends a frame to the guest.
    fn put(&mut self, offload: Offload, frame: &[u8]) {
        let header = if self.offloads { offload.to_bytes(0).to_vec() } else { Vec::new() };
        let length = (header.len() + frame.len()) as u32;
        self.host.write_all(&[&length.to_be_bytes()[..], &header, frame].concat()).unwrap();
    }

    /// Offers `count` buffers of `bytes` each; their places by head.
    fn offer(&mut self, count: u64, bytes: u32) {
        for number in 0..count {
            let address = IN + number * u64::from(bytes);
            self.receive.add(&[Piece { address, length: bytes, writable: true }]);
        }
        self.receive.notify();
    }

    /// Waits for one frame in buffers of `bytes` that are used in the order offered, from the `first`.
    fn received(&mut self, first: u64, bytes: u32) -> (Offload, u16, Vec<u8>) {
        let (_, length) = self.receive.wait_used();
        let mut whole = vec![0; length as usize];
        self.memory.read_slice(&mut whole, GuestAddress(IN + first * u64::from(bytes))).unwrap();
        let count = u16::from_le_bytes([whole[10], whole[11]]);
        for number in 1..u64::from(count) {
            // All buffers of a frame are there as soon as the first is.
            let (_, length) = self.receive.take_used().expect("a frame in part");
            let mut part = vec![0; length as usize];
            self.memory
                .read_slice(&mut part, GuestAddress(IN + (first + number) * u64::from(bytes)))
                .unwrap();
            whole.extend(part);
        }
        let offload = Offload::parse(*whole.first_chunk().unwrap()).unwrap();
        (offload, count, whole.split_off(12))
    }
}

fn plain(length: usize) -> Vec<u8> {
    (0..length).map(|byte| byte as u8).collect()
}

#[test]
fn frames_go_both_ways() {
    for offloads in [false, true] {
        let mut machine = machine(offloads, 0);
        let header = if offloads { Offload::NONE.to_bytes(0).to_vec() } else { Vec::new() };
        for length in [14, 60, 1514, 65_549] {
            machine.send(Offload::NONE, &plain(length));
            assert_eq!(machine.arrived(), [header.clone(), plain(length)].concat());
        }
        machine.offer(40, 2048);
        let mut first = 0;
        for (length, buffers) in [(14, 1), (2036, 1), (2037, 2), (65_549, 33)] {
            machine.put(Offload::NONE, &plain(length));
            let (offload, count, frame) = machine.received(first, 2048);
            assert_eq!((offload, count, frame == plain(length)), (Offload::NONE, buffers, true));
            first += u64::from(buffers);
        }
        let counters = machine.device.counters();
        assert_eq!((counters.frames_from_guest.get(), counters.frames_to_guest.get()), (4, 4));
        assert_eq!((counters.dropped_from_guest.get(), counters.dropped_to_guest.get()), (0, 0));
    }
}

#[test]
fn a_frame_waits_for_the_buffers_it_needs() {
    let mut machine = machine(false, 0);
    machine.put(Offload::NONE, &plain(5000));
    machine.offer(2, 2048);
    // Nothing is used before there is room for all of it, even over a stop.
    let state = machine.device.stop_queue(0).unwrap();
    assert_eq!((state.next_avail, state.next_used), (0, 0));
    machine.device.start_queue(0, machine.receive.resume(state)).unwrap();
    machine.receive.add(&[Piece { address: IN + 2 * 2048, length: 2048, writable: true }]);
    machine.receive.notify();
    assert_eq!(machine.received(0, 2048).1, 3);
}

#[test]
fn checksums_and_segments_are_done_here_for_a_plain_socket() {
    let payload = plain(4500);
    for (segmentation, ipv6) in [
        (Segmentation::Tcp4, false),
        (Segmentation::Tcp6, true),
        (Segmentation::Udp, false),
        (Segmentation::Udp, true),
    ] {
        let mut machine = machine(false, 0);
        let (large, offload) = frame(segmentation, ipv6, &payload);
        machine.send(offload, &large);
        let headers = large.len() - payload.len();
        let mut whole = Vec::new();
        while whole.len() < payload.len() {
            let piece = machine.arrived();
            assert!(is_sound(&piece, ipv6));
            whole.extend_from_slice(&piece[headers..]);
        }
        assert_eq!(whole, payload);
        let (mut small, offload) = frame(segmentation, true, b"small");
        machine.send(Offload { segmentation: Segmentation::None, segment_bytes: 0, ..offload }, &small);
        complete(&mut small, offload.checksum.unwrap()).unwrap();
        assert_eq!(machine.arrived(), small);
    }
}

#[test]
fn large_segments_cross_a_socket_with_offloads_whole() {
    let (large, offload) = frame(Segmentation::Tcp4, false, &plain(60_000));
    let mut machine = machine(true, 0);
    machine.send(offload, &large);
    assert_eq!(machine.arrived(), [&offload.to_bytes(0)[..], &large].concat());
    machine.offer(40, 2048);
    machine.put(offload, &large);
    let (got, count, received) = machine.received(0, 2048);
    assert_eq!((got, count, received == large), (offload, 30, true));
    // The driver is told how long the headers are.
    assert_eq!(machine.memory.read_obj::<u16>(GuestAddress(IN + 2)).unwrap(), 54);
}

#[test]
fn a_driver_that_takes_nothing_gets_whole_frames() {
    let all = 1 << F_GUEST_TSO4 | 1 << F_GUEST_CSUM;
    let mut machine = machine(true, all);
    machine.offer(40, 2048);
    let payload = plain(4500);
    let (large, offload) = frame(Segmentation::Tcp4, false, &payload);
    machine.put(offload, &large);
    let mut whole = Vec::new();
    for number in 0..5 {
        let (offload, count, piece) = machine.received(number, 2048);
        assert_eq!((offload, count), (Offload::NONE, 1));
        assert!(is_sound(&piece, false));
        whole.extend_from_slice(&piece[54..]);
    }
    assert_eq!(whole, payload);
    let (small, offload) = frame(Segmentation::Tcp6, true, b"small");
    machine.put(Offload { segmentation: Segmentation::None, segment_bytes: 0, ..offload }, &small);
    let (offload, _, got) = machine.received(5, 2048);
    assert!(offload == Offload::NONE && is_sound(&got, true));
    machine.put(Offload { checksum_good: true, ..Offload::NONE }, &plain(60));
    assert_eq!(machine.received(6, 2048).0, Offload::NONE);
}

#[test]
fn a_driver_without_mergeable_buffers_loses_what_does_not_fit() {
    let mut machine = machine(false, 1 << F_MRG_RXBUF);
    machine.offer(2, 1600);
    machine.put(Offload::NONE, &plain(3000));
    machine.put(Offload::NONE, &plain(1500));
    let (_, count, frame) = machine.received(0, 1600);
    assert_eq!((count, frame), (1, plain(1500)));
    assert_eq!(machine.device.counters().dropped_to_guest.get(), 1);
}

#[test]
fn frames_that_make_no_sense_are_dropped_and_counted() {
    let (large, offload) = frame(Segmentation::Tcp4, false, &plain(4500));
    for offloads in [false, true] {
        let mut machine = machine(offloads, 1 << F_HOST_TSO6 | 1 << F_HOST_USO);
        machine.send(Offload::NONE, &plain(13));
        machine.send(Offload::NONE, &plain(70_000));
        machine.send(Offload { checksum: Some((4000, 2000)), ..Offload::NONE }, &plain(100));
        machine.send(Offload { segmentation: Segmentation::Tcp6, ..offload }, &large);
        machine.send(Offload { segmentation: Segmentation::Udp, ..offload }, &large);
        machine.send(Offload { segment_bytes: 0, ..offload }, &large);
        assert_eq!(machine.transmit.run(&[Piece { address: OUT, length: 11, writable: false }]), 0);
        assert_eq!(machine.transmit.run(&[Piece { address: OUT, length: 100, writable: true }]), 0);
        assert_eq!(machine.transmit.run(&[Piece { address: 1 << 40, length: 100, writable: false }]), 0);
        assert_eq!(machine.device.counters().dropped_from_guest.get(), 9);
        machine.send(Offload::NONE, &plain(60));
        assert!(machine.arrived().ends_with(&plain(60)));
    }
    let mut machine = machine(true, 0);
    machine.offer(4, 2048);
    machine.host.write_all(&[0, 0, 0, 3, 1, 2, 3]).unwrap();
    machine.host.write_all(&[0, 0, 0, 12, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]).unwrap();
    machine.put(Offload::NONE, &plain(13));
    machine.put(Offload::NONE, &plain(60));
    assert_eq!(machine.received(0, 2048).2, plain(60));
    assert_eq!(machine.device.counters().dropped_to_guest.get(), 3);
}

#[test]
fn buffers_too_small_for_a_header_are_handed_back() {
    let mut machine = machine(false, 0);
    machine.offer(3, 8);
    machine.receive.add(&[Piece { address: IN + 0x1000, length: 2048, writable: true }]);
    machine.receive.notify();
    machine.put(Offload::NONE, &plain(60));
    for _ in 0..3 {
        assert_eq!(machine.receive.wait_used().1, 0);
    }
    assert_eq!(machine.receive.wait_used().1, 72);
    assert_eq!(machine.device.counters().malformed.get(), 3);
}

#[test]
fn a_socket_that_takes_nothing_stops_the_guest_and_loses_nothing() {
    let mut machine = machine(false, 0);
    let frame = plain(32_000);
    let bytes = [&[0; 12][..], &frame].concat();
    machine.memory.write_slice(&bytes, GuestAddress(OUT)).unwrap();
    let mut sent = 0;
    while machine.transmit.free() > 0 {
        machine.transmit.add(&[Piece { address: OUT, length: bytes.len() as u32, writable: false }]);
        sent += 1;
    }
    machine.transmit.notify();
    for _ in 0..sent {
        assert_eq!(machine.arrived(), frame);
    }
    for _ in 0..sent {
        machine.transmit.wait_used();
    }
    assert_eq!(machine.device.counters().dropped_from_guest.get(), 0);
}

#[test]
fn the_link_goes_down_with_the_socket() {
    let mut machine = machine(false, 0);
    let mut config = [0; 12];
    machine.device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 2, 1, 0, 1, 0, 0xdc, 5]);
    let (other, _) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut machine.host, other));
    driver::wait(&[&machine.receive.config], Duration::from_secs(60));
    machine.device.read_config(0, &mut config);
    assert_eq!(config[6..8], [0, 0]);
    machine.send(Offload::NONE, &plain(60));
    assert_eq!(machine.device.counters().dropped_from_guest.get(), 1);
}

#[test]
fn a_lost_framing_closes_the_link() {
    let mut machine = machine(true, 0);
    machine.offer(4, 2048);
    machine.host.write_all(&[0xff; 8]).unwrap();
    driver::wait(&[&machine.receive.config], Duration::from_secs(60));
    machine.send(Offload::NONE, &plain(60));
    assert_eq!(machine.device.counters().dropped_from_guest.get(), 1);
}

#[test]
fn nothing_is_left_to_a_driver_by_a_plain_socket() {
    let guest = 1 << F_GUEST_CSUM | 1 << F_GUEST_TSO4 | 1 << F_GUEST_TSO6;
    assert_eq!(machine(false, 0).device.features() & guest, 0);
    assert_eq!(machine(true, 0).device.features() & guest, guest);
}

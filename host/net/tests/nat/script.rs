//! Scripted exchanges with the pure stack: a fake clock, fake host sockets, and a link that can be made bad.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use host_net::{Config, DropReason, FLOW_CAPACITY, Failure, FlowId, Operation, Stack};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl,
    TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

use crate::offloads;
use crate::support::{
    GATEWAY, GUEST, GUEST_MAC, Guest, HOST, dns_query, pattern, receive_pattern, send_pattern,
};

const PEER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 9), 80);
const MILLISECOND: Duration = Duration::from_millis(1);

/// What happens to frames on their way.
#[derive(Clone, Copy, Default)]
struct Weather {
    /// Frames lost, doubled, delayed (and so overtaken), in a thousand.
    lost: u64,
    doubled: u64,
    delayed: u64,
}

/// One direction of the link.
#[derive(Default)]
struct Way {
    frames: BTreeMap<(Duration, u64), Vec<u8>>,
    count: u64,
}

/// A host socket as the stack's operations describe it.
#[derive(Default)]
struct FakeSocket {
    to_guest: VecDeque<u8>,
    /// Bytes the guest sent, each checked as it came.
    from_guest: usize,
    /// After `to_guest`, the end.
    ends: bool,
    end_told: bool,
    shut: bool,
}

struct World {
    stack: Stack,
    guest: Guest,
    sockets: HashMap<FlowId, FakeSocket>,
    now: Duration,
    weather: Weather,
    there: Way,
    back: Way,
    random: u64,
    /// The link has offloads; the most packets that came as one.
    largest: Option<usize>,
}

impl World {
    fn new(weather: Weather, seed: u64) -> Self {
        Self {
            stack: Stack::new(Config::default(), seed),
            guest: Guest::new(1500),
            sockets: HashMap::new(),
            now: Duration::ZERO,
            weather,
            there: Way::default(),
            back: Way::default(),
            random: seed | 1,
            largest: None,
        }
    }

    /// The guest's card leaves checksums to the NAT, and cuts what the NAT sends.
    fn with_offloads(weather: Weather, seed: u64) -> Self {
        let config = Config { offloads: true, ..Config::default() };
        Self { stack: Stack::new(config, seed), largest: Some(0), ..Self::new(weather, seed) }
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 1000 < per_mille
    }

    fn put(&mut self, there: bool, frame: Vec<u8>) {
        let weather = self.weather;
        if self.chance(weather.lost) {
            return;
        }
        let copies = if self.chance(weather.doubled) { 2 } else { 1 };
        for _ in 0..copies {
            let delay = if self.chance(weather.delayed) { 20 * MILLISECOND } else { MILLISECOND };
            let at = self.now + delay;
            let way = if there { &mut self.there } else { &mut self.back };
            way.count += 1;
            way.frames.insert((at, way.count), frame.clone());
        }
    }

    /// Lets everything happen that happens now, then moves the clock to the next thing.
    fn step(&mut self) {
        while let Some(entry) = self.there.frames.first_entry()
            && entry.key().0 <= self.now
        {
            let frame = entry.remove();
            self.stack.receive_from_link(&frame, self.now);
        }
        while let Some(entry) = self.back.frames.first_entry()
            && entry.key().0 <= self.now
        {
            let frame = entry.remove();
            self.guest.port.to_guest.push_back(frame);
        }
        self.guest.poll(self.now);
        self.stack.tick(self.now);
        self.operate();
        self.move_bytes();
        for frame in std::mem::take(&mut self.guest.port.from_guest) {
            let frame = if self.largest.is_some() { offloads::leave(frame) } else { frame };
            self.put(true, frame);
        }
        loop {
            let mut frame = Vec::new();
            if self.stack.next_frame(&mut frame, self.now).is_none() {
                break;
            }
            if let Some(largest) = &mut self.largest {
                let packets;
                (frame, packets) = offloads::finish(&frame);
                *largest = packets.max(*largest);
            }
            self.put(false, frame);
        }
        self.operate();
        let next = [
            self.there.frames.keys().next().map(|key| key.0),
            self.back.frames.keys().next().map(|key| key.0),
            self.stack.next_deadline(),
            self.guest.poll_at(self.now),
        ];
        let soon = self.now + MILLISECOND;
        self.now =
            next.into_iter().flatten().min().unwrap_or(soon).clamp(soon, self.now + Duration::from_secs(1));
    }

    fn operate(&mut self) {
        while let Some(operation) = self.stack.next_operation() {
            match operation {
                Operation::Connect { flow, .. } => {
                    self.sockets.insert(flow, FakeSocket::default());
                    self.stack.connected(flow);
                }
                Operation::Close { flow } | Operation::Reset { flow } => drop(self.sockets.remove(&flow)),
                Operation::Send { .. } | Operation::Receive { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn move_bytes(&mut self) {
        for (flow, socket) in &mut self.sockets {
            let (first, second) = self.stack.outgoing(*flow);
            let count = first.len() + second.len();
            for byte in first.iter().chain(second) {
                assert_eq!(*byte, pattern(socket.from_guest), "byte {}", socket.from_guest);
                socket.from_guest += 1;
            }
            self.stack.host_took(*flow, count);
            if self.stack.wants_shutdown(*flow) {
                socket.shut = true;
                self.stack.host_shut(*flow);
            }
            let count = self.stack.room(*flow).min(socket.to_guest.len());
            let bytes: Vec<u8> = socket.to_guest.drain(..count).collect();
            if !bytes.is_empty() {
                self.stack.host_sent(*flow, &bytes);
            }
            if socket.ends && socket.to_guest.is_empty() && !socket.end_told {
                socket.end_told = true;
                self.stack.host_ended(*flow);
            }
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..2_000_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("{what}: not within {:?} of the fake clock; {}", self.now, self.stack.counters());
    }

    fn only_socket(&mut self) -> Option<&mut FakeSocket> {
        self.sockets.values_mut().next()
    }
}

/// A megabyte each way at once through whatever weather, every byte checked.
fn transfer(weather: Weather, seed: u64) -> World {
    transfer_in(World::new(weather, seed))
}

fn transfer_in(mut world: World) -> World {
    const TOTAL: usize = 1 << 20;
    let handle = world.guest.connect(PEER, 65_536);
    world.until("connected", |world| world.guest.tcp(handle).may_send());
    let socket = world.only_socket().unwrap();
    socket.to_guest.extend((0..TOTAL).map(pattern));
    socket.ends = true;
    let (mut sent, mut received) = (0, 0);
    world.until("a megabyte each way", |world| {
        let socket = world.guest.tcp(handle);
        send_pattern(socket, &mut sent, TOTAL);
        receive_pattern(socket, &mut received);
        if sent == TOTAL {
            socket.close();
        }
        received == TOTAL
            && world.only_socket().is_none_or(|socket| socket.from_guest == TOTAL && socket.shut)
    });
    world.until("the flow ends", |world| world.stack.counters().flows_open == 0);
    assert!(world.sockets.is_empty());
    world
}

#[test]
fn a_good_link_needs_no_repair() {
    let world = transfer(Weather::default(), 1);
    assert_eq!(world.stack.counters().retransmissions, 0);
    assert!(world.now < Duration::from_secs(2), "{:?}", world.now);
}

#[test]
fn lost_frames_are_repaired() {
    for seed in 0..4 {
        let world = transfer(Weather { lost: 30, ..Weather::default() }, 100 + seed);
        assert!(world.stack.counters().retransmissions > 0);
    }
}

#[test]
fn doubled_and_overtaken_frames_do_no_harm() {
    for seed in 0..4 {
        transfer(Weather { doubled: 100, delayed: 50, ..Weather::default() }, 200 + seed);
    }
}

#[test]
fn a_link_with_every_fault_carries_every_byte() {
    for seed in 0..4 {
        transfer(Weather { lost: 50, doubled: 50, delayed: 100 }, 300 + seed);
    }
}

#[test]
fn a_card_with_offloads_gets_large_segments_and_leaves_checksums() {
    for weather in [Weather::default(), Weather { lost: 30, doubled: 50, delayed: 50 }] {
        let world = transfer_in(World::with_offloads(weather, 400));
        assert!(world.largest > Some(8), "{:?}", world.largest);
    }
}

#[test]
fn a_guest_that_stops_reading_is_probed_and_goes_on() {
    let mut world = World::new(Weather::default(), 5);
    let handle = world.guest.connect(PEER, 4096);
    world.until("connected", |world| world.guest.tcp(handle).may_send());
    let total = 1 << 20;
    world.only_socket().unwrap().to_guest.extend((0..total).map(pattern));
    world.until("a full window", |world| world.guest.tcp(handle).recv_queue() == 4096);
    // The guest sleeps a day; every word it says about its window in the meantime is lost.
    let slept = world.now + Duration::from_secs(86_400);
    world.until("a day", |world| world.now >= slept);
    assert_eq!(world.stack.counters().flows_open, 1, "probing never gives up");
    world.weather.lost = 1000;
    let mut received = 0;
    receive_pattern(world.guest.tcp(handle), &mut received);
    let deaf = world.now + Duration::from_secs(5);
    world.until("the update is lost", |world| world.now >= deaf);
    world.weather.lost = 0;
    world.until("the rest", |world| {
        receive_pattern(world.guest.tcp(handle), &mut received);
        received == total
    });
}

// ---- single frames ------------------------------------------------------------------------------------------------

struct Script {
    stack: Stack,
    now: Duration,
}

/// A frame to the guest, taken apart.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Reset {
        to: u16,
        ack: Option<u32>,
    },
    Segment {
        control: TcpControl,
        seq: u32,
        ack: u32,
        window: u16,
        scale: Option<u8>,
        mss: Option<u16>,
        payload: Vec<u8>,
    },
    Datagram {
        from: SocketAddrV4,
        to: u16,
        payload: Vec<u8>,
    },
    Unreachable {
        reason: Icmpv4DstUnreachable,
        about: SocketAddrV4,
        from_port: u16,
    },
    EchoReply {
        from: Ipv4Addr,
        ident: u16,
        sequence: u16,
        data: Vec<u8>,
    },
    Arp {
        address: Ipv4Addr,
        mac: EthernetAddress,
    },
}

impl Script {
    fn new() -> Self {
        let mut stack = Stack::new(Config::default(), 9);
        stack.set_resolvers(&["10.0.0.1:53".parse().unwrap(), "10.0.0.2:53".parse().unwrap()]);
        Self { stack, now: Duration::from_secs(100) }
    }

    fn frame(&mut self, protocol: EthernetProtocol, payload: &[u8]) {
        let mac = EthernetAddress([0x02, 0x65, 0x6e, 0x67, 0x00, 0x01]);
        let header = EthernetRepr { src_addr: GUEST_MAC, dst_addr: mac, ethertype: protocol };
        let mut frame = vec![0; 14 + payload.len()];
        header.emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
        frame[14..].copy_from_slice(payload);
        self.stack.receive_frame(&frame, self.now);
    }

    fn packet(&mut self, from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) {
        let header = Ipv4Repr {
            src_addr: from,
            dst_addr: to,
            next_header: protocol,
            payload_len: payload.len(),
            hop_limit: 64,
        };
        let mut packet = vec![0; 20 + payload.len()];
        header.emit(&mut Ipv4Packet::new_unchecked(&mut packet[..]), &ChecksumCapabilities::default());
        packet[20..].copy_from_slice(payload);
        self.frame(EthernetProtocol::Ipv4, &packet);
    }

    fn udp(&mut self, port: u16, to: SocketAddrV4, payload: &[u8]) {
        let header = UdpRepr { src_port: port, dst_port: to.port() };
        let mut datagram = vec![0; 8 + payload.len()];
        header.emit(
            &mut UdpPacket::new_unchecked(&mut datagram[..]),
            &IpAddress::Ipv4(GUEST),
            &IpAddress::Ipv4(*to.ip()),
            payload.len(),
            |place| place.copy_from_slice(payload),
            &ChecksumCapabilities::default(),
        );
        self.packet(GUEST, *to.ip(), IpProtocol::Udp, &datagram);
    }

    fn tcp(&mut self, port: u16, to: SocketAddrV4, segment: TcpRepr<'_>) {
        let segment = TcpRepr { src_port: port, dst_port: to.port(), ..segment };
        let mut bytes = vec![0; segment.buffer_len()];
        segment.emit(
            &mut TcpPacket::new_unchecked(&mut bytes[..]),
            &IpAddress::Ipv4(GUEST),
            &IpAddress::Ipv4(*to.ip()),
            &ChecksumCapabilities::default(),
        );
        self.packet(GUEST, *to.ip(), IpProtocol::Tcp, &bytes);
    }

    fn ping(&mut self, to: Ipv4Addr, ident: u16, sequence: u16, data: &[u8]) {
        let request = Icmpv4Repr::EchoRequest { ident, seq_no: sequence, data };
        let mut bytes = vec![0; request.buffer_len()];
        request.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
        self.packet(GUEST, to, IpProtocol::Icmp, &bytes);
    }

    fn operations(&mut self) -> Vec<Operation> {
        std::iter::from_fn(|| self.stack.next_operation()).collect()
    }

    /// Everything said to the guest since the last call; every checksum is checked.
    fn said(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        loop {
            let mut frame = Vec::new();
            match self.stack.next_frame(&mut frame, self.now) {
                Some(length) => assert_eq!(length, frame.len()),
                None => return said,
            }
            said.push(read(&frame));
        }
    }

    /// Lets time pass, acting on each deadline in turn.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.stack.next_deadline().filter(|deadline| *deadline <= end) {
            self.now = deadline.max(self.now);
            self.stack.tick(self.now);
        }
        self.now = end;
        self.stack.tick(self.now);
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.stack.counters().dropped(reason)
    }

    /// Opens a connection up to the guest's ACK; returns the flow and our first sequence number.
    fn open(&mut self, port: u16, to: SocketAddrV4) -> (FlowId, u32) {
        self.tcp(port, to, syn(1000));
        let operations = self.operations();
        let [Operation::Connect { flow, .. }] = operations[..] else { panic!("{operations:?}") };
        self.stack.connected(flow);
        let said = self.said();
        let [Said::Segment { control: TcpControl::Syn, seq, ack: 1001, .. }] = said[..] else {
            panic!("{said:?}")
        };
        self.tcp(port, to, segment(1001, seq.wrapping_add(1), b""));
        assert_eq!(self.said(), []);
        (flow, seq.wrapping_add(1))
    }
}

fn read(frame: &[u8]) -> Said {
    let checksums = ChecksumCapabilities::default();
    let frame = EthernetFrame::new_checked(frame).unwrap();
    if frame.ethertype() == EthernetProtocol::Arp {
        let ArpRepr::EthernetIpv4 { operation, source_hardware_addr, source_protocol_addr, .. } =
            ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).unwrap()).unwrap()
        else {
            panic!()
        };
        assert_eq!(operation, ArpOperation::Reply);
        return Said::Arp { address: source_protocol_addr, mac: source_hardware_addr };
    }
    let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
    let header = Ipv4Repr::parse(&packet, &checksums).unwrap();
    let (from, to) = (IpAddress::Ipv4(header.src_addr), IpAddress::Ipv4(header.dst_addr));
    match header.next_header {
        IpProtocol::Tcp => {
            let packet = TcpPacket::new_checked(packet.payload()).unwrap();
            let segment = TcpRepr::parse(&packet, &from, &to, &checksums).unwrap();
            let ack = segment.ack_number.map(|ack| ack.0 as u32);
            match segment.control {
                TcpControl::Rst => Said::Reset { to: segment.dst_port, ack },
                control => Said::Segment {
                    control,
                    seq: segment.seq_number.0 as u32,
                    ack: ack.unwrap(),
                    window: segment.window_len,
                    scale: segment.window_scale,
                    mss: segment.max_seg_size,
                    payload: segment.payload.to_vec(),
                },
            }
        }
        IpProtocol::Udp => {
            let packet = UdpPacket::new_checked(packet.payload()).unwrap();
            let datagram = UdpRepr::parse(&packet, &from, &to, &checksums).unwrap();
            Said::Datagram {
                from: SocketAddrV4::new(header.src_addr, datagram.src_port),
                to: datagram.dst_port,
                payload: packet.payload().to_vec(),
            }
        }
        IpProtocol::Icmp => {
            let packet = Icmpv4Packet::new_checked(packet.payload()).unwrap();
            match Icmpv4Repr::parse(&packet, &checksums).unwrap() {
                Icmpv4Repr::EchoReply { ident, seq_no, data } => {
                    Said::EchoReply { from: header.src_addr, ident, sequence: seq_no, data: data.to_vec() }
                }
                Icmpv4Repr::DstUnreachable { reason, header: quoted, data } => {
                    // A closed port is its host's affair, everything else the router's.
                    let sender = if reason == Icmpv4DstUnreachable::PortUnreachable {
                        quoted.dst_addr
                    } else {
                        GATEWAY
                    };
                    assert_eq!((header.src_addr, quoted.src_addr), (sender, GUEST));
                    let port = |at: usize| u16::from_be_bytes([data[at], data[at + 1]]);
                    Said::Unreachable {
                        reason,
                        about: SocketAddrV4::new(quoted.dst_addr, port(2)),
                        from_port: port(0),
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        other => panic!("{other:?}"),
    }
}

fn segment(seq: u32, ack: u32, payload: &[u8]) -> TcpRepr<'_> {
    TcpRepr {
        src_port: 0,
        dst_port: 0,
        control: TcpControl::None,
        seq_number: TcpSeqNumber(seq as i32),
        ack_number: Some(TcpSeqNumber(ack as i32)),
        window_len: 64_000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    }
}

fn syn(seq: u32) -> TcpRepr<'static> {
    TcpRepr { control: TcpControl::Syn, ack_number: None, max_seg_size: Some(1460), ..segment(seq, 0, b"") }
}

fn fin(seq: u32, ack: u32) -> TcpRepr<'static> {
    TcpRepr { control: TcpControl::Fin, ..segment(seq, ack, b"") }
}

fn rst(seq: u32) -> TcpRepr<'static> {
    TcpRepr { control: TcpControl::Rst, ack_number: None, ..segment(seq, 0, b"") }
}

#[test]
fn a_syn_waits_for_the_hosts_connection() {
    let mut script = Script::new();
    let to = SocketAddrV4::new(HOST, 8080);
    script.tcp(5000, to, TcpRepr { window_scale: Some(7), ..syn(1000) });
    let operations = script.operations();
    let [Operation::Connect { flow, to: SocketAddr::V4(host) }] = operations[..] else {
        panic!("{operations:?}")
    };
    assert_eq!(host, SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080), "the alias is the host's loopback");
    assert_eq!(script.said(), []);
    script.tcp(5000, to, syn(1000));
    assert_eq!((script.operations(), script.said()), (vec![], vec![]), "the guest's patience is not ours");

    script.stack.connected(flow);
    let said = script.said();
    let [Said::Segment { control: TcpControl::Syn, ack: 1001, scale: Some(7), mss: Some(1460), .. }] =
        said[..]
    else {
        panic!("{said:?}")
    };
}

#[test]
fn the_hosts_refusal_and_silence_reach_the_guest_as_they_are() {
    for (failure, expected) in [
        (Failure::Refused, None),
        (Failure::NoSocket, None),
        (Failure::HostUnreachable, Some(Icmpv4DstUnreachable::HostUnreachable)),
        (Failure::NetworkUnreachable, Some(Icmpv4DstUnreachable::NetUnreachable)),
    ] {
        let mut script = Script::new();
        script.tcp(5000, PEER, syn(1000));
        let operations = script.operations();
        let [Operation::Connect { flow, .. }] = operations[..] else { panic!("{operations:?}") };
        script.stack.failed(flow, failure, script.now);
        let expected = match expected {
            None => Said::Reset { to: 5000, ack: Some(1001) },
            Some(reason) => Said::Unreachable { reason, about: PEER, from_port: 5000 },
        };
        assert_eq!(script.said(), [expected], "{failure:?}");
        assert_eq!(script.operations(), [Operation::Close { flow }]);
        assert_eq!(script.stack.counters().flows_open, 0);
    }
}

#[test]
fn a_broken_connection_resets_the_guest_and_a_reset_guest_the_connection() {
    let mut script = Script::new();
    let (flow, _) = script.open(5000, PEER);
    script.stack.failed(flow, Failure::Reset, script.now);
    assert_eq!(script.said(), [Said::Reset { to: 5000, ack: Some(1001) }]);
    assert_eq!(script.operations(), [Operation::Close { flow }]);

    let (flow, ours) = script.open(5001, PEER);
    script.tcp(5001, PEER, rst(1005));
    let said = script.said();
    assert!(matches!(said[..], [Said::Segment { ack: 1001, .. }]), "not quite right: asked back: {said:?}");
    script.tcp(5001, PEER, rst(999_999_999));
    assert_eq!(script.operations(), []);
    script.tcp(5001, PEER, rst(1001));
    assert_eq!(script.operations(), [Operation::Reset { flow }]);
    script.tcp(5001, PEER, segment(1001, ours, b"late"));
    assert_eq!(script.said(), [Said::Reset { to: 5001, ack: None }]);
    assert_eq!(script.dropped(DropReason::NoConnection), 1);
}

#[test]
fn segments_out_of_order_are_asked_for_at_once() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    for late in [b"def", b"ghi"] {
        script.tcp(5000, PEER, segment(1004, ours, late));
    }
    let said = script.said();
    assert_eq!(said.len(), 2, "one for each, so that the guest can count: {said:?}");
    assert!(said.iter().all(|said| matches!(said, Said::Segment { ack: 1001, .. })), "{said:?}");
    script.tcp(5000, PEER, segment(1001, ours, b"abc"));
    script.tcp(5000, PEER, segment(1001, ours, b"abcdef"));
    assert_eq!(script.stack.outgoing(flow).0, b"abcdef", "the known part once");
}

#[test]
fn a_slow_host_socket_closes_the_window_and_opens_it_again() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    let block = vec![7; 1460];
    let mut seq = 1001u32;
    let last = loop {
        script.tcp(5000, PEER, segment(seq, ours, &block));
        let said = script.said();
        let [Said::Segment { ack, window, .. }] = said[..] else { panic!("{said:?}") };
        seq = ack;
        if window == 0 {
            break ack;
        }
        assert!(ack - 1001 < 1 << 20, "no end of buffering");
    };
    script.tcp(5000, PEER, segment(last, ours, b"x"));
    let said = script.said();
    assert!(matches!(said[..], [Said::Segment { ack, window: 0, .. }] if ack == last), "a probe: {said:?}");
    script.stack.host_took(flow, 100);
    assert_eq!(script.said(), [], "too little to talk about");
    script.stack.host_took(flow, 100_000);
    let said = script.said();
    assert!(
        matches!(said[..], [Said::Segment { ack, window, .. }] if ack == last && window > 60_000),
        "{said:?}"
    );
}

#[test]
fn a_guest_that_vanishes_is_given_up() {
    let mut script = Script::new();
    script.tcp(5000, PEER, syn(1000));
    let operations = script.operations();
    let [Operation::Connect { flow, .. }] = operations[..] else { panic!("{operations:?}") };
    script.stack.connected(flow);
    let mut answers = 0;
    for _ in 0..200 {
        script.pass(Duration::from_secs(1));
        answers += script.said().iter().filter(|said| matches!(said, Said::Segment { .. })).count();
    }
    assert_eq!(answers, 6, "our SYN,ACK and five more");
    assert_eq!(script.operations(), [Operation::Reset { flow }]);

    let (flow, _) = script.open(5001, PEER);
    script.stack.host_sent(flow, b"hello?");
    let mut tries = 0;
    for _ in 0..2000 {
        script.pass(Duration::from_secs(1));
        tries += script.said().iter().filter(|said| matches!(said, Said::Segment { .. })).count();
    }
    assert_eq!(tries, 16);
    assert_eq!(script.operations(), [Operation::Reset { flow }]);
    assert_eq!((script.stack.counters().flows_open, script.stack.next_deadline()), (0, None));
}

#[test]
fn an_idle_connection_needs_no_timer() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    script.stack.host_sent(flow, b"word");
    assert_eq!(script.said().len(), 1);
    script.tcp(5000, PEER, segment(1001, ours + 4, b""));
    script.pass(Duration::from_secs(10));
    assert_eq!(script.stack.next_deadline(), None);
    script.pass(Duration::from_secs(1_000_000));
    assert_eq!(script.stack.counters().flows_open, 1);
}

#[test]
fn each_direction_ends_on_its_own_and_the_flow_with_the_second() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    script.tcp(5000, PEER, segment(1001, ours, b"last words"));
    script.tcp(5000, PEER, fin(1011, ours));
    assert_eq!(script.operations(), [Operation::Send { flow }]);
    assert!(!script.stack.wants_shutdown(flow), "not before the words have gone");
    script.stack.host_took(flow, 10);
    assert!(script.stack.wants_shutdown(flow));
    script.stack.host_shut(flow);
    let said = script.said();
    assert!(matches!(said[..], [Said::Segment { ack: 1012, .. }]), "{said:?}");

    script.stack.host_sent(flow, b"answer");
    script.stack.host_ended(flow);
    let said = script.said();
    let [Said::Segment { control: TcpControl::Fin, seq, ref payload, .. }] = said[..] else {
        panic!("{said:?}")
    };
    assert_eq!((seq, &payload[..]), (ours, &b"answer"[..]));
    assert_eq!(script.stack.counters().flows_open, 1);
    script.operations();
    script.tcp(5000, PEER, segment(1012, ours + 7, b""));
    assert_eq!(script.operations(), [Operation::Close { flow }]);
    assert_eq!(script.said(), []);
}

#[test]
fn a_full_table_refuses_new_connections_and_keeps_the_old() {
    let mut script = Script::new();
    for number in 0..FLOW_CAPACITY {
        let to = SocketAddrV4::new(Ipv4Addr::from(0x0a00_0000 + number as u32), 80);
        script.tcp(5000, to, syn(1));
    }
    assert_eq!(script.operations().len(), FLOW_CAPACITY);
    script.tcp(6000, PEER, syn(1000));
    assert_eq!(script.said(), [Said::Reset { to: 6000, ack: Some(1001) }]);
    script.udp(6000, PEER, b"x");
    assert_eq!(script.dropped(DropReason::FlowTableFull), 2);
    assert_eq!(script.operations(), []);
}

#[test]
fn datagrams_share_a_socket_until_silence_ends_it() {
    let mut script = Script::new();
    script.udp(5000, PEER, b"one");
    script.udp(5000, PEER, b"two");
    let operations = script.operations();
    let Some(Operation::OpenUdp { flow, to }) = operations.first() else { panic!("{operations:?}") };
    assert_eq!(*to, SocketAddr::V4(PEER));
    let sent = |payload: &[u8]| Operation::SendDatagram { flow: *flow, payload: payload.to_vec() };
    assert_eq!(operations[1..], [sent(b"one"), sent(b"two")]);
    script.stack.datagram(*flow, b"three", script.now);
    assert_eq!(script.said(), [Said::Datagram { from: PEER, to: 5000, payload: b"three".to_vec() }]);
    script.stack.failed(*flow, Failure::Refused, script.now);
    let reason = Icmpv4DstUnreachable::PortUnreachable;
    assert_eq!(script.said(), [Said::Unreachable { reason, about: PEER, from_port: 5000 }]);
    script.pass(Duration::from_secs(179));
    assert_eq!(script.operations(), []);
    script.pass(Duration::from_secs(2));
    assert_eq!(script.operations(), [Operation::Close { flow: *flow }]);
    assert_eq!(script.stack.next_deadline(), None);
}

#[test]
fn a_silent_resolver_is_followed_by_the_next_then_by_a_failure() {
    let mut script = Script::new();
    let dns = SocketAddrV4::new(GATEWAY, 53);
    script.udp(5000, dns, &dns_query(7, "example.com"));
    script.udp(5000, dns, &dns_query(7, "example.com"));
    let mut asked = Vec::new();
    for _ in 0..20 {
        for operation in script.operations() {
            match operation {
                Operation::OpenUdp { to, .. } => asked.push(to.to_string()),
                Operation::SendDatagram { payload, .. } => {
                    assert_eq!(payload[2..], dns_query(7, "example.com")[2..])
                }
                Operation::Close { .. } => asked.push("closed".into()),
                other => panic!("{other:?}"),
            }
        }
        script.pass(Duration::from_secs(1));
    }
    assert_eq!(asked, ["10.0.0.1:53", "10.0.0.2:53", "10.0.0.1:53", "10.0.0.2:53", "closed"]);
    let said = script.said();
    let [Said::Datagram { from, to: 5000, ref payload }] = said[..] else { panic!("{said:?}") };
    assert_eq!((from, &payload[..4]), (dns, &[0, 7, 0x81, 0x82][..]));
    assert_eq!(script.stack.next_deadline(), None);
}

#[test]
fn an_answer_from_a_resolver_comes_back_under_the_guests_id() {
    let mut script = Script::new();
    let dns = SocketAddrV4::new(GATEWAY, 53);
    script.udp(5000, dns, &dns_query(7, "example.com"));
    let operations = script.operations();
    let [Operation::OpenUdp { flow, .. }, Operation::SendDatagram { ref payload, .. }] = operations[..]
    else {
        panic!("{operations:?}")
    };
    let mut answer = payload.clone();
    answer[2] |= 0x80;
    answer.extend([9; 3000]);
    let mut forged = answer.clone();
    forged[0] ^= 1;
    script.stack.datagram(flow, &forged, script.now);
    assert_eq!(script.dropped(DropReason::UnexpectedMessage), 1);
    script.stack.datagram(flow, &answer, script.now);
    assert_eq!(script.operations(), [Operation::Close { flow }]);
    let mut frame = Vec::new();
    let mut frames = 0;
    while script.stack.next_frame(&mut frame, script.now).is_some() {
        frames += 1;
    }
    assert_eq!(frames, 3, "in fragments");
    assert_eq!(frame[14 + 20 + 8..][..2], [0, 7]);
}

#[test]
fn names_over_tcp_go_to_the_first_resolver() {
    let mut script = Script::new();
    script.tcp(5000, SocketAddrV4::new(GATEWAY, 53), syn(1));
    let operations = script.operations();
    let [Operation::Connect { to, .. }] = operations[..] else { panic!("{operations:?}") };
    assert_eq!(to.to_string(), "10.0.0.1:53");
    script.tcp(5001, SocketAddrV4::new(GATEWAY, 80), syn(1));
    assert_eq!(script.said(), [Said::Reset { to: 5001, ack: Some(2) }]);
}

#[test]
fn pings_of_the_gateway_are_answered_here_and_others_go_out() {
    let mut script = Script::new();
    for here in [GATEWAY, HOST] {
        script.ping(here, 3, 4, b"data");
        let reply = Said::EchoReply { from: here, ident: 3, sequence: 4, data: b"data".to_vec() };
        assert_eq!(script.said(), [reply]);
    }
    script.ping(*PEER.ip(), 3, 4, b"data");
    let operations = script.operations();
    let [Operation::OpenEcho { flow, to }, Operation::SendDatagram { ref payload, .. }] = operations[..]
    else {
        panic!("{operations:?}")
    };
    assert_eq!(to, *PEER.ip());
    // The host's kernel puts an identifier of its own in.
    let mut reply = payload.clone();
    (reply[0], reply[4], reply[5]) = (0, 0x77, 0x88);
    script.stack.datagram(flow, &reply, script.now);
    let reply = Said::EchoReply { from: *PEER.ip(), ident: 3, sequence: 4, data: b"data".to_vec() };
    assert_eq!(script.said(), [reply]);
    script.pass(Duration::from_secs(31));
    assert_eq!(script.operations(), [Operation::Close { flow }]);
}

#[test]
fn only_our_addresses_answer_arp() {
    let mut script = Script::new();
    for (target, answered) in
        [(GATEWAY, true), (HOST, true), (GUEST, false), (Ipv4Addr::new(198, 18, 0, 9), false)]
    {
        let question = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: GUEST_MAC,
            source_protocol_addr: GUEST,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        let mut bytes = vec![0; question.buffer_len()];
        question.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
        script.frame(EthernetProtocol::Arp, &bytes);
        let said = script.said();
        match said[..] {
            [Said::Arp { address, mac }] => assert!(answered && address == target && mac.is_unicast()),
            [] => assert!(!answered, "{target}"),
            _ => panic!("{said:?}"),
        }
    }
}

#[test]
fn what_is_not_carried_is_counted_and_starts_nothing() {
    let mut script = Script::new();
    script.frame(EthernetProtocol::Ipv6, &[0x60; 60]);
    script.frame(EthernetProtocol::Unknown(0x88cc), &[0; 60]);
    script.frame(EthernetProtocol::Ipv4, &[0; 60]);
    script.udp(5000, SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53), b"the host's loopback");
    script.udp(5000, SocketAddrV4::new(Ipv4Addr::new(224, 0, 0, 251), 5353), b"a group");
    script.packet(Ipv4Addr::new(10, 1, 1, 1), *PEER.ip(), IpProtocol::Udp, &[0; 20]);
    script.packet(GATEWAY, *PEER.ip(), IpProtocol::Udp, &[0; 20]);
    script.packet(GUEST, *PEER.ip(), IpProtocol::Igmp, &[0; 20]);
    for (reason, count) in [
        (DropReason::Ipv6, 1),
        (DropReason::UnknownProtocol, 2),
        (DropReason::Malformed, 1),
        (DropReason::Martian, 1),
        (DropReason::Multicast, 1),
        (DropReason::Spoofed, 2),
    ] {
        assert_eq!(script.dropped(reason), count, "{reason:?}");
    }
    assert_eq!((script.operations(), script.said()), (vec![], vec![]));
    assert_eq!(script.stack.counters().flows_opened, 0);
}

#[test]
fn a_datagram_in_fragments_goes_out_whole() {
    let mut script = Script::new();
    let payload: Vec<u8> = (0..3000).map(pattern).collect();
    let mut datagram = vec![0; 8 + payload.len()];
    UdpRepr { src_port: 5000, dst_port: 80 }.emit(
        &mut UdpPacket::new_unchecked(&mut datagram[..]),
        &IpAddress::Ipv4(GUEST),
        &IpAddress::Ipv4(*PEER.ip()),
        payload.len(),
        |place| place.copy_from_slice(&payload),
        &ChecksumCapabilities::default(),
    );
    for (number, piece) in datagram.chunks(1480).enumerate() {
        let header = Ipv4Repr {
            src_addr: GUEST,
            dst_addr: *PEER.ip(),
            next_header: IpProtocol::Udp,
            payload_len: piece.len(),
            hop_limit: 64,
        };
        let mut bytes = vec![0; 20 + piece.len()];
        bytes[20..].copy_from_slice(piece);
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
        header.emit(&mut packet, &ChecksumCapabilities::default());
        packet.set_dont_frag(false);
        packet.set_more_frags(number < 2);
        packet.set_frag_offset((number * 1480) as u16);
        packet.fill_checksum();
        script.frame(EthernetProtocol::Ipv4, &bytes);
    }
    let operations = script.operations();
    let [Operation::OpenUdp { flow, .. }, ref sent] = operations[..] else { panic!("{operations:?}") };
    assert_eq!(*sent, Operation::SendDatagram { flow, payload });
}

#[test]
fn a_guest_without_window_scaling_is_served_within_64_kib() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    script.stack.host_sent(flow, &vec![7; 200_000]);
    let sent: usize = script
        .said()
        .iter()
        .map(|said| match said {
            Said::Segment { payload, .. } => payload.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    assert!((64_000 - 1460..=64_000).contains(&sent), "{sent}");
    script.tcp(5000, PEER, segment(1001, ours + sent as u32, b""));
    assert!(!script.said().is_empty());
}

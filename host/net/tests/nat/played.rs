//! A guest played frame by frame, and what the NAT says to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use host_net::{Config, DropReason, FlowId, Operation, Stack};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress, IpProtocol, IpRepr, Ipv4Packet, Ipv4Repr,
    Ipv6Packet, Ipv6Repr, NdiscRepr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

use crate::support::{GUEST, GUEST_MAC, GUEST6};

/// Somebody far away.
pub const PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)), 80);
/// The same in IPv6.
pub const PEER6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9)), 80);
/// Hops left in the guest's packets.
pub const HOPS: u8 = 64;

pub struct Script {
    pub stack: Stack,
    pub now: Duration,
    /// Hops left in what the guest sends.
    pub hops: u8,
    /// Who sends, and for whom frames have to be.
    pub mac: EthernetAddress,
}

/// A frame to the guest, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
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
    /// A connection is opened.
    Syn {
        from: SocketAddr,
        to: u16,
        seq: u32,
        window: u16,
        scale: Option<u8>,
        mss: Option<u16>,
    },
    Datagram {
        from: SocketAddr,
        to: u16,
        payload: Vec<u8>,
    },
    /// An ICMP error: type, code and the rest of its header; by whom; what it quotes.
    Error {
        code: [u32; 3],
        by: IpAddr,
        about: SocketAddr,
        from_port: u16,
    },
    EchoReply {
        from: IpAddr,
        ident: u16,
        sequence: u16,
        data: Vec<u8>,
    },
    /// Whose hardware address an address is.
    Address {
        address: IpAddr,
        mac: EthernetAddress,
    },
    /// That there is a router, and whom it told.
    Router {
        to: Ipv6Addr,
    },
}

impl Script {
    pub fn new() -> Self {
        let mut stack = Stack::new(Config::default(), 9);
        stack.set_resolvers(&["10.0.0.1:53".parse().unwrap(), "10.0.0.2:53".parse().unwrap()]);
        Self { stack, now: Duration::from_secs(100), hops: HOPS, mac: GUEST_MAC }
    }

    pub fn frame(&mut self, protocol: EthernetProtocol, payload: &[u8]) {
        let mac = EthernetAddress([0x02, 0x65, 0x6e, 0x67, 0x00, 0x01]);
        let header = EthernetRepr { src_addr: self.mac, dst_addr: mac, ethertype: protocol };
        let mut frame = vec![0; 14 + payload.len()];
        header.emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
        frame[14..].copy_from_slice(payload);
        self.stack.receive_frame(&frame, self.now);
    }

    pub fn packet(&mut self, from: IpAddr, to: IpAddr, protocol: IpProtocol, payload: &[u8]) {
        let header = IpRepr::new(from.into(), to.into(), protocol, payload.len(), self.hops);
        let mut packet = vec![0; header.header_len()];
        header.emit(&mut packet, &ChecksumCapabilities::default());
        packet.extend(payload);
        let kind = if from.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 };
        self.frame(kind, &packet);
    }

    pub fn udp(&mut self, port: u16, to: SocketAddr, payload: &[u8]) {
        let guest = guest(to.ip());
        let datagram = datagram(guest, port, to, payload);
        self.packet(guest, to.ip(), IpProtocol::Udp, &datagram);
    }

    pub fn tcp(&mut self, port: u16, to: SocketAddr, segment: TcpRepr<'_>) {
        let segment = TcpRepr { src_port: port, dst_port: to.port(), ..segment };
        let mut bytes = vec![0; segment.buffer_len()];
        segment.emit(
            &mut TcpPacket::new_unchecked(&mut bytes[..]),
            &guest(to.ip()).into(),
            &to.ip().into(),
            &ChecksumCapabilities::default(),
        );
        self.packet(guest(to.ip()), to.ip(), IpProtocol::Tcp, &bytes);
    }

    pub fn ping(&mut self, to: IpAddr, ident: u16, sequence: u16, data: &[u8]) {
        match to {
            IpAddr::V4(_) => {
                let request = Icmpv4Repr::EchoRequest { ident, seq_no: sequence, data };
                let mut bytes = vec![0; request.buffer_len()];
                request
                    .emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
                self.packet(GUEST.into(), to, IpProtocol::Icmp, &bytes);
            }
            IpAddr::V6(to) => {
                self.icmp6(GUEST6, to, &Icmpv6Repr::EchoRequest { ident, seq_no: sequence, data });
            }
        }
    }

    pub fn icmp6(&mut self, from: Ipv6Addr, to: Ipv6Addr, message: &Icmpv6Repr<'_>) {
        let mut bytes = vec![0; message.buffer_len()];
        let mut packet = Icmpv6Packet::new_unchecked(&mut bytes[..]);
        message.emit(&from, &to, &mut packet, &ChecksumCapabilities::default());
        self.packet(from.into(), to.into(), IpProtocol::Icmpv6, &bytes);
    }

    pub fn operations(&mut self) -> Vec<Operation> {
        std::iter::from_fn(|| self.stack.next_operation()).collect()
    }

    /// Everything said to the guest since the last call; every checksum is checked, and that it is for `mac` or for several.
    pub fn said(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        loop {
            let mut frame = Vec::new();
            match self.stack.next_frame(&mut frame, self.now) {
                Some(length) => assert_eq!(length, frame.len()),
                None => return said,
            }
            let to = EthernetFrame::new_unchecked(&frame).dst_addr();
            assert!(to == self.mac || to.is_multicast(), "{to}");
            said.push(read(&frame));
        }
    }

    /// Lets time pass, acting on each deadline in turn.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.stack.next_deadline().filter(|deadline| *deadline <= end) {
            self.now = deadline.max(self.now);
            self.stack.tick(self.now);
        }
        self.now = end;
        self.stack.tick(self.now);
    }

    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.stack.counters().dropped(reason)
    }

    /// So much was dropped for these reasons, and nothing was started or said.
    pub fn assert_only_dropped(&mut self, expected: &[(DropReason, u64)]) {
        for (reason, count) in expected {
            assert_eq!(self.dropped(*reason), *count, "{reason:?}");
        }
        assert_eq!((self.operations(), self.said()), (vec![], vec![]));
    }

    /// Opens a connection up to the guest's ACK; returns the flow and our first sequence number.
    pub fn open(&mut self, port: u16, to: SocketAddr) -> (FlowId, u32) {
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
        return Said::Address { address: source_protocol_addr.into(), mac: source_hardware_addr };
    }
    let (from, to, protocol, payload): (IpAddr, IpAddr, _, _) = match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
            let header = Ipv4Repr::parse(&packet, &checksums).unwrap();
            (header.src_addr.into(), header.dst_addr.into(), header.next_header, packet.payload())
        }
        _ => {
            let packet = Ipv6Packet::new_checked(frame.payload()).unwrap();
            let header = Ipv6Repr::parse(&packet).unwrap();
            (header.src_addr.into(), header.dst_addr.into(), header.next_header, packet.payload())
        }
    };
    let (source, destination) = (IpAddress::from(from), IpAddress::from(to));
    match protocol {
        IpProtocol::Tcp => {
            let packet = TcpPacket::new_checked(payload).unwrap();
            let segment = TcpRepr::parse(&packet, &source, &destination, &checksums).unwrap();
            let ack = segment.ack_number.map(|ack| ack.0 as u32);
            match segment.control {
                TcpControl::Rst => Said::Reset { to: segment.dst_port, ack },
                TcpControl::Syn if ack.is_none() => Said::Syn {
                    from: SocketAddr::new(from, segment.src_port),
                    to: segment.dst_port,
                    seq: segment.seq_number.0 as u32,
                    window: segment.window_len,
                    scale: segment.window_scale,
                    mss: segment.max_seg_size,
                },
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
            let packet = UdpPacket::new_checked(payload).unwrap();
            let datagram = UdpRepr::parse(&packet, &source, &destination, &checksums).unwrap();
            Said::Datagram {
                from: SocketAddr::new(from, datagram.src_port),
                to: datagram.dst_port,
                payload: packet.payload().to_vec(),
            }
        }
        IpProtocol::Icmp => {
            let packet = Icmpv4Packet::new_checked(payload).unwrap();
            assert!(packet.verify_checksum());
            match payload[0] {
                0 => echo_reply(from, payload),
                _ => error(from, payload, 20),
            }
        }
        IpProtocol::Icmpv6 => {
            let (IpAddr::V6(from6), IpAddr::V6(to6)) = (from, to) else { panic!("{from} {to}") };
            let packet = Icmpv6Packet::new_checked(payload).unwrap();
            assert!(packet.verify_checksum(&from6, &to6));
            match payload[0] {
                129 => echo_reply(from, payload),
                134 => Said::Router { to: to6 },
                136 => match Icmpv6Repr::parse(&from6, &to6, &packet, &checksums).unwrap() {
                    Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { target_addr, lladdr, .. }) => {
                        let mac = EthernetAddress::from_bytes(lladdr.unwrap().as_bytes());
                        Said::Address { address: target_addr.into(), mac }
                    }
                    other => panic!("{other:?}"),
                },
                _ => error(from, payload, 40),
            }
        }
        other => panic!("{other:?}"),
    }
}

fn echo_reply(from: IpAddr, message: &[u8]) -> Said {
    let word = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    Said::EchoReply { from, ident: word(4), sequence: word(6), data: message[8..].to_vec() }
}

fn error(by: IpAddr, message: &[u8], header: usize) -> Said {
    let quoted = &message[8..];
    let (guest, remote) = match by {
        IpAddr::V4(_) => {
            let packet = Ipv4Packet::new_unchecked(quoted);
            (IpAddr::V4(packet.src_addr()), IpAddr::V4(packet.dst_addr()))
        }
        IpAddr::V6(_) => {
            let packet = Ipv6Packet::new_unchecked(quoted);
            (IpAddr::V6(packet.src_addr()), IpAddr::V6(packet.dst_addr()))
        }
    };
    assert_eq!(guest, self::guest(by));
    let port = |at: usize| u16::from_be_bytes([quoted[header + at], quoted[header + at + 1]]);
    let rest = u32::from_be_bytes(message[4..8].try_into().unwrap());
    Said::Error {
        code: [message[0].into(), message[1].into(), rest],
        by,
        about: SocketAddr::new(remote, port(2)),
        from_port: port(0),
    }
}

/// The guest's own address in the family of another.
pub fn guest(of: IpAddr) -> IpAddr {
    if of.is_ipv4() { GUEST.into() } else { GUEST6.into() }
}

/// A UDP datagram without its IP header.
pub fn datagram(guest: IpAddr, port: u16, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let header = UdpRepr { src_port: port, dst_port: to.port() };
    let mut datagram = vec![0; 8 + payload.len()];
    header.emit(
        &mut UdpPacket::new_unchecked(&mut datagram[..]),
        &guest.into(),
        &to.ip().into(),
        payload.len(),
        |place| place.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    datagram
}

pub fn segment(seq: u32, ack: u32, payload: &[u8]) -> TcpRepr<'_> {
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

pub fn syn(seq: u32) -> TcpRepr<'static> {
    TcpRepr { control: TcpControl::Syn, ack_number: None, max_seg_size: Some(1460), ..segment(seq, 0, b"") }
}

pub fn fin(seq: u32, ack: u32) -> TcpRepr<'static> {
    TcpRepr { control: TcpControl::Fin, ..segment(seq, ack, b"") }
}

pub fn rst(seq: u32) -> TcpRepr<'static> {
    TcpRepr { control: TcpControl::Rst, ack_number: None, ..segment(seq, 0, b"") }
}

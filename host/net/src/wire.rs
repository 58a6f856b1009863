//! Frames as bytes: headers around payloads, and back. Parsing and emitting is smoltcp's; what is kept here is how
//! this link uses it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpPacket, ArpRepr, ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame, EthernetProtocol,
    IPV4_HEADER_LEN, Icmpv4Packet, Icmpv6Packet, IpAddress, IpProtocol, IpRepr, Ipv4Packet, TcpControl,
    TcpPacket, TcpRepr, TcpSeqNumber, UDP_HEADER_LEN, UdpPacket,
};

use crate::arp::GATEWAY_MAC;
use crate::config::ROUTER_LINK_LOCAL;
use crate::icmp::Notice;
use crate::ipv6;
use crate::neighbour;
use crate::neighbours::Neighbours;
use crate::offload;
use crate::tcp::Segment;

/// Hops left in packets of ours.
const HOP_LIMIT: u8 = 64;

/// Source and destination of a packet, of one family.
pub(crate) type Ends = (IpAddr, IpAddr);

/// Puts frames to one guest together.
#[derive(Debug)]
pub(crate) struct Framer {
    pub(crate) neighbours: Neighbours,
    mtu: usize,
    /// Identifies the fragments of one datagram.
    ident: u32,
    checksums: ChecksumCapabilities,
    /// The guest makes TCP's checksums and cuts segments that are too long.
    offloads: bool,
}

impl Framer {
    pub(crate) fn new(neighbours: Neighbours, mtu: u16, offloads: bool) -> Self {
        Self { neighbours, mtu: mtu.into(), ident: 0, checksums: ChecksumCapabilities::default(), offloads }
    }

    /// An answer to `mac`, which asked.
    pub(crate) fn arp(&self, mac: EthernetAddress, reply: &ArpRepr) -> Vec<u8> {
        let mut frame = Vec::new();
        let payload = self.ethernet(&mut frame, mac, EthernetProtocol::Arp, reply.buffer_len());
        reply.emit(&mut ArpPacket::new_unchecked(payload));
        frame
    }

    /// Appends one TCP segment to `out`, and before it what is left to do, if the link has that; returns the length of
    /// both. The payload comes in two pieces.
    pub(crate) fn segment(
        &self,
        out: &mut Vec<u8>,
        from: SocketAddr,
        to: SocketAddr,
        segment: &Segment,
        payload: [&[u8]; 2],
    ) -> usize {
        let header = TcpRepr {
            src_port: from.port(),
            dst_port: to.port(),
            control: segment.control,
            seq_number: TcpSeqNumber(segment.seq.0.cast_signed()),
            ack_number: segment.ack.map(|ack| TcpSeqNumber(ack.0.cast_signed())),
            window_len: segment.window,
            window_scale: segment.scale,
            max_seg_size: segment.mss,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let [first, second] = payload;
        let length = header.header_len() + first.len() + second.len();
        let start = out.len();
        let ends = (from.ip(), to.ip());
        if self.offloads {
            let transport = ETHERNET_HEADER_LEN + ip_header_bytes(ends.0);
            let headers = transport + header.header_len();
            let work = offload::of_segment(ends.0, transport, headers, segment.length, segment.limit);
            out.extend(work);
        }
        let packet = self.ip(out, ends, IpProtocol::Tcp, length);
        let at = header.header_len();
        packet[at..at + first.len()].copy_from_slice(first);
        packet[at + first.len()..].copy_from_slice(second);
        let (source, destination) = (IpAddress::from(ends.0), IpAddress::from(ends.1));
        let mut packet = TcpPacket::new_unchecked(packet);
        header.emit(&mut packet, &source, &destination, &ChecksumCapabilities::ignored());
        // emit() knows of an end of data or of stream, not of both.
        packet.set_psh(matches!(segment.control, TcpControl::Psh | TcpControl::Fin) && length > at);
        if self.offloads {
            packet.set_checksum(pseudo_sum(ends, length));
        } else {
            packet.fill_checksum(&source, &destination);
        }
        out.len() - start
    }

    /// A reset for a connection we know nothing of, or for one of ours.
    pub(crate) fn reset(&self, from: SocketAddr, to: SocketAddr, seq: u32, ack: Option<u32>) -> Vec<u8> {
        let header = TcpRepr {
            src_port: from.port(),
            dst_port: to.port(),
            control: TcpControl::Rst,
            seq_number: TcpSeqNumber(seq.cast_signed()),
            ack_number: ack.map(|ack| TcpSeqNumber(ack.cast_signed())),
            window_len: 0,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let mut frame = Vec::new();
        let packet = self.ip(&mut frame, (from.ip(), to.ip()), IpProtocol::Tcp, header.header_len());
        header.emit(
            &mut TcpPacket::new_unchecked(packet),
            &IpAddress::from(from.ip()),
            &IpAddress::from(to.ip()),
            &self.checksums,
        );
        frame
    }

    /// A datagram, in as many fragments as the link needs.
    pub(crate) fn datagram(&mut self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<Vec<u8>> {
        self.datagram_to(self.neighbours.of(to.ip()), from, to, payload)
    }

    fn datagram_to(
        &mut self,
        mac: EthernetAddress,
        from: SocketAddr,
        to: SocketAddr,
        payload: &[u8],
    ) -> Vec<Vec<u8>> {
        let mut datagram = vec![0; UDP_HEADER_LEN + payload.len()];
        datagram[UDP_HEADER_LEN..].copy_from_slice(payload);
        let length = datagram.len() as u16;
        let mut packet = UdpPacket::new_unchecked(&mut datagram[..]);
        packet.set_src_port(from.port());
        packet.set_dst_port(to.port());
        packet.set_len(length);
        packet.fill_checksum(&IpAddress::from(from.ip()), &IpAddress::from(to.ip()));
        self.fragments((from.ip(), to.ip()), IpProtocol::Udp, mac, &datagram)
    }

    /// A DHCP reply: like any datagram, but perhaps to everybody.
    pub(crate) fn broadcast_datagram(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        payload: &[u8],
    ) -> Vec<Vec<u8>> {
        self.datagram_to(EthernetAddress::BROADCAST, from, to, payload)
    }

    /// An ICMP message, of either family, whose checksum is made here.
    pub(crate) fn icmp(&mut self, ends: Ends, mut message: Vec<u8>) -> Vec<Vec<u8>> {
        let protocol = checksum_icmp(ends, &mut message);
        self.fragments(ends, protocol, self.neighbours.of(ends.1), &message)
    }

    /// Tells the guest that a packet of its own did not arrive, in the name of `sender`.
    pub(crate) fn notice(&mut self, sender: IpAddr, notice: &Notice) -> Vec<Vec<u8>> {
        self.icmp((sender, notice.guest), notice.message())
    }

    /// A message of the router's to a neighbour, or to everybody.
    pub(crate) fn neighbour(&self, from: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
        let ends = (from.into(), to.into());
        let protocol = checksum_icmp(ends, &mut message);
        let mac = match to.octets() {
            // RFC 2464 §7.
            [0xff, .., a, b, c, d] => EthernetAddress([0x33, 0x33, a, b, c, d]),
            _ => self.neighbours.of(ends.1),
        };
        let mut frame = Vec::new();
        self.ip_to(&mut frame, mac, ends, protocol, neighbour::HOPS, message.len()).copy_from_slice(&message);
        frame
    }

    /// That there is a router, for everybody.
    pub(crate) fn to_all_nodes(&self, message: Vec<u8>) -> Vec<u8> {
        self.neighbour(ROUTER_LINK_LOCAL, neighbour::ALL_NODES, message)
    }

    fn fragments(
        &mut self,
        ends: Ends,
        protocol: IpProtocol,
        mac: EthernetAddress,
        payload: &[u8],
    ) -> Vec<Vec<u8>> {
        self.ident = self.ident.wrapping_add(1);
        let room = self.mtu - ip_header_bytes(ends.0);
        if payload.len() <= room {
            let mut frame = Vec::new();
            self.ip_to(&mut frame, mac, ends, protocol, HOP_LIMIT, payload.len()).copy_from_slice(payload);
            return vec![frame];
        }
        let extra = if ends.0.is_ipv4() { 0 } else { ipv6::FRAGMENT_HEADER_BYTES };
        // Every fragment but the last is a multiple of 8 bytes long.
        let step = (room - extra) & !7;
        let count = payload.len().div_ceil(step);
        payload
            .chunks(step)
            .enumerate()
            .map(|(number, chunk)| {
                self.fragment(ends, protocol, mac, (number * step) as u16, number + 1 < count, chunk)
            })
            .collect()
    }

    fn fragment(
        &self,
        ends: Ends,
        protocol: IpProtocol,
        mac: EthernetAddress,
        offset: u16,
        more: bool,
        chunk: &[u8],
    ) -> Vec<u8> {
        let mut frame = Vec::new();
        if ends.0.is_ipv4() {
            self.ip_to(&mut frame, mac, ends, protocol, HOP_LIMIT, chunk.len()).copy_from_slice(chunk);
            let mut packet = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_HEADER_LEN..]);
            packet.set_dont_frag(false);
            packet.set_ident(self.ident as u16);
            packet.set_more_frags(more);
            packet.set_frag_offset(offset);
            packet.fill_checksum();
        } else {
            let length = ipv6::FRAGMENT_HEADER_BYTES + chunk.len();
            let place = self.ip_to(&mut frame, mac, ends, IpProtocol::Ipv6Frag, HOP_LIMIT, length);
            let (header, rest) = place.split_at_mut(ipv6::FRAGMENT_HEADER_BYTES);
            header[0] = protocol.into();
            header[2..4].copy_from_slice(&(offset | u16::from(more)).to_be_bytes());
            header[4..].copy_from_slice(&self.ident.to_be_bytes());
            rest.copy_from_slice(chunk);
        }
        frame
    }

    fn ip<'a>(&self, out: &'a mut Vec<u8>, ends: Ends, protocol: IpProtocol, length: usize) -> &'a mut [u8] {
        self.ip_to(out, self.neighbours.of(ends.1), ends, protocol, HOP_LIMIT, length)
    }

    /// Appends Ethernet and IP headers to `out`, and returns the place for `length` bytes of payload.
    fn ip_to<'a>(
        &self,
        out: &'a mut Vec<u8>,
        mac: EthernetAddress,
        (source, destination): Ends,
        protocol: IpProtocol,
        hops: u8,
        length: usize,
    ) -> &'a mut [u8] {
        let header = IpRepr::new(source.into(), destination.into(), protocol, length, hops);
        let kind = if source.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 };
        let packet = self.ethernet(out, mac, kind, header.header_len() + length);
        header.emit(&mut packet[..header.header_len()], &self.checksums);
        &mut packet[header.header_len()..]
    }

    fn ethernet<'a>(
        &self,
        out: &'a mut Vec<u8>,
        mac: EthernetAddress,
        protocol: EthernetProtocol,
        length: usize,
    ) -> &'a mut [u8] {
        let start = out.len();
        out.resize(start + ETHERNET_HEADER_LEN + length, 0);
        let mut frame = EthernetFrame::new_unchecked(&mut out[start..]);
        frame.set_src_addr(GATEWAY_MAC);
        frame.set_dst_addr(mac);
        frame.set_ethertype(protocol);
        &mut out[start + ETHERNET_HEADER_LEN..]
    }
}

fn ip_header_bytes(address: IpAddr) -> usize {
    if address.is_ipv4() { IPV4_HEADER_LEN } else { ipv6::HEADER_BYTES }
}

/// Makes a message's checksum; returns the protocol it is of.
fn checksum_icmp(ends: Ends, message: &mut [u8]) -> IpProtocol {
    match ends {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            Icmpv6Packet::new_unchecked(message).fill_checksum(&source, &destination);
            IpProtocol::Icmpv6
        }
        _ => {
            Icmpv4Packet::new_unchecked(message).fill_checksum();
            IpProtocol::Icmp
        }
    }
}

/// The sum of what a TCP checksum takes from the IP header (RFC 9293 §3.1, RFC 8200 §8.1), for others to go on with.
fn pseudo_sum((source, destination): Ends, length: usize) -> u16 {
    let halves = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().chunks_exact(2).map(pair).sum::<u32>(),
        IpAddr::V6(address) => address.octets().chunks_exact(2).map(pair).sum::<u32>(),
    };
    let mut sum = halves(source) + halves(destination) + u32::from(u8::from(IpProtocol::Tcp)) + length as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn pair(bytes: &[u8]) -> u32 {
    u32::from(bytes[0]) << 8 | u32::from(bytes[1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reassembly::{Name, Outcome, Reassembly};

    fn end(last: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([198, 18, 0, last], port))
    }

    fn nobody() -> Neighbours {
        Neighbours::new(end(2, 0).ip())
    }

    #[test]
    fn a_datagram_larger_than_the_link_is_fragmented() {
        let mut framer = Framer::new(nobody(), 1500, false);
        let payload: Vec<u8> = (0..4000u32).map(|i| i as u8).collect();
        let frames = framer.datagram(end(1, 53), end(2, 999), &payload);
        assert_eq!(frames.len(), 3);
        let mut whole = Vec::new();
        for (number, frame) in frames.iter().enumerate() {
            assert!(frame.len() <= ETHERNET_HEADER_LEN + 1500);
            let packet = Ipv4Packet::new_checked(&frame[ETHERNET_HEADER_LEN..]).unwrap();
            assert!(packet.verify_checksum());
            assert_eq!(usize::from(packet.frag_offset()), whole.len());
            assert_eq!(packet.more_frags(), number < 2);
            whole.extend(packet.payload());
        }
        assert_eq!(whole[UDP_HEADER_LEN..], payload);
        let packet = UdpPacket::new_checked(&whole[..]).unwrap();
        assert!(packet.verify_checksum(&end(1, 0).ip().into(), &end(2, 0).ip().into()));
    }

    #[test]
    fn and_so_in_ipv6() {
        let mut framer = Framer::new(nobody(), 1280, false);
        let [from, to] = ["[fdc7::1]:53", "[fdc7::2]:999"].map(|end| end.parse::<SocketAddr>().unwrap());
        let payload: Vec<u8> = (0..4000u32).map(|i| i as u8).collect();
        let mut reassembly = Reassembly::default();
        let mut outcome = Outcome::Kept;
        for frame in framer.datagram(from, to, &payload) {
            assert_eq!(outcome, Outcome::Kept);
            assert!(frame.len() <= ETHERNET_HEADER_LEN + 1280);
            let packet = ipv6::parse(&frame[ETHERNET_HEADER_LEN..]).unwrap();
            let piece = packet.fragment.unwrap();
            let (source, destination) = (packet.source.into(), packet.destination.into());
            let name = Name { source, destination, protocol: packet.protocol, ident: piece.ident };
            outcome = reassembly.insert(name, piece.offset, piece.more, packet.payload, Default::default());
        }
        let Outcome::Whole(whole) = outcome else { panic!("{outcome:?}") };
        assert_eq!(whole[UDP_HEADER_LEN..], payload);
        let packet = UdpPacket::new_checked(&whole[..]).unwrap();
        assert!(packet.verify_checksum(&from.ip().into(), &to.ip().into()));
    }

    #[test]
    fn a_datagram_that_fits_is_one_frame() {
        let mut framer = Framer::new(nobody(), 1500, false);
        let frames = framer.datagram(end(1, 53), end(2, 999), &[7; 1472]);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].len(), 1514);
        let packet = Ipv4Packet::new_checked(&frames[0][ETHERNET_HEADER_LEN..]).unwrap();
        assert!(packet.dont_frag());
    }
}

//! Frames as bytes: headers around payloads, and back. Parsing and emitting is smoltcp's; what is kept here is how
//! this link uses it.

use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpPacket, ArpRepr, ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame, EthernetProtocol,
    IPV4_HEADER_LEN, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl,
    TcpPacket, TcpRepr, TcpSeqNumber, UDP_HEADER_LEN, UdpPacket,
};

use crate::arp::GATEWAY_MAC;
use crate::icmp::Unreachable;
use crate::offload;
use crate::tcp::Segment;

/// Hops left in packets of ours.
const HOP_LIMIT: u8 = 64;

/// Puts frames to one guest together.
#[derive(Debug)]
pub(crate) struct Framer {
    pub(crate) guest_mac: EthernetAddress,
    mtu: usize,
    /// Identifies the fragments of one datagram.
    ident: u16,
    checksums: ChecksumCapabilities,
    /// The guest makes TCP's checksums and cuts segments that are too long.
    offloads: bool,
}

impl Framer {
    pub(crate) fn new(mtu: u16, offloads: bool) -> Self {
        Self {
            // Until the guest has said something, everybody is meant.
            guest_mac: EthernetAddress::BROADCAST,
            mtu: mtu.into(),
            ident: 0,
            checksums: ChecksumCapabilities::default(),
            offloads,
        }
    }

    pub(crate) fn arp(&self, reply: &ArpRepr) -> Vec<u8> {
        let mut frame = Vec::new();
        let payload = self.ethernet(&mut frame, self.guest_mac, EthernetProtocol::Arp, reply.buffer_len());
        reply.emit(&mut ArpPacket::new_unchecked(payload));
        frame
    }

    /// Appends one TCP segment to `out`, and before it what is left to do, if the link has that; returns the length of
    /// both. The payload comes in two pieces.
    pub(crate) fn segment(
        &self,
        out: &mut Vec<u8>,
        from: SocketAddrV4,
        to: SocketAddrV4,
        segment: &Segment,
        payload: [&[u8]; 2],
    ) -> usize {
        let header = TcpRepr {
            src_port: from.port(),
            dst_port: to.port(),
            control: segment.control,
            seq_number: TcpSeqNumber(segment.seq.0.cast_signed()),
            ack_number: Some(TcpSeqNumber(segment.ack.0.cast_signed())),
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
        if self.offloads {
            let transport = ETHERNET_HEADER_LEN + IPV4_HEADER_LEN;
            let headers = transport + header.header_len();
            out.extend(offload::of_segment(transport, headers, segment.length, segment.limit));
        }
        let packet = self.ipv4(out, (*from.ip(), *to.ip()), IpProtocol::Tcp, length);
        let at = header.header_len();
        packet[at..at + first.len()].copy_from_slice(first);
        packet[at + first.len()..].copy_from_slice(second);
        let (source, destination) = (IpAddress::Ipv4(*from.ip()), IpAddress::Ipv4(*to.ip()));
        let mut packet = TcpPacket::new_unchecked(packet);
        header.emit(&mut packet, &source, &destination, &ChecksumCapabilities::ignored());
        // emit() knows of an end of data or of stream, not of both.
        packet.set_psh(matches!(segment.control, TcpControl::Psh | TcpControl::Fin) && length > at);
        if self.offloads {
            packet.set_checksum(pseudo_sum(*from.ip(), *to.ip(), length));
        } else {
            packet.fill_checksum(&source, &destination);
        }
        out.len() - start
    }

    /// A reset for a connection we know nothing of, or for one of ours.
    pub(crate) fn reset(&self, from: SocketAddrV4, to: SocketAddrV4, seq: u32, ack: Option<u32>) -> Vec<u8> {
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
        let packet = self.ipv4(&mut frame, (*from.ip(), *to.ip()), IpProtocol::Tcp, header.header_len());
        header.emit(
            &mut TcpPacket::new_unchecked(packet),
            &IpAddress::Ipv4(*from.ip()),
            &IpAddress::Ipv4(*to.ip()),
            &self.checksums,
        );
        frame
    }

    /// A datagram, in as many fragments as the link needs.
    pub(crate) fn datagram(&mut self, from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<Vec<u8>> {
        let mut datagram = vec![0; UDP_HEADER_LEN + payload.len()];
        datagram[UDP_HEADER_LEN..].copy_from_slice(payload);
        let length = datagram.len() as u16;
        let mut packet = UdpPacket::new_unchecked(&mut datagram[..]);
        packet.set_src_port(from.port());
        packet.set_dst_port(to.port());
        packet.set_len(length);
        packet.fill_checksum(&IpAddress::Ipv4(*from.ip()), &IpAddress::Ipv4(*to.ip()));
        self.fragments((*from.ip(), *to.ip()), IpProtocol::Udp, self.guest_mac, &datagram)
    }

    /// A DHCP reply: like any datagram, but perhaps to everybody.
    pub(crate) fn broadcast_datagram(
        &mut self,
        from: SocketAddrV4,
        to: SocketAddrV4,
        payload: &[u8],
    ) -> Vec<Vec<u8>> {
        let known = std::mem::replace(&mut self.guest_mac, EthernetAddress::BROADCAST);
        let frames = self.datagram(from, to, payload);
        self.guest_mac = known;
        frames
    }

    pub(crate) fn echo_reply(
        &mut self,
        addresses: (Ipv4Addr, Ipv4Addr),
        ident: u16,
        sequence: u16,
        data: &[u8],
    ) -> Vec<Vec<u8>> {
        let message = self.icmp(&Icmpv4Repr::EchoReply { ident, seq_no: sequence, data });
        self.fragments(addresses, IpProtocol::Icmp, self.guest_mac, &message)
    }

    /// Tells the guest that a packet of its own did not arrive, in the name of `sender`.
    pub(crate) fn unreachable(&mut self, sender: Ipv4Addr, error: &Unreachable) -> Vec<Vec<u8>> {
        let Unreachable { reason, header, ref quote } = *error;
        let message = self.icmp(&Icmpv4Repr::DstUnreachable { reason, header, data: quote });
        self.fragments((sender, header.src_addr), IpProtocol::Icmp, self.guest_mac, &message)
    }

    fn icmp(&self, repr: &Icmpv4Repr<'_>) -> Vec<u8> {
        let mut message = vec![0; repr.buffer_len()];
        repr.emit(&mut Icmpv4Packet::new_unchecked(&mut message[..]), &self.checksums);
        message
    }

    fn fragments(
        &mut self,
        addresses: (Ipv4Addr, Ipv4Addr),
        protocol: IpProtocol,
        mac: EthernetAddress,
        payload: &[u8],
    ) -> Vec<Vec<u8>> {
        // Every fragment but the last is a multiple of 8 bytes long.
        let room = self.mtu - IPV4_HEADER_LEN;
        let step = if payload.len() <= room { room } else { room & !7 };
        self.ident = self.ident.wrapping_add(1);
        let ident = self.ident;
        let chunks = payload.chunks(step);
        let last = chunks.len().saturating_sub(1);
        chunks
            .enumerate()
            .map(|(number, chunk)| {
                let mut frame = Vec::new();
                let place = self.ipv4_to(&mut frame, mac, addresses, protocol, chunk.len());
                place.copy_from_slice(chunk);
                if last > 0 {
                    let mut packet = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_HEADER_LEN..]);
                    packet.set_dont_frag(false);
                    packet.set_ident(ident);
                    packet.set_more_frags(number < last);
                    packet.set_frag_offset((number * step) as u16);
                    packet.fill_checksum();
                }
                frame
            })
            .collect()
    }

    fn ipv4<'a>(
        &self,
        out: &'a mut Vec<u8>,
        addresses: (Ipv4Addr, Ipv4Addr),
        protocol: IpProtocol,
        length: usize,
    ) -> &'a mut [u8] {
        self.ipv4_to(out, self.guest_mac, addresses, protocol, length)
    }

    /// Appends Ethernet and IP headers to `out`, and returns the place for `length` bytes of payload.
    fn ipv4_to<'a>(
        &self,
        out: &'a mut Vec<u8>,
        mac: EthernetAddress,
        (source, destination): (Ipv4Addr, Ipv4Addr),
        protocol: IpProtocol,
        length: usize,
    ) -> &'a mut [u8] {
        let header = Ipv4Repr {
            src_addr: source,
            dst_addr: destination,
            next_header: protocol,
            payload_len: length,
            hop_limit: HOP_LIMIT,
        };
        let packet = self.ethernet(out, mac, EthernetProtocol::Ipv4, IPV4_HEADER_LEN + length);
        header.emit(&mut Ipv4Packet::new_unchecked(&mut packet[..]), &self.checksums);
        &mut packet[IPV4_HEADER_LEN..]
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

/// The sum of what a TCP checksum takes from the IP header (RFC 9293 §3.1), for others to go on with.
fn pseudo_sum(source: Ipv4Addr, destination: Ipv4Addr, length: usize) -> u16 {
    let [source, destination] = [u32::from(source), u32::from(destination)];
    let halves = [source >> 16, source & 0xffff, destination >> 16, destination & 0xffff];
    let mut sum = halves.iter().sum::<u32>() + u32::from(u8::from(IpProtocol::Tcp)) + length as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(last: u8, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, last), port)
    }

    #[test]
    fn a_datagram_larger_than_the_link_is_fragmented() {
        let mut framer = Framer::new(1500, false);
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
        assert!(packet.verify_checksum(&IpAddress::Ipv4(*end(1, 0).ip()), &IpAddress::Ipv4(*end(2, 0).ip())));
    }

    #[test]
    fn a_datagram_that_fits_is_one_frame() {
        let mut framer = Framer::new(1500, false);
        let frames = framer.datagram(end(1, 53), end(2, 999), &[7; 1472]);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].len(), 1514);
        let packet = Ipv4Packet::new_checked(&frames[0][ETHERNET_HEADER_LEN..]).unwrap();
        assert!(packet.dont_frag());
    }
}

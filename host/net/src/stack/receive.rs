//! Frames from the guest, taken apart as far as the conversation they belong to; what is answered on the spot.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use smoltcp::phy::Checksum;
use smoltcp::wire::{
    ArpPacket, ArpRepr, DHCP_CLIENT_PORT, DHCP_SERVER_PORT, EthernetAddress, EthernetFrame, EthernetProtocol,
    Icmpv6Packet, IpProtocol, Ipv4Packet,
};

use super::{Dropped, Envelope, Stack};
use crate::arp::{self, GATEWAY_MAC};
use crate::config::{ROUTER_LINK_LOCAL, Route};
use crate::counters::DropReason;
use crate::dhcp;
use crate::icmp::{Notice, Reason};
use crate::ipv6;
use crate::neighbour::{self, Question};
use crate::offload::Offload;
use crate::reassembly::{Name, Outcome};

impl Stack {
    /// Takes what the link carries from the guest: a frame, and before it what is left to do, if the link has that.
    pub fn receive_from_link(&mut self, bytes: &[u8], now: Duration) {
        if !self.config.offloads {
            return self.receive_frame(bytes, now);
        }
        match Offload::split(bytes) {
            Some((offload, frame)) => self.receive_offloaded(frame, offload, now),
            None => self.counters.count(DropReason::Malformed),
        }
    }

    fn receive_offloaded(&mut self, frame: &[u8], offload: Offload, now: Duration) {
        let checksums = self.checksums.clone();
        if offload.checksum_missing {
            self.checksums.tcp = Checksum::Tx;
            self.checksums.udp = Checksum::Tx;
        }
        self.offload = offload;
        self.receive_frame(frame, now);
        self.offload = Offload::default();
        self.checksums = checksums;
    }

    /// Takes one Ethernet frame from the guest.
    pub fn receive_frame(&mut self, frame: &[u8], now: Duration) {
        self.counters.frames_in += 1;
        self.counters.bytes_in += frame.len() as u64;
        if let Err(reason) = self.ethernet(frame, now) {
            self.counters.count(reason);
        }
    }

    fn ethernet(&mut self, bytes: &[u8], now: Duration) -> Dropped {
        let frame = EthernetFrame::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        let (source, destination) = (frame.src_addr(), frame.dst_addr());
        if destination != GATEWAY_MAC && destination.is_unicast() {
            return Err(DropReason::NotForUs);
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.arp(source, frame.payload()),
            EthernetProtocol::Ipv4 => self.ipv4(source, frame.payload(), now),
            EthernetProtocol::Ipv6 if self.config.has_ipv6() => self.ipv6(source, frame.payload(), now),
            EthernetProtocol::Ipv6 => Err(DropReason::Ipv6),
            EthernetProtocol::Unknown(_) => Err(DropReason::UnknownProtocol),
        }
    }

    fn arp(&mut self, sender: EthernetAddress, bytes: &[u8]) -> Dropped {
        let packet = ArpPacket::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        let question = ArpRepr::parse(&packet).map_err(|_| DropReason::Malformed)?;
        let ArpRepr::EthernetIpv4 { source_protocol_addr, .. } = question else { return Ok(()) };
        self.framer.neighbours.heard(source_protocol_addr.into(), sender);
        match arp::answer(&self.config, &question) {
            Some(answer) => {
                let frame = self.framer.arp(sender, &answer);
                self.queue([frame])
            }
            None => Ok(()),
        }
    }

    fn ipv4(&mut self, sender: EthernetAddress, bytes: &[u8], now: Duration) -> Dropped {
        let packet = Ipv4Packet::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        if packet.version() != 4 || (self.checksums.ipv4.rx() && !packet.verify_checksum()) {
            return Err(DropReason::Malformed);
        }
        let (source, destination) = (packet.src_addr().into(), packet.dst_addr().into());
        self.framer.neighbours.heard(source, sender);
        let fragment = packet.more_frags() || packet.frag_offset() != 0;
        let envelope = Envelope {
            source,
            destination,
            route: self.config.route(destination),
            hops: packet.hop_limit(),
            whole: packet.dont_frag() && !fragment,
        };
        let protocol = packet.next_header();
        if !fragment {
            return self.packet(&envelope, protocol, packet.payload(), now);
        }
        let name = Name { source, destination, protocol, ident: packet.ident().into() };
        let offset = packet.frag_offset().into();
        match self.reassembly.insert(name, offset, packet.more_frags(), packet.payload(), now) {
            Outcome::Kept => Ok(()),
            Outcome::Discarded => Err(DropReason::Fragment),
            Outcome::Whole(payload) => self.packet(&envelope, protocol, &payload, now),
        }
    }

    fn ipv6(&mut self, sender: EthernetAddress, bytes: &[u8], now: Duration) -> Dropped {
        let packet = ipv6::parse(bytes).ok_or(DropReason::Malformed)?;
        let (source, destination) = (packet.source.into(), packet.destination.into());
        self.framer.neighbours.heard(source, sender);
        let envelope = Envelope {
            source,
            destination,
            route: self.config.route(destination),
            hops: packet.hops,
            whole: packet.fragment.is_none(),
        };
        let Some(fragment) = packet.fragment else {
            return self.packet(&envelope, packet.protocol, packet.payload, now);
        };
        let name = Name { source, destination, protocol: packet.protocol, ident: fragment.ident };
        match self.reassembly.insert(name, fragment.offset, fragment.more, packet.payload, now) {
            Outcome::Kept => Ok(()),
            Outcome::Discarded => Err(DropReason::Fragment),
            Outcome::Whole(payload) => {
                let (protocol, payload) =
                    ipv6::upper(packet.protocol, &payload).ok_or(DropReason::Malformed)?;
                self.packet(&envelope, protocol, payload, now)
            }
        }
    }

    /// Takes a whole packet: a header and everything that belongs to it.
    fn packet(
        &mut self,
        envelope: &Envelope,
        protocol: IpProtocol,
        payload: &[u8],
        now: Duration,
    ) -> Dropped {
        // A guest without an address yet speaks DHCP and neighbour discovery, and only that.
        match (envelope.source, protocol) {
            (IpAddr::V4(_), IpProtocol::Udp)
                if matches!(envelope.route, Route::Gateway | Route::Multicast) =>
            {
                let datagram = self.parse_udp(envelope, payload)?;
                if datagram.0.dst_port == DHCP_SERVER_PORT && datagram.0.src_port == DHCP_CLIENT_PORT {
                    return self.dhcp(datagram.1);
                }
            }
            (IpAddr::V6(source), IpProtocol::Icmpv6) => {
                let question = self.question(envelope, payload)?;
                if let Some(question) = question {
                    return self.discovery(source, question, now);
                }
            }
            _ => {}
        }
        self.check_source(envelope)?;
        let mut envelope = *envelope;
        match envelope.route {
            Route::Multicast => return Err(DropReason::Multicast),
            Route::Nowhere => return Err(DropReason::Martian),
            Route::Gateway | Route::Host(_) => {}
            // What goes on crosses a router: this one.
            Route::Outside(_) if envelope.hops > 1 => envelope.hops -= 1,
            Route::Outside(_) => {
                return self.report_packet(Reason::HopsExceeded, &envelope, protocol, payload);
            }
            Route::Neighbour => {
                return self.report_packet(Reason::HostUnreachable, &envelope, protocol, payload);
            }
        }
        match (protocol, envelope.source) {
            (IpProtocol::Tcp, _) => self.tcp(&envelope, payload, now),
            (IpProtocol::Udp, _) => self.udp(&envelope, payload, now),
            (IpProtocol::Icmp, IpAddr::V4(_)) | (IpProtocol::Icmpv6, IpAddr::V6(_)) => {
                self.icmp(&envelope, payload, now)
            }
            _ => Err(DropReason::UnknownProtocol),
        }
    }

    /// Says that a packet goes nowhere, if it is one that is told of (RFC 1122 §3.2.2: no error about an error).
    fn report_packet(
        &mut self,
        reason: Reason,
        envelope: &Envelope,
        protocol: IpProtocol,
        payload: &[u8],
    ) -> Dropped {
        const ECHO: [u8; 2] = [8, 128];
        let icmp = matches!(protocol, IpProtocol::Icmp | IpProtocol::Icmpv6);
        if icmp && !payload.first().is_some_and(|kind| ECHO.contains(kind)) {
            return Err(DropReason::UnsupportedIcmp);
        }
        let notice = Notice::packet(reason, envelope.source, envelope.destination, protocol, payload);
        self.report(&notice, None)
    }

    fn check_source(&self, envelope: &Envelope) -> Dropped {
        let usable = match envelope.source {
            IpAddr::V4(source) => {
                let own = source == self.config.gateway || source == self.config.host_alias;
                self.config.contains(source) && source != self.config.broadcast() && !own
            }
            IpAddr::V6(source) if neighbour::is_own(&self.config, source) => false,
            // An address of this link does for what is on it.
            IpAddr::V6(source) if source.is_unicast_link_local() => {
                !matches!(envelope.route, Route::Outside(_) | Route::Host(_))
            }
            IpAddr::V6(source) => self.config.contains6(source),
        };
        if usable { Ok(()) } else { Err(DropReason::Spoofed) }
    }

    fn dhcp(&mut self, message: &[u8]) -> Dropped {
        let reply = dhcp::answer(&self.config, message).ok_or(DropReason::UnexpectedMessage)?;
        let from = SocketAddr::new(self.config.gateway.into(), DHCP_SERVER_PORT);
        let to = SocketAddr::new(reply.to.into(), DHCP_CLIENT_PORT);
        let frames = if reply.broadcast {
            self.framer.broadcast_datagram(from, to, &reply.message)
        } else {
            self.framer.datagram(from, to, &reply.message)
        };
        self.queue(frames)
    }

    // ---- neighbour discovery --------------------------------------------------------------------------------------

    /// What an ICMPv6 message asks about the link.
    fn question(&self, envelope: &Envelope, message: &[u8]) -> Result<Option<Question>, DropReason> {
        if !self.has_checksum(envelope, message)? {
            return Err(DropReason::Malformed);
        }
        Ok(neighbour::read(envelope.hops, message))
    }

    /// Whether an ICMPv6 message's checksum is right.
    fn has_checksum(&self, envelope: &Envelope, message: &[u8]) -> Result<bool, DropReason> {
        let packet = Icmpv6Packet::new_checked(message).map_err(|_| DropReason::Malformed)?;
        Ok(match (envelope.source, envelope.destination) {
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                !self.checksums.icmpv6.rx() || packet.verify_checksum(&source, &destination)
            }
            _ => false,
        })
    }

    fn discovery(&mut self, source: Ipv6Addr, question: Question, now: Duration) -> Dropped {
        let nameless = source.is_unspecified();
        let known = source.is_unicast_link_local() || self.config.contains6(source);
        if !nameless && (!known || neighbour::is_own(&self.config, source)) {
            return Err(DropReason::Spoofed);
        }
        let to = if nameless { neighbour::ALL_NODES } else { source };
        let frame = match question {
            Question::Router => {
                self.advertise_at.get_or_insert(now + neighbour::ADVERTISE_EVERY);
                let message = neighbour::router_advertisement(&self.config);
                self.framer.neighbour(ROUTER_LINK_LOCAL, to, message)
            }
            Question::Neighbour(target) if neighbour::is_own(&self.config, target) => {
                self.framer.neighbour(target, to, neighbour::advertisement(target, !nameless))
            }
            Question::Neighbour(_) => return Ok(()),
        };
        self.queue([frame])
    }
}

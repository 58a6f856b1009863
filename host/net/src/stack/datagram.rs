//! UDP, questions for names, and echoes: one datagram at a time.

use std::net::SocketAddr;
use std::time::Duration;

use smoltcp::wire::{Icmpv4Packet, IpAddress, UdpPacket, UdpRepr};

use super::{Dropped, Envelope, FRAME_QUEUE, Operation, Stack};
use crate::config::Route;
use crate::counters::DropReason;
use crate::dns::{self, DNS_PORT, Query, Response, Verdict};
use crate::flow::{Flow, FlowId, Key};
use crate::icmp::{Echo, EchoMessage, Notice, Reason, Trouble};
use crate::udp::Association;

/// Largest payload of a UDP datagram or an echo in IPv4, and of what is carried in IPv6.
const DATAGRAM_MAX: usize = 65_507;
/// Routers that a question of ours to a resolver may cross: as many as any packet of this host.
const RESOLVER_HOPS: u8 = 64;

impl Stack {
    pub(super) fn parse_udp<'a>(
        &self,
        envelope: &Envelope,
        bytes: &'a [u8],
    ) -> Result<(UdpRepr, &'a [u8]), DropReason> {
        let packet = UdpPacket::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        let (source, destination) = (IpAddress::from(envelope.source), IpAddress::from(envelope.destination));
        // Only IPv4 knows datagrams without a checksum (RFC 8200 §8.1).
        if envelope.source.is_ipv6() && packet.checksum() == 0 && self.checksums.udp.rx() {
            return Err(DropReason::Malformed);
        }
        let header = UdpRepr::parse(&packet, &source, &destination, &self.checksums)
            .map_err(|_| DropReason::Malformed)?;
        Ok((header, packet.payload()))
    }

    pub(super) fn udp(&mut self, envelope: &Envelope, bytes: &[u8], now: Duration) -> Dropped {
        let (header, payload) = self.parse_udp(envelope, bytes)?;
        let guest = SocketAddr::new(envelope.source, header.src_port);
        let remote = SocketAddr::new(envelope.destination, header.dst_port);
        let to = match envelope.route {
            Route::Outside(address) | Route::Host(address) => SocketAddr::new(address, remote.port()),
            Route::Gateway if remote.port() == DNS_PORT => return self.dns(guest, payload, now),
            _ => {
                let notice = Notice::udp(Reason::PortUnreachable, guest, remote, payload.len());
                return self.report(&notice, None);
            }
        };
        if header.src_port == 0 {
            return Err(DropReason::Malformed);
        }
        let datagrams = self.offload.datagrams(payload)?;
        let key = Key::Udp { guest, remote };
        let flow = match self.table.find(&key) {
            Some(flow) => flow,
            None => {
                let flow = self.open(key, Flow::Udp(Association::new(guest, remote, now)))?;
                self.operations.push_back(Operation::OpenUdp { flow, to });
                flow
            }
        };
        if let Some(Flow::Udp(association)) = self.table.get_mut(flow).map(|entry| &mut entry.flow) {
            association.sent(payload.len(), now);
        }
        self.watch(flow);
        for datagram in datagrams {
            let payload = datagram.to_vec();
            let Envelope { hops, whole, .. } = *envelope;
            self.operations.push_back(Operation::SendDatagram { flow, payload, hops, whole });
        }
        Ok(())
    }

    fn dns(&mut self, guest: SocketAddr, message: &[u8], now: Duration) -> Dropped {
        match dns::consider(&self.config, message) {
            Verdict::Nonsense => Err(DropReason::UnexpectedMessage),
            Verdict::Answer(answer) => self.dns_reply(guest, &answer),
            Verdict::Forward { .. } if self.resolvers.is_empty() => {
                self.dns_reply(guest, &dns::servfail(message))
            }
            Verdict::Forward { id } => {
                let key = Key::Dns { guest, id };
                if self.table.find(&key).is_some() {
                    // The guest asks again; so do we, in our own time.
                    return Ok(());
                }
                let our_id = self.random.next() as u16;
                let query = Query::new(guest, message, id, our_id, now);
                let flow = self.open(key, Flow::Dns(query))?;
                self.ask_resolver(flow);
                Ok(())
            }
        }
    }

    fn dns_reply(&mut self, guest: SocketAddr, message: &[u8]) -> Dropped {
        let from = SocketAddr::new(self.config.gateway_for(guest.ip()), DNS_PORT);
        let frames = self.framer.datagram(from, guest, message);
        self.queue(frames)
    }

    /// Asks the resolver whose turn it is, or tells the guest that all have had theirs.
    fn ask_resolver(&mut self, id: FlowId) {
        let Some(Flow::Dns(query)) = self.table.get(id).map(|entry| &entry.flow) else { return };
        match query.resolver(self.resolvers.len()) {
            Some(turn) => {
                let payload = query.request();
                let to = self.resolvers[turn];
                self.operations.push_back(Operation::OpenUdp { flow: id, to });
                let (hops, whole) = (RESOLVER_HOPS, false);
                self.operations.push_back(Operation::SendDatagram { flow: id, payload, hops, whole });
                self.watch(id);
            }
            None => {
                let (guest, failure) = (query.guest(), query.failure());
                if let Err(reason) = self.dns_reply(guest, &failure) {
                    self.counters.count(reason);
                }
                self.end(id, Operation::Close { flow: id });
            }
        }
    }

    pub(super) fn ask_next_resolver(&mut self, id: FlowId, now: Duration) {
        if let Some(Flow::Dns(query)) = self.table.get_mut(id).map(|entry| &mut entry.flow) {
            query.next_resolver(now);
            self.ask_resolver(id);
        }
    }

    pub(super) fn icmp(&mut self, envelope: &Envelope, bytes: &[u8], now: Duration) -> Dropped {
        let (guest, remote) = (envelope.source, envelope.destination);
        if guest.is_ipv4() {
            let packet = Icmpv4Packet::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
            if self.checksums.icmpv4.rx() && !packet.verify_checksum() {
                return Err(DropReason::Malformed);
            }
        }
        let message = EchoMessage::read_request(guest, bytes).ok_or(DropReason::UnsupportedIcmp)?;
        let Route::Outside(to) = envelope.route else {
            // The gateway and the host itself are here.
            let frames = self.framer.icmp((remote, guest), message.reply(guest));
            return self.queue(frames);
        };
        let key = Key::Echo { guest, remote, ident: message.ident };
        let flow = match self.table.find(&key) {
            Some(flow) => flow,
            None => {
                let flow = self.open(key, Flow::Echo(Echo::new(guest, remote, message.ident, now)))?;
                self.operations.push_back(Operation::OpenEcho { flow, to });
                flow
            }
        };
        if let Some(Flow::Echo(echo)) = self.table.get_mut(flow).map(|entry| &mut entry.flow) {
            echo.touch(now);
        }
        self.watch(flow);
        let Envelope { hops, whole, .. } = *envelope;
        let payload = message.request(remote);
        self.operations.push_back(Operation::SendDatagram { flow, payload, hops, whole });
        Ok(())
    }

    /// False while so many frames wait for the link that datagrams had better wait in the host's sockets.
    pub fn takes_datagrams(&self) -> bool {
        self.frames.len() < FRAME_QUEUE / 2
    }

    /// A datagram arrived on the flow's host socket.
    pub fn datagram(&mut self, id: FlowId, payload: &[u8], now: Duration) {
        if let Err(reason) = self.try_datagram(id, payload, now) {
            self.counters.count(reason);
        }
    }

    fn try_datagram(&mut self, id: FlowId, payload: &[u8], now: Duration) -> Dropped {
        let resolvers = self.resolvers.len();
        if payload.len() > DATAGRAM_MAX {
            return Err(DropReason::UnexpectedMessage);
        }
        let Some(entry) = self.table.get_mut(id) else { return Ok(()) };
        match &mut entry.flow {
            Flow::Udp(association) => {
                association.received(now);
                let frames = self.framer.datagram(association.remote(), association.guest(), payload);
                self.watch(id);
                self.queue(frames)
            }
            Flow::Echo(echo) => {
                let reply = EchoMessage::read_reply(echo.remote, payload);
                let reply = reply.ok_or(DropReason::UnexpectedMessage)?;
                echo.touch(now);
                let message = EchoMessage { ident: echo.ident, ..reply }.reply(echo.guest);
                let frames = self.framer.icmp((echo.remote, echo.guest), message);
                self.watch(id);
                self.queue(frames)
            }
            Flow::Dns(query) => match query.response(payload, query.has_fresh_resolver(resolvers)) {
                Response::Foreign => Err(DropReason::UnexpectedMessage),
                Response::Failed => {
                    self.ask_next_resolver(id, now);
                    Ok(())
                }
                Response::Deliver(answer) => {
                    let guest = query.guest();
                    self.end(id, Operation::Close { flow: id });
                    self.dns_reply(guest, &answer)
                }
            },
            Flow::Tcp(_) => Ok(()),
        }
    }

    /// What became of something sent on a UDP or echo flow's socket.
    pub(super) fn datagram_trouble(&mut self, id: FlowId, trouble: Trouble) {
        let Some(entry) = self.table.get(id) else { return };
        let Trouble { reason, from, sequence } = trouble;
        let notice = match &entry.flow {
            Flow::Udp(association) => {
                let (guest, remote) = (association.guest(), association.remote());
                Notice::udp(reason, guest, remote, association.last_length)
            }
            Flow::Echo(echo) => Notice::echo(reason, echo, sequence.unwrap_or_default()),
            Flow::Tcp(_) | Flow::Dns(_) => return,
        };
        self.report_or_count(&notice, from);
    }
}

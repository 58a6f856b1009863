//! The NAT as a pure machine: frames and socket events in, frames and socket operations out. No I/O, no clock: the
//! caller passes `now`, the time since any fixed moment.
//!
//! The driver's side of the contract:
//!
//! - give every frame to [`Stack::receive_frame`], and [`Stack::tick`] when [`Stack::next_deadline`] has come;
//! - carry out [`Stack::next_operation`] until there is none, and report what became of them ([`Stack::connected`],
//!   [`Stack::failed`], …). An event of a flow that has ended meanwhile is ignored;
//! - move TCP bytes: [`Stack::outgoing`] → host socket → [`Stack::host_took`], and host socket → [`Stack::host_sent`]
//!   as far as [`Stack::room`] allows. What does not fit stays in the host's socket buffer: that is the backpressure;
//! - take frames with [`Stack::next_frame`] as long as there is room on the link; what is not taken stays in the
//!   flows' bounded buffers.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use host_frames::OFFLOAD_BYTES;
use smoltcp::phy::{Checksum, ChecksumCapabilities};
use smoltcp::wire::{
    ArpPacket, ArpRepr, DHCP_CLIENT_PORT, DHCP_SERVER_PORT, EthernetFrame, EthernetProtocol,
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet, TcpControl, TcpPacket,
    TcpRepr, UdpPacket, UdpRepr,
};

use crate::arp::{self, GATEWAY_MAC};
use crate::config::{Config, Route};
use crate::counters::{Counters, DropReason};
use crate::dhcp;
use crate::dns::{self, DNS_PORT, Query, RESOLVERS_MAX, Response, Verdict as DnsVerdict};
use crate::flow::{Flow, FlowId, Key, Table};
use crate::icmp::{self, Echo, Unreachable};
use crate::offload::Offload;
use crate::random::Random;
use crate::reassembly::{Name, Outcome, Reassembly};
use crate::tcp::{Connection, Timeout, Verdict};
use crate::timer::Timers;
use crate::udp::Association;
use crate::wire::Framer;

/// Largest payload of a UDP datagram or an echo in IPv4.
const DATAGRAM_MAX: usize = 65_507;
/// Frames (other than TCP's, which wait in their connections) that wait for the link. A burst of small answers fits;
/// beyond that the link is stuck, and what waits would be stale.
const FRAME_QUEUE: usize = 1024;

/// Something for the driver to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Open a TCP connection; report [`Stack::connected`] or [`Stack::failed`].
    Connect {
        /// For this flow.
        flow: FlowId,
        /// To this address.
        to: SocketAddr,
    },
    /// There are bytes (or the end) for the host's TCP socket: see [`Stack::outgoing`], [`Stack::wants_shutdown`].
    Send {
        /// Of this flow.
        flow: FlowId,
    },
    /// There is room again for bytes of the host's TCP socket: see [`Stack::room`].
    Receive {
        /// In this flow.
        flow: FlowId,
    },
    /// Open a UDP socket connected to the address. A socket the flow had before is closed.
    OpenUdp {
        /// For this flow.
        flow: FlowId,
        /// To this address.
        to: SocketAddr,
    },
    /// Open an unprivileged ICMP echo socket connected to the address.
    OpenEcho {
        /// For this flow.
        flow: FlowId,
        /// To this address.
        to: Ipv4Addr,
    },
    /// Send one datagram (UDP payload, or ICMP message) on the flow's socket; report failures.
    SendDatagram {
        /// Of this flow.
        flow: FlowId,
        /// The bytes.
        payload: Vec<u8>,
    },
    /// The flow has ended: close its socket, if it has one.
    Close {
        /// The flow.
        flow: FlowId,
    },
    /// The guest reset the connection: pass that on.
    Reset {
        /// The flow.
        flow: FlowId,
    },
}

/// Why a host socket failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Nobody listens there.
    Refused,
    /// The host has no route, or the way there is down.
    NetworkUnreachable,
    /// No answer from that host.
    HostUnreachable,
    /// The connection broke.
    Reset,
    /// The host has no socket for us (limits, permissions).
    NoSocket,
}

/// The NAT.
#[derive(Debug)]
pub struct Stack {
    config: Config,
    resolvers: Vec<SocketAddr>,
    random: Random,
    checksums: ChecksumCapabilities,
    /// What the guest has left to do for the frame being received.
    offload: Offload,
    framer: Framer,
    reassembly: Reassembly,
    table: Table,
    timers: Timers,
    /// Frames that are ready as bytes.
    frames: VecDeque<Vec<u8>>,
    /// TCP flows that may have segments to send, in turn.
    ready: VecDeque<FlowId>,
    operations: VecDeque<Operation>,
    counters: Counters,
}

/// Addresses of a packet whose header has passed.
#[derive(Debug, Clone, Copy)]
struct Envelope {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    route: Route,
}

type Dropped = Result<(), DropReason>;

impl Stack {
    /// A NAT without flows. `seed` must differ from run to run and be hard to guess.
    pub fn new(config: Config, seed: u64) -> Self {
        let config = Config { mtu: config.mtu.max(576), ..config };
        Self {
            framer: Framer::new(config.mtu, config.offloads),
            offload: Offload::default(),
            resolvers: Vec::new(),
            random: Random::new(seed),
            checksums: ChecksumCapabilities::default(),
            reassembly: Reassembly::default(),
            table: Table::default(),
            timers: Timers::default(),
            frames: VecDeque::new(),
            ready: VecDeque::new(),
            operations: VecDeque::new(),
            counters: Counters::default(),
            config,
        }
    }

    /// The host's resolvers, best first.
    pub fn set_resolvers(&mut self, resolvers: &[SocketAddr]) {
        self.resolvers = resolvers.iter().copied().take(RESOLVERS_MAX).collect();
    }

    /// Believes transport checksums unseen, so that invented frames get past them.
    pub(crate) fn ignore_checksums(&mut self) {
        let mut checksums = ChecksumCapabilities::ignored();
        checksums.ipv4 = Checksum::Tx;
        self.checksums = checksums;
    }

    /// The numbers so far.
    pub fn counters(&self) -> Counters {
        Counters { flows_open: self.table.len() as u64, ..self.counters }
    }

    /// Counts a packet that the driver could not carry.
    pub fn count_drop(&mut self, reason: DropReason) {
        self.counters.count(reason);
    }

    // ---- from the guest -------------------------------------------------------------------------------------------

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
        if source.is_unicast() {
            self.framer.guest_mac = source;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.arp(frame.payload()),
            EthernetProtocol::Ipv4 => self.ipv4(frame.payload(), now),
            EthernetProtocol::Ipv6 => Err(DropReason::Ipv6),
            EthernetProtocol::Unknown(_) => Err(DropReason::UnknownProtocol),
        }
    }

    fn arp(&mut self, bytes: &[u8]) -> Dropped {
        let packet = ArpPacket::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        let question = ArpRepr::parse(&packet).map_err(|_| DropReason::Malformed)?;
        match arp::answer(&self.config, &question) {
            Some(answer) => {
                let frame = self.framer.arp(&answer);
                self.queue([frame])
            }
            None => Ok(()),
        }
    }

    fn ipv4(&mut self, bytes: &[u8], now: Duration) -> Dropped {
        let packet = Ipv4Packet::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        if packet.version() != 4 || (self.checksums.ipv4.rx() && !packet.verify_checksum()) {
            return Err(DropReason::Malformed);
        }
        if !packet.more_frags() && packet.frag_offset() == 0 {
            return self.packet(&packet, packet.payload(), now);
        }
        let name = Name {
            source: packet.src_addr(),
            destination: packet.dst_addr(),
            protocol: packet.next_header(),
            ident: packet.ident(),
        };
        let offset = packet.frag_offset().into();
        match self.reassembly.insert(name, offset, packet.more_frags(), packet.payload(), now) {
            Outcome::Kept => Ok(()),
            Outcome::Discarded => Err(DropReason::Fragment),
            Outcome::Whole(payload) => self.packet(&packet, &payload, now),
        }
    }

    /// Takes a whole packet: a header and everything that belongs to it.
    fn packet(&mut self, header: &Ipv4Packet<&[u8]>, payload: &[u8], now: Duration) -> Dropped {
        let (source, destination) = (header.src_addr(), header.dst_addr());
        let envelope = Envelope { source, destination, route: self.config.route(destination) };
        // A guest without an address yet speaks DHCP, and only that.
        if header.next_header() == IpProtocol::Udp
            && matches!(envelope.route, Route::Gateway | Route::Multicast)
        {
            let datagram = self.parse_udp(&envelope, payload)?;
            if datagram.0.dst_port == DHCP_SERVER_PORT && datagram.0.src_port == DHCP_CLIENT_PORT {
                return self.dhcp(datagram.1);
            }
        }
        self.check_source(source)?;
        match envelope.route {
            Route::Multicast => return Err(DropReason::Multicast),
            Route::Nowhere => return Err(DropReason::Martian),
            Route::Gateway | Route::Outside(_) | Route::Neighbour => {}
        }
        match header.next_header() {
            IpProtocol::Tcp => self.tcp(&envelope, payload, now),
            IpProtocol::Udp => self.udp(&envelope, payload, now),
            IpProtocol::Icmp => self.icmp(&envelope, payload, now),
            _ => Err(DropReason::UnknownProtocol),
        }
    }

    fn check_source(&self, source: Ipv4Addr) -> Dropped {
        let own = source == self.config.gateway || source == self.config.host_alias;
        let usable = self.config.contains(source) && source != self.config.broadcast();
        if usable && !own { Ok(()) } else { Err(DropReason::Spoofed) }
    }

    fn dhcp(&mut self, message: &[u8]) -> Dropped {
        let reply = dhcp::answer(&self.config, message).ok_or(DropReason::UnexpectedMessage)?;
        let from = SocketAddrV4::new(self.config.gateway, DHCP_SERVER_PORT);
        let to = SocketAddrV4::new(reply.to, DHCP_CLIENT_PORT);
        let frames = if reply.broadcast {
            self.framer.broadcast_datagram(from, to, &reply.message)
        } else {
            self.framer.datagram(from, to, &reply.message)
        };
        self.queue(frames)
    }

    // ---- TCP ------------------------------------------------------------------------------------------------------

    fn tcp(&mut self, envelope: &Envelope, bytes: &[u8], now: Duration) -> Dropped {
        let packet = TcpPacket::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        let (source, destination) = (IpAddress::Ipv4(envelope.source), IpAddress::Ipv4(envelope.destination));
        let segment = TcpRepr::parse(&packet, &source, &destination, &self.checksums)
            .map_err(|_| DropReason::Malformed)?;
        let guest = SocketAddrV4::new(envelope.source, segment.src_port);
        let remote = SocketAddrV4::new(envelope.destination, segment.dst_port);
        let key = Key::Tcp { guest, remote };
        if let Some(id) = self.table.find(&key) {
            self.tcp_segment(id, &segment, now);
            return Ok(());
        }
        if segment.control != TcpControl::Syn || segment.ack_number.is_some() {
            self.refuse(&segment, guest, remote)?;
            return Err(DropReason::NoConnection);
        }
        let to = match envelope.route {
            Route::Outside(address) => SocketAddr::V4(SocketAddrV4::new(address, remote.port())),
            Route::Gateway if remote.port() == DNS_PORT && !self.resolvers.is_empty() => self.resolvers[0],
            Route::Neighbour => {
                let sequence = segment.seq_number.0.cast_unsigned();
                let error = Unreachable::tcp(Icmpv4DstUnreachable::HostUnreachable, guest, remote, sequence);
                return self.report(&error);
            }
            _ => return self.refuse(&segment, guest, remote),
        };
        let mut connection = Connection::new(&segment, self.config.mtu, self.random.next() as u32);
        if self.config.offloads {
            connection.send_large();
        }
        match self.table.insert(key, Flow::Tcp(Box::new(connection))) {
            Some(flow) => {
                self.counters.flows_opened += 1;
                self.operations.push_back(Operation::Connect { flow, to });
                Ok(())
            }
            None => {
                self.refuse(&segment, guest, remote)?;
                Err(DropReason::FlowTableFull)
            }
        }
    }

    fn tcp_segment(&mut self, id: FlowId, segment: &TcpRepr<'_>, now: Duration) {
        let Some(connection) = self.connection(id) else { return };
        match connection.receive(segment, now) {
            Verdict::Continue => self.settle(id),
            Verdict::Reset => self.end(id, Operation::Reset { flow: id }),
        }
    }

    /// Answers a segment that belongs to nothing with a reset (RFC 9293 §3.10.7.1), unless it is one.
    fn refuse(&mut self, segment: &TcpRepr<'_>, guest: SocketAddrV4, remote: SocketAddrV4) -> Dropped {
        if segment.control == TcpControl::Rst {
            return Ok(());
        }
        let (seq, ack) = match segment.ack_number {
            Some(ack) => (ack.0.cast_unsigned(), None),
            None => {
                let end = segment.seq_number.0.cast_unsigned().wrapping_add(segment.segment_len() as u32);
                (0, Some(end))
            }
        };
        let frame = self.framer.reset(remote, guest, seq, ack);
        self.queue([frame])
    }

    fn connection(&mut self, id: FlowId) -> Option<&mut Connection> {
        match &mut self.table.get_mut(id)?.flow {
            Flow::Tcp(connection) => Some(connection),
            _ => None,
        }
    }

    /// The host's connection stands.
    pub fn connected(&mut self, id: FlowId) {
        if let Some(connection) = self.connection(id) {
            connection.connected();
            self.settle(id);
        }
    }

    /// How many bytes [`Stack::host_sent`] takes now. After 0 an [`Operation::Receive`] says when to ask again.
    pub fn room(&mut self, id: FlowId) -> usize {
        self.connection(id).map_or(0, Connection::room)
    }

    /// The host's socket delivered these bytes, no more than [`Stack::room`] said.
    pub fn host_sent(&mut self, id: FlowId, bytes: &[u8]) {
        if let Some(connection) = self.connection(id) {
            connection.host_sent(bytes);
            self.settle(id);
        }
    }

    /// The host's socket has no more to deliver.
    pub fn host_ended(&mut self, id: FlowId) {
        if let Some(connection) = self.connection(id) {
            connection.host_ended();
            self.settle(id);
        }
    }

    /// Bytes for the host's socket, in two pieces.
    pub fn outgoing(&mut self, id: FlowId) -> (&[u8], &[u8]) {
        self.connection(id).map_or((&[], &[]), |connection| connection.outgoing())
    }

    /// The host's socket took this many of the bytes.
    pub fn host_took(&mut self, id: FlowId, count: usize) {
        if let Some(connection) = self.connection(id) {
            connection.host_took(count);
            self.settle(id);
        }
    }

    /// True when the host's socket has all bytes and is to be shut down for writing; then call [`Stack::host_shut`].
    pub fn wants_shutdown(&mut self, id: FlowId) -> bool {
        self.connection(id).is_some_and(|connection| connection.wants_shutdown())
    }

    /// The host's socket has been shut down for writing.
    pub fn host_shut(&mut self, id: FlowId) {
        if let Some(connection) = self.connection(id) {
            connection.host_shut();
            self.settle(id);
        }
    }

    /// After anything that changed a connection: tells the driver, the timers and the queue of senders, or ends it.
    fn settle(&mut self, id: FlowId) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let Flow::Tcp(connection) = &mut entry.flow else { return };
        if connection.is_finished() {
            return self.end(id, Operation::Close { flow: id });
        }
        if connection.wants_send() {
            self.operations.push_back(Operation::Send { flow: id });
        }
        if connection.wants_receive() {
            self.operations.push_back(Operation::Receive { flow: id });
        }
        if !entry.ready {
            entry.ready = true;
            self.ready.push_back(id);
        }
        self.watch(id);
    }

    /// Sends the guest a reset for a connection of ours.
    fn reset_guest(&mut self, id: FlowId) {
        let Some(entry) = self.table.get(id) else { return };
        let (Flow::Tcp(connection), Key::Tcp { guest, remote }) = (&entry.flow, entry.key) else { return };
        let (seq, ack) = connection.reset();
        let frame = self.framer.reset(remote, guest, seq.0, Some(ack.0));
        self.queue_or_count([frame]);
    }

    fn tcp_failed(&mut self, id: FlowId, failure: Failure) {
        let Some(entry) = self.table.get(id) else { return };
        let (Flow::Tcp(connection), Key::Tcp { guest, remote }) = (&entry.flow, entry.key) else { return };
        match unreachable_reason(failure) {
            Some(reason) if connection.is_connecting() => {
                let error = Unreachable::tcp(reason, guest, remote, connection.syn_sequence());
                self.report_or_count(&error);
            }
            _ => self.reset_guest(id),
        }
        self.end(id, Operation::Close { flow: id });
    }

    // ---- UDP, DNS, ICMP -------------------------------------------------------------------------------------------

    fn parse_udp<'a>(&self, envelope: &Envelope, bytes: &'a [u8]) -> Result<(UdpRepr, &'a [u8]), DropReason> {
        let packet = UdpPacket::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        let (source, destination) = (IpAddress::Ipv4(envelope.source), IpAddress::Ipv4(envelope.destination));
        let header = UdpRepr::parse(&packet, &source, &destination, &self.checksums)
            .map_err(|_| DropReason::Malformed)?;
        Ok((header, packet.payload()))
    }

    fn udp(&mut self, envelope: &Envelope, bytes: &[u8], now: Duration) -> Dropped {
        let (header, payload) = self.parse_udp(envelope, bytes)?;
        let guest = SocketAddrV4::new(envelope.source, header.src_port);
        let remote = SocketAddrV4::new(envelope.destination, header.dst_port);
        let unreachable = |reason| Unreachable::udp(reason, guest, remote, payload.len());
        let to = match envelope.route {
            Route::Outside(address) => SocketAddr::V4(SocketAddrV4::new(address, remote.port())),
            Route::Gateway if remote.port() == DNS_PORT => return self.dns(guest, payload, now),
            Route::Neighbour => return self.report(&unreachable(Icmpv4DstUnreachable::HostUnreachable)),
            _ => return self.report(&unreachable(Icmpv4DstUnreachable::PortUnreachable)),
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
            self.operations.push_back(Operation::SendDatagram { flow, payload: datagram.to_vec() });
        }
        Ok(())
    }

    fn dns(&mut self, guest: SocketAddrV4, message: &[u8], now: Duration) -> Dropped {
        match dns::consider(&self.config, message) {
            DnsVerdict::Nonsense => Err(DropReason::UnexpectedMessage),
            DnsVerdict::Answer(answer) => self.dns_reply(guest, &answer),
            DnsVerdict::Forward { .. } if self.resolvers.is_empty() => {
                self.dns_reply(guest, &dns::servfail(message))
            }
            DnsVerdict::Forward { id } => {
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

    fn dns_reply(&mut self, guest: SocketAddrV4, message: &[u8]) -> Dropped {
        let from = SocketAddrV4::new(self.config.gateway, DNS_PORT);
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
                self.operations.push_back(Operation::SendDatagram { flow: id, payload });
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

    fn ask_next_resolver(&mut self, id: FlowId, now: Duration) {
        if let Some(Flow::Dns(query)) = self.table.get_mut(id).map(|entry| &mut entry.flow) {
            query.next_resolver(now);
            self.ask_resolver(id);
        }
    }

    fn icmp(&mut self, envelope: &Envelope, bytes: &[u8], now: Duration) -> Dropped {
        let packet = Icmpv4Packet::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        let message = Icmpv4Repr::parse(&packet, &self.checksums).map_err(|_| DropReason::UnsupportedIcmp)?;
        let Icmpv4Repr::EchoRequest { ident, seq_no, data } = message else {
            return Err(DropReason::UnsupportedIcmp);
        };
        let (guest, remote) = (envelope.source, envelope.destination);
        match envelope.route {
            Route::Outside(to) if remote != self.config.host_alias => {
                let key = Key::Echo { guest, remote, ident };
                let flow = match self.table.find(&key) {
                    Some(flow) => flow,
                    None => {
                        let flow = self.open(key, Flow::Echo(Echo::new(guest, remote, ident, now)))?;
                        self.operations.push_back(Operation::OpenEcho { flow, to });
                        flow
                    }
                };
                if let Some(Flow::Echo(echo)) = self.table.get_mut(flow).map(|entry| &mut entry.flow) {
                    echo.touch(now);
                }
                self.watch(flow);
                let payload = icmp::request(seq_no, data);
                self.operations.push_back(Operation::SendDatagram { flow, payload });
                Ok(())
            }
            Route::Neighbour => {
                let echo = Echo::new(guest, remote, ident, now);
                self.report(&Unreachable::echo(Icmpv4DstUnreachable::HostUnreachable, &echo))
            }
            // The gateway and the host itself are here.
            _ => {
                let frames = self.framer.echo_reply((remote, guest), ident, seq_no, data);
                self.queue(frames)
            }
        }
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
        let gateway = SocketAddrV4::new(self.config.gateway, DNS_PORT);
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
                let (sequence, data) = icmp::parse_reply(payload).ok_or(DropReason::UnexpectedMessage)?;
                echo.touch(now);
                let frames = self.framer.echo_reply((echo.remote, echo.guest), echo.ident, sequence, data);
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
                    let frames = self.framer.datagram(gateway, query.guest(), &answer);
                    self.end(id, Operation::Close { flow: id });
                    self.queue(frames)
                }
            },
            Flow::Tcp(_) => Ok(()),
        }
    }

    // ---- both -----------------------------------------------------------------------------------------------------

    /// The flow's host socket could not be opened, or broke.
    pub fn failed(&mut self, id: FlowId, failure: Failure, now: Duration) {
        if failure == Failure::NoSocket {
            self.counters.count(DropReason::HostSocket);
        }
        let Some(entry) = self.table.get(id) else { return };
        let reason = match failure {
            Failure::Refused => Some(Icmpv4DstUnreachable::PortUnreachable),
            _ => unreachable_reason(failure),
        };
        match &entry.flow {
            Flow::Tcp(_) => self.tcp_failed(id, failure),
            Flow::Dns(_) => self.ask_next_resolver(id, now),
            Flow::Udp(association) => {
                let (guest, remote, length) =
                    (association.guest(), association.remote(), association.last_length);
                if let Some(reason) = reason {
                    self.report_or_count(&Unreachable::udp(reason, guest, remote, length));
                }
                // A refusal is news about one datagram; without a socket there is nothing left to keep.
                if failure != Failure::Refused {
                    self.end(id, Operation::Close { flow: id });
                }
            }
            Flow::Echo(echo) => {
                if let Some(reason) = unreachable_reason(failure) {
                    let error = Unreachable::echo(reason, echo);
                    self.report_or_count(&error);
                }
                self.end(id, Operation::Close { flow: id });
            }
        }
    }

    fn open(&mut self, key: Key, flow: Flow) -> Result<FlowId, DropReason> {
        let id = self.table.insert(key, flow).ok_or(DropReason::FlowTableFull)?;
        self.counters.flows_opened += 1;
        Ok(id)
    }

    fn end(&mut self, id: FlowId, last: Operation) {
        if self.table.remove(id).is_some() {
            self.operations.push_back(last);
        }
    }

    fn report(&mut self, error: &Unreachable) -> Dropped {
        // That a port has nobody is said by the host that was asked, everything else by a router (RFC 1122, 3.2.2.1).
        let sender = match error.reason {
            Icmpv4DstUnreachable::PortUnreachable => error.header.dst_addr,
            _ => self.config.gateway,
        };
        let frames = self.framer.unreachable(sender, error);
        self.queue(frames)
    }

    fn report_or_count(&mut self, error: &Unreachable) {
        if let Err(reason) = self.report(error) {
            self.counters.count(reason);
        }
    }

    /// Queues the frames of one packet: all of them or none.
    fn queue(&mut self, frames: impl IntoIterator<Item = Vec<u8>>) -> Dropped {
        if self.frames.len() >= FRAME_QUEUE {
            return Err(DropReason::LinkQueueFull);
        }
        self.frames.extend(frames);
        Ok(())
    }

    fn queue_or_count(&mut self, frames: impl IntoIterator<Item = Vec<u8>>) {
        if let Err(reason) = self.queue(frames) {
            self.counters.count(reason);
        }
    }

    // ---- time -----------------------------------------------------------------------------------------------------

    /// When [`Stack::tick`] is wanted; `None` while nothing waits for time to pass.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.timers.next()
    }

    /// Acts on every deadline that has come.
    pub fn tick(&mut self, now: Duration) {
        while let Some((at, id)) = self.timers.pop_due(now) {
            let Some(entry) = self.table.get_mut(id) else { continue };
            if entry.timer != Some(at) {
                continue;
            }
            entry.timer = None;
            if entry.flow.deadline().is_some_and(|deadline| deadline <= now) {
                self.expire(id, now);
            }
            self.watch(id);
        }
    }

    fn expire(&mut self, id: FlowId, now: Duration) {
        let Some(entry) = self.table.get_mut(id) else { return };
        match &mut entry.flow {
            Flow::Tcp(connection) => match connection.timeout(now) {
                Timeout::Continue => self.settle(id),
                Timeout::GiveUp => {
                    self.reset_guest(id);
                    self.end(id, Operation::Reset { flow: id });
                }
            },
            Flow::Dns(_) => self.ask_next_resolver(id, now),
            Flow::Udp(_) | Flow::Echo(_) => self.end(id, Operation::Close { flow: id }),
        }
    }

    /// Makes sure that the timers look at the flow no later than its deadline.
    fn watch(&mut self, id: FlowId) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let Some(deadline) = entry.flow.deadline() else { return };
        if entry.timer.is_none_or(|timer| timer > deadline) {
            entry.timer = Some(deadline);
            self.timers.push(deadline, id);
        }
    }

    // ---- out ------------------------------------------------------------------------------------------------------

    /// The next thing to do on the host's side.
    pub fn next_operation(&mut self) -> Option<Operation> {
        self.operations.pop_front()
    }

    /// Appends the next frame for the guest to `out`, and before it what is left to do, if the link has that. Returns the
    /// length of both; `None` when there is none.
    pub fn next_frame(&mut self, out: &mut Vec<u8>, now: Duration) -> Option<usize> {
        let length = match self.frames.pop_front() {
            Some(frame) => {
                // Nothing is left to do for these.
                let before = if self.config.offloads { &[0; OFFLOAD_BYTES][..] } else { &[] };
                out.extend_from_slice(before);
                out.extend_from_slice(&frame);
                before.len() + frame.len()
            }
            None => self.next_segment(out, now)?,
        };
        let before = if self.config.offloads { OFFLOAD_BYTES } else { 0 };
        self.counters.frames_out += 1;
        self.counters.bytes_out += (length - before) as u64;
        Some(length)
    }

    /// One segment of the connection whose turn it is.
    fn next_segment(&mut self, out: &mut Vec<u8>, now: Duration) -> Option<usize> {
        while let Some(id) = self.ready.pop_front() {
            let Some(entry) = self.table.get_mut(id) else { continue };
            let (Flow::Tcp(connection), Key::Tcp { guest, remote }) = (&mut entry.flow, entry.key) else {
                continue;
            };
            let Some(segment) = connection.next_segment(now) else {
                entry.ready = false;
                continue;
            };
            let payload = window(connection.to_guest(), segment.offset, segment.length);
            let length = self.framer.segment(out, remote, guest, &segment, payload);
            self.counters.retransmissions += u64::from(segment.again);
            if connection.is_finished() {
                self.end(id, Operation::Close { flow: id });
            } else {
                self.ready.push_back(id);
                self.watch(id);
            }
            return Some(length);
        }
        None
    }
}

/// `length` bytes at `offset` of a ring's two pieces.
fn window<'a>((first, second): (&'a [u8], &'a [u8]), offset: usize, length: usize) -> [&'a [u8]; 2] {
    let end = offset + length;
    let split = first.len();
    [
        &first[offset.min(split)..end.min(split)],
        &second[offset.saturating_sub(split)..end.saturating_sub(split)],
    ]
}

fn unreachable_reason(failure: Failure) -> Option<Icmpv4DstUnreachable> {
    match failure {
        Failure::NetworkUnreachable => Some(Icmpv4DstUnreachable::NetUnreachable),
        Failure::HostUnreachable => Some(Icmpv4DstUnreachable::HostUnreachable),
        Failure::Refused | Failure::Reset | Failure::NoSocket => None,
    }
}

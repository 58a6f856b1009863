//! TCP between the guest's segments and the host's sockets: the stack's side of [`crate::tcp`].

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use smoltcp::wire::{IpAddress, TcpControl, TcpPacket, TcpRepr};

use super::{Dropped, Envelope, Failure, Operation, Stack, unreachable_reason};
use crate::config::Route;
use crate::counters::DropReason;
use crate::dns::DNS_PORT;
use crate::flow::{FLOW_CAPACITY, Flow, FlowId, Key};
use crate::icmp::{Notice, Reason, Trouble};
use crate::tcp::{Connection, Verdict, WIDE_FLOWS};

/// Ports of ours for connections into the guest: all but those that mean something.
const FIRST_PORT: u16 = 1024;

impl Stack {
    /// Opens a connection into the guest, to `landing`, for a socket of the host's that is connected already and is the
    /// flow's from now on. The guest sees the host's address in its network.
    ///
    /// # Errors
    /// When the guest has not been heard of, `landing` is not on its network, or the table is full. The refusal is
    /// counted; the socket is the caller's to reset.
    pub fn land(&mut self, landing: SocketAddr, now: Duration) -> Result<FlowId, DropReason> {
        self.try_land(landing, now).inspect_err(|reason| self.counters.count(*reason))
    }

    fn try_land(&mut self, landing: SocketAddr, now: Duration) -> Result<FlowId, DropReason> {
        let reachable = landing.is_ipv4() || self.config.has_ipv6();
        if !self.framer.neighbours.knows_machine()
            || !reachable
            || self.config.route(landing.ip()) != Route::Neighbour
        {
            return Err(DropReason::NoLanding);
        }
        let from: IpAddr = match landing {
            SocketAddr::V4(_) => self.config.host_alias.into(),
            SocketAddr::V6(_) => self.config.host_alias6().into(),
        };
        // Each port in turn, so that one is not used again while the guest remembers the connection before; one of so many
        // is free, for there are not as many flows.
        let mut free = None;
        for _ in 0..=FLOW_CAPACITY {
            self.landing_port = self.landing_port.checked_add(1).unwrap_or(FIRST_PORT).max(FIRST_PORT);
            let key = Key::Tcp { guest: landing, remote: SocketAddr::new(from, self.landing_port) };
            if self.table.find(&key).is_none() {
                free = Some(key);
                break;
            }
        }
        let key = free.ok_or(DropReason::FlowTableFull)?;
        // By the clock (RFC 9293 §3.4.1), so that it is ahead of what the guest remembers of the same ports.
        let ticks = (now.as_micros() / 4) as u32;
        let connection =
            Connection::opening(self.largest_payload(landing), self.landing_seq.wrapping_add(ticks));
        let id = self.open(key, Flow::Tcp(Box::new(self.equip(connection))))?;
        self.settle(id);
        Ok(id)
    }

    /// The ends of a TCP flow: the guest's, and the other.
    pub(crate) fn ends(&self, id: FlowId) -> Option<(SocketAddr, SocketAddr)> {
        match self.table.get(id)?.key {
            Key::Tcp { guest, remote } => Some((guest, remote)),
            _ => None,
        }
    }

    /// What IP and TCP headers leave of a packet.
    fn largest_payload(&self, guest: SocketAddr) -> u16 {
        self.config.mtu.saturating_sub(if guest.is_ipv4() { 40 } else { 60 })
    }

    /// A new connection with what the link and the number of others allow.
    fn equip(&self, mut connection: Connection) -> Connection {
        if self.config.offloads {
            connection.send_large();
        }
        // So there are never more of them than that.
        if self.table.len() < WIDE_FLOWS {
            connection.buffer_more();
        }
        connection
    }

    pub(super) fn tcp(&mut self, envelope: &Envelope, bytes: &[u8], now: Duration) -> Dropped {
        let packet = TcpPacket::new_checked(bytes).map_err(|_| DropReason::Malformed)?;
        let (source, destination) = (IpAddress::from(envelope.source), IpAddress::from(envelope.destination));
        let segment = TcpRepr::parse(&packet, &source, &destination, &self.checksums)
            .map_err(|_| DropReason::Malformed)?;
        let guest = SocketAddr::new(envelope.source, segment.src_port);
        let remote = SocketAddr::new(envelope.destination, segment.dst_port);
        let key = Key::Tcp { guest, remote };
        if let Some(id) = self.table.find(&key) {
            return self.tcp_segment(id, &segment, (guest, remote), now);
        }
        if segment.control != TcpControl::Syn || segment.ack_number.is_some() {
            self.refuse(&segment, guest, remote)?;
            return Err(DropReason::NoConnection);
        }
        let to = match envelope.route {
            Route::Outside(address) | Route::Host(address) => SocketAddr::new(address, remote.port()),
            Route::Gateway if remote.port() == DNS_PORT && !self.resolvers.is_empty() => self.resolvers[0],
            _ => return self.refuse(&segment, guest, remote),
        };
        let connection = Connection::new(&segment, self.largest_payload(guest), self.random.next() as u32);
        let connection = self.equip(connection);
        match self.table.insert(key, Flow::Tcp(Box::new(connection))) {
            Some(flow) => {
                self.counters.flows_opened += 1;
                self.operations.push_back(Operation::Connect { flow, to, hops: envelope.hops });
                Ok(())
            }
            None => {
                self.refuse(&segment, guest, remote)?;
                Err(DropReason::FlowTableFull)
            }
        }
    }

    fn tcp_segment(
        &mut self,
        id: FlowId,
        segment: &TcpRepr<'_>,
        (guest, remote): (SocketAddr, SocketAddr),
        now: Duration,
    ) -> Dropped {
        let Some(connection) = self.connection(id) else { return Ok(()) };
        match connection.receive(segment, now) {
            Verdict::Continue => self.settle(id),
            Verdict::Reset => self.end(id, Operation::Reset { flow: id }),
            Verdict::Stale => {
                self.refuse(segment, guest, remote)?;
                return Err(DropReason::NoConnection);
            }
        }
        Ok(())
    }

    /// Answers a segment that belongs to nothing with a reset (RFC 9293 §3.10.7.1), unless it is one.
    fn refuse(&mut self, segment: &TcpRepr<'_>, guest: SocketAddr, remote: SocketAddr) -> Dropped {
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
    pub(super) fn settle(&mut self, id: FlowId) {
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
    pub(super) fn reset_guest(&mut self, id: FlowId) {
        let Some(entry) = self.table.get(id) else { return };
        let (Flow::Tcp(connection), Key::Tcp { guest, remote }) = (&entry.flow, entry.key) else { return };
        let (seq, ack) = connection.reset();
        let frame = self.framer.reset(remote, guest, seq.0, ack.map(|ack| ack.0));
        self.queue_or_count([frame]);
    }

    pub(super) fn tcp_failed(&mut self, id: FlowId, failure: Failure) {
        let Some(entry) = self.table.get(id) else { return };
        let (Flow::Tcp(connection), Key::Tcp { guest, remote }) = (&entry.flow, entry.key) else { return };
        match unreachable_reason(failure) {
            Some(reason) if connection.is_connecting() => {
                let notice = Notice::tcp(reason, guest, remote, connection.syn_sequence());
                self.report_or_count(&notice, None);
            }
            _ => self.reset_guest(id),
        }
        self.end(id, Operation::Close { flow: id });
    }

    /// What was heard of a SYN. What is heard later is the host's own TCP's affair.
    pub(super) fn tcp_trouble(&mut self, id: FlowId, trouble: Trouble) {
        let Some(entry) = self.table.get(id) else { return };
        let (Flow::Tcp(connection), Key::Tcp { guest, remote }) = (&entry.flow, entry.key) else { return };
        if !connection.is_connecting() {
            return;
        }
        match trouble.reason {
            Reason::PortUnreachable => self.reset_guest(id),
            reason => {
                let notice = Notice::tcp(reason, guest, remote, connection.syn_sequence());
                self.report_or_count(&notice, trouble.from);
            }
        }
        self.end(id, Operation::Close { flow: id });
    }
}

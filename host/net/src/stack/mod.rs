//! The NAT as a pure machine: frames and socket events in, frames and socket operations out. No I/O, no clock: the
//! caller passes `now`, the time since any fixed moment.
//!
//! The driver's side of the contract:
//!
//! - give every frame to [`Stack::receive_frame`], and [`Stack::tick`] when [`Stack::next_deadline`] has come;
//! - carry out [`Stack::next_operation`] until there is none, and report what became of them ([`Stack::connected`],
//!   [`Stack::failed`], …). An event of a flow that has ended meanwhile is ignored;
//! - give a socket that the host has accepted for the guest to [`Stack::land`], which makes a flow of it;
//! - move TCP bytes: [`Stack::outgoing`] → host socket → [`Stack::host_took`], and host socket → [`Stack::host_sent`]
//!   as far as [`Stack::room`] allows. What does not fit stays in the host's socket buffer: that is the backpressure;
//! - take frames with [`Stack::next_frame`] as long as there is room on the link; what is not taken stays in the
//!   flows' bounded buffers.

mod datagram;
mod receive;
mod tcp;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use host_frames::OFFLOAD_BYTES;
use smoltcp::phy::{Checksum, ChecksumCapabilities};

use crate::config::{Config, Route};
use crate::counters::{Counters, DropReason};
use crate::dns::RESOLVERS_MAX;
use crate::flow::{Flow, FlowId, Key, Table};
use crate::icmp::{Notice, Reason, Trouble};
use crate::neighbour;
use crate::neighbours::Neighbours;
use crate::offload::Offload;
use crate::random::Random;
use crate::reassembly::Reassembly;
use crate::tcp::Timeout;
use crate::timer::Timers;
use crate::wire::Framer;

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
        /// Through so many routers at most.
        hops: u8,
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
        to: IpAddr,
    },
    /// Send one datagram (UDP payload, or ICMP message) on the flow's socket; report failures, and what is heard of it
    /// later ([`Stack::trouble`]).
    SendDatagram {
        /// Of this flow.
        flow: FlowId,
        /// The bytes.
        payload: Vec<u8>,
        /// Through so many routers at most.
        hops: u8,
        /// It may not be cut on its way: its sender wants to hear that it is too large.
        whole: bool,
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
    /// Of the last connection into the guest, and what the clock is added to for the first sequence number of each.
    landing_port: u16,
    landing_seq: u32,
    /// When the guest is reminded of its router; not before it has asked for one.
    advertise_at: Option<Duration>,
    counters: Counters,
}

/// What the header of a packet says that has passed.
#[derive(Debug, Clone, Copy)]
struct Envelope {
    source: IpAddr,
    destination: IpAddr,
    route: Route,
    /// How many routers it may still cross.
    hops: u8,
    /// It may not be cut.
    whole: bool,
}

type Dropped = Result<(), DropReason>;

impl Stack {
    /// A NAT without flows. `seed` must differ from run to run and be hard to guess.
    pub fn new(config: Config, seed: u64) -> Self {
        let config = Config { mtu: config.mtu.max(576), ..config };
        let mut random = Random::new(seed);
        Self {
            landing_port: random.next() as u16,
            landing_seq: random.next() as u32,
            framer: Framer::new(Neighbours::new(config.guest.into()), config.mtu, config.offloads),
            offload: Offload::default(),
            resolvers: Vec::new(),
            random,
            checksums: ChecksumCapabilities::default(),
            reassembly: Reassembly::default(),
            table: Table::default(),
            timers: Timers::default(),
            frames: VecDeque::new(),
            ready: VecDeque::new(),
            operations: VecDeque::new(),
            advertise_at: None,
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

    // ---- flows ----------------------------------------------------------------------------------------------------

    /// The flow's host socket could not be opened, or broke.
    pub fn failed(&mut self, id: FlowId, failure: Failure, now: Duration) {
        if failure == Failure::NoSocket {
            self.counters.count(DropReason::HostSocket);
        }
        let Some(entry) = self.table.get(id) else { return };
        match &entry.flow {
            Flow::Tcp(_) => self.tcp_failed(id, failure),
            Flow::Dns(_) => self.ask_next_resolver(id, now),
            Flow::Udp(_) | Flow::Echo(_) => {
                let reason = match failure {
                    Failure::Refused => Some(Reason::PortUnreachable),
                    Failure::NoSocket => Some(Reason::Prohibited),
                    other => unreachable_reason(other),
                };
                if let Some(reason) = reason {
                    self.datagram_trouble(id, Trouble { reason, from: None, sequence: None });
                }
                // A refusal is news about one datagram; without a socket there is nothing left to keep.
                if failure != Failure::Refused {
                    self.end(id, Operation::Close { flow: id });
                }
            }
        }
    }

    /// The host has heard that something sent on the flow's socket did not arrive.
    pub fn trouble(&mut self, id: FlowId, trouble: Trouble, now: Duration) {
        let Some(entry) = self.table.get(id) else { return };
        match &entry.flow {
            Flow::Tcp(_) => self.tcp_trouble(id, trouble),
            Flow::Udp(_) | Flow::Echo(_) => self.datagram_trouble(id, trouble),
            Flow::Dns(_) if matches!(trouble.reason, Reason::TooLarge { .. }) => {}
            Flow::Dns(_) => self.ask_next_resolver(id, now),
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

    /// Tells the guest of a packet of its own, in the name of the router that said so, if it was one.
    fn report(&mut self, notice: &Notice, from: Option<IpAddr>) -> Dropped {
        let sender = match notice.reason {
            // That a port has nobody is said by the host that was asked, everything else by a router (RFC 1122,
            // 3.2.2.1).
            Reason::PortUnreachable => notice.remote,
            _ => from
                .filter(|from| from.is_ipv4() == notice.guest.is_ipv4())
                .filter(|from| matches!(self.config.route(*from), Route::Outside(_)))
                .unwrap_or(self.config.gateway_for(notice.guest)),
        };
        let frames = self.framer.notice(sender, notice);
        self.queue(frames)
    }

    fn report_or_count(&mut self, notice: &Notice, from: Option<IpAddr>) {
        if let Err(reason) = self.report(notice, from) {
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
        [self.timers.next(), self.advertise_at].into_iter().flatten().min()
    }

    /// Acts on every deadline that has come.
    pub fn tick(&mut self, now: Duration) {
        if self.advertise_at.is_some_and(|at| at <= now) {
            self.advertise_at = Some(now + neighbour::ADVERTISE_EVERY);
            let frame = self.framer.to_all_nodes(neighbour::router_advertisement(&self.config));
            self.queue_or_count([frame]);
        }
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

fn unreachable_reason(failure: Failure) -> Option<Reason> {
    match failure {
        Failure::NetworkUnreachable => Some(Reason::NetworkUnreachable),
        Failure::HostUnreachable => Some(Reason::HostUnreachable),
        Failure::Refused | Failure::Reset | Failure::NoSocket => None,
    }
}

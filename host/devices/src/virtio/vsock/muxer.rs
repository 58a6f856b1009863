//! The table of streams: finds the stream a packet belongs to, and says whose turn it is to send to the guest.
//!
//! Owns every [`Connection`], the ports in use and the line of streams that have something to send (round robin). Does
//! not touch queues: the packets come as buffers from `queue.rs`, and what to send goes back there.
//!
//! Full is a designed state: beyond [`MAX_CONNECTIONS`] a stream is refused, beyond [`MAX_REPLIES`] answers to nonsense
//! are dropped and counted. Nothing waits for the guest to make room, so the two queues cannot lock each other up.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tracing::{debug, warn};

use super::connection::{Connection, Key, Verdict};
use super::packet::{Cid, HEADER_BYTES, Header, Operation, TYPE_STREAM};
use super::{Backend, Counters};
use crate::throttle::Throttle;
use crate::virtio::buffers::Buffers;

/// The most streams at a time. With the backlog of each this bounds what a guest can make us hold to 512 MiB.
pub(super) const MAX_CONNECTIONS: usize = 2048;

/// The most answers to packets without a stream that wait for room in the guest's queue.
const MAX_REPLIES: usize = 256;
/// The most resets that wait for it in all. A stream that really was there is only forgotten in silence by a guest that
/// opens streams and ends them wrongly, twice the table over, without ever reading.
const MAX_RESETS: usize = MAX_REPLIES + 2 * MAX_CONNECTIONS;

/// How long a guest may take to accept a stream.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guest without room for more may say nothing before it is asked.
const CREDIT_PATIENCE: Duration = Duration::from_secs(1);

/// Host ports of streams that the host opens. Clear of the ports anybody listens on.
const FIRST_EPHEMERAL_PORT: u32 = 0x8000_0000;
const LAST_EPHEMERAL_PORT: u32 = u32::MAX - 1;

/// A place in the table; its generation tells a stream from the one that had the place before.
struct Slot {
    generation: u32,
    connection: Option<Connection>,
}

/// Whose turn it is.
pub(super) enum Turn {
    /// An answer to a packet that belongs to no stream.
    Reply,
    /// The stream in this slot.
    Connection(usize),
}

/// All streams of one device.
pub(super) struct Muxer {
    guest: Cid,
    registry: Registry,
    backend: Backend,
    counters: Arc<Counters>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
    /// Streams with something to send, in turn. Each at most once, by its mark.
    line: VecDeque<usize>,
    replies: VecDeque<Header>,
    /// Streams that wait for the guest's answer, oldest first: time-out, slot, generation.
    requested: VecDeque<(Instant, usize, u32)>,
    /// Streams whose guest has no room for more: when to look again, slot, generation. Each at most once, by its own mark.
    hungry: VecDeque<(Instant, usize, u32)>,
    next_port: u32,
    throttle: Throttle,
}

impl Muxer {
    pub fn new(guest: Cid, registry: Registry, backend: Backend, counters: Arc<Counters>) -> Self {
        Self {
            guest,
            registry,
            backend,
            counters,
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            line: VecDeque::new(),
            replies: VecDeque::new(),
            requested: VecDeque::new(),
            hungry: VecDeque::new(),
            next_port: FIRST_EPHEMERAL_PORT,
            throttle: Throttle::default(),
        }
    }

    pub fn guest(&self) -> Cid {
        self.guest
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Opens a stream from the host to a port of the guest.
    pub fn connect(&mut self, guest_port: u32, preface: Vec<u8>, socket: OwnedFd, now: Instant) {
        let Some(host_port) = self.ephemeral_port(guest_port) else { return };
        let key = Key { host_port, guest_port };
        if let Some(slot) = self.insert(Connection::to_guest(key, preface, socket)) {
            let generation = self.slots[slot].generation;
            self.requested.push_back((now + CONNECT_TIMEOUT, slot, generation));
            self.enqueue(slot);
        }
    }

    /// The port of the next stream that the host opens.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Gives no port away that a guest may still have packets for; `false` if it is none that the host gives.
    pub fn go_on_from(&mut self, port: u32) -> bool {
        let is_ours = (FIRST_EPHEMERAL_PORT..=LAST_EPHEMERAL_PORT).contains(&port);
        if is_ours {
            self.next_port = port;
        }
        is_ours
    }

    fn ephemeral_port(&mut self, guest_port: u32) -> Option<u32> {
        // One more try than there are streams finds a free port.
        for _ in 0..=MAX_CONNECTIONS {
            let host_port = self.next_port;
            self.next_port = match host_port {
                LAST_EPHEMERAL_PORT => FIRST_EPHEMERAL_PORT,
                port => port + 1,
            };
            if !self.by_key.contains_key(&Key { host_port, guest_port }) {
                return Some(host_port);
            }
        }
        None
    }

    /// Takes one packet of the guest.
    pub fn guest_packet(&mut self, mut packet: Buffers<'_>) {
        let mut bytes = [0; HEADER_BYTES];
        if packet.copy_out(&mut bytes) < HEADER_BYTES {
            self.malformed("a packet is shorter than its header");
            return;
        }
        let header = Header::from_bytes(&bytes);
        if header.source_cid != self.guest.0 || header.destination_cid != Cid::HOST.0 {
            self.malformed("a packet has foreign addresses");
            return;
        }
        let key = Key { host_port: header.destination_port, guest_port: header.source_port };
        let operation = Operation::from_number(header.operation).filter(|_| header.kind == TYPE_STREAM);
        let whole = header.length as usize <= packet.len();
        packet.truncate(header.length as usize);
        match (self.by_key.get(&key), operation) {
            (Some(&slot), Some(operation)) if whole => {
                let verdict = match self.slots[slot].connection.as_mut() {
                    Some(connection) => connection.guest_packet(&header, operation, &mut packet),
                    None => return,
                };
                self.conclude(slot, verdict);
            }
            (Some(&slot), _) => {
                self.malformed("a packet has an unknown operation or less data than it says");
                self.conclude(slot, Verdict::Reset);
            }
            (None, Some(Operation::Request)) => self.guest_request(key, &header),
            // Answering a reset with a reset would never end.
            (None, Some(Operation::Reset)) => {}
            (None, _) => self.refuse(key, MAX_REPLIES),
        }
    }

    fn guest_request(&mut self, key: Key, header: &Header) {
        if !self.backend.ports.contains(&key.host_port) {
            self.refuse(key, MAX_REPLIES);
            return;
        }
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (near, far) = match pair {
            Ok(pair) => pair,
            Err(error) => {
                if let Some(suppressed) = self.throttle.admit(Instant::now()) {
                    warn!(port = key.host_port, suppressed, %error, "cannot make a socket for the guest's stream");
                }
                self.refuse(key, MAX_REPLIES);
                return;
            }
        };
        match self.insert(Connection::from_guest(key, near, header)) {
            Some(slot) => {
                self.enqueue(slot);
                (self.backend.accepted)(key.host_port, far);
            }
            None => self.refuse(key, MAX_REPLIES),
        }
    }

    /// Sends a reset, unless `limit` of them wait already.
    fn refuse(&mut self, key: Key, limit: usize) {
        if self.replies.len() >= limit {
            self.counters.replies_dropped.add(1);
            return;
        }
        self.replies.push_back(Header::to_guest(self.guest, key.host_port, key.guest_port, Operation::Reset));
    }

    fn malformed(&mut self, what: &str) {
        self.counters.malformed.add(1);
        if let Some(suppressed) = self.throttle.admit(Instant::now()) {
            warn!(guest = %self.guest, suppressed, "{what}");
        }
    }

    /// Takes note of an event on a host socket.
    pub fn event(&mut self, event: &Event) {
        let (slot, generation) = slot_of(event.token());
        let Some(place) = self.slots.get_mut(slot).filter(|place| place.generation == generation) else {
            return;
        };
        let Some(connection) = place.connection.as_mut() else { return };
        let hung_up = event.is_read_closed() && event.is_write_closed();
        let verdict = connection.host_event(event.is_readable(), event.is_writable(), hung_up);
        self.conclude(slot, verdict);
    }

    /// When [`Self::tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let first = |waiting: &VecDeque<(Instant, usize, u32)>| waiting.front().map(|(at, ..)| *at);
        first(&self.requested).into_iter().chain(first(&self.hungry)).min()
    }

    /// Gives up on streams the guest did not answer in time, and asks after those it has no room for.
    pub fn tick(&mut self, now: Instant) {
        while let Some((_, slot, generation)) = self.hungry.pop_front_if(|(at, ..)| *at <= now) {
            if self.slots[slot].generation == generation
                && let Some(connection) = self.slots[slot].connection.as_mut()
            {
                connection.look_again();
                self.conclude(slot, Verdict::Keep);
            }
        }
        while let Some(&(at, slot, generation)) = self.requested.front() {
            let waiting = self.slots[slot].generation == generation
                && self.slots[slot].connection.as_ref().is_some_and(Connection::is_requested);
            if waiting && at > now {
                return;
            }
            self.requested.pop_front();
            if waiting {
                debug!(guest = %self.guest, "the guest did not answer a connect in time");
                self.conclude(slot, Verdict::Reset);
            }
        }
    }

    /// Does what a stream has decided about itself, and puts it in line if it has something to send.
    pub fn conclude(&mut self, slot: usize, verdict: Verdict) {
        let Some(connection) = self.slots[slot].connection.as_mut() else { return };
        let key = connection.key;
        let known_to_guest = !connection.is_detached();
        match verdict {
            Verdict::Keep => {
                if connection.has_output() {
                    self.enqueue(slot);
                } else if connection.begins_to_hunger() {
                    let generation = self.slots[slot].generation;
                    self.hungry.push_back((Instant::now() + CREDIT_PATIENCE, slot, generation));
                }
                return;
            }
            Verdict::Detach | Verdict::Linger => {
                connection.detach();
                self.by_key.remove(&key);
                if verdict == Verdict::Detach {
                    self.refuse(key, MAX_RESETS);
                }
                return;
            }
            Verdict::Abort => connection.abort(),
            Verdict::Reset | Verdict::Remove => {}
        }
        if known_to_guest {
            self.by_key.remove(&key);
            if verdict == Verdict::Reset {
                self.refuse(key, MAX_RESETS);
            }
        }
        self.remove(slot);
    }

    fn insert(&mut self, connection: Connection) -> Option<usize> {
        let key = connection.key;
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < MAX_CONNECTIONS => {
                self.slots.push(Slot { generation: 0, connection: None });
                self.slots.len() - 1
            }
            None => {
                self.counters.refused_full.add(1);
                return None;
            }
        };
        let place = &mut self.slots[slot];
        let registered = self.registry.register(
            &mut SourceFd(&connection.socket().as_raw_fd()),
            token_of(slot, place.generation),
            Interest::READABLE | Interest::WRITABLE,
        );
        if let Err(error) = registered {
            self.free.push(slot);
            if let Some(suppressed) = self.throttle.admit(Instant::now()) {
                warn!(port = key.guest_port, suppressed, %error, "cannot watch the socket of a stream");
            }
            return None;
        }
        place.connection = Some(connection);
        self.by_key.insert(key, slot);
        self.counters.opened.add(1);
        Some(slot)
    }

    fn remove(&mut self, slot: usize) {
        let place = &mut self.slots[slot];
        let Some(connection) = place.connection.take() else { return };
        place.generation = place.generation.wrapping_add(1);
        if let Err(error) = self.registry.deregister(&mut SourceFd(&connection.socket().as_raw_fd())) {
            warn!(%error, "cannot stop watching the socket of a stream");
        }
        if connection.in_line {
            self.line.retain(|waiting| *waiting != slot);
        }
        self.free.push(slot);
        self.counters.closed.add(1);
    }

    fn enqueue(&mut self, slot: usize) {
        if let Some(connection) = self.slots[slot].connection.as_mut()
            && !std::mem::replace(&mut connection.in_line, true)
        {
            self.line.push_back(slot);
        }
    }

    /// Whether anything waits to be sent to the guest.
    pub fn has_output(&self) -> bool {
        !self.replies.is_empty() || !self.line.is_empty()
    }

    /// Whose turn it is to send. Resets come first: they free things on the other side.
    pub fn turn(&self) -> Option<Turn> {
        match self.replies.is_empty() {
            false => Some(Turn::Reply),
            true => self.line.front().copied().map(Turn::Connection),
        }
    }

    /// Takes the oldest reply.
    pub fn take_reply(&mut self) -> Option<Header> {
        self.replies.pop_front()
    }

    /// The stream in a slot.
    pub fn connection(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots[slot].connection.as_mut()
    }

    /// Ends the turn of the stream at the front: it leaves the line, and stands again at its end if it has more.
    pub fn end_turn(&mut self, slot: usize, verdict: Verdict) {
        if self.line.front() == Some(&slot) {
            self.line.pop_front();
            if let Some(connection) = self.slots[slot].connection.as_mut() {
                connection.in_line = false;
            }
        }
        self.conclude(slot, verdict);
    }

    /// Drops every stream; the host sees its sockets close.
    pub fn reset(&mut self) {
        for slot in 0..self.slots.len() {
            self.remove(slot);
        }
        self.by_key.clear();
        self.line.clear();
        self.replies.clear();
        self.requested.clear();
        self.hungry.clear();
    }
}

fn token_of(slot: usize, generation: u32) -> Token {
    // The worker's own tokens are at the very top, beyond any slot.
    Token((generation as usize) << 32 | slot)
}

fn slot_of(token: Token) -> (usize, u32) {
    (token.0 & 0xffff_ffff, (token.0 >> 32) as u32)
}

/// The ports a guest may connect to.
pub(super) type Ports = BTreeSet<u32>;

//! One stream: the device's end between a host socket and the two queues.
//!
//! Owns the host socket, the credit of both directions (virtio 1.3 §5.10.6.3) and the bytes that the guest has sent
//! and the host socket has not taken yet, at most [`BUFFER_BYTES`] of them. It decides what to send to the guest next;
//! who sends when is the muxer's business.
//!
//! ```text
//! phase      Requested ── response ──▶ Established ── guest closed both ──▶ Detached ── backlog written ──▶ gone
//!                │ reset, time-out          │ reset, both directions ended
//!                └───────────▶ gone ◀───────┘
//!
//! to host    Open ── guest shut its sending ──▶ Draining ── backlog written ──▶ Finished
//!              └────── the host socket refuses ──▶ Refused
//! to guest   Open ── the host socket's end was read ──▶ Closed     (also: the guest shut its receiving)
//! ```
//!
//! A half-close passes through in both directions. When both have ended, the guest gets a reset, which Linux reads as
//! an orderly end once one direction was shut: nothing is left to wait for, and nobody keeps state for a stream that
//! is over. A `Detached` stream is over for the guest (its ports may be used again at once), but the host socket has
//! not taken everything yet.
//!
//! A socket of Linux in the guest cannot reset: closed in the middle of something, it shuts both directions at once. Where
//! the host's socket is TCP, of which there are only published ports, that is a reset to its peer: a peer that saw an
//! ordinary end would take half an answer for a whole one. An orderly end shuts the guest's sending alone first.

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::socket_domain;
use rustix::net::{AddressFamily, SendFlags, Shutdown};

use super::packet::{Cid, Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::buffers::Buffers;

/// What we tell the guest it may send before we have passed it on. Four of the largest packets Linux sends, as its own host has.
pub(super) const BUFFER_BYTES: u32 = 256 * 1024;

/// We tell the guest about consumed bytes when it does not know of this many: two of its largest packets. Two more can be on
/// their way meanwhile, so it never runs dry for lack of news; and each of these interrupts it.
const CREDIT_NEWS_BYTES: u32 = BUFFER_BYTES / 2;

/// The two ports that name a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Requested,
    Established,
    Detached,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ToHost {
    Open,
    Draining,
    Finished,
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ToGuest {
    Open,
    Closed,
}

/// What becomes of a stream after it has taken note of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// It is over for the guest, which is told by a reset; the host socket still has to take the backlog.
    Detach,
    /// The same, and the guest knows.
    Linger,
    /// It is over, and the guest is told by a reset.
    Reset,
    /// It is over, and the guest knows.
    Remove,
    /// It is over because the guest broke it off: the host is told by a reset where its socket has such a thing.
    Abort,
}

/// Which packets without data wait to be sent.
#[derive(Clone, Copy, Debug, Default)]
struct Pending {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    /// Shutdown flags the guest has not been told.
    shutdown: u32,
}

/// Whether the guest, out of room for what the host says, is to be asked for news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hunger {
    /// It has room, or nothing waits for it.
    None,
    /// The muxer looks again in a while, and the guest has said nothing since.
    Waiting,
    /// The muxer looks again, and the guest has made room meanwhile.
    Relieved,
    /// It was asked, and has not said anything new.
    Asked,
}

/// What came of trying to read the host socket into guest buffers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes.
    Data(usize),
    /// Nothing now.
    Nothing,
}

/// One stream.
pub(super) struct Connection {
    pub key: Key,
    socket: OwnedFd,
    phase: Phase,
    pending: Pending,

    to_host: ToHost,
    backlog: VecDeque<u8>,
    /// Bytes the guest has sent.
    received: Wrapping<u32>,
    /// Bytes passed on to the host socket, and how much of that the guest knows.
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    writable: bool,

    to_guest: ToGuest,
    /// What the guest gets before anything from the socket; what it has got of it is gone.
    preface: Vec<u8>,
    sent: Wrapping<u32>,
    guest_buffer_bytes: u32,
    guest_forwarded: Wrapping<u32>,
    hunger: Hunger,
    readable: bool,
    /// The host's peer has gone entirely; nobody will read what the guest sends.
    hung_up: bool,
    /// The host's peer can be told a reset from an end.
    is_tcp: bool,

    /// The muxer's mark that the stream stands in its line.
    pub in_line: bool,
}

impl Connection {
    fn new(key: Key, socket: OwnedFd, phase: Phase, pending: Pending) -> Self {
        let domain = socket_domain(&socket);
        let is_tcp = domain.is_ok_and(|domain| [AddressFamily::INET, AddressFamily::INET6].contains(&domain));
        Self {
            key,
            socket,
            phase,
            pending,
            to_host: ToHost::Open,
            backlog: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            // The first event says otherwise if need be; trying costs one call.
            writable: true,
            to_guest: ToGuest::Open,
            preface: Vec::new(),
            sent: Wrapping(0),
            guest_buffer_bytes: 0,
            guest_forwarded: Wrapping(0),
            hunger: Hunger::None,
            readable: true,
            hung_up: false,
            is_tcp,
            in_line: false,
        }
    }

    /// A stream that the host opens and begins with `preface`; the guest has yet to be asked.
    pub fn to_guest(key: Key, preface: Vec<u8>, socket: OwnedFd) -> Self {
        let pending = Pending { request: true, ..Pending::default() };
        Self { preface, ..Self::new(key, socket, Phase::Requested, pending) }
    }

    /// A stream that the guest has asked for with `request`.
    pub fn from_guest(key: Key, socket: OwnedFd, request: &Header) -> Self {
        let pending = Pending { response: true, ..Pending::default() };
        let mut connection = Self::new(key, socket, Phase::Established, pending);
        connection.guest_credit(request);
        connection
    }

    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub fn is_requested(&self) -> bool {
        self.phase == Phase::Requested
    }

    pub fn is_detached(&self) -> bool {
        self.phase == Phase::Detached
    }

    /// Makes an abortive end visible to the host, where the socket's protocol knows one.
    pub fn abort(&self) {
        // A socket without lingering (or already dead) just closes.
        let _unsupported = rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
    }

    /// Ends the guest's side; the host socket still takes the backlog.
    pub fn detach(&mut self) {
        self.phase = Phase::Detached;
        self.pending = Pending::default();
        self.to_guest = ToGuest::Closed;
    }

    /// Takes a packet of the guest. `operation` and the data's true length have been checked by the muxer.
    pub fn guest_packet(&mut self, header: &Header, operation: Operation, data: &mut Buffers<'_>) -> Verdict {
        if operation == Operation::Reset {
            // After both directions were shut a reset is how Linux says that it is done.
            let orderly = self.to_host != ToHost::Open && self.to_guest == ToGuest::Closed;
            return match (orderly, self.backlog.is_empty()) {
                (false, _) => Verdict::Abort,
                (true, true) => Verdict::Remove,
                (true, false) => Verdict::Linger,
            };
        }
        self.guest_credit(header);
        match (self.phase, operation) {
            (Phase::Requested, Operation::Response) if !self.pending.request => {
                self.phase = Phase::Established;
                Verdict::Keep
            }
            (Phase::Established, Operation::Data) => self.guest_data(data),
            (Phase::Established, Operation::CreditUpdate) => Verdict::Keep,
            (Phase::Established, Operation::CreditRequest) => {
                self.pending.credit_update = true;
                Verdict::Keep
            }
            (Phase::Established, Operation::Shutdown) => self.guest_shutdown(header.flags),
            _ => Verdict::Reset,
        }
    }

    fn guest_credit(&mut self, header: &Header) {
        let news = (header.buffer_bytes, Wrapping(header.forwarded));
        if news != (self.guest_buffer_bytes, self.guest_forwarded) {
            (self.guest_buffer_bytes, self.guest_forwarded) = news;
            self.hunger = match self.hunger {
                Hunger::Waiting | Hunger::Relieved => Hunger::Relieved,
                Hunger::None | Hunger::Asked => Hunger::None,
            };
        }
    }

    /// How many bytes the guest can take. A guest that counts wrongly gets nothing, and harms nobody else.
    fn credit(&self) -> usize {
        self.guest_buffer_bytes.saturating_sub((self.sent - self.guest_forwarded).0) as usize
    }

    fn guest_data(&mut self, data: &mut Buffers<'_>) -> Verdict {
        // Bounded by the muxer's check against the packet's buffers, which a chain limits to 32 bits.
        let length = data.len() as u32;
        if length == 0 {
            return Verdict::Keep;
        }
        self.received += length;
        match self.to_host {
            ToHost::Open => {}
            // In flight when we told the guest that nobody listens.
            ToHost::Refused => {
                self.forward(length);
                return Verdict::Keep;
            }
            ToHost::Draining | ToHost::Finished => return Verdict::Reset,
        }
        if (self.received - self.forwarded).0 > BUFFER_BYTES {
            return Verdict::Reset;
        }
        while self.backlog.is_empty() && self.writable && !data.is_empty() {
            match data.send(self.socket.as_fd()) {
                Ok(taken) => self.forward(taken as u32),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(_) => {
                    self.forward(data.len() as u32);
                    return self.refuse();
                }
            }
        }
        if !data.is_empty() {
            let start = self.backlog.len();
            self.backlog.resize(start + data.len(), 0);
            // The ring may have wrapped; the new bytes lie in the tail of the first half, the second half, or both.
            let (front, back) = self.backlog.as_mut_slices();
            let in_front = start.min(front.len());
            data.copy_out(&mut front[in_front..]);
            let in_back = start - in_front;
            data.copy_out(&mut back[in_back..]);
        }
        Verdict::Keep
    }

    /// Counts bytes as consumed, and plans to tell the guest when it knows too little.
    fn forward(&mut self, count: u32) {
        self.forwarded += count;
        let known = self.phase != Phase::Detached;
        if known && (self.forwarded - self.forwarded_told).0 >= CREDIT_NEWS_BYTES {
            self.pending.credit_update = true;
        }
    }

    fn guest_shutdown(&mut self, flags: u32) -> Verdict {
        let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        if flags & both == both && self.is_tcp && self.to_host == ToHost::Open {
            self.abort();
            return Verdict::Reset;
        }
        if flags & SHUTDOWN_RECEIVE != 0 && self.to_guest == ToGuest::Open {
            self.to_guest = ToGuest::Closed;
            // The host's writes fail from now on, as they would on a pipe without reader.
            let _already_dead = rustix::net::shutdown(&self.socket, Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 && self.to_host == ToHost::Open {
            self.to_host = ToHost::Draining;
            self.finish_if_drained();
        }
        self.settle()
    }

    /// Writes as much of the backlog as the host socket takes.
    fn drain(&mut self) -> Verdict {
        while self.writable && !self.backlog.is_empty() {
            let (front, back) = self.backlog.as_slices();
            let chunk = if front.is_empty() { back } else { front };
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, chunk, flags) {
                Ok(taken) => {
                    self.backlog.drain(..taken);
                    self.forward(taken as u32);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.writable = false,
                Err(_) => return self.refuse(),
            }
        }
        if self.backlog.is_empty() && self.backlog.capacity() > 0 {
            // Idle streams hold no buffer.
            self.backlog = VecDeque::new();
        }
        self.finish_if_drained();
        self.settle()
    }

    fn finish_if_drained(&mut self) {
        if self.to_host == ToHost::Draining && self.backlog.is_empty() {
            self.to_host = ToHost::Finished;
            let _already_dead = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// The host socket takes no more: the guest is told, and what it still sends is dropped.
    fn refuse(&mut self) -> Verdict {
        if self.to_host == ToHost::Open {
            self.pending.shutdown |= SHUTDOWN_RECEIVE;
        }
        self.to_host = ToHost::Refused;
        let lost = self.backlog.len() as u32;
        self.backlog = VecDeque::new();
        self.forward(lost);
        self.settle()
    }

    /// Whether the stream is over.
    fn settle(&self) -> Verdict {
        let to_host_over = matches!(self.to_host, ToHost::Finished | ToHost::Refused);
        match (self.phase, self.to_host, self.to_guest) {
            (Phase::Detached, ..) if to_host_over => Verdict::Remove,
            (Phase::Established, _, ToGuest::Closed) if to_host_over => Verdict::Reset,
            (Phase::Established, ToHost::Draining, ToGuest::Closed) => Verdict::Detach,
            _ => Verdict::Keep,
        }
    }

    /// Takes note of what the poll says about the host socket.
    pub fn host_event(&mut self, readable: bool, writable: bool, hung_up: bool) -> Verdict {
        self.readable |= readable || hung_up;
        self.hung_up |= hung_up;
        self.writable |= writable || hung_up;
        match self.phase {
            // Even if the host has gone: what it said before is for the guest to hear.
            Phase::Requested => Verdict::Keep,
            // The end was read before the poll told that the host is gone entirely.
            Phase::Established if self.hung_up && self.to_guest == ToGuest::Closed => self.refuse(),
            Phase::Established | Phase::Detached => self.drain(),
        }
    }

    /// Whether there is something to send to the guest now.
    pub fn has_output(&self) -> bool {
        let Pending { request, response, credit_update, credit_request, shutdown } = self.pending;
        let control = request || response || credit_update || credit_request || shutdown != 0;
        control || (self.may_read() && self.credit() > 0)
    }

    /// Whether something may be there to be read from the host socket, for which the guest needs room.
    fn may_read(&self) -> bool {
        self.phase == Phase::Established
            && !self.pending.response
            && self.to_guest == ToGuest::Open
            && (self.readable || !self.preface.is_empty())
    }

    fn lacks_room(&self) -> bool {
        self.may_read() && self.credit() == 0
    }

    /// Whether the muxer is to look again in a while, by [`Self::look_again`], because the guest has no room for what may wait.
    /// Linux says by itself when it has some; to ask each time would interrupt it for nothing.
    pub fn begins_to_hunger(&mut self) -> bool {
        let begins = self.hunger == Hunger::None && self.lacks_room();
        if begins {
            self.hunger = Hunger::Waiting;
        }
        begins
    }

    /// Takes note that a while has passed; a guest that has said nothing all the time is asked, once.
    pub fn look_again(&mut self) {
        let is_silent = self.hunger == Hunger::Waiting && self.lacks_room();
        self.pending.credit_request |= is_silent;
        self.hunger = if is_silent { Hunger::Asked } else { Hunger::None };
    }

    /// The next packet without data, if one waits. Taking it means sending it.
    pub fn next_control(&mut self, guest: Cid) -> Option<Header> {
        let pending = &mut self.pending;
        let (operation, flags) = if std::mem::take(&mut pending.request) {
            (Operation::Request, 0)
        } else if std::mem::take(&mut pending.response) {
            (Operation::Response, 0)
        } else if std::mem::take(&mut pending.credit_request) {
            (Operation::CreditRequest, 0)
        } else if std::mem::take(&mut pending.credit_update) {
            (Operation::CreditUpdate, 0)
        } else if pending.shutdown != 0 {
            (Operation::Shutdown, std::mem::take(&mut pending.shutdown))
        } else {
            return None;
        };
        Some(self.header(guest, operation, flags, 0))
    }

    /// How many bytes may be read for the guest now.
    pub fn readable_bytes(&self) -> usize {
        match (self.may_read(), self.preface.len()) {
            (false, _) => 0,
            (true, 0) => self.credit(),
            (true, preface) => self.credit().min(preface),
        }
    }

    /// Reads the preface, then the host socket, into guest buffers that hold at most [`Self::readable_bytes`].
    pub fn receive(&mut self, space: &mut Buffers<'_>) -> (Received, Verdict) {
        if !self.preface.is_empty() {
            let count = space.copy_in(&self.preface);
            self.preface.drain(..count);
            return (Received::Data(count), Verdict::Keep);
        }
        match space.receive(self.socket.as_fd()) {
            Ok(0) => {
                self.readable = false;
                self.to_guest = ToGuest::Closed;
                if self.hung_up {
                    return (Received::Nothing, self.refuse());
                }
                self.pending.shutdown |= SHUTDOWN_SEND;
                (Received::Nothing, self.settle())
            }
            // Only "would block" proves an edge-triggered socket empty: a short read may have stopped at a boundary.
            Ok(count) => (Received::Data(count), Verdict::Keep),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                (Received::Nothing, Verdict::Keep)
            }
            Err(_) => (Received::Nothing, Verdict::Reset),
        }
    }

    /// The header of a data packet of `length` bytes. Taking it means sending it.
    pub fn data_header(&mut self, guest: Cid, length: u32) -> Header {
        self.sent += length;
        self.header(guest, Operation::Data, 0, length)
    }

    /// Every packet carries our side of the credit, so the guest then knows of all we consumed.
    fn header(&mut self, guest: Cid, operation: Operation, flags: u32, length: u32) -> Header {
        self.forwarded_told = self.forwarded;
        self.pending.credit_update = false;
        Header {
            flags,
            length,
            buffer_bytes: BUFFER_BYTES,
            forwarded: self.forwarded.0,
            ..Header::to_guest(guest, self.key.host_port, self.key.guest_port, operation)
        }
    }
}

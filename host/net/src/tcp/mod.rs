//! TCP with the guest, ended here: each connection of the guest's becomes a host socket, and each socket that the host has
//! accepted for the guest a connection into it.
//!
//! # Theory of operation
//!
//! The guest's SYN is not answered until the host's connection stands, so refusal and unreachability look to the
//! guest as they are (reset, ICMP). From then on both ends run freely: bytes from the guest are acknowledged when they
//! are in our buffer, bytes from the host are kept until the guest has acknowledged them.
//!
//! ```text
//!  guest                         here                              host socket
//!  SYN ───────────────────────►  Connecting ── connect ─────────►
//!                                    │      ◄───────────── connected
//!      ◄────────────── SYN,ACK   Accepting
//!  ACK ───────────────────────►  Open
//!  data ──────────────────────►  to_host ── write ──────────────►   a full buffer closes the guest's window
//!      ◄───────────────── data   to_guest ◄───────────────── read   a full buffer stops the reading
//!  FIN ───────────────────────►  guest_ended, then ── shutdown ──►  each direction ends on its own
//!      ◄────────────────── FIN   host_ended ◄──────────────── EOF
//! ```
//!
//! A connection into the guest begins the other way round, and goes on the same. Its socket stands; nothing is read from it
//! before the guest has accepted, so what its peer says waits where it always does.
//!
//! ```text
//!      ◄────────────────── SYN   Opening                            accepted before
//!  SYN,ACK ───────────────────►  Open
//!      ◄────────────────── ACK
//!  RST, or silence ───────────►  gone ───────── reset ──────────►
//! ```
//!
//! The link is the memory between two processes: it loses nothing and keeps the order. So there is no congestion
//! control, no SACK, and segments out of order are dropped and answered with a duplicate ACK; loss is repaired
//! correctly, if not cleverly (fast retransmit; after a timeout, hole by hole with doubling patience). Zero windows
//! are probed. There is no TIME-WAIT: nothing old can come later on this link, and a FIN sent again to a connection
//! that has ended is answered with a reset, which the closed socket behind it does not feel. There is no keepalive.
//!
//! Rules: RFC 9293 (§3.10.7 order of checks), RFC 7323 (window scale), RFC 5961 (resets), RFC 5681 (duplicate ACKs).
//!
//! This file owns one connection's state and does no I/O; stack.rs owns frames, timers and the table.

use std::collections::VecDeque;
use std::time::Duration;

use smoltcp::wire::{TcpControl, TcpRepr};

use crate::seq::Seq;

/// Bytes kept in each direction. With the guest's software CPU a round trip takes up to some milliseconds; this
/// carries some 100 MB/s then. Buffers grow only as they are used.
pub(crate) const BUFFER: usize = 256 * 1024;
/// The same while connections are few: a busy host gives the processor to others for ten milliseconds and more, and a guest
/// that waits for nothing else should not run dry by that.
pub(crate) const BUFFER_WIDE: usize = 1024 * 1024;
/// As long as there are fewer flows than this, new connections are such.
pub(crate) const WIDE_FLOWS: usize = 32;
/// Our window's unit is 2⁷ bytes: fine enough to announce small rooms, coarse enough for `BUFFER`.
const WINDOW_SCALE: u8 = 7;
/// Segment size of a guest that names none (RFC 9293 §3.7.1), and the least we believe (Linux' own minimum).
const MSS_DEFAULT: u16 = 536;
/// Largest payload of a segment that others cut: with its headers it fits an IP packet.
const LARGE_MAX: usize = 65_535 - 60;
const MSS_MIN: u16 = 88;
/// First patience for an acknowledgement (RFC 6298 §2.1), and the most.
const RTO_INITIAL: Duration = Duration::from_secs(1);
const RTO_MAX: Duration = Duration::from_secs(60);
/// Times a segment is sent again before the guest is believed dead: about a quarter of an hour, as in Linux.
const RETRIES_MAX: u32 = 15;
/// The same for our SYN and our SYN,ACK: about a minute.
const SYN_RETRIES_MAX: u32 = 5;
/// Duplicate ACKs that mean loss (RFC 5681 §3.2).
const DUPLICATE_ACKS: u8 = 3;
/// At most one answer in this time to an empty segment that fits nowhere, so that two ends never play ping-pong.
const CHALLENGE_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The guest's SYN is here, the host's connection is under way.
    Connecting,
    /// Our SYN,ACK is out.
    Accepting,
    /// The host's connection stands; our SYN is out, or due.
    Opening,
    /// Data flows.
    Open,
}

/// What the stack must do after a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Look for things to send, deliver and time.
    Continue,
    /// The guest reset the connection.
    Reset,
    /// The segment is of a connection before this one: to be answered as one that belongs to nothing.
    Stale,
}

/// What the stack must do after a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timeout {
    /// Look for things to send.
    Continue,
    /// The guest is gone.
    GiveUp,
}

/// A segment to send; its payload is `length` bytes at `offset` of [`Connection::to_guest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) control: TcpControl,
    pub(crate) seq: Seq,
    /// `None` in our SYN only.
    pub(crate) ack: Option<Seq>,
    pub(crate) window: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) scale: Option<u8>,
    pub(crate) offset: usize,
    pub(crate) length: usize,
    /// The most payload a packet on the link may have: a segment with more is to be cut.
    pub(crate) limit: usize,
    pub(crate) again: bool,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    state: State,
    /// Largest payload of a segment to the guest.
    mss: usize,
    /// Largest payload that is handed over at once, for others to cut: as many segments as fit a packet, or one.
    large: usize,
    /// Segments are cut here, and not by who takes them.
    cuts: bool,
    /// Bytes kept in each direction.
    buffer: usize,
    /// What we announce as ours.
    our_mss: u16,
    /// Whether both ends scale windows.
    scaled: bool,

    // Towards the guest (RFC 9293 calls these SND.*).
    /// Bytes the host sent; the first is `una`'s.
    to_guest: VecDeque<u8>,
    /// Oldest byte not acknowledged, and next to send.
    una: Seq,
    next: Seq,
    guest_window: usize,
    guest_scale: u8,
    /// Segment (seq, ack) that `guest_window` came from.
    window_from: (Seq, Seq),
    host_ended: bool,
    fin_acknowledged: bool,
    duplicate_acks: u8,
    /// While repairing a loss: acknowledged up to here means repaired.
    recovery: Option<Seq>,
    resend_first: bool,
    probe: bool,
    synchronize: bool,

    // From the guest (RCV.*).
    /// Bytes for the host.
    to_host: VecDeque<u8>,
    received: Seq,
    /// Right edge of the window the guest knows.
    announced: Seq,
    guest_ended: bool,
    host_shut: bool,
    ack_due: bool,
    acks_owed: u8,
    last_challenge: Option<Duration>,

    // Timing.
    rto: Duration,
    retries: u32,
    deadline: Option<Duration>,

    // What the driver has been told.
    send_noticed: bool,
    receive_wanted: bool,
}

impl Connection {
    /// The answer to a guest's SYN, once the host's connection stands. `largest` is the largest payload of a segment on
    /// the link, `initial` our first sequence number.
    pub(crate) fn new(syn: &TcpRepr<'_>, largest: u16, initial: u32) -> Self {
        let mut connection = Self::blank(State::Connecting, largest, initial);
        connection.learn(syn);
        connection
    }

    /// A connection into the guest; the host's stands. `largest` and `initial` as for [`Connection::new`].
    pub(crate) fn opening(largest: u16, initial: u32) -> Self {
        let mut connection = Self::blank(State::Opening, largest, initial);
        connection.synchronize = true;
        connection
    }

    fn blank(state: State, largest: u16, initial: u32) -> Self {
        let our_mss = largest.max(MSS_MIN);
        let (received, initial) = (Seq(0), Seq(initial));
        let mss = usize::from(MSS_DEFAULT.min(our_mss));
        Self {
            state,
            mss,
            large: mss,
            cuts: true,
            buffer: BUFFER,
            our_mss,
            scaled: false,
            to_guest: VecDeque::new(),
            una: initial,
            next: initial,
            guest_window: 0,
            guest_scale: 0,
            window_from: (received, initial),
            host_ended: false,
            fin_acknowledged: false,
            duplicate_acks: 0,
            recovery: None,
            resend_first: false,
            probe: false,
            synchronize: false,
            to_host: VecDeque::new(),
            received,
            announced: received,
            guest_ended: false,
            host_shut: false,
            ack_due: false,
            acks_owed: 0,
            last_challenge: None,
            rto: RTO_INITIAL,
            retries: 0,
            deadline: None,
            send_noticed: false,
            receive_wanted: false,
        }
    }

    /// Takes from the guest's SYN, or its SYN,ACK, what counts from then on.
    fn learn(&mut self, syn: &TcpRepr<'_>) {
        self.received = Seq(syn.seq_number.0.cast_unsigned()) + 1;
        self.mss = syn.max_seg_size.unwrap_or(MSS_DEFAULT).clamp(MSS_MIN, self.our_mss).into();
        self.large = if self.cuts { self.mss } else { self.mss * (LARGE_MAX / self.mss).max(1) };
        self.scaled = syn.window_scale.is_some();
        self.guest_window = syn.window_len.into();
        self.guest_scale = syn.window_scale.unwrap_or(0).min(14);
        self.window_from = (self.received, self.una);
        self.announced = self.received;
    }

    /// The host's connection stands.
    pub(crate) fn connected(&mut self) {
        if self.state == State::Connecting {
            self.state = State::Accepting;
            self.synchronize = true;
        }
    }

    pub(crate) fn is_connecting(&self) -> bool {
        self.state == State::Connecting
    }

    /// The sequence number of the guest's SYN, which ICMP errors quote.
    pub(crate) fn syn_sequence(&self) -> u32 {
        self.received.0.wrapping_sub(1)
    }

    /// Takes a segment from the guest.
    pub(crate) fn receive(&mut self, segment: &TcpRepr<'_>, now: Duration) -> Verdict {
        let seq = Seq(segment.seq_number.0.cast_unsigned());
        match self.state {
            State::Connecting => match segment.control {
                TcpControl::Rst => return Verdict::Reset,
                _ => return Verdict::Continue,
            },
            State::Opening => return self.receive_opening(segment, now),
            State::Accepting if segment.control == TcpControl::Syn && seq + 1 == self.received => {
                self.synchronize = true;
                return Verdict::Continue;
            }
            State::Accepting | State::Open => {}
        }
        if !self.is_acceptable(seq, segment) {
            self.answer_stray(segment, now);
            return Verdict::Continue;
        }
        match segment.control {
            TcpControl::Rst if seq == self.received => return Verdict::Reset,
            TcpControl::Rst | TcpControl::Syn => {
                self.challenge(now);
                return Verdict::Continue;
            }
            TcpControl::None | TcpControl::Psh | TcpControl::Fin => {}
        }
        let Some(ack) = segment.ack_number.map(|ack| Seq(ack.0.cast_unsigned())) else {
            return Verdict::Continue;
        };
        if ack.is_after(self.next) || self.una.distance(ack) > self.buffer as i32 {
            self.challenge(now);
            return Verdict::Continue;
        }
        if self.state == State::Accepting {
            // Not before our SYN,ACK is out, and nothing but its ACK.
            if ack != self.next || self.next == self.una {
                return Verdict::Continue;
            }
            self.establish(ack, now);
        }
        self.acknowledged(seq, ack, segment, now);
        self.take(seq, segment);
        Verdict::Continue
    }

    /// The answer to our SYN (RFC 9293 §3.10.7.3). Two SYNs that cross do not make a connection here: no guest opens one
    /// from a landing.
    fn receive_opening(&mut self, segment: &TcpRepr<'_>, now: Duration) -> Verdict {
        let ack = segment.ack_number.map(|ack| Seq(ack.0.cast_unsigned()));
        let is_ours = ack == Some(self.next) && self.next != self.una;
        match segment.control {
            TcpControl::Rst if is_ours => Verdict::Reset,
            TcpControl::Rst => Verdict::Continue,
            _ if ack.is_none() => Verdict::Continue,
            // Of a connection before, with the same ports: our answer ends that, and our next SYN is taken.
            _ if !is_ours => Verdict::Stale,
            TcpControl::Syn => {
                self.learn(segment);
                // As the window of our SYN said.
                self.announced = self.received + self.buffer.min(u16::MAX.into());
                self.window_from = (Seq(segment.seq_number.0.cast_unsigned()), self.next);
                self.establish(self.next, now);
                self.ack_due = true;
                Verdict::Continue
            }
            TcpControl::None | TcpControl::Psh | TcpControl::Fin => Verdict::Continue,
        }
    }

    /// RFC 9293 §3.10.7.4, first check: does the segment touch the window? Segments without data at its left edge
    /// do even when it is closed; data there is refused later, after its ACK has been used.
    fn is_acceptable(&self, seq: Seq, segment: &TcpRepr<'_>) -> bool {
        let room = self.window_room();
        let start = seq.distance(self.received);
        let fin = usize::from(segment.control == TcpControl::Fin);
        let end = (seq + segment.payload.len() + fin).distance(self.received);
        start <= room as i32 && (end > 0 || (start == 0 && end == 0))
    }

    /// An old or far segment: tell the guest where we are, unless it is a reset.
    fn answer_stray(&mut self, segment: &TcpRepr<'_>, now: Duration) {
        if segment.control == TcpControl::Rst {
            return;
        }
        if segment.is_empty() {
            self.challenge(now);
        } else {
            self.owe_ack();
        }
    }

    fn challenge(&mut self, now: Duration) {
        if self.last_challenge.is_none_or(|last| now.saturating_sub(last) >= CHALLENGE_INTERVAL) {
            self.last_challenge = Some(now);
            self.owe_ack();
        }
    }

    fn owe_ack(&mut self) {
        self.acks_owed = self.acks_owed.saturating_add(1);
    }

    fn establish(&mut self, ack: Seq, now: Duration) {
        self.state = State::Open;
        self.una = ack;
        self.progress(now);
    }

    /// Uses a segment's ACK and window.
    fn acknowledged(&mut self, seq: Seq, ack: Seq, segment: &TcpRepr<'_>, now: Duration) {
        let window = usize::from(segment.window_len) << self.guest_scale;
        if ack.is_after(self.una) {
            self.drop_acknowledged(ack);
            self.progress(now);
        } else if ack == self.una && segment.is_empty() && self.in_flight() > 0 && window == self.guest_window
        {
            self.duplicate_acks = self.duplicate_acks.saturating_add(1);
            if self.duplicate_acks == DUPLICATE_ACKS && self.recovery.is_none() {
                self.recovery = Some(self.next);
                self.resend_first = true;
            }
        }
        let (from_seq, from_ack) = self.window_from;
        if seq.is_after(from_seq) || (seq == from_seq && !from_ack.is_after(ack)) {
            if self.guest_window == 0 && self.in_flight() == 0 {
                // Probing is over, or goes on against a guest that answers: no reason for less patience with it.
                self.rto = if window > 0 { RTO_INITIAL } else { self.rto };
                self.deadline = if window > 0 { None } else { self.deadline };
            }
            if window == 0 {
                self.retries = 0;
            }
            self.guest_window = window;
            self.window_from = (seq, ack);
        }
    }

    fn drop_acknowledged(&mut self, ack: Seq) {
        let count = ack.since(self.una);
        let data = count.min(self.to_guest.len());
        self.to_guest.drain(..data);
        if count > data {
            self.fin_acknowledged = true;
        }
        self.una = ack;
        self.duplicate_acks = 0;
        match self.recovery {
            Some(end) if end.is_after(ack) => self.resend_first = true,
            _ => self.recovery = None,
        }
    }

    /// Something new was acknowledged: patience starts over.
    fn progress(&mut self, now: Duration) {
        self.rto = RTO_INITIAL;
        self.retries = 0;
        self.deadline = (self.in_flight() > 0).then(|| now + self.rto);
    }

    /// Takes a segment's data and FIN, as far as there is room.
    fn take(&mut self, seq: Seq, segment: &TcpRepr<'_>) {
        if segment.payload.is_empty() && segment.control != TcpControl::Fin {
            return;
        }
        if seq.is_after(self.received) {
            // Something before it is missing: say so at once, the guest counts.
            self.owe_ack();
            return;
        }
        self.ack_due = true;
        if self.guest_ended {
            return;
        }
        let known = self.received.since(seq);
        let fresh = segment.payload.get(known..).unwrap_or_default();
        let taken = fresh.len().min(self.window_room());
        self.to_host.extend(&fresh[..taken]);
        self.received = self.received + taken;
        if segment.control == TcpControl::Fin && taken == fresh.len() {
            self.guest_ended = true;
            self.received = self.received + 1;
        }
    }

    /// Segments are cut by whoever takes them, so several go as one.
    pub(crate) fn send_large(&mut self) {
        self.cuts = false;
        self.large = self.mss * (LARGE_MAX / self.mss).max(1);
    }

    /// Keeps [`BUFFER_WIDE`] bytes instead of [`BUFFER`]. Before anything is announced.
    pub(crate) fn buffer_more(&mut self) {
        self.buffer = BUFFER_WIDE;
    }

    /// The next segment for the guest, if any is due.
    pub(crate) fn next_segment(&mut self, now: Duration) -> Option<Segment> {
        match self.state {
            State::Connecting => return None,
            State::Accepting | State::Opening => return self.synchronize.then(|| self.syn(now)),
            State::Open => {}
        }
        if self.acks_owed > 0 {
            self.acks_owed -= 1;
            return Some(self.bare(self.next));
        }
        if std::mem::take(&mut self.resend_first) && self.in_flight() > 0 {
            return Some(self.first_again(now));
        }
        if let Some(segment) = self.fresh(now) {
            return Some(segment);
        }
        if std::mem::take(&mut self.probe) {
            return Some(self.bare(Seq(self.una.0.wrapping_sub(1))));
        }
        self.ack_due.then(|| self.bare(self.next))
    }

    /// Our SYN, or SYN,ACK.
    fn syn(&mut self, now: Duration) -> Segment {
        let accepting = self.state == State::Accepting;
        self.synchronize = false;
        let again = self.next != self.una;
        self.next = self.una + 1;
        self.deadline = Some(now + self.rto);
        // The window of a SYN is never scaled.
        let window = self.buffer.min(u16::MAX.into());
        self.announced = self.received + window;
        Segment {
            control: TcpControl::Syn,
            seq: self.una,
            ack: accepting.then_some(self.received),
            window: window as u16,
            mss: Some(self.our_mss),
            scale: (self.scaled || !accepting).then_some(WINDOW_SCALE),
            offset: 0,
            length: 0,
            limit: self.mss,
            again,
        }
    }

    /// A segment without data.
    fn bare(&mut self, seq: Seq) -> Segment {
        self.segment(TcpControl::None, seq, 0, 0)
    }

    fn first_again(&mut self, now: Duration) -> Segment {
        let length = self.in_flight().min(self.mss).min(self.to_guest.len());
        let fin_sent = self.in_flight() > self.to_guest.len();
        let control =
            if fin_sent && length == self.to_guest.len() { TcpControl::Fin } else { TcpControl::None };
        self.deadline = Some(now + self.rto);
        Segment { again: true, ..self.segment(control, self.una, 0, length) }
    }

    /// Data (or the end of it) that fits the guest's window.
    fn fresh(&mut self, now: Duration) -> Option<Segment> {
        if self.fin_acknowledged {
            return None;
        }
        let sent = self.next.since(self.una);
        let unsent = self.to_guest.len().checked_sub(sent)?;
        let window = self.guest_window.saturating_sub(sent);
        let mut length = unsent.min(window).min(self.large);
        // A sliver of window is not worth a segment while an acknowledgement is still to come.
        if length < unsent.min(self.mss) && sent > 0 {
            length = 0;
        }
        let fin = self.host_ended && length == unsent;
        if length == 0 && !fin {
            if unsent > 0 && sent == 0 && self.deadline.is_none() {
                self.deadline = Some(now + self.rto);
            }
            return None;
        }
        let control = match (fin, length == unsent) {
            (true, _) => TcpControl::Fin,
            (false, true) => TcpControl::Psh,
            (false, false) => TcpControl::None,
        };
        let seq = self.next;
        self.next = seq + length + usize::from(fin);
        if sent == 0 || self.deadline.is_none() {
            self.deadline = Some(now + self.rto);
        }
        Some(self.segment(control, seq, sent, length))
    }

    fn segment(&mut self, control: TcpControl, seq: Seq, offset: usize, length: usize) -> Segment {
        self.ack_due = false;
        let scale = if self.scaled { WINDOW_SCALE } else { 0 };
        let window = (self.window_room() >> scale).min(u16::MAX.into());
        self.announced = self.received + (window << scale);
        Segment {
            control,
            seq,
            ack: Some(self.received),
            window: window as u16,
            mss: None,
            scale: None,
            offset,
            length,
            limit: self.mss,
            again: false,
        }
    }

    /// Sequence and acknowledgement numbers for a reset of ours.
    pub(crate) fn reset(&self) -> (Seq, Option<Seq>) {
        (self.next, (self.state != State::Opening).then_some(self.received))
    }

    fn in_flight(&self) -> usize {
        self.next.since(self.una)
    }

    fn window_room(&self) -> usize {
        self.buffer.saturating_sub(self.to_host.len())
    }

    /// When to look at the connection although nothing happened.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// Acts on a deadline that has come.
    pub(crate) fn timeout(&mut self, now: Duration) -> Timeout {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return Timeout::Continue;
        }
        self.rto = (self.rto * 2).min(RTO_MAX);
        self.deadline = Some(now + self.rto);
        match self.state {
            State::Connecting => self.deadline = None,
            State::Accepting | State::Opening => {
                self.retries += 1;
                self.synchronize = true;
                if self.retries > SYN_RETRIES_MAX {
                    return Timeout::GiveUp;
                }
            }
            State::Open if self.in_flight() > 0 => {
                self.retries += 1;
                // Most likely the guest is only slow (its CPU may be software, or paused): one segment asks. If more
                // was lost, each partial acknowledgement brings the next.
                self.resend_first = true;
                self.recovery = Some(self.next);
                if self.retries > RETRIES_MAX {
                    return Timeout::GiveUp;
                }
            }
            State::Open if !self.to_guest.is_empty() => self.probe = true,
            State::Open => self.deadline = None,
        }
        Timeout::Continue
    }

    /// Room for bytes from the host. Remembers when there is none, for [`Connection::wants_receive`].
    pub(crate) fn room(&mut self) -> usize {
        let room = if self.state == State::Open || self.state == State::Accepting {
            self.buffer.saturating_sub(self.to_guest.len())
        } else {
            0
        };
        self.receive_wanted = room == 0;
        room
    }

    /// True once when the driver, having found no room, may read again.
    pub(crate) fn wants_receive(&mut self) -> bool {
        let worth_it = self.to_guest.len() <= self.buffer - self.buffer / 4;
        let wants = self.receive_wanted && self.state == State::Open && worth_it;
        if wants {
            self.receive_wanted = false;
        }
        wants
    }

    /// Bytes from the host; no more than [`Connection::room`].
    pub(crate) fn host_sent(&mut self, bytes: &[u8]) {
        debug_assert!(!self.host_ended && bytes.len() <= self.buffer - self.to_guest.len());
        self.to_guest.extend(bytes);
    }

    /// The host has no more.
    pub(crate) fn host_ended(&mut self) {
        self.host_ended = true;
    }

    /// True once when there is something new for the host: bytes, or the end. Not again before the driver, which
    /// waits for its socket, has taken all of it.
    pub(crate) fn wants_send(&mut self) -> bool {
        let wants = !self.send_noticed && (!self.to_host.is_empty() || self.wants_shutdown());
        self.send_noticed |= wants;
        wants
    }

    /// Bytes for the host, in two pieces.
    pub(crate) fn outgoing(&self) -> (&[u8], &[u8]) {
        self.to_host.as_slices()
    }

    /// The host took `count` bytes.
    pub(crate) fn host_took(&mut self, count: usize) {
        self.to_host.drain(..count.min(self.to_host.len()));
        self.send_noticed = !self.to_host.is_empty();
        // The guest hears of new room when it is worth a segment: a quarter of the buffer, or the end of a standstill.
        let known = self.announced.since(self.received);
        let gain = self.window_room().saturating_sub(known);
        if gain >= self.buffer / 4 || (known < 2 * self.mss && gain >= 2 * self.mss) {
            self.ack_due |= !self.guest_ended;
        }
    }

    /// True when the host's socket should be told that nothing more comes.
    pub(crate) fn wants_shutdown(&self) -> bool {
        self.guest_ended && !self.host_shut && self.to_host.is_empty()
    }

    pub(crate) fn host_shut(&mut self) {
        self.host_shut = true;
    }

    /// Both directions have ended and everything is acknowledged.
    pub(crate) fn is_finished(&self) -> bool {
        self.fin_acknowledged && self.host_shut && !self.ack_due && self.acks_owed == 0
    }

    /// Bytes for the guest from the oldest unacknowledged on, in two pieces.
    pub(crate) fn to_guest(&self) -> (&[u8], &[u8]) {
        self.to_guest.as_slices()
    }
}

#[cfg(test)]
mod tests;

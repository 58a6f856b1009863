//! The work on the device's queues: packets in from the guest's transmit queue, packets out into its receive queue.
//!
//! Host sockets are read straight into guest buffers, several of them per system call, and written straight from them.
//! Each pass is bounded, and the two queues take turns, so no guest and no stream can hold the thread.

use std::os::fd::OwnedFd;
use std::time::Instant;

use mio::event::Event;
use vm_memory::GuestMemoryMmap;

use super::Message;
use super::connection::{Received, Verdict};
use super::muxer::{Muxer, Turn};
use super::packet::{HEADER_BYTES, Header};
use crate::virtio::buffers::Buffers;
use crate::virtio::device::DeviceState;
use crate::virtio::ring::{Ring, Round};
use crate::virtio::worker::{Model, Rings};

/// Queue indexes (virtio 1.3 §5.10.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;

/// The event that all streams are gone and the guest's context id may be another (§5.10.6.7): its number, u32.
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Packets taken from the guest before the other queue has its turn.
const TRANSMIT_BUDGET: usize = 64;
/// Packets given to the guest before the other queue has its turn.
const RECEIVE_BUDGET: usize = 256;
/// Buffers for events looked at before the other queues have their turn.
const EVENT_BUDGET: usize = 64;
/// The most guest buffers filled by one read of a host socket. Linux offers buffers of just under 4 KiB.
const BURST: usize = 16;

/// The model, on the device's thread.
pub(crate) struct Queues {
    muxer: Muxer,
    transmit_kicked: bool,
    /// The guest goes on from a saved state, and has not been told yet that its streams are gone.
    transport_reset: bool,
}

/// A guest buffer that waits to be filled.
struct Slot<'a> {
    head: u16,
    header: Buffers<'a>,
    room: usize,
}

/// What came of one attempt to send.
enum Sent {
    /// So many guest buffers were used.
    Buffers(usize),
    /// The guest offers no buffer.
    NoBuffer,
}

impl Queues {
    pub(super) fn new(muxer: Muxer) -> Self {
        Self { muxer, transmit_kicked: false, transport_reset: false }
    }

    /// Opens a stream from the host to a port of the guest.
    pub fn connect(&mut self, port: u32, preface: Vec<u8>, socket: OwnedFd, now: Instant) {
        self.muxer.connect(port, preface, socket, now);
    }

    /// Tells the guest that its streams are gone, once it offers a buffer to be told in; `true` when it offers more than
    /// were looked at.
    fn tell_reset(&mut self, ring: &mut Ring) -> bool {
        let event = EVENT_TRANSPORT_RESET.to_le_bytes();
        let round = ring.serve(EVENT_BUDGET, |mut chain| {
            if !self.transport_reset {
                return None;
            }
            if chain.writable.len() < event.len() {
                self.muxer.counters().malformed.add(1);
                return Some(0);
            }
            self.transport_reset = false;
            Some(chain.writable.copy_in(&event) as u32)
        });
        ring.flush();
        self.transport_reset && round == Round::HasMore
    }

    /// Takes packets from the guest; `true` when there may be more.
    fn transmit(&mut self, ring: &mut Ring) -> bool {
        let round = ring.serve(TRANSMIT_BUDGET, |chain| {
            self.muxer.counters().packets_from_guest.add(1);
            self.muxer.guest_packet(chain.readable);
            Some(0)
        });
        round == Round::HasMore
    }

    /// Gives packets to the guest; `true` when there may be more to give now.
    fn receive(&mut self, ring: &mut Ring) -> bool {
        let memory = ring.memory();
        let mut budget = RECEIVE_BUDGET;
        while let Some(turn) = self.muxer.turn() {
            if budget == 0 {
                return true;
            }
            let sent = match turn {
                Turn::Reply => self.send_reply(ring, &memory),
                Turn::Connection(slot) => self.send_for(slot, ring, &memory),
            };
            match sent {
                // An empty turn (nothing was there to read after all) costs a system call, so it counts as well.
                Sent::Buffers(count) => budget = budget.saturating_sub(count.max(1)),
                Sent::NoBuffer => {
                    if !ring.enable_kicks() {
                        return false;
                    }
                    budget -= 1;
                }
            }
        }
        ring.disable_kicks();
        false
    }

    fn send_reply(&mut self, ring: &mut Ring, memory: &GuestMemoryMmap) -> Sent {
        let Some(slot) = self.take_slot(ring, memory) else { return Sent::NoBuffer };
        match self.muxer.take_reply() {
            Some(header) => self.fill(ring, memory, slot, header),
            None => ring.untake(1),
        }
        Sent::Buffers(1)
    }

    /// One turn of a stream: its packets without data, then one burst of data.
    fn send_for(&mut self, index: usize, ring: &mut Ring, memory: &GuestMemoryMmap) -> Sent {
        let guest = self.muxer.guest();
        let mut used = 0;
        loop {
            let Some(slot) = self.take_slot(ring, memory) else {
                // The stream keeps its place at the front.
                return Sent::NoBuffer;
            };
            let Some(header) =
                self.muxer.connection(index).and_then(|connection| connection.next_control(guest))
            else {
                ring.untake(1);
                break;
            };
            self.fill(ring, memory, slot, header);
            used += 1;
        }
        let limit = self.muxer.connection(index).map_or(0, |connection| connection.readable_bytes());
        if limit == 0 {
            self.muxer.end_turn(index, Verdict::Keep);
            return Sent::Buffers(used);
        }
        let (slots, mut space) = self.take_burst(ring, memory, limit);
        if slots.is_empty() {
            return Sent::NoBuffer;
        }
        let Some(connection) = self.muxer.connection(index) else {
            ring.untake(slots.len() as u16);
            return Sent::Buffers(used);
        };
        let (received, verdict) = connection.receive(&mut space);
        let mut left = match received {
            Received::Data(count) => count,
            Received::Nothing => 0,
        };
        self.muxer.counters().bytes_to_guest.add(left as u64);
        let mut unused = 0;
        for slot in slots {
            if left == 0 {
                unused += 1;
                continue;
            }
            let length = left.min(slot.room);
            left -= length;
            let Some(connection) = self.muxer.connection(index) else { continue };
            let header = connection.data_header(guest, length as u32);
            self.fill(ring, memory, slot, header);
            used += 1;
        }
        ring.untake(unused);
        self.muxer.end_turn(index, verdict);
        Sent::Buffers(used)
    }

    /// Takes guest buffers for one read of at most `limit` bytes. The space is theirs without the headers.
    fn take_burst<'a>(
        &mut self,
        ring: &mut Ring,
        memory: &'a GuestMemoryMmap,
        limit: usize,
    ) -> (Vec<Slot<'a>>, Buffers<'a>) {
        let mut slots = Vec::with_capacity(BURST);
        let mut space = Buffers::default();
        while slots.len() < BURST && space.len() < limit {
            let Some(chain) = ring.take(memory) else { break };
            let mut room = chain.writable;
            let header = room.split_front(HEADER_BYTES);
            if header.len() < HEADER_BYTES || room.is_empty() {
                // Unusable. Behind others it would break the run that can be given back; its time comes.
                if slots.is_empty() {
                    self.muxer.counters().malformed.add(1);
                    ring.complete(memory, chain.head, 0);
                } else {
                    ring.untake(1);
                }
                break;
            }
            room.truncate(limit - space.len());
            space.append(&room);
            slots.push(Slot { head: chain.head, header, room: room.len() });
        }
        (slots, space)
    }

    /// Takes one guest buffer that has room for a header. Unusable ones are handed back empty.
    fn take_slot<'a>(&mut self, ring: &mut Ring, memory: &'a GuestMemoryMmap) -> Option<Slot<'a>> {
        // A ring holds no more chains than this; a driver that adds as fast as we look gets no further.
        for _ in 0..RECEIVE_BUDGET {
            let mut chain = ring.take(memory)?;
            let header = chain.writable.split_front(HEADER_BYTES);
            if header.len() == HEADER_BYTES {
                return Some(Slot { head: chain.head, header, room: chain.writable.len() });
            }
            self.muxer.counters().malformed.add(1);
            ring.complete(memory, chain.head, 0);
        }
        None
    }

    /// Writes the header of a guest buffer whose data, if any, is already there, and hands it over.
    fn fill(&mut self, ring: &mut Ring, memory: &GuestMemoryMmap, mut slot: Slot<'_>, header: Header) {
        slot.header.copy_in(&header.to_bytes());
        ring.complete(memory, slot.head, HEADER_BYTES as u32 + header.length);
        self.muxer.counters().packets_to_guest.add(1);
    }
}

impl Model for Queues {
    type Message = Message;

    fn ack_features(&mut self, _features: u64) {
        // Nothing of what is offered changes how packets look.
    }

    fn kicked(&mut self, queue: usize) {
        // A kick of the receive queue needs no note: `run` looks at that queue whenever something waits.
        self.transmit_kicked |= queue == TRANSMIT;
    }

    fn event(&mut self, event: &Event) {
        self.muxer.event(event);
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Connect { port, preface, socket } => self.connect(port, preface, socket, Instant::now()),
        }
    }

    fn run(&mut self, rings: &mut Rings) -> bool {
        if self.muxer.deadline().is_some() {
            self.muxer.tick(Instant::now());
        }
        let mut more = false;
        if self.transport_reset
            && let Some(ring) = &mut rings[EVENT]
        {
            more = self.tell_reset(ring);
        }
        if self.transmit_kicked
            && let Some(ring) = &mut rings[TRANSMIT]
        {
            self.transmit_kicked = self.transmit(ring);
            ring.flush();
        }
        // A stream that the guest hears of before the reset would be taken for one of those that are gone.
        if self.muxer.has_output()
            && !self.transport_reset
            && let Some(ring) = &mut rings[RECEIVE]
        {
            more |= self.receive(ring);
            ring.flush();
        }
        more || (self.transmit_kicked && rings[TRANSMIT].is_some())
    }

    fn deadline(&self) -> Option<Instant> {
        self.muxer.deadline()
    }

    /// No stream is saved: its other end is a socket of the host. The guest is told.
    fn save(&self) -> Result<Vec<u8>, String> {
        Ok(self.muxer.next_port().to_le_bytes().to_vec())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let port = <[u8; 4]>::try_from(&state.model[..]).map(u32::from_le_bytes).ok();
        self.transport_reset = true;
        match port.is_some_and(|port| self.muxer.go_on_from(port)) {
            true => Ok(()),
            false => Err("the port of its next stream is none of the host's".to_owned()),
        }
    }

    fn reset(&mut self) {
        self.muxer.reset();
        self.transmit_kicked = false;
        self.transport_reset = false;
    }
}

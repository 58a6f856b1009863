//! The work on the card's queues.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use host_frames::{FRAME_MAX, OFFLOAD_BYTES};
use mio::event::Event;
use vm_memory::GuestMemoryMmap;

use super::link::Link;
use super::offload::{Offload, Segmentation, complete, cut};
use super::{
    Counters, F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_HOST_USO,
    F_MRG_RXBUF, STATUS,
};
use crate::virtio::buffers::Buffers;
use crate::virtio::config::ConfigSpace;
use crate::virtio::ring::{Ring, Round};
use crate::virtio::worker::{Model, Rings};

/// Queue indexes (virtio 1.3 §5.1.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A driver's header: what is left to do, and in how many buffers the frame lies.
const HEADER_BYTES: usize = OFFLOAD_BYTES + 2;
/// The shortest frame: its Ethernet header.
const FRAME_MIN: usize = 14;
/// Frames taken from one queue before the other has its turn.
const BUDGET: usize = 64;

/// The model, on the device's thread.
pub(crate) struct Queues {
    link: Link,
    config: ConfigSpace,
    counters: Arc<Counters>,
    features: u64,
    transmit_kicked: bool,
    /// Pieces of a large frame that this driver does not take whole.
    pieces: VecDeque<Vec<u8>>,
    /// The frame being worked on.
    frame: Vec<u8>,
    /// The driver has been told that the link is down.
    told: bool,
}

/// What became of a frame for the guest.
enum Delivery {
    Done,
    /// The guest has not offered enough buffers; it kicks when there are more.
    NoBuffer,
    /// A buffer that cannot be used has been handed back.
    Again,
    /// It fits no buffer.
    TooLarge,
}

impl Delivery {
    /// Whether the frame is done with.
    fn is_over(&self) -> bool {
        matches!(self, Self::Done | Self::TooLarge)
    }
}

impl Queues {
    pub(super) fn new(link: Link, config: ConfigSpace, counters: Arc<Counters>) -> Self {
        Self {
            link,
            config,
            counters,
            features: 0,
            transmit_kicked: false,
            pieces: VecDeque::new(),
            frame: Vec::with_capacity(FRAME_MAX),
            told: false,
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Takes frames from the guest; `true` when there may be more that can be taken now.
    fn transmit(&mut self, ring: &mut Ring) -> bool {
        let round = ring.serve(BUDGET, |chain| {
            if !self.link.has_room() {
                self.link.flush();
                if !self.link.has_room() {
                    return None;
                }
            }
            if self.send(chain.readable).is_none() || self.link.is_closed() {
                self.counters.dropped_from_guest.add(1);
            }
            Some(0)
        });
        // A round that was stopped goes on when the link has room.
        self.transmit_kicked = round != Round::Empty;
        round == Round::HasMore
    }

    /// Sends one frame of the guest; `None` when it makes no sense.
    fn send(&mut self, mut bytes: Buffers<'_>) -> Option<()> {
        let mut header = [0; HEADER_BYTES];
        let length = bytes.len().checked_sub(HEADER_BYTES)?;
        if !(FRAME_MIN..=FRAME_MAX).contains(&length) {
            return None;
        }
        bytes.copy_out(&mut header);
        let offload = Offload::parse(*header.first_chunk()?)?;
        self.frame.resize(length, 0);
        bytes.copy_out(&mut self.frame);
        // A driver may ask for no more than it has agreed to.
        let asked = match offload.segmentation {
            Segmentation::None => F_CSUM,
            Segmentation::Tcp4 => F_HOST_TSO4,
            Segmentation::Tcp6 => F_HOST_TSO6,
            Segmentation::Udp => F_HOST_USO,
        };
        if offload.checksum.is_some() && !self.has(asked) {
            return None;
        }
        // Whether a driver has looked at a checksum is nothing it could say of its own frame.
        let offload = Offload { checksum_good: false, ..offload };
        self.counters.frames_from_guest.add(1);
        self.counters.bytes_from_guest.add(length as u64);
        if self.link.offloads() {
            let (start, offset) = offload.checksum.unwrap_or_default();
            if usize::from(start) + usize::from(offset) + 2 > length {
                return None;
            }
            self.link.put(offload, &self.frame);
            return Some(());
        }
        if offload.segmentation != Segmentation::None {
            let link = &mut self.link;
            return cut(&self.frame, offload, |piece| link.put(Offload::NONE, piece));
        }
        if let Some(checksum) = offload.checksum {
            complete(&mut self.frame, checksum)?;
        }
        self.link.put(Offload::NONE, &self.frame);
        Some(())
    }

    /// Gives frames to the guest; `true` when there may be more to give now.
    fn receive(&mut self, ring: &mut Ring) -> bool {
        let memory = ring.memory();
        for _ in 0..BUDGET {
            let delivery = if let Some(piece) = self.pieces.front() {
                let delivery = deliver(ring, &memory, self.features, &self.counters, Offload::NONE, piece);
                if delivery.is_over() {
                    self.pieces.pop_front();
                }
                delivery
            } else {
                let features = self.features;
                let Some((offload, frame)) = self.link.peek() else { return false };
                match offload {
                    Some(offload) if takes(features, offload) => {
                        let delivery = deliver(ring, &memory, features, &self.counters, offload, frame);
                        if delivery.is_over() {
                            self.link.skip();
                        }
                        delivery
                    }
                    Some(offload) => {
                        if finish(offload, frame, &mut self.pieces).is_none() {
                            self.counters.dropped_to_guest.add(1);
                        }
                        self.link.skip();
                        continue;
                    }
                    None => {
                        self.counters.dropped_to_guest.add(1);
                        self.link.skip();
                        continue;
                    }
                }
            };
            match delivery {
                Delivery::Done | Delivery::Again => {}
                Delivery::NoBuffer => return false,
                Delivery::TooLarge => self.counters.dropped_to_guest.add(1),
            }
        }
        true
    }
}

/// Whether a driver with these features takes a frame for which this is left to do.
fn takes(features: u64, offload: Offload) -> bool {
    let has = |feature: u32| features & 1 << feature != 0;
    match offload.segmentation {
        Segmentation::None => (offload.checksum.is_none() && !offload.checksum_good) || has(F_GUEST_CSUM),
        Segmentation::Tcp4 => has(F_GUEST_TSO4),
        Segmentation::Tcp6 => has(F_GUEST_TSO6),
        Segmentation::Udp => false,
    }
}

/// Does what is left to do, for a driver that does not.
fn finish(offload: Offload, frame: &[u8], pieces: &mut VecDeque<Vec<u8>>) -> Option<()> {
    if offload.segmentation != Segmentation::None {
        return cut(frame, offload, |piece| pieces.push_back(piece.to_vec()));
    }
    let mut frame = frame.to_vec();
    if let Some(checksum) = offload.checksum {
        complete(&mut frame, checksum)?;
    }
    pieces.push_back(frame);
    Some(())
}

/// Writes a frame into as many of the guest's buffers as it needs and the driver allows.
fn deliver(
    ring: &mut Ring,
    memory: &GuestMemoryMmap,
    features: u64,
    counters: &Counters,
    offload: Offload,
    frame: &[u8],
) -> Delivery {
    if !(FRAME_MIN..=FRAME_MAX).contains(&frame.len()) {
        return Delivery::TooLarge;
    }
    let mergeable = features & 1 << F_MRG_RXBUF != 0;
    let wanted = HEADER_BYTES + frame.len();
    let mut heads: Vec<(u16, usize)> = Vec::new();
    let mut space = Buffers::default();
    while space.len() < wanted {
        if !heads.is_empty() && (!mergeable || heads.len() >= usize::from(ring.size())) {
            // What the driver offers never gets larger than this.
            ring.untake(heads.len() as u16);
            return Delivery::TooLarge;
        }
        let Some(chain) = ring.take(memory) else {
            // Asked before those that were taken are given back, so that the kick comes for another one.
            if ring.enable_kicks() {
                continue;
            }
            ring.untake(heads.len() as u16);
            return Delivery::NoBuffer;
        };
        let mut room = chain.writable;
        let least = if heads.is_empty() { HEADER_BYTES } else { 1 };
        if room.len() < least {
            counters.malformed.add(1);
            // Behind others it would break the run that can be given back; its time comes.
            if heads.is_empty() {
                ring.complete(memory, chain.head, 0);
                return Delivery::Again;
            }
            ring.untake(heads.len() as u16 + 1);
            return skip_unusable(ring, memory);
        }
        room.truncate(wanted - space.len());
        heads.push((chain.head, room.len()));
        space.append(&room);
    }
    let mut header = [0; HEADER_BYTES];
    header[..OFFLOAD_BYTES].copy_from_slice(&offload.to_bytes(headers(frame, offload)));
    header[OFFLOAD_BYTES..].copy_from_slice(&(heads.len() as u16).to_le_bytes());
    space.copy_in(&header);
    space.copy_in(frame);
    let used: Vec<(u16, u32)> = heads.iter().map(|(head, length)| (*head, *length as u32)).collect();
    ring.complete_all(memory, &used);
    counters.frames_to_guest.add(1);
    counters.bytes_to_guest.add(frame.len() as u64);
    Delivery::Done
}

/// Hands back the driver's next buffers up to the first that cannot be used, so that the next round gets by it.
fn skip_unusable(ring: &mut Ring, memory: &GuestMemoryMmap) -> Delivery {
    while let Some(chain) = ring.take(memory) {
        let usable = !chain.writable.is_empty();
        ring.complete(memory, chain.head, 0);
        if !usable {
            break;
        }
    }
    Delivery::Again
}

/// How long the headers of a frame are that the driver may have to cut.
fn headers(frame: &[u8], offload: Offload) -> u16 {
    match offload.checksum {
        Some((start, 16)) => {
            let offset = frame.get(usize::from(start) + 12).map_or(0, |offset| u16::from(offset >> 4) * 4);
            start.saturating_add(offset)
        }
        Some((start, _)) => start.saturating_add(8),
        None => 0,
    }
}

impl Model for Queues {
    type Message = ();

    fn ack_features(&mut self, features: u64) {
        self.features = features;
    }

    fn kicked(&mut self, queue: usize) {
        // A kick of the receive queue needs no note: `run` looks at that queue whenever a frame waits.
        self.transmit_kicked |= queue == TRANSMIT;
    }

    fn event(&mut self, event: &Event) {
        self.link.notice(event);
    }

    fn message(&mut self, (): ()) {}

    fn run(&mut self, rings: &mut Rings) -> bool {
        self.link.flush();
        let mut more = false;
        if self.transmit_kicked
            && let Some(ring) = &mut rings[TRANSMIT]
        {
            more |= self.transmit(ring);
            ring.flush();
        }
        self.link.flush();
        if let Some(ring) = &mut rings[RECEIVE] {
            more |= self.receive(ring);
            ring.flush();
        }
        if self.link.is_closed()
            && !self.told
            && let Some(ring) = rings.iter_mut().flatten().next()
        {
            self.told = true;
            self.config.set(STATUS, &[0, 0]);
            ring.signal_config();
        }
        more
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        self.features = 0;
        self.transmit_kicked = false;
        self.pieces.clear();
    }
}

//! The driver's requests (virtio 1.3 §5.15.6).

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::event::Event;
use vm_memory::GuestAddress;

use super::blocks::{Blocks, State};
use super::{
    ADDRESS, BLOCK, BLOCK_BYTES, Backend, Counters, Message, PLUGGED, REGION, REQUESTED, Told, USABLE,
};
use crate::virtio::buffers::Buffers;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceState;
use crate::virtio::ring::Round;
use crate::virtio::worker::{Model, Rings};

/// Requests served before others have their turn.
const BUDGET: usize = 16;
/// How long nothing may change before whoever waits is told so.
const PATIENCE: Duration = Duration::from_secs(10);

/// A request: its type, and where it wants something of how many blocks.
const REQUEST_BYTES: usize = 24;
/// A response: its type, and the state that was asked for.
const RESPONSE_BYTES: usize = 10;

// Types of requests.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Response {
    /// It was done.
    Ack,
    /// It was not done, and might have been before.
    Nack,
    /// It cannot be done.
    Error,
    /// How the blocks are.
    State(State),
}

impl Response {
    fn bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0_u16, 0_u16),
            Self::Nack => (1, 0),
            Self::Error => (3, 0),
            Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
        };
        let mut bytes = [0; RESPONSE_BYTES];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

/// Somebody waits for the guest to have what was requested.
struct Waiting {
    told: Told,
    until: Instant,
}

/// The model, on the device's thread.
pub(crate) struct Queues {
    backend: Backend,
    config: ConfigSpace,
    counters: Arc<Counters>,
    blocks: Blocks,
    /// The first blocks, which the driver may plug.
    usable: usize,
    /// How many the driver is to plug.
    requested: usize,
    kicked: bool,
    /// The wish has changed and the driver has not been told.
    untold: bool,
    waiting: Option<Waiting>,
}

impl Queues {
    pub(super) fn new(backend: Backend, config: ConfigSpace, counters: Arc<Counters>) -> Self {
        let blocks = Blocks::new(whole_blocks(backend.bytes));
        Self {
            backend,
            config,
            counters,
            blocks,
            usable: 0,
            requested: 0,
            kicked: false,
            untold: false,
            waiting: None,
        }
    }

    /// Serves one request, and tells how much of a response was written.
    fn request(&mut self, mut request: Buffers<'_>, mut response: Buffers<'_>) -> Option<u32> {
        let mut bytes = [0; REQUEST_BYTES];
        if request.copy_out(&mut bytes) < REQUEST_BYTES || response.len() < RESPONSE_BYTES {
            self.counters.malformed.add(1);
            return Some(0);
        }
        let [low, high, _, _, _, _, _, _, place @ .., blocks_low, blocks_high, _, _, _, _, _, _] = bytes;
        let blocks = self.blocks_at(u64::from_le_bytes(place), u16::from_le_bytes([blocks_low, blocks_high]));
        let answer = match (u16::from_le_bytes([low, high]), blocks) {
            (PLUG, Some(blocks)) => self.plug(blocks),
            (UNPLUG, Some(blocks)) => self.unplug(blocks),
            (UNPLUG_ALL, _) => self.unplug_all(),
            (STATE, Some(blocks)) => Response::State(self.blocks.state(blocks)),
            _ => Response::Error,
        };
        match answer {
            Response::Error => self.counters.errors.add(1),
            Response::Nack => self.counters.refused.add(1),
            Response::Ack | Response::State(_) => {}
        }
        Some(response.copy_in(&answer.bytes()) as u32)
    }

    /// The usable blocks at an address, if there are so many, and any.
    fn blocks_at(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.backend.start.0)?;
        let start = usize::try_from(offset / BLOCK_BYTES).ok()?;
        let end = start.checked_add(usize::from(count))?;
        (offset.is_multiple_of(BLOCK_BYTES) && start < end && end <= self.usable).then_some(start..end)
    }

    fn plug(&mut self, blocks: Range<usize>) -> Response {
        if self.blocks.state(blocks.clone()) != State::Unplugged {
            return Response::Error;
        }
        if self.blocks.plugged() + blocks.len() > self.requested {
            return Response::Nack;
        }
        self.counters.plugged.add(blocks.len() as u64);
        self.blocks.set(blocks, true);
        self.changed();
        Response::Ack
    }

    fn unplug(&mut self, blocks: Range<usize>) -> Response {
        if self.blocks.state(blocks.clone()) != State::Plugged {
            return Response::Error;
        }
        self.take_back(blocks);
        self.changed();
        Response::Ack
    }

    fn unplug_all(&mut self) -> Response {
        let mut next = 0;
        while let Some(run) = self.blocks.run(next) {
            next = run.end;
            self.take_back(run);
        }
        self.changed();
        Response::Ack
    }

    fn take_back(&mut self, blocks: Range<usize>) {
        let start = self.backend.start.0 + bytes_of(blocks.start);
        (self.backend.discard)(GuestAddress(start), bytes_of(blocks.len()));
        self.counters.unplugged.add(blocks.len() as u64);
        self.blocks.set(blocks, false);
    }

    /// Writes down what is plugged; whoever waits for it has more patience now.
    fn changed(&mut self) {
        self.config.set(PLUGGED, &bytes_of(self.blocks.plugged()).to_le_bytes());
        if let Some(waiting) = &mut self.waiting {
            waiting.until = Instant::now() + PATIENCE;
        }
    }

    /// Tells whoever waits how much the guest has.
    fn tell(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            (waiting.told)(bytes_of(self.blocks.plugged()));
        }
    }
}

fn whole_blocks(bytes: u64) -> usize {
    usize::try_from(bytes / BLOCK_BYTES).unwrap_or(usize::MAX)
}

fn bytes_of(blocks: usize) -> u64 {
    blocks as u64 * BLOCK_BYTES
}

/// A field of configuration space.
fn field(config: &[u8], offset: usize) -> Option<u64> {
    config.get(offset..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

impl Model for Queues {
    type Message = Message;

    fn ack_features(&mut self, _features: u64) {
        // What is not plugged is left alone by drivers with and without the feature: it holds nothing.
    }

    fn kicked(&mut self, _queue: usize) {
        self.kicked = true;
    }

    fn event(&mut self, _event: &Event) {
        // Nothing is registered.
    }

    fn message(&mut self, Message { bytes, usable, told }: Message) {
        self.tell();
        // What was usable once may be plugged.
        self.usable = whole_blocks(usable).min(self.blocks.count()).max(self.usable);
        self.requested = whole_blocks(bytes.next_multiple_of(BLOCK_BYTES)).min(self.usable);
        self.config.set(USABLE, &bytes_of(self.usable).to_le_bytes());
        self.config.set(REQUESTED, &bytes_of(self.requested).to_le_bytes());
        self.untold = true;
        self.waiting = Some(Waiting { told, until: Instant::now() + PATIENCE });
    }

    fn run(&mut self, rings: &mut Rings) -> bool {
        let mut more = false;
        let ring = rings[0].as_mut();
        let nobody = ring.is_none();
        if let Some(ring) = ring {
            if std::mem::take(&mut self.untold) {
                ring.signal_config();
            }
            if std::mem::take(&mut self.kicked) {
                let round = ring.serve(BUDGET, |chain| self.request(chain.readable, chain.writable));
                more = round == Round::HasMore;
                self.kicked = more;
                ring.flush();
            }
        }
        let over = self.waiting.as_ref().is_some_and(|waiting| waiting.until <= Instant::now());
        if nobody || over || self.blocks.plugged() == self.requested {
            self.tell();
        }
        more
    }

    fn save(&self) -> Result<Vec<u8>, String> {
        Ok(self.blocks.bytes())
    }

    /// Goes on with the blocks that were plugged. What they hold is the machine's to bring back.
    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let ours = self.config.bytes();
        if [BLOCK, ADDRESS, REGION].iter().any(|at| field(&state.config, *at) != field(&ours, *at)) {
            return Err("its memory is elsewhere or of another size".to_owned());
        }
        let blocks = self.blocks.like(&state.model).ok_or("it does not say which blocks are plugged")?;
        let number = |offset| field(&state.config, offset).unwrap_or(u64::MAX);
        let (usable, requested) = (whole_blocks(number(USABLE)), whole_blocks(number(REQUESTED)));
        let last = (0..blocks.count()).rev().find(|block| blocks.state(*block..block + 1) == State::Plugged);
        let consistent = bytes_of(blocks.plugged()) == number(PLUGGED)
            && usable <= blocks.count()
            && requested <= usable
            && bytes_of(usable) == number(USABLE)
            && bytes_of(requested) == number(REQUESTED)
            && last.is_none_or(|last| last < usable);
        if !consistent {
            return Err("the sizes in its configuration space are not those of its blocks".to_owned());
        }
        (self.blocks, self.usable, self.requested) = (blocks, usable, requested);
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|waiting| waiting.until)
    }

    /// What is plugged stays so (§5.15.6.1): a driver that comes again asks for it.
    fn reset(&mut self) {
        self.kicked = false;
    }
}

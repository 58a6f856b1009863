//! The work on the console's queues.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::debug;

use super::{Counters, Message};
use crate::virtio::buffers::Buffers;
use crate::virtio::ring::{Ring, Round};
use crate::virtio::worker::{Model, Rings};

/// Queue indexes (virtio 1.3 §5.3.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

const STREAM: Token = Token(0);
/// Output that waits for the other end: some thousand lines.
const PENDING_MAX: usize = 256 * 1024;
/// Chains taken from one queue before the other has its turn.
const BUDGET: usize = 32;
/// The most taken from one chain: a page is what drivers send.
const CHAIN_MAX: usize = 64 * 1024;

/// The model, on the device's thread.
pub(crate) struct Queues {
    stream: UnixStream,
    counters: Arc<Counters>,
    /// What the other end has not taken yet.
    pending: VecDeque<u8>,
    readable: bool,
    writable: bool,
    /// Nobody reads what is written any more.
    closed: bool,
    transmit_kicked: bool,
    untold: bool,
}

impl Queues {
    pub(super) fn new(stream: UnixStream, registry: &Registry, counters: Arc<Counters>) -> io::Result<Self> {
        let mut source = SourceFd(&stream.as_raw_fd());
        registry.register(&mut source, STREAM, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self {
            stream,
            counters,
            pending: VecDeque::new(),
            readable: true,
            writable: true,
            closed: false,
            transmit_kicked: false,
            untold: false,
        })
    }

    /// Takes output of the guest.
    fn output(&mut self, mut bytes: Buffers<'_>) {
        if bytes.is_empty() {
            self.counters.malformed.add(1);
        }
        bytes.truncate(CHAIN_MAX);
        self.counters.output_bytes.add(bytes.len() as u64);
        while self.pending.is_empty() && self.writable && !bytes.is_empty() {
            if let Err(error) = bytes.send(self.stream.as_fd()) {
                self.not_sent(&error);
            }
        }
        if !self.closed {
            let room = PENDING_MAX - self.pending.len();
            let mut kept = bytes.split_front(room);
            let mut part = [0; 4096];
            while !kept.is_empty() {
                let count = kept.copy_out(&mut part);
                self.pending.extend(&part[..count]);
            }
        }
        self.counters.dropped_bytes.add(bytes.len() as u64);
    }

    /// Sends what waits, as far as it is taken.
    fn flush(&mut self) {
        while self.writable && !self.pending.is_empty() {
            let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
            match rustix::net::send(&self.stream, self.pending.as_slices().0, flags) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => self.not_sent(&error.into()),
            }
        }
    }

    fn not_sent(&mut self, error: &io::Error) {
        self.writable = false;
        if error.kind() != io::ErrorKind::WouldBlock {
            debug!(%error, "nobody reads the console any more");
            self.closed = true;
            self.counters.dropped_bytes.add(self.pending.len() as u64);
            self.pending.clear();
        }
    }

    /// Gives input to the guest; `true` when there may be more.
    fn receive(&mut self, ring: &mut Ring) -> bool {
        let memory = ring.memory();
        for _ in 0..BUDGET {
            if !self.readable {
                return false;
            }
            let Some(mut chain) = ring.take(&memory) else {
                if !ring.enable_kicks() {
                    return false;
                }
                continue;
            };
            if chain.writable.is_empty() {
                self.counters.malformed.add(1);
                ring.complete(&memory, chain.head, 0);
                continue;
            }
            chain.writable.truncate(CHAIN_MAX);
            match chain.writable.receive(self.stream.as_fd()) {
                Ok(0) => {
                    self.readable = false;
                    ring.untake(1);
                }
                Ok(count) => {
                    self.counters.input_bytes.add(count as u64);
                    ring.complete(&memory, chain.head, count as u32);
                }
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        debug!(%error, "nobody writes to the console any more");
                    }
                    self.readable = false;
                    ring.untake(1);
                }
            }
        }
        true
    }
}

impl Model for Queues {
    type Message = Message;

    fn ack_features(&mut self, _features: u64) {
        // A driver that did not take the size does not look at it.
    }

    fn kicked(&mut self, queue: usize) {
        // A kick of the receive queue needs no note: `run` looks at that queue whenever the socket has something.
        self.transmit_kicked |= queue == TRANSMIT;
    }

    fn event(&mut self, event: &Event) {
        self.readable |= event.is_readable();
        self.writable |= event.is_writable() && !self.closed;
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Resized => self.untold = true,
        }
    }

    fn run(&mut self, rings: &mut Rings) -> bool {
        if self.untold
            && let Some(ring) = rings.iter_mut().flatten().next()
        {
            self.untold = false;
            ring.signal_config();
        }
        self.flush();
        if self.transmit_kicked
            && let Some(ring) = &mut rings[TRANSMIT]
        {
            let round = ring.serve(BUDGET, |chain| {
                self.output(chain.readable);
                Some(0)
            });
            self.transmit_kicked = round == Round::HasMore;
            ring.flush();
        }
        let mut more = false;
        if self.readable
            && let Some(ring) = &mut rings[RECEIVE]
        {
            more = self.receive(ring);
            ring.flush();
        }
        more || (self.transmit_kicked && rings[TRANSMIT].is_some())
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn reset(&mut self) {
        // What the guest has written was written; it still goes out.
        self.transmit_kicked = false;
    }
}

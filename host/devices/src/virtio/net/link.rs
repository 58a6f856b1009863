//! The frame socket: frames with their lengths, in bounded buffers.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::{debug, warn};

use super::offload::{OFFLOAD_BYTES, Offload};

const STREAM: Token = Token(0);
/// Bytes before each frame: its length, u32 big-endian.
const PREFIX: usize = 4;
/// The longest frame: a 64 KiB IP packet, its Ethernet header and a VLAN tag.
pub(super) const FRAME_MAX: usize = 65_535 + 18;
/// Bytes read at a time: several of the largest frames.
const INPUT: usize = 256 * 1024;
/// Frames are taken from the guest as long as less than this waits for the other end.
const OUTPUT: usize = 256 * 1024;

pub(crate) struct Link {
    stream: UnixStream,
    offloads: bool,
    readable: bool,
    writable: bool,
    closed: bool,
    input: Vec<u8>,
    start: usize,
    end: usize,
    output: Vec<u8>,
    sent: usize,
}

impl Link {
    /// Takes a connected socket. It becomes non-blocking.
    pub fn new(stream: UnixStream, registry: &Registry, offloads: bool) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let mut source = SourceFd(&stream.as_raw_fd());
        registry.register(&mut source, STREAM, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self {
            stream,
            offloads,
            readable: true,
            writable: true,
            closed: false,
            input: vec![0; INPUT],
            start: 0,
            end: 0,
            output: Vec::with_capacity(OUTPUT + FRAME_MAX),
            sent: 0,
        })
    }

    pub fn notice(&mut self, event: &Event) {
        self.readable |= event.is_readable() || event.is_error();
        self.writable |= event.is_writable();
    }

    /// Whether frames carry what is left to do for them.
    pub fn offloads(&self) -> bool {
        self.offloads
    }

    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether another frame of the guest may be taken.
    pub fn has_room(&self) -> bool {
        self.closed || self.output.len() - self.sent < OUTPUT
    }

    /// Adds a frame to what is sent at the next [`Self::flush`].
    pub fn put(&mut self, offload: Offload, frame: &[u8]) {
        if self.closed {
            return;
        }
        let header = if self.offloads { &offload.to_bytes(0)[..] } else { &[] };
        let length = (header.len() + frame.len()) as u32;
        self.output.extend(length.to_be_bytes());
        self.output.extend_from_slice(header);
        self.output.extend_from_slice(frame);
    }

    /// Sends what the other end takes.
    pub fn flush(&mut self) {
        while self.writable && !self.closed && self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.close(&error),
            }
        }
        if self.sent == self.output.len() || self.closed {
            self.output.clear();
            self.sent = 0;
        } else if self.sent > OUTPUT / 2 {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// The next frame and what is left to do for it, without consuming it. `None` when none is there; a frame whose
    /// header makes no sense comes without one.
    pub fn peek(&mut self) -> Option<(Option<Offload>, &[u8])> {
        let length = loop {
            let unread = &self.input[self.start..self.end];
            if let Some((prefix, rest)) = unread.split_first_chunk::<PREFIX>() {
                let length = u32::from_be_bytes(*prefix) as usize;
                if length > FRAME_MAX + OFFLOAD_BYTES {
                    warn!(length, "a frame is announced that is longer than any: the framing is lost");
                    self.close(&io::ErrorKind::InvalidData.into());
                    return None;
                }
                if rest.len() >= length {
                    break length;
                }
            }
            if !self.fill() {
                return None;
            }
        };
        let frame = &self.input[self.start + PREFIX..self.start + PREFIX + length];
        Some(match (self.offloads, frame.split_first_chunk()) {
            (false, _) => (Some(Offload::NONE), frame),
            (true, Some((header, frame))) => (Offload::parse(*header), frame),
            (true, None) => (None, frame),
        })
    }

    /// Consumes the frame that [`Self::peek`] has shown.
    pub fn skip(&mut self) {
        if let Some(prefix) = self.input[self.start..self.end].first_chunk() {
            self.start += PREFIX + u32::from_be_bytes(*prefix) as usize;
        }
    }

    /// Reads once. `true` when there is something new.
    fn fill(&mut self) -> bool {
        if !self.readable || self.closed {
            return false;
        }
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            // The largest frame fits, so there is room.
            match self.stream.read(&mut self.input[self.end..]) {
                Ok(0) => self.close(&io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.end += count;
                    return true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => self.close(&error),
            }
            return false;
        }
    }

    fn close(&mut self, error: &io::Error) {
        if !self.closed {
            debug!(%error, "the network's other end has gone");
            self.closed = true;
        }
    }
}

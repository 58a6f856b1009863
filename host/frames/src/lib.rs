//! The framing between a network card and the network behind it: QEMU's `-netdev stream`, a length (u32, big-endian)
//! and that many bytes.
//!
//! Owns: one end of such a socket with its bounded buffers ([`FrameSocket`]), over anything that reads and writes. Does
//! not own: the socket's registration with a poll, or what a frame means. Both ends use it: the card in host-devices
//! and the NAT in host-net, which otherwise do not know each other.
//!
//! ```text
//!   readable, writable ──notice──▶ FrameSocket ──fill──▶ peek, skip
//!                                      ▲
//!                         put ─────────┴──────────────▶ flush
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::io::{self, ErrorKind, Read, Write};

/// Bytes before each frame: its length.
const PREFIX: usize = 4;
/// Bytes at the beginning of each frame of a link with offloads: what is left to do for the rest, which both ends read for
/// themselves.
pub const OFFLOAD_BYTES: usize = 10;
/// The longest Ethernet frame: a 64 KiB IP packet, its Ethernet header and a VLAN tag.
pub const FRAME_MAX: usize = 65_535 + 18;
/// Longest announced length believed. Beyond it the framing is lost.
const LENGTH_MAX: usize = FRAME_MAX + OFFLOAD_BYTES;
/// Input handled at a time: several of the largest frames; small enough that answers do not wait long.
const INPUT: usize = 256 * 1024;
/// Frames are added as long as less than this waits for the other end: as much as its socket buffer takes at once.
const OUTPUT: usize = 256 * 1024;

/// One end of a frame socket, non-blocking, as an edge-triggered poll drives it.
#[derive(Debug)]
pub struct FrameSocket<S> {
    stream: S,
    readable: bool,
    writable: bool,
    closed: bool,
    input: Vec<u8>,
    /// The unread part of `input`.
    start: usize,
    end: usize,
    output: Vec<u8>,
    sent: usize,
}

impl<S: Read + Write> FrameSocket<S> {
    /// Takes a connected, non-blocking stream.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            readable: true,
            writable: true,
            closed: false,
            input: vec![0; INPUT],
            start: 0,
            end: 0,
            output: Vec::with_capacity(OUTPUT + PREFIX + LENGTH_MAX),
            sent: 0,
        }
    }

    /// Takes note of what the poll has said about the stream. An end or an error counts as readable.
    pub fn notice(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// True while there may be more to read.
    pub fn has_input(&self) -> bool {
        self.readable && !self.closed
    }

    /// True once the other end has gone, or [`Self::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Reads and writes no more, and forgets what was to be sent.
    pub fn close(&mut self) {
        self.closed = true;
        self.output.clear();
        self.sent = 0;
    }

    /// Reads once. True when there is something new.
    ///
    /// # Errors
    /// What reading says, but for an other end that has gone: that closes.
    pub fn fill(&mut self) -> io::Result<bool> {
        if !self.has_input() {
            return Ok(false);
        }
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        // A frame and its prefix always fit, so there is room once whole frames have been skipped.
        loop {
            match self.stream.read(&mut self.input[self.end..]) {
                Ok(0) => self.close(),
                Ok(count) => {
                    self.end += count;
                    return Ok(true);
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => self.readable = false,
                    ErrorKind::Interrupted => continue,
                    _ if is_gone(&error) => self.close(),
                    _ => return Err(error),
                },
            }
            return Ok(false);
        }
    }

    /// The next whole frame that has been read.
    ///
    /// # Errors
    /// When the other end announces a frame longer than any: the framing is lost.
    pub fn peek(&self) -> io::Result<Option<&[u8]>> {
        let unread = &self.input[self.start..self.end];
        let Some((prefix, rest)) = unread.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let length = u32::from_be_bytes(*prefix) as usize;
        if length > LENGTH_MAX {
            let message =
                format!("a frame of {length} bytes announced, more than {LENGTH_MAX}: the framing is lost");
            return Err(io::Error::new(ErrorKind::InvalidData, message));
        }
        Ok(rest.get(..length))
    }

    /// Has done with the frame that [`Self::peek`] shows, if it shows one.
    pub fn skip(&mut self) {
        if let Ok(Some(frame)) = self.peek() {
            self.start += PREFIX + frame.len();
        }
    }

    /// Whether another frame may be added.
    pub fn has_room(&self) -> bool {
        self.closed || self.output.len() - self.sent < OUTPUT
    }

    /// Adds the frame that `append` appends to what is sent at the next [`Self::flush`]; `None` from it adds nothing,
    /// and comes back as `false`. After the end a frame goes nowhere.
    pub fn put(&mut self, append: impl FnOnce(&mut Vec<u8>) -> Option<()>) -> bool {
        let start = self.output.len();
        self.output.extend([0; PREFIX]);
        let added = append(&mut self.output).is_some();
        let length = self.output.len() - start - PREFIX;
        match added && !self.closed {
            true => self.output[start..start + PREFIX].copy_from_slice(&(length as u32).to_be_bytes()),
            false => self.output.truncate(start),
        }
        added
    }

    /// Sends what the other end takes. True when nothing waits any more.
    ///
    /// # Errors
    /// What writing says, but for an other end that has gone: that closes.
    pub fn flush(&mut self) -> io::Result<bool> {
        while self.writable && self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => self.writable = false,
                    ErrorKind::Interrupted => {}
                    _ if is_gone(&error) => self.close(),
                    _ => return Err(error),
                },
            }
        }
        if self.sent == self.output.len() {
            self.output.clear();
            self.sent = 0;
            return Ok(true);
        }
        // Keeps the buffer from growing at its end while its beginning is long sent.
        if self.sent > OUTPUT / 2 {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        Ok(false)
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests;

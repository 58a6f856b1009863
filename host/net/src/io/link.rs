//! The frame socket: QEMU's `-netdev stream` framing, in bounded buffers.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream as StdUnixStream;

use mio::event::Event;
use mio::net::UnixStream;
use mio::{Interest, Registry, Token};

use crate::offload::OFFLOAD_BYTES;

/// Bytes before each frame: its length, u32 big-endian.
const PREFIX: usize = 4;
/// Longest frame believed: a 64 KiB IP packet, its Ethernet header and a VLAN tag, and what may stand before it. Beyond that, the framing is lost.
const FRAME_MAX: usize = 65_535 + 18 + OFFLOAD_BYTES;
/// Input handled at a time: several large frames; small enough that answers do not wait long.
const INPUT: usize = 256 * 1024;
/// Output waiting for the other end: as much as its socket buffer takes at once.
const OUTPUT: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
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

impl Link {
    pub(super) fn new(stream: StdUnixStream, registry: &Registry, token: Token) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(stream);
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self {
            stream,
            readable: true,
            writable: true,
            closed: false,
            input: vec![0; INPUT],
            start: 0,
            end: 0,
            output: Vec::with_capacity(OUTPUT),
            sent: 0,
        })
    }

    pub(super) fn notice(&mut self, event: &Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable();
    }

    /// True while there may be more to read.
    pub(super) fn has_input(&self) -> bool {
        self.readable && !self.closed
    }

    /// True once the other end has gone.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Reads once. True when there is something new.
    pub(super) fn fill(&mut self) -> io::Result<bool> {
        if !self.readable {
            return Ok(false);
        }
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        // A frame and its prefix always fit, so there is room.
        match self.stream.read(&mut self.input[self.end..]) {
            Ok(0) => {
                self.closed = true;
                Ok(false)
            }
            Ok(count) => {
                self.end += count;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(false)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) if is_gone(&error) => {
                self.closed = true;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The next whole frame that has been read.
    pub(super) fn next_frame(&mut self) -> io::Result<Option<&[u8]>> {
        let unread = &self.input[self.start..self.end];
        let Some((prefix, rest)) = unread.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let length = u32::from_be_bytes(*prefix) as usize;
        if length > FRAME_MAX {
            let message =
                format!("a frame of {length} bytes announced, more than {FRAME_MAX}: the framing is lost");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let start = self.start + PREFIX;
        self.start = start + length;
        Ok(Some(&self.input[start..start + length]))
    }

    /// Fills the output buffer from `next`, which appends one frame and returns its length. True when it was filled,
    /// so that there may be more.
    pub(super) fn put_frames(&mut self, mut next: impl FnMut(&mut Vec<u8>) -> Option<usize>) -> bool {
        while self.output.len() < OUTPUT {
            let start = self.output.len();
            self.output.extend([0; PREFIX]);
            match next(&mut self.output) {
                Some(length) => {
                    self.output[start..start + PREFIX].copy_from_slice(&(length as u32).to_be_bytes());
                }
                None => {
                    self.output.truncate(start);
                    return false;
                }
            }
        }
        true
    }

    /// Writes what the other end takes. True when everything has been written.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        while self.writable && self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_gone(&error) => {
                    self.closed = true;
                    self.readable = true;
                    self.sent = self.output.len();
                }
                Err(error) => return Err(error),
            }
        }
        if self.sent == self.output.len() {
            self.output.clear();
            self.sent = 0;
            return Ok(true);
        }
        // Keep the buffer from growing at its end while its beginning is long sent.
        if self.sent > OUTPUT / 2 {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        Ok(false)
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use mio::Poll;

    use super::*;

    fn pair() -> (Link, StdUnixStream, Poll) {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let poll = Poll::new().unwrap();
        let link = Link::new(ours, poll.registry(), Token(0)).unwrap();
        (link, theirs, poll)
    }

    #[test]
    fn frames_arrive_whole_however_they_are_cut() {
        let (mut link, mut theirs, _poll) = pair();
        let mut bytes = Vec::new();
        for length in [60usize, 0, 1514, 65_549] {
            bytes.extend((length as u32).to_be_bytes());
            bytes.extend((0..length).map(|i| i as u8));
        }
        let mut lengths = Vec::new();
        for piece in bytes.chunks(997) {
            theirs.write_all(piece).unwrap();
            link.readable = true;
            assert!(link.fill().unwrap());
            while let Some(frame) = link.next_frame().unwrap() {
                assert!(frame.iter().enumerate().all(|(i, byte)| *byte == i as u8));
                lengths.push(frame.len());
            }
        }
        assert_eq!(lengths, [60, 0, 1514, 65_549]);
        drop(theirs);
        link.readable = true;
        assert!(!link.fill().unwrap() && link.is_closed());
    }

    #[test]
    fn a_lost_framing_is_an_error() {
        let (mut link, mut theirs, _poll) = pair();
        theirs.write_all(&[0xff; 8]).unwrap();
        link.fill().unwrap();
        let error = link.next_frame().unwrap_err();
        assert!(error.to_string().starts_with("a frame of 4294967295 bytes announced"), "{error}");
    }

    #[test]
    fn output_waits_for_a_slow_reader_and_stays_bounded() {
        let (mut link, mut theirs, _poll) = pair();
        let mut made = 0u32;
        let mut read = Vec::new();
        for _ in 0..200 {
            let filled = link.put_frames(|out| {
                out.extend([7; 1000]);
                made += 1;
                Some(1000)
            });
            assert!(filled && link.output.len() <= OUTPUT + 1004);
            if !link.flush().unwrap() {
                let mut buffer = [0; 50_000];
                let count = theirs.read(&mut buffer).unwrap();
                read.extend_from_slice(&buffer[..count]);
                link.writable = true;
            }
        }
        assert!(read.len() > OUTPUT);
        for chunk in read.chunks_exact(1004) {
            assert_eq!(chunk[..4], 1000u32.to_be_bytes());
        }
    }
}

//! One connection: first requests and replies, then perhaps a stream.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use guest_runtime::shim::{Frame, FrameBuffer, FrameError, Reply};
use rustix::net::{SendFlags, send};

use crate::log::Stream;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Requests are read and answered.
    Control,
    /// A `Wait` on the process at this index is pending.
    Waiting(usize),
    /// Attached.
    Attached(Attachment),
    /// To be closed when everything has been sent.
    Closing,
}

/// What a stream carries, of the process at an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    pub process: usize,
    pub stdin: bool,
    pub outputs: [bool; 2],
}

/// A connection of the engine.
pub struct Client {
    pub stream: UnixStream,
    pub mode: Mode,
    pub input: FrameBuffer,
    /// The engine has shut its side; nothing more will be read.
    pub ended: bool,
    /// The engine has closed altogether, but what it sent may still be unread.
    pub hung_up: bool,
    /// How many kills for want of memory it has been told of, if it wants to be.
    pub ooms: Option<u64>,
    queue: Vec<u8>,
    sent: usize,
}

impl Client {
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let input = FrameBuffer::default();
        Ok(Self {
            stream,
            mode: Mode::Control,
            input,
            ended: false,
            hung_up: false,
            ooms: None,
            queue: Vec::new(),
            sent: 0,
        })
    }

    pub fn attachment(&self) -> Option<Attachment> {
        match self.mode {
            Mode::Attached(attachment) => Some(attachment),
            _ => None,
        }
    }

    /// Whether it wants this stream of the process at an index.
    pub fn wants(&self, process: usize, stream: Stream) -> bool {
        self.attachment().is_some_and(|one| one.process == process && one.outputs[stream.index()])
    }

    /// How many bytes wait to be sent.
    pub fn queued(&self) -> usize {
        self.queue.len() - self.sent
    }

    pub fn reply(&mut self, reply: &Reply) -> Result<(), FrameError> {
        let frame = Frame::encode(reply)?;
        // A broken connection shows itself at the next poll.
        let _ = self.send(&frame);
        Ok(())
    }

    /// Sends what the socket takes at once and queues the rest.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let now = if self.queued() == 0 { self.try_send(bytes)? } else { 0 };
        self.queue.extend_from_slice(&bytes[now..]);
        Ok(())
    }

    /// Sends from the queue.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.queued() > 0 {
            match self.try_send(&self.queue[self.sent..])? {
                0 => break,
                count => self.sent += count,
            }
        }
        if self.queued() == 0 {
            // A burst's memory goes back.
            self.queue = Vec::new();
            self.sent = 0;
        } else if self.sent > self.queue.len() / 2 {
            self.queue.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }

    fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            match send(&self.stream, &bytes[sent..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => sent += count,
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sent)
    }

    /// Closes so that the engine reads an end, not a reset: a unix socket closed with unread input resets its peer. The
    /// shutdown matters too: a container that has not been started yet holds copies of our descriptors.
    pub fn close(mut self) {
        // Nothing is owed to a peer that is already gone.
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut scratch = [0; 4096];
        while matches!(self.stream.read(&mut scratch), Ok(1..)) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_socket_does_not_take_is_kept_in_order() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut client = Client::new(near).unwrap();
        let data: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
        for piece in data.chunks(70_001) {
            client.send(piece).unwrap();
        }
        assert!(client.queued() > 0);
        let mut received = Vec::new();
        let mut chunk = vec![0; 100_000];
        while received.len() < data.len() {
            let count = far.read(&mut chunk).unwrap();
            received.extend_from_slice(&chunk[..count]);
            client.flush().unwrap();
        }
        assert!(received == data);
        assert_eq!(client.queued(), 0);
    }

    #[test]
    fn the_peer_reads_an_end_even_if_its_last_words_were_not_read() {
        use std::io::Write;
        let (near, mut far) = UnixStream::pair().unwrap();
        let client = Client::new(near).unwrap();
        far.write_all(b"unread").unwrap();
        client.close();
        assert_eq!(far.read(&mut [0; 8]).unwrap(), 0);
    }
}

//! The card's end of the frame socket: frames, with what is left to do for them.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use host_frames::FrameSocket;
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::{debug, warn};

use super::offload::Offload;

const STREAM: Token = Token(0);

pub(crate) struct Link {
    socket: FrameSocket<UnixStream>,
    offloads: bool,
    /// The other end has gone, and that was said.
    told: bool,
}

impl Link {
    /// Takes a connected socket. It becomes non-blocking.
    pub fn new(stream: UnixStream, registry: &Registry, offloads: bool) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let mut source = SourceFd(&stream.as_raw_fd());
        registry.register(&mut source, STREAM, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { socket: FrameSocket::new(stream), offloads, told: false })
    }

    pub fn notice(&mut self, event: &Event) {
        self.socket.notice(event.is_readable() || event.is_error(), event.is_writable());
    }

    /// Whether frames carry what is left to do for them.
    pub fn offloads(&self) -> bool {
        self.offloads
    }

    pub fn is_closed(&self) -> bool {
        self.socket.is_closed()
    }

    /// Whether another frame of the guest may be taken.
    pub fn has_room(&self) -> bool {
        self.socket.has_room()
    }

    /// Adds a frame to what is sent at the next [`Self::flush`].
    pub fn put(&mut self, offload: Offload, frame: &[u8]) {
        let header = if self.offloads { &offload.to_bytes(0)[..] } else { &[] };
        self.socket.put(|out| {
            out.extend_from_slice(header);
            out.extend_from_slice(frame);
            Some(())
        });
    }

    /// Sends what the other end takes.
    pub fn flush(&mut self) {
        let flushed = self.socket.flush();
        self.note(flushed);
    }

    /// The next frame and what is left to do for it, without consuming it. `None` when none is there; a frame whose
    /// header makes no sense comes without one.
    pub fn peek(&mut self) -> Option<(Option<Offload>, &[u8])> {
        loop {
            let filled = match self.socket.peek() {
                Ok(Some(_)) => break,
                Ok(None) => self.socket.fill(),
                Err(error) => Err(error),
            };
            if self.note(filled) != Some(true) {
                return None;
            }
        }
        let frame = self.socket.peek().ok()??;
        Some(match (self.offloads, frame.split_first_chunk()) {
            (false, _) => (Some(Offload::NONE), frame),
            (true, Some((header, frame))) => (Offload::parse(*header), frame),
            (true, None) => (None, frame),
        })
    }

    /// Consumes the frame that [`Self::peek`] has shown.
    pub fn skip(&mut self) {
        self.socket.skip();
    }

    /// An error is the end of the link.
    fn note<T>(&mut self, result: io::Result<T>) -> Option<T> {
        let value = result.inspect_err(|error| {
            if !self.told {
                warn!(%error, "the network is cut off");
            }
            self.socket.close();
        });
        if self.socket.is_closed() && !self.told {
            self.told = true;
            debug!("the network's other end has gone");
        }
        value.ok()
    }
}

//! The socket device (virtio 1.3 §5.10): streams between ports of the guest and sockets of the host.
//!
//! Owns: the packet layer, the streams and their credit. Does not own: what a port means, who listens on the host, or
//! the other ends of the sockets. Configuration space: the guest's context id, 8 bytes, little-endian.
//!
//! Both ways in are file descriptors. For a stream *to* the guest, [`Handle::connect`] takes a connected stream socket
//! (unix or TCP) and a guest port, from any thread. For a stream *from* the guest to one of the ports in
//! [`Backend::ports`], the device makes a socket pair and hands one end to [`Backend::accepted`]; any other port is
//! refused. All waiting is done on the device's own thread (`vsock`), and no call here changes `O_NONBLOCK`, which a
//! handed-over socket shares with the process that handed it over.
//!
//! Files: `packet` is the header, `connection` one stream, `muxer` the table of streams, `queue` the two rings.

mod connection;
mod muxer;
mod packet;
mod queue;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use mio::Registry;
use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;

pub use packet::Cid;

use self::muxer::{Muxer, Ports};
pub(crate) use self::queue::Queues;
use crate::counter::Counter;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceKind;
use crate::virtio::threaded::{Front, Threaded};
use crate::virtio::worker::Mailbox;

/// Receive, transmit and event queue. The third tells a restored guest that its streams are gone.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// What the device needs from outside.
pub struct Backend {
    /// The host's ports a guest may connect to.
    pub ports: Ports,
    /// Takes one end of a new stream from the guest, with the host port it asked for.
    ///
    /// Called on the device's thread: it must not block. Dropping the descriptor closes the stream.
    pub accepted: Box<dyn Fn(u32, OwnedFd) + Send>,
}

impl fmt::Debug for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Backend").field("ports", &self.ports).finish_non_exhaustive()
    }
}

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Streams opened from either side.
    pub opened: Counter,
    /// Streams ended; as many as were opened when none is left.
    pub closed: Counter,
    /// Streams refused because the table was full.
    pub refused_full: Counter,
    /// Packets of the guest that made no sense, and guest buffers too small for a header.
    pub malformed: Counter,
    /// Resets not sent because the guest took none of those before.
    pub replies_dropped: Counter,
    /// Packets taken from the guest.
    pub packets_from_guest: Counter,
    /// Packets given to the guest.
    pub packets_to_guest: Counter,
    /// Bytes read from host sockets into the guest.
    pub bytes_to_guest: Counter,
}

impl Counters {
    /// How many streams there are now.
    pub fn open_streams(&self) -> u64 {
        // Closed is read first, so that a stream that closes meanwhile does not make the difference negative.
        let closed = self.closed.get();
        self.opened.get().saturating_sub(closed)
    }
}

/// What the thread is asked for.
pub enum Message {
    /// Opens a stream to the guest.
    Connect {
        /// The guest's port.
        port: u32,
        /// What the guest gets first.
        preface: Vec<u8>,
        /// The host's end.
        socket: OwnedFd,
    },
}

/// Why a socket was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Only stream sockets carry streams.
    #[error("cannot connect guest port {port}: the descriptor is not a stream socket")]
    NotAStreamSocket {
        /// The guest's port.
        port: u32,
    },
    /// The device is gone, with its machine.
    #[error("cannot connect guest port {port}: the socket device has stopped")]
    Stopped {
        /// The guest's port.
        port: u32,
    },
}

/// Opens streams to the guest, from any thread, for as long as the device lives.
#[derive(Clone)]
pub struct Handle {
    mailbox: Mailbox<Message>,
}

impl Handle {
    /// Opens a stream to a port of the guest and copies between it and `socket`, a connected stream socket. The guest
    /// gets `preface` first.
    ///
    /// Returns at once. If the guest refuses, or does not answer within ten seconds, the socket is closed. Bytes
    /// already waiting in the socket are delivered once the guest has accepted. Whether the socket is blocking does
    /// not matter and is not changed.
    pub fn connect(&self, port: u32, preface: Vec<u8>, socket: OwnedFd) -> Result<(), ConnectError> {
        match socket_type(&socket) {
            Ok(SocketType::STREAM) => {}
            _ => return Err(ConnectError::NotAStreamSocket { port }),
        }
        self.mailbox
            .send(Message::Connect { port, preface, socket })
            .map_err(|_refused| ConnectError::Stopped { port })
    }
}

/// The socket device.
pub struct Vsock {
    counters: Arc<Counters>,
    front: Front<Message>,
}

impl Vsock {
    /// Makes the device of the guest with this context id (3 or above), and its thread.
    pub fn new(guest: Cid, backend: Backend) -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        let shared = Arc::clone(&counters);
        let config = ConfigSpace::new(guest.0.to_le_bytes().to_vec());
        let front = Front::spawn(DeviceKind::Vsock, 0, QUEUE_SIZES.to_vec(), config, move |registry| {
            Queues::new(Muxer::new(guest, registry, backend, shared))
        })?;
        Ok(Self { counters, front })
    }

    /// A handle to open streams to the guest with.
    pub fn handle(&self) -> Handle {
        Handle { mailbox: self.front.mailbox() }
    }

    /// What the device has done.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

/// The model without a thread, for fuzz targets.
pub(crate) fn model(guest: Cid, registry: Registry, backend: Backend) -> Queues {
    Queues::new(Muxer::new(guest, registry, backend, Arc::default()))
}

impl Threaded for Vsock {
    type Message = Message;

    fn front(&self) -> &Front<Message> {
        &self.front
    }
}

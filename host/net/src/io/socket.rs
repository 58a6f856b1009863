//! One flow's socket on the host.

use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use mio::event::Event;
use mio::net::{TcpStream, UdpSocket};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::flow::FlowId;
use crate::stack::Stack;

/// Bytes read for one flow before the others have their turn.
const STREAM_SHARE: usize = 256 * 1024;
/// The same in datagrams.
const DATAGRAM_SHARE: usize = 64;

#[derive(Debug)]
pub(super) struct HostSocket {
    flow: FlowId,
    kind: Kind,
    readable: bool,
    writable: bool,
    /// Whether the flow stands in the driver's queue.
    pub(super) queued: bool,
}

#[derive(Debug)]
enum Kind {
    Tcp { stream: TcpStream, state: TcpState },
    Udp(UdpSocket),
    Echo(Socket),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TcpState {
    Connecting,
    Open,
    /// The peer sends no more; we may.
    Ended,
}

/// What is left after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing until an event or the stack says so.
    Waits,
    /// More, in the next turn.
    HasMore,
    /// Datagrams, once the link has drained.
    Stalled,
}

impl HostSocket {
    pub(super) fn connect(flow: FlowId, to: SocketAddr, registry: &Registry) -> io::Result<Self> {
        let mut stream = TcpStream::connect(to)?;
        registry.register(&mut stream, token(flow), Interest::READABLE | Interest::WRITABLE)?;
        // The guest's own stack decides when to send small pieces.
        stream.set_nodelay(true)?;
        Ok(Self::new(flow, Kind::Tcp { stream, state: TcpState::Connecting }))
    }

    pub(super) fn udp(flow: FlowId, to: SocketAddr, registry: &Registry) -> io::Result<Self> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let mut socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(to)?;
        registry.register(&mut socket, token(flow), Interest::READABLE)?;
        Ok(Self::new(flow, Kind::Udp(socket)))
    }

    pub(super) fn echo(flow: FlowId, to: Ipv4Addr, registry: &Registry) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4))?;
        socket.set_nonblocking(true)?;
        socket.connect(&SocketAddr::new(to.into(), 0).into())?;
        registry.register(&mut SourceFd(&socket.as_raw_fd()), token(flow), Interest::READABLE)?;
        Ok(Self::new(flow, Kind::Echo(socket)))
    }

    fn new(flow: FlowId, kind: Kind) -> Self {
        Self { flow, kind, readable: false, writable: false, queued: false }
    }

    pub(super) fn flow(&self) -> FlowId {
        self.flow
    }

    pub(super) fn notice(&mut self, event: &Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    /// Closes a TCP socket so that its peer sees a reset.
    pub(super) fn reset(self) {
        if let Kind::Tcp { stream, .. } = self.kind
            && let Err(error) = SockRef::from(&stream).set_linger(Some(Duration::ZERO))
        {
            tracing::debug!(flow = ?self.flow, %error, "a reset becomes an ordinary close");
        }
    }

    pub(super) fn send_datagram(&self, payload: &[u8]) -> io::Result<()> {
        match &self.kind {
            Kind::Udp(socket) => socket.send(payload).map(drop),
            Kind::Echo(socket) => socket.send(payload).map(drop),
            Kind::Tcp { .. } => Ok(()),
        }
    }

    /// One turn: connects, reads, writes, as far as socket and stack are ready. An error means the socket is done.
    pub(super) fn pump(
        &mut self,
        stack: &mut Stack,
        scratch: &mut [u8],
        now: Duration,
    ) -> io::Result<Progress> {
        if let Kind::Tcp { stream, state: state @ TcpState::Connecting } = &mut self.kind {
            if !is_connected(stream, self.writable)? {
                return Ok(Progress::Waits);
            }
            *state = TcpState::Open;
            stack.connected(self.flow);
        }
        match &self.kind {
            Kind::Tcp { .. } => {
                self.write_stream(stack)?;
                self.read_stream(stack, scratch)
            }
            Kind::Udp(_) | Kind::Echo(_) => self.read_datagrams(stack, scratch, now),
        }
    }

    fn write_stream(&mut self, stack: &mut Stack) -> io::Result<()> {
        let Kind::Tcp { stream, .. } = &mut self.kind else { return Ok(()) };
        while self.writable {
            let (first, second) = stack.outgoing(self.flow);
            if first.is_empty() {
                break;
            }
            match stream.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
                Ok(count) => stack.host_took(self.flow, count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if stack.wants_shutdown(self.flow) {
            stream.shutdown(Shutdown::Write)?;
            stack.host_shut(self.flow);
        }
        Ok(())
    }

    fn read_stream(&mut self, stack: &mut Stack, scratch: &mut [u8]) -> io::Result<Progress> {
        let Kind::Tcp { stream, state } = &mut self.kind else { return Ok(Progress::Waits) };
        let mut share = STREAM_SHARE;
        while self.readable && *state == TcpState::Open {
            let room = stack.room(self.flow).min(scratch.len());
            if room == 0 {
                return Ok(Progress::Waits);
            }
            if share == 0 {
                return Ok(Progress::HasMore);
            }
            match stream.read(&mut scratch[..room]) {
                Ok(0) => {
                    *state = TcpState::Ended;
                    stack.host_ended(self.flow);
                }
                Ok(count) => {
                    stack.host_sent(self.flow, &scratch[..count]);
                    share = share.saturating_sub(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::Waits)
    }

    fn read_datagrams(
        &mut self,
        stack: &mut Stack,
        scratch: &mut [u8],
        now: Duration,
    ) -> io::Result<Progress> {
        for _ in 0..DATAGRAM_SHARE {
            if !self.readable {
                return Ok(Progress::Waits);
            }
            if !stack.takes_datagrams() {
                return Ok(Progress::Stalled);
            }
            let received = match &self.kind {
                Kind::Udp(socket) => socket.recv(scratch),
                Kind::Echo(socket) => (&mut &*socket).read(scratch),
                Kind::Tcp { .. } => return Ok(Progress::Waits),
            };
            match received {
                Ok(count) => stack.datagram(self.flow, &scratch[..count], now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::HasMore)
    }
}

/// Whether a connection under way stands; an error when it failed.
fn is_connected(stream: &TcpStream, writable: bool) -> io::Result<bool> {
    if !writable {
        return Ok(false);
    }
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    match stream.peer_addr() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}

fn token(flow: FlowId) -> Token {
    Token(flow.to_bits() as usize)
}

//! One flow's socket on the host.

use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use mio::event::Event;
use mio::net::{TcpStream, UdpSocket};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::heard;
use crate::flow::FlowId;
use crate::stack::Stack;

/// Bytes read for one flow before the others have their turn.
const STREAM_SHARE: usize = 256 * 1024;
/// The same in datagrams.
const DATAGRAM_SHARE: usize = 64;
/// A SYN with fewer hops left asks for the way (traceroute -T); others have what the host gives its own.
const FEW_HOPS: u8 = 32;

#[derive(Debug)]
pub(super) struct HostSocket {
    flow: FlowId,
    kind: Kind,
    ipv6: bool,
    /// What datagrams were last told to do on their way: hops, and whether they stay whole.
    manner: Option<(u8, bool)>,
    readable: bool,
    writable: bool,
    /// The kernel may have heard something about what was sent.
    heard: bool,
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
    /// The kernel keeps what it hears, if it `listens`.
    Connecting {
        listens: bool,
    },
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
    pub(super) fn connect(flow: FlowId, to: SocketAddr, hops: u8, registry: &Registry) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        // The guest's own stack decides when to send small pieces.
        socket.set_tcp_nodelay(true)?;
        if hops < FEW_HOPS {
            set_hops(&socket, to.is_ipv6(), hops)?;
            heard::listen(&socket, to.is_ipv6())?;
        }
        match socket.connect(&to.into()) {
            Err(error) if Errno::from_io_error(&error) != Some(Errno::INPROGRESS) => return Err(error),
            _ => {}
        }
        let mut stream = TcpStream::from_std(socket.into());
        registry.register(&mut stream, token(flow), Interest::READABLE | Interest::WRITABLE)?;
        let listens = hops < FEW_HOPS;
        Ok(Self::new(flow, to, Kind::Tcp { stream, state: TcpState::Connecting { listens } }))
    }

    /// A socket that is connected already, whose flow leads to `landing`.
    pub(super) fn accepted(
        flow: FlowId,
        landing: SocketAddr,
        mut stream: TcpStream,
        registry: &Registry,
    ) -> io::Result<Self> {
        registry.register(&mut stream, token(flow), Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self::new(flow, landing, Kind::Tcp { stream, state: TcpState::Open }))
    }

    pub(super) fn udp(flow: FlowId, to: SocketAddr, registry: &Registry) -> io::Result<Self> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let mut socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        heard::listen(&socket, to.is_ipv6())?;
        socket.connect(to)?;
        registry.register(&mut socket, token(flow), Interest::READABLE)?;
        Ok(Self::new(flow, to, Kind::Udp(socket)))
    }

    pub(super) fn echo(flow: FlowId, to: IpAddr, registry: &Registry) -> io::Result<Self> {
        let (domain, protocol) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(protocol))?;
        socket.set_nonblocking(true)?;
        heard::listen(&socket, to.is_ipv6())?;
        let to = SocketAddr::new(to, 0);
        socket.connect(&to.into())?;
        registry.register(&mut SourceFd(&socket.as_raw_fd()), token(flow), Interest::READABLE)?;
        Ok(Self::new(flow, to, Kind::Echo(socket)))
    }

    fn new(flow: FlowId, to: SocketAddr, kind: Kind) -> Self {
        let ipv6 = to.is_ipv6();
        Self { flow, kind, ipv6, manner: None, readable: false, writable: false, heard: false, queued: false }
    }

    pub(super) fn flow(&self) -> FlowId {
        self.flow
    }

    pub(super) fn notice(&mut self, event: &Event) {
        self.heard |= event.is_error();
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    /// Closes a TCP socket so that its peer sees a reset.
    pub(super) fn reset(self) {
        if let Kind::Tcp { stream, .. } = self.kind {
            reset(&stream);
        }
    }

    /// Sends a datagram through at most `hops` routers; one that is `whole` may not be cut.
    pub(super) fn send_datagram(&mut self, payload: &[u8], hops: u8, whole: bool) -> io::Result<()> {
        let change = self.manner != Some((hops, whole));
        let socket = match &self.kind {
            Kind::Udp(socket) => SockRef::from(socket),
            Kind::Echo(socket) => SockRef::from(socket),
            Kind::Tcp { .. } => return Ok(()),
        };
        if change {
            set_hops(&socket, self.ipv6, hops)?;
            heard::may_be_cut(&*socket, self.ipv6, !whole)?;
            self.manner = Some((hops, whole));
        }
        socket.send(payload).map(drop)
    }

    /// Passes on what the kernel has heard about what was sent. Returns whether there was anything.
    pub(super) fn listen(&mut self, stack: &mut Stack, now: Duration) -> io::Result<bool> {
        self.heard = false;
        let socket = match &self.kind {
            Kind::Udp(socket) => SockRef::from(socket),
            Kind::Echo(socket) => SockRef::from(socket),
            Kind::Tcp { stream, state: TcpState::Connecting { listens: true } } => SockRef::from(stream),
            Kind::Tcp { .. } => return Ok(false),
        };
        let mut any = false;
        while let Some(heard) = heard::read(&*socket)? {
            any = true;
            if let Some(trouble) = heard {
                stack.trouble(self.flow, trouble, now);
            }
        }
        Ok(any)
    }

    /// One turn: connects, reads, writes, as far as socket and stack are ready. An error means the socket is done.
    pub(super) fn pump(
        &mut self,
        stack: &mut Stack,
        scratch: &mut [u8],
        now: Duration,
    ) -> io::Result<Progress> {
        if self.heard {
            self.listen(stack, now)?;
        }
        if let Kind::Tcp { stream, state: state @ TcpState::Connecting { .. } } = &mut self.kind {
            if !is_connected(stream, self.writable)? {
                return Ok(Progress::Waits);
            }
            if *state == (TcpState::Connecting { listens: true }) {
                // From now on passing trouble is TCP's own to deal with.
                heard::listen_no_more(stream, self.ipv6)?;
            }
            *state = TcpState::Open;
            stack.connected(self.flow);
        }
        match &self.kind {
            Kind::Tcp { .. } => {
                self.write_stream(stack)?;
                self.read_stream(stack, scratch)
            }
            Kind::Udp(_) | Kind::Echo(_) => match self.read_datagrams(stack, scratch, now) {
                // What the kernel has just heard, it says here too.
                Err(_) if self.listen(stack, now)? => Ok(Progress::HasMore),
                other => other,
            },
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

/// Has the peer see a reset when the socket is closed.
pub(super) fn reset(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "a reset becomes an ordinary close");
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

fn set_hops(socket: &Socket, ipv6: bool, hops: u8) -> io::Result<()> {
    if ipv6 { socket.set_unicast_hops_v6(hops.into()) } else { socket.set_ttl_v4(hops.into()) }
}

fn token(flow: FlowId) -> Token {
    Token(flow.to_bits() as usize)
}

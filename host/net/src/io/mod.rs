//! The loop that drives the [`Stack`]: the frame socket, the host's sockets, and time.
//!
//! One thread, one poll set, edge-triggered. Everything it holds is bounded: one buffer of input and one of output for
//! the link, one shared buffer for reading, and what the stack keeps per connection. A slow guest stops the reading of
//! host sockets; a slow host socket shrinks the guest's window. While nothing happens the thread sleeps without a
//! timer.

mod heard;
mod socket;

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host_frames::FrameSocket;
use mio::event::Event;
use mio::net::TcpStream;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use rustix::io::Errno;

use self::socket::{HostSocket, Progress};
use crate::config::Config;
use crate::counters::{Counters, DropReason};
use crate::flow::FlowId;
use crate::resolv::{self, Asked, ResolvConf};
use crate::stack::{Failure, Operation, Stack};

/// Tokens that no flow has: see [`FlowId::to_bits`].
const LINK: Token = Token(usize::MAX);
const WAKE: Token = Token(usize::MAX - 1);
/// Events taken from the kernel at a time.
const EVENTS: usize = 512;
/// Sockets for the guest that may wait to be taken: as many as wait at a busy listener of the host.
const OFFERS_MAX: usize = 4096;
/// One read of a host socket: the largest datagram, and a good bite of a stream.
const SCRATCH: usize = 64 * 1024;

/// A running NAT. Dropping it stops the thread and waits for it.
#[derive(Debug)]
pub struct Handle {
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    waker: Arc<Waker>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    counters: [AtomicU64; COUNTERS],
    /// What `resolv.conf` holds now, until the loop has taken note of it.
    told: Mutex<Option<String>>,
    offers: Mutex<Offers>,
}

/// Sockets for the guest that wait for the loop.
#[derive(Debug, Default)]
struct Offers {
    waiting: VecDeque<(SocketAddr, TcpStream)>,
    /// How many found no room, until the loop has counted them.
    refused: u64,
    /// The loop has ended.
    closed: bool,
}

/// Tells a NAT what it may not read, from any thread.
#[derive(Debug, Clone)]
pub struct Teller {
    shared: Arc<Shared>,
    waker: Arc<Waker>,
}

impl Teller {
    /// Gives it the text of `resolv.conf`. Harmless when the NAT has ended.
    pub fn tell(&self, resolv_conf: String) {
        *self.shared.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(resolv_conf);
        if let Err(error) = self.waker.wake() {
            tracing::warn!(%error, "cannot tell the NAT about new resolvers");
        }
    }
}

/// Gives connections that the host has accepted to the guest, from any thread.
#[derive(Debug, Clone)]
pub struct Opener {
    shared: Arc<Shared>,
    waker: Arc<Waker>,
}

impl Opener {
    /// Carries a connected TCP socket to `landing`, an address of the guest's network: a connection is opened to it from the
    /// host's address there, and the two go on as one. What cannot be is reset, for its peer to see: when the guest
    /// refuses or keeps silent, when too many wait, when the NAT has ended.
    pub fn open(&self, landing: SocketAddr, socket: OwnedFd) {
        let stream = std::net::TcpStream::from(socket);
        if let Err(error) = stream.set_nonblocking(true) {
            tracing::warn!(%error, "a connection for the guest is not carried");
            return;
        }
        let stream = TcpStream::from_std(stream);
        let mut offers = self.shared.offers();
        if offers.closed || offers.waiting.len() >= OFFERS_MAX {
            offers.refused += 1;
            drop(offers);
            return socket::reset(&stream);
        }
        offers.waiting.push_back((landing, stream));
        drop(offers);
        if let Err(error) = self.waker.wake() {
            tracing::warn!(%error, "cannot tell the NAT about a connection for the guest");
        }
    }
}

const COUNTERS: usize = 7 + DropReason::ALL.len();

impl Handle {
    /// Ends the loop, closes every socket and waits for the thread. Safe when it has ended already. Returns the
    /// numbers.
    pub fn stop(mut self) -> Counters {
        self.finish();
        self.counters()
    }

    /// A handle to tell it about resolvers.
    pub fn teller(&self) -> Teller {
        Teller { shared: Arc::clone(&self.shared), waker: Arc::clone(&self.waker) }
    }

    /// A handle to give it connections for the guest.
    pub fn opener(&self) -> Opener {
        Opener { shared: Arc::clone(&self.shared), waker: Arc::clone(&self.waker) }
    }

    /// True once the loop has ended: the other end of the frame socket went away, or it was stopped.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// The numbers, as of the last time the loop had something to do.
    pub fn counters(&self) -> Counters {
        let mut numbers = self.shared.counters.iter().map(|number| number.load(Ordering::Relaxed));
        let mut next = || numbers.next().unwrap_or_default();
        Counters {
            frames_in: next(),
            bytes_in: next(),
            frames_out: next(),
            bytes_out: next(),
            flows_opened: next(),
            flows_open: next(),
            retransmissions: next(),
            drops: std::array::from_fn(|_| next()),
        }
    }

    fn finish(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "cannot wake the NAT's thread to stop it");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the NAT's thread panicked");
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.finish();
        }
    }
}

impl Shared {
    fn offers(&self) -> MutexGuard<'_, Offers> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, counters: &Counters) {
        let numbers = [
            counters.frames_in,
            counters.bytes_in,
            counters.frames_out,
            counters.bytes_out,
            counters.flows_opened,
            counters.flows_open,
            counters.retransmissions,
        ];
        for (place, number) in self.counters.iter().zip(numbers.into_iter().chain(counters.drops)) {
            place.store(number, Ordering::Relaxed);
        }
    }
}

/// Starts the NAT's thread (`nat`) behind `stream`, a connected socket that speaks QEMU's `-netdev stream` framing
/// (u32 big-endian length, then the Ethernet frame; see [`Config::offloads`] for more). The thread ends when the other end closes. Does not block.
///
/// Each flow may need one file descriptor, up to [`crate::FLOW_CAPACITY`]: the program should have raised its soft
/// limit.
///
/// # Errors
/// When the poll set or the thread cannot be made.
pub fn spawn(stream: UnixStream, config: Config) -> io::Result<Handle> {
    spawn_asking(stream, config, None)
}

/// The same as [`spawn`], for a thread that may not open [`Config::resolv_conf`] and is told instead.
///
/// # Errors
/// The same.
pub fn spawn_asking(stream: UnixStream, config: Config, asked: Option<Asked>) -> io::Result<Handle> {
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
    stream.set_nonblocking(true)?;
    let interest = Interest::READABLE | Interest::WRITABLE;
    poll.registry().register(&mut SourceFd(&stream.as_raw_fd()), LINK, interest)?;
    let link = FrameSocket::new(stream);
    let shared = Arc::new(Shared::default());
    let mut driver = Driver::new(poll, link, config, asked, Arc::clone(&shared));
    let thread = std::thread::Builder::new().name("nat".into()).spawn(move || {
        match driver.run() {
            Ok(()) => tracing::debug!(counters = %driver.stack.counters(), "NAT ended"),
            Err(error) => tracing::error!(%error, counters = %driver.stack.counters(), "NAT failed"),
        }
        driver.refuse_offers();
        driver.shared.publish(&driver.stack.counters());
    })?;
    Ok(Handle { thread: Some(thread), shared, waker })
}

struct Driver {
    poll: Poll,
    stack: Stack,
    link: FrameSocket<UnixStream>,
    resolv_conf: ResolvConf,
    shared: Arc<Shared>,
    start: Instant,
    /// The flows' sockets, by [`FlowId::index`].
    sockets: Vec<Option<HostSocket>>,
    /// Flows whose sockets are ready for something, each once.
    work: VecDeque<FlowId>,
    /// Datagram flows that wait for the link to drain.
    stalled: Vec<FlowId>,
    scratch: Vec<u8>,
}

impl Driver {
    fn new(
        poll: Poll,
        link: FrameSocket<UnixStream>,
        config: Config,
        asked: Option<Asked>,
        shared: Arc<Shared>,
    ) -> Self {
        let resolv_conf = ResolvConf::new(config.resolv_conf.clone(), asked);
        // The standard library's keys come from the system's source of randomness.
        let seed = RandomState::new().hash_one(std::process::id());
        Self {
            poll,
            stack: Stack::new(config, seed),
            link,
            resolv_conf,
            shared,
            start: Instant::now(),
            sockets: Vec::new(),
            work: VecDeque::new(),
            stalled: Vec::new(),
            scratch: vec![0; SCRATCH],
        }
    }

    /// Runs until the link closes or the handle says stop.
    fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        loop {
            match self.poll.poll(&mut events, self.patience()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            if self.shared.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            for event in &events {
                match event.token() {
                    LINK => notice_link(&mut self.link, event),
                    WAKE => {}
                    Token(bits) => self.notice(FlowId::from_bits(bits as u64), event),
                }
            }
            if let Some(text) = self.shared.told.lock().unwrap_or_else(PoisonError::into_inner).take() {
                self.stack.set_resolvers(&resolv::parse(&text));
            }
            let now = self.start.elapsed();
            if !self.receive_frames(now)? {
                return Ok(());
            }
            self.take_offers(now);
            self.stack.tick(now);
            self.operate(now);
            self.work(now);
            self.operate(now);
            self.send_frames(now)?;
            if self.link.is_closed() {
                return Ok(());
            }
            self.shared.publish(&self.stack.counters());
        }
    }

    /// How long there is nothing to do.
    fn patience(&self) -> Option<Duration> {
        if !self.work.is_empty() || self.link.has_input() {
            return Some(Duration::ZERO);
        }
        let deadline = self.stack.next_deadline()?;
        Some(deadline.saturating_sub(self.start.elapsed()))
    }

    fn notice(&mut self, flow: FlowId, event: &Event) {
        if let Some(socket) = socket_of(&mut self.sockets, flow) {
            socket.notice(event);
            queue(&mut self.work, socket);
        }
    }

    /// Hands one buffer of frames to the stack. False when the link has closed.
    fn receive_frames(&mut self, now: Duration) -> io::Result<bool> {
        if !self.link.fill()? {
            return Ok(!self.link.is_closed());
        }
        if let Some(resolvers) = self.resolv_conf.changed(now) {
            self.stack.set_resolvers(&resolvers);
        }
        while let Some(frame) = self.link.peek()? {
            self.stack.receive_from_link(frame, now);
            self.link.skip();
        }
        Ok(true)
    }

    /// Makes flows of the sockets that wait for the guest.
    fn take_offers(&mut self, now: Duration) {
        let (offers, refused) = {
            let mut offers = self.shared.offers();
            (std::mem::take(&mut offers.waiting), std::mem::take(&mut offers.refused))
        };
        (0..refused).for_each(|_| self.stack.count_drop(DropReason::OfferQueueFull));
        for (landing, stream) in offers {
            match self.stack.land(landing, now) {
                Ok(flow) => {
                    let socket = HostSocket::accepted(flow, landing, stream, self.poll.registry());
                    self.install(flow, socket, now);
                }
                Err(reason) => {
                    tracing::debug!(%landing, ?reason, "a connection for the guest is not carried");
                    socket::reset(&stream);
                }
            }
        }
    }

    /// Nobody takes sockets any more.
    fn refuse_offers(&self) {
        let mut offers = self.shared.offers();
        offers.closed = true;
        let waiting = std::mem::take(&mut offers.waiting);
        drop(offers);
        waiting.iter().for_each(|(_, stream)| socket::reset(stream));
    }

    /// Does what the stack asks for.
    fn operate(&mut self, now: Duration) {
        while let Some(operation) = self.stack.next_operation() {
            match operation {
                Operation::Connect { flow, to, hops } => {
                    let opened = HostSocket::connect(flow, to, hops, self.poll.registry());
                    self.install(flow, opened, now);
                }
                Operation::OpenUdp { flow, to } => {
                    let opened = HostSocket::udp(flow, to, self.poll.registry());
                    self.install(flow, opened, now);
                }
                Operation::OpenEcho { flow, to } => {
                    let opened = HostSocket::echo(flow, to, self.poll.registry());
                    self.install(flow, opened, now);
                }
                Operation::SendDatagram { flow, payload, hops, whole } => {
                    self.send_datagram(flow, (&payload, hops, whole), now);
                }
                Operation::Send { flow } | Operation::Receive { flow } => {
                    if let Some(socket) = socket_of(&mut self.sockets, flow) {
                        queue(&mut self.work, socket);
                    }
                }
                Operation::Close { flow } => drop(self.take(flow)),
                Operation::Reset { flow } => {
                    if let Some(socket) = self.take(flow) {
                        socket.reset();
                    }
                }
            }
        }
    }

    fn install(&mut self, flow: FlowId, opened: io::Result<HostSocket>, now: Duration) {
        match opened {
            Ok(socket) => {
                if self.sockets.len() <= flow.index() {
                    self.sockets.resize_with(flow.index() + 1, || None);
                }
                self.sockets[flow.index()] = Some(socket);
            }
            Err(error) => {
                tracing::trace!(?flow, %error, "no host socket");
                drop(self.take(flow));
                self.stack.failed(flow, failure(&error), now);
            }
        }
    }

    fn take(&mut self, flow: FlowId) -> Option<HostSocket> {
        let place = self.sockets.get_mut(flow.index())?;
        place.take_if(|socket| socket.flow() == flow)
    }

    fn send_datagram(&mut self, flow: FlowId, datagram: (&[u8], u8, bool), now: Duration) {
        let Some(socket) = socket_of(&mut self.sockets, flow) else { return };
        let (payload, hops, whole) = datagram;
        let mut sent = socket.send_datagram(payload, hops, whole);
        if let Err(error) = &sent
            && error.kind() != io::ErrorKind::WouldBlock
        {
            // What the kernel has heard of earlier datagrams is told at the next, which it does not send.
            let told = socket.listen(&mut self.stack, now).unwrap_or_default();
            let too_large = Errno::from_io_error(error) == Some(Errno::MSGSIZE);
            if too_large {
                // The guest has been told, or there is nothing to tell it: a datagram was lost.
                return;
            }
            let refused = failure(error) == Failure::Refused;
            if refused && !told {
                self.stack.failed(flow, Failure::Refused, now);
            }
            if told || refused {
                sent = socket.send_datagram(payload, hops, whole);
            }
        }
        match sent {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.stack.count_drop(DropReason::HostQueueFull);
            }
            Err(error) => self.stack.failed(flow, failure(&error), now),
        }
    }

    /// Moves bytes for every flow that is ready, each for its share.
    fn work(&mut self, now: Duration) {
        for _ in 0..self.work.len() {
            let Some(flow) = self.work.pop_front() else { return };
            let Some(socket) = socket_of(&mut self.sockets, flow) else { continue };
            socket.queued = false;
            match socket.pump(&mut self.stack, &mut self.scratch, now) {
                Ok(Progress::Waits) => {}
                Ok(Progress::HasMore) => queue(&mut self.work, socket),
                Ok(Progress::Stalled) => self.stalled.push(flow),
                Err(error) => {
                    self.stack.failed(flow, failure(&error), now);
                    // A refused datagram is no reason to stop reading; a broken connection's socket is closed first.
                    queue(&mut self.work, socket);
                }
            }
        }
    }

    fn send_frames(&mut self, now: Duration) -> io::Result<()> {
        loop {
            let mut filled = true;
            while filled && self.link.has_room() {
                filled = self.link.put(|out| self.stack.next_frame(out, now).map(drop));
            }
            let sent = self.link.flush()?;
            if !(filled && sent) {
                break;
            }
        }
        if !self.stalled.is_empty() && self.stack.takes_datagrams() {
            for flow in self.stalled.drain(..) {
                if let Some(socket) = socket_of(&mut self.sockets, flow) {
                    queue(&mut self.work, socket);
                }
            }
        }
        // Sending may have ended connections.
        self.operate(now);
        Ok(())
    }
}

fn notice_link(link: &mut FrameSocket<UnixStream>, event: &Event) {
    let readable = event.is_readable() || event.is_read_closed() || event.is_error();
    link.notice(readable, event.is_writable());
}

fn socket_of(sockets: &mut [Option<HostSocket>], flow: FlowId) -> Option<&mut HostSocket> {
    sockets.get_mut(flow.index())?.as_mut().filter(|socket| socket.flow() == flow)
}

fn queue(work: &mut VecDeque<FlowId>, socket: &mut HostSocket) {
    if !socket.queued {
        socket.queued = true;
        work.push_back(socket.flow());
    }
}

/// What an error of a host socket means to the guest.
fn failure(error: &io::Error) -> Failure {
    use io::ErrorKind as Kind;

    match error.kind() {
        Kind::ConnectionRefused => Failure::Refused,
        Kind::NetworkUnreachable | Kind::NetworkDown => Failure::NetworkUnreachable,
        Kind::HostUnreachable | Kind::TimedOut => Failure::HostUnreachable,
        Kind::PermissionDenied | Kind::AddrNotAvailable | Kind::OutOfMemory => Failure::NoSocket,
        _ => match Errno::from_io_error(error) {
            // A host without IPv6.
            Some(Errno::AFNOSUPPORT) => Failure::NetworkUnreachable,
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::PROTONOSUPPORT) => Failure::NoSocket,
            _ => Failure::Reset,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_errors_become_what_the_guest_should_see() {
        let check = |errno: Errno, expected| assert_eq!(failure(&errno.into()), expected, "{errno}");
        check(Errno::CONNREFUSED, Failure::Refused);
        check(Errno::NETUNREACH, Failure::NetworkUnreachable);
        check(Errno::HOSTUNREACH, Failure::HostUnreachable);
        check(Errno::TIMEDOUT, Failure::HostUnreachable);
        check(Errno::MFILE, Failure::NoSocket);
        check(Errno::ACCESS, Failure::NoSocket);
        check(Errno::CONNRESET, Failure::Reset);
        check(Errno::PIPE, Failure::Reset);
    }
}

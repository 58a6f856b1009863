//! A listening socket for a front end that makes its own connection. QEMU's network cards do: of all its vhost-user
//! devices they alone take no descriptor of a connection that is there already ("does not support FD passing").
//!
//! The socket has no name in any folder, but an abstract one (unix(7)) that the kernel has chosen: nothing of it can be
//! left behind. Anybody on this computer may connect to such a name, so whoever is not of our own user is turned away.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, PoisonError};

use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, getsockname, listen, shutdown,
    socket_with,
};
use tracing::warn;

/// A socket at which one front end is awaited.
#[derive(Debug)]
pub struct Waiting {
    listener: UnixListener,
    name: String,
}

impl Waiting {
    /// Listens from now on.
    ///
    /// # Errors
    /// When the system has no socket for us.
    pub fn new() -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // Binding to no name has the kernel choose one.
        bind(&socket, &SocketAddrUnix::new_unnamed())?;
        listen(&socket, 1)?;
        let address = SocketAddrUnix::try_from(getsockname(&socket)?)?;
        let name = address.abstract_name().and_then(|name| std::str::from_utf8(name).ok());
        let name =
            name.ok_or_else(|| io::Error::other("the system has bound a socket to no name"))?.to_owned();
        Ok(Self { listener: socket.into(), name })
    }

    /// The abstract name, without the zero byte before it.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn try_clone(&self) -> io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }

    /// Waits for the front end.
    pub(super) fn accept(self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = self.listener.accept()?;
            let peer = socket_peercred(&stream)?;
            if peer.uid == rustix::process::geteuid() {
                return Ok(stream);
            }
            warn!(
                pid = peer.pid.as_raw_nonzero(),
                "another user's process came to a socket of the machine's"
            );
        }
    }
}

/// What wakes the thread of a connection: the socket that it waits at.
#[derive(Debug)]
pub(super) struct Connection(Mutex<State>);

#[derive(Debug)]
struct State {
    socket: OwnedFd,
    closed: bool,
}

impl Connection {
    pub fn new(socket: OwnedFd) -> Self {
        Self(Mutex::new(State { socket, closed: false }))
    }

    /// The thread waits at another socket from now on, unless it is to end.
    pub fn moves_to(&self, socket: OwnedFd) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.socket = socket;
        if state.closed {
            state.close();
        }
    }

    /// Ends the wait, and the connection.
    pub fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).close();
    }

    /// Whether the wait has been ended.
    pub fn is_closed(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).closed
    }
}

impl State {
    fn close(&mut self) {
        self.closed = true;
        // Already closed by the other side: then the thread is ending anyway.
        let _closed = shutdown(&self.socket, Shutdown::Both);
    }
}

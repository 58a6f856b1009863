//! Serves one sandbox's questions: ours from the table, others from name servers outside, each asked from where it was
//! named: the host's from the host, a container's own from its sandbox.
//!
//! Two tasks per sandbox, one for each transport; a question that is forwarded has a task of its own, of which there
//! are so many at most at a time over all sandboxes together. An answer from outside is passed on as it came.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::answer::{Answer, Names, answer};
use super::listener::Listener;
use crate::blocking;
use crate::netlink::inside;

/// How long one name server may take.
const UPSTREAM_DEADLINE: Duration = Duration::from_secs(4);
/// How long a client may be silent on a connection.
const IDLE_DEADLINE: Duration = Duration::from_secs(10);
/// Questions that are asked outside at a time; Docker's own limit per sandbox. More are refused with a failure, which
/// clients repeat.
const FORWARDED_MAX: usize = 1024;
/// Connections one sandbox may hold open; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 64;
/// Largest datagram.
const DATAGRAM_MAX: usize = 65535;

/// Sockets that are made inside sandboxes at a time: each needs a thread for a moment.
const MAKERS_MAX: usize = 16;

static FORWARDED: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(FORWARDED_MAX));
static MAKERS: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(MAKERS_MAX));

/// What a server asks: names that are ours, and whom to ask about others.
pub trait Resolver: Names + Send + Sync + 'static {
    /// Name servers for what is not ours, best first.
    fn upstreams(&self) -> Vec<Upstream>;
    /// Whether bare names (without a dot) are asked outside too.
    fn forwards_bare_names(&self) -> bool;
}

/// A name server that is asked about what is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Where it listens.
    pub address: SocketAddr,
    /// It is asked from inside the sandbox, by the sandbox's routes; otherwise from the host.
    pub inside: bool,
}

/// A running server. Dropping it ends it, and its connections.
#[derive(Debug)]
pub struct Server {
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Server {
    /// Serves what `listener` hears.
    ///
    /// # Errors
    /// When the sockets cannot be used here.
    pub fn start(listener: Listener, resolver: Arc<dyn Resolver>) -> io::Result<Self> {
        let udp = UdpSocket::from_std(listener.udp)?;
        let tcp = TcpListener::from_std(listener.tcp)?;
        let asker = Arc::new(Asker { resolver, namespace: listener.namespace });
        let datagrams = tokio::spawn(serve_datagrams(Arc::new(udp), asker.clone()));
        let connections = tokio::spawn(serve_connections(tcp, asker));
        Ok(Self { tasks: [datagrams, connections] })
    }
}

/// Who answers for one sandbox.
struct Asker {
    resolver: Arc<dyn Resolver>,
    namespace: OwnedFd,
}

async fn serve_datagrams(socket: Arc<UdpSocket>, asker: Arc<Asker>) {
    let mut forwarded = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM_MAX];
    loop {
        while forwarded.try_join_next().is_some() {}
        // Errors on the socket are those of earlier answers that could not be delivered.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let query = &buffer[..length];
        match answer(query, asker.resolver.as_ref(), false) {
            // A client that has gone needs no answer.
            Answer::Reply(bytes) => _ = socket.send_to(&bytes, client).await,
            Answer::Forward { is_bare } => {
                let (socket, asker, query) = (socket.clone(), asker.clone(), query.to_vec());
                forwarded.spawn(async move {
                    if let Some(bytes) = asker.forward(&query, is_bare, false).await {
                        let _ = socket.send_to(&bytes, client).await;
                    }
                });
            }
            Answer::Drop => {}
        }
    }
}

async fn serve_connections(listener: TcpListener, asker: Arc<Asker>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely: not for ever.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let asker = asker.clone();
        connections.spawn(async move {
            // How a connection ends is its client's business.
            let _ = serve_connection(stream, &asker).await;
        });
    }
}

async fn serve_connection(mut stream: TcpStream, asker: &Asker) -> io::Result<()> {
    loop {
        let query = timeout(IDLE_DEADLINE, read_framed(&mut stream)).await??;
        let reply = match answer(&query, asker.resolver.as_ref(), true) {
            Answer::Reply(bytes) => Some(bytes),
            Answer::Forward { is_bare } => asker.forward(&query, is_bare, true).await,
            Answer::Drop => None,
        };
        let Some(bytes) = reply else { return Ok(()) };
        timeout(IDLE_DEADLINE, write_framed(&mut stream, &bytes)).await??;
    }
}

impl Asker {
    /// Asks the name servers one after another. One that fails or refuses is passed over.
    async fn forward(&self, query: &[u8], is_bare: bool, over_tcp: bool) -> Option<Vec<u8>> {
        if is_bare && !self.resolver.forwards_bare_names() {
            return Answer::failure(query);
        }
        let Ok(_permit) = FORWARDED.try_acquire() else { return Answer::failure(query) };
        for server in self.resolver.upstreams() {
            let asked = async {
                if over_tcp {
                    self.ask_over_tcp(query, server).await
                } else {
                    self.ask_over_udp(query, server).await
                }
            };
            if let Ok(Ok(bytes)) = timeout(UPSTREAM_DEADLINE, asked).await
                && !is_failure(&bytes)
            {
                return Some(bytes);
            }
        }
        Answer::failure(query)
    }

    /// A socket made by `make` where the server is to be asked from: it stays there, whoever uses it.
    async fn socket<T: Send + 'static>(
        &self,
        server: Upstream,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if !server.inside {
            return make();
        }
        let _permit = MAKERS.acquire().await.map_err(io::Error::other)?;
        let namespace = self.namespace.try_clone()?;
        let made = blocking(move || inside(namespace.as_fd(), make)).await?;
        made.map_err(io::Error::other)?
    }

    async fn ask_over_udp(&self, query: &[u8], server: Upstream) -> io::Result<Vec<u8>> {
        let is_six = server.address.is_ipv6();
        // A port of its own for each question, and only this server's answers.
        let socket = self.socket(server, move || {
            let any: IpAddr =
                if is_six { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
            let socket = std::net::UdpSocket::bind((any, 0))?;
            socket.set_nonblocking(true).map(|()| socket)
        });
        let socket = UdpSocket::from_std(socket.await?)?;
        socket.connect(server.address).await?;
        socket.send(query).await?;
        let mut buffer = vec![0; DATAGRAM_MAX];
        loop {
            let length = socket.recv(&mut buffer).await?;
            let reply = &buffer[..length];
            // An answer to another question is nobody's.
            if length >= 12 && reply[..2] == query[..2] && reply[2] & 0x80 != 0 {
                return Ok(reply.to_vec());
            }
        }
    }

    async fn ask_over_tcp(&self, query: &[u8], server: Upstream) -> io::Result<Vec<u8>> {
        let is_six = server.address.is_ipv6();
        let socket =
            self.socket(server, move || if is_six { TcpSocket::new_v6() } else { TcpSocket::new_v4() });
        let mut stream = socket.await?.connect(server.address).await?;
        write_framed(&mut stream, query).await?;
        read_framed(&mut stream).await
    }
}

/// SERVFAIL and REFUSED: another server may know.
fn is_failure(reply: &[u8]) -> bool {
    reply.get(3).is_none_or(|flags| matches!(flags & 0x0f, 2 | 5))
}

async fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut bytes = vec![0; usize::from(length)];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

async fn write_framed(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend(bytes);
    stream.write_all(&framed).await
}

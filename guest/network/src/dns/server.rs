//! Serves one sandbox's questions: ours from the table, others from the host's name servers.
//!
//! Two tasks per sandbox, one for each transport; a question that is forwarded has a task of its own, of which there
//! are so many at most at a time over all sandboxes together. An answer from outside is passed on as it came.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::answer::{Answer, Names, answer};
use super::listener::Listener;

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

static FORWARDED: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(FORWARDED_MAX));

/// What a server asks: names that are ours, and whom to ask about others.
pub trait Resolver: Names + Send + Sync + 'static {
    /// Name servers for what is not ours, best first. None: the sandbox has no way out.
    fn upstreams(&self) -> Vec<SocketAddr>;
    /// Whether bare names (without a dot) are asked outside too.
    fn forwards_bare_names(&self) -> bool;
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
        let datagrams = tokio::spawn(serve_datagrams(Arc::new(udp), resolver.clone()));
        let connections = tokio::spawn(serve_connections(tcp, resolver));
        Ok(Self { tasks: [datagrams, connections] })
    }
}

async fn serve_datagrams(socket: Arc<UdpSocket>, resolver: Arc<dyn Resolver>) {
    let mut forwarded = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM_MAX];
    loop {
        while forwarded.try_join_next().is_some() {}
        // Errors on the socket are those of earlier answers that could not be delivered.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let query = &buffer[..length];
        match answer(query, resolver.as_ref(), false) {
            // A client that has gone needs no answer.
            Answer::Reply(bytes) => _ = socket.send_to(&bytes, client).await,
            Answer::Forward { is_bare } => {
                let (socket, resolver, query) = (socket.clone(), resolver.clone(), query.to_vec());
                forwarded.spawn(async move {
                    if let Some(bytes) = forward(&query, resolver.as_ref(), is_bare, false).await {
                        let _ = socket.send_to(&bytes, client).await;
                    }
                });
            }
            Answer::Drop => {}
        }
    }
}

async fn serve_connections(listener: TcpListener, resolver: Arc<dyn Resolver>) {
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
        let resolver = resolver.clone();
        connections.spawn(async move {
            // How a connection ends is its client's business.
            let _ = serve_connection(stream, resolver.as_ref()).await;
        });
    }
}

async fn serve_connection(mut stream: TcpStream, resolver: &dyn Resolver) -> io::Result<()> {
    loop {
        let query = timeout(IDLE_DEADLINE, read_framed(&mut stream)).await??;
        let reply = match answer(&query, resolver, true) {
            Answer::Reply(bytes) => Some(bytes),
            Answer::Forward { is_bare } => forward(&query, resolver, is_bare, true).await,
            Answer::Drop => None,
        };
        let Some(bytes) = reply else { return Ok(()) };
        timeout(IDLE_DEADLINE, write_framed(&mut stream, &bytes)).await??;
    }
}

/// Asks the name servers one after another. One that fails or refuses is passed over.
async fn forward(query: &[u8], resolver: &dyn Resolver, is_bare: bool, over_tcp: bool) -> Option<Vec<u8>> {
    if is_bare && !resolver.forwards_bare_names() {
        return Answer::failure(query);
    }
    let Ok(_permit) = FORWARDED.try_acquire() else { return Answer::failure(query) };
    for server in resolver.upstreams() {
        let asked = async {
            if over_tcp { ask_over_tcp(query, server).await } else { ask_over_udp(query, server).await }
        };
        if let Ok(Ok(bytes)) = timeout(UPSTREAM_DEADLINE, asked).await
            && !is_failure(&bytes)
        {
            return Some(bytes);
        }
    }
    Answer::failure(query)
}

/// SERVFAIL and REFUSED: another server may know.
fn is_failure(reply: &[u8]) -> bool {
    reply.get(3).is_none_or(|flags| matches!(flags & 0x0f, 2 | 5))
}

async fn ask_over_udp(query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let any: SocketAddr = if server.is_ipv6() { ([0_u16; 8], 0).into() } else { ([0, 0, 0, 0], 0).into() };
    // A port of its own for each question, and only this server's answers.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
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

async fn ask_over_tcp(query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_framed(&mut stream, query).await?;
    read_framed(&mut stream).await
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

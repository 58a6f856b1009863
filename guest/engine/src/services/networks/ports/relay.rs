//! Carries what the kernel cannot lead to a container: connections to `::1`, to IPv6 addresses for a container that
//! speaks IPv4, and whatever arrives while somebody has flushed the firewall.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::host::relay;

/// How long connecting to the container may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long a UDP client may be silent before its flow is forgotten.
const FLOW_IDLE: Duration = Duration::from_secs(90);
/// UDP clients of one port; more are not heard until one is forgotten.
const FLOWS_MAX: usize = 1024;
/// Connections of one port; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 1024;
const DATAGRAM_MAX: usize = 65535;

/// The container's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl Target {
    /// The address for clients of a family: of the same one if there is one.
    pub fn address(self, six: bool) -> Option<IpAddr> {
        let (v4, v6) = (self.v4.map(IpAddr::V4), self.v6.map(IpAddr::V6));
        if six { v6.or(v4) } else { v4.or(v6) }
    }
}

/// Where connections go now: a container that joins or leaves a network is reached elsewhere.
pub type Targets = watch::Receiver<Target>;

/// A running relay. Dropping it ends it, with its connections.
pub struct Relay {
    task: JoinHandle<()>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relay {
    pub fn tcp(listener: TcpListener, targets: Targets, port: u16) -> Self {
        Self { task: tokio::spawn(accept(listener, targets, port)) }
    }

    pub fn udp(socket: UdpSocket, targets: Targets, port: u16) -> Self {
        Self { task: tokio::spawn(datagrams(Arc::new(socket), targets, port)) }
    }

    /// Ends it, and returns once its socket is closed.
    pub async fn close(mut self) {
        self.task.abort();
        // It was told to be cancelled.
        let _ = (&mut self.task).await;
    }
}

async fn accept(listener: TcpListener, targets: Targets, port: u16) {
    let six = listener.local_addr().is_ok_and(|address| address.is_ipv6());
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        let Ok((client, _)) = listener.accept().await else {
            // Out of descriptors, most likely: not for ever.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Some(address) = targets.borrow().address(six) else { continue };
        connections.spawn(async move {
            // How it ends is its two ends' business; each sees the other's.
            let _ = carry(client, SocketAddr::new(address, port)).await;
        });
    }
}

/// Both directions until both have ended; an end is passed on, and so is a reset.
async fn carry(mut client: TcpStream, target: SocketAddr) -> io::Result<()> {
    let carried = async {
        let server = timeout(CONNECT_DEADLINE, TcpStream::connect(target)).await??;
        relay::connection(&mut client, server).await
    };
    let carried = carried.await;
    if carried.is_err() {
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    }
    carried
}

struct Flow {
    socket: Arc<UdpSocket>,
    back: JoinHandle<()>,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.back.abort();
    }
}

async fn datagrams(socket: Arc<UdpSocket>, targets: Targets, port: u16) {
    let six = socket.local_addr().is_ok_and(|address| address.is_ipv6());
    let mut flows: HashMap<SocketAddr, Flow> = HashMap::new();
    let mut buffer = vec![0; DATAGRAM_MAX];
    loop {
        // Errors are those of earlier answers that could not be delivered.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        flows.retain(|_, flow| !flow.back.is_finished());
        if !flows.contains_key(&client) {
            if flows.len() >= FLOWS_MAX {
                continue;
            }
            let Some(address) = targets.borrow().address(six) else { continue };
            let target = SocketAddr::new(address, port);
            let Ok(flow) = open_flow(&socket, client, target).await else { continue };
            flows.insert(client, flow);
        }
        if let Some(flow) = flows.get(&client) {
            // Lost, as datagrams may be.
            let _ = flow.socket.send(&buffer[..length]).await;
        }
    }
}

async fn open_flow(outer: &Arc<UdpSocket>, client: SocketAddr, target: SocketAddr) -> io::Result<Flow> {
    let any: SocketAddr = if target.is_ipv6() { ([0_u16; 8], 0).into() } else { ([0, 0, 0, 0], 0).into() };
    let socket = Arc::new(UdpSocket::bind(any).await?);
    socket.connect(target).await?;
    let (outer, inner) = (outer.clone(), socket.clone());
    let back = tokio::spawn(async move {
        let mut buffer = vec![0; DATAGRAM_MAX];
        while let Ok(Ok(length)) = timeout(FLOW_IDLE, inner.recv(&mut buffer)).await {
            // A client that has gone.
            if outer.send_to(&buffer[..length], client).await.is_err() {
                return;
            }
        }
    });
    Ok(Flow { socket, back })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const LOCAL: Target = Target { v4: Some(Ipv4Addr::LOCALHOST), v6: None };

    #[tokio::test]
    async fn a_half_close_is_passed_on_both_ways() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let _relay = Relay::tcp(listener, watch::channel(LOCAL).1, server.local_addr().unwrap().port());
        let mut client = TcpStream::connect(at).await.unwrap();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let (mut stream, _) = server.accept().await.unwrap();
        let mut heard = String::new();
        stream.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "question");
        stream.write_all(b"answer").await.unwrap();
        drop(stream);
        heard.clear();
        client.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "answer");
    }

    #[tokio::test]
    async fn a_reset_is_passed_on_both_ways() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let _relay = Relay::tcp(listener, watch::channel(LOCAL).1, server.local_addr().unwrap().port());
        for client_resets in [true, false] {
            let client = TcpStream::connect(at).await.unwrap();
            let (stream, _) = server.accept().await.unwrap();
            let (goes, mut stays) = if client_resets { (client, stream) } else { (stream, client) };
            socket2::SockRef::from(&goes).set_linger(Some(Duration::ZERO)).unwrap();
            drop(goes);
            let error = stays.read(&mut [0; 8]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "client resets: {client_resets}");
        }
    }

    #[tokio::test]
    async fn every_client_has_its_own_flow() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let outer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = outer.local_addr().unwrap();
        let _relay = Relay::udp(outer, watch::channel(LOCAL).1, server.local_addr().unwrap().port());
        let mut peers = Vec::new();
        for word in [b"one", b"two"] {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.send_to(word, at).await.unwrap();
            let mut buffer = [0; 16];
            let (length, peer) = server.recv_from(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], word);
            server.send_to(b"back", peer).await.unwrap();
            let (length, from) = client.recv_from(&mut buffer).await.unwrap();
            assert_eq!((&buffer[..length], from), (&b"back"[..], at));
            peers.push(peer);
        }
        assert_ne!(peers[0], peers[1]);
    }
}

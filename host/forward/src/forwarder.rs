//! `Forwarder`: everything one container publishes, as sockets of the host.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};

use guest_protocol::forward::Header;
use guest_protocol::{GrantedPort, Landing, PortRequest, Transport};
use tokio::task::JoinSet;

use crate::bind::{self, BindError};
use crate::{tcp, udp};

/// Takes a stream into the machine, with the header that goes in front of it.
pub type Sink = Arc<dyn Fn(Header, OwnedFd) + Send + Sync>;

/// Listeners of one container. Dropping it ends them soon; [`Self::close`] waits until they have ended.
#[derive(Debug)]
pub struct Forwarder {
    ports: Vec<GrantedPort>,
    landings: Landings,
    tasks: JoinSet<()>,
}

/// Where connections enter the guest by now, for all listeners of one container.
type Landings = Arc<RwLock<Vec<Landing>>>;

impl Forwarder {
    /// Binds all that `requests` ask for, or nothing, and forwards from then on. Needs a tokio runtime.
    pub fn bind(container: &str, requests: &[PortRequest], sink: &Sink) -> Result<Self, BindError> {
        let mut sockets = Vec::new();
        for request in requests {
            for socket in bind::bind(request)? {
                sockets.push((request, socket));
            }
        }
        let mut forwarder = Self { ports: Vec::new(), landings: Landings::default(), tasks: JoinSet::new() };
        for (request, socket) in sockets {
            let transport = request.transport;
            let failed = |address, error| BindError::Io { address, transport, error };
            let unknown = std::net::SocketAddr::new(request.addresses[0], request.first);
            let local = socket.local_addr().map_err(|error| failed(unknown, error))?;
            let address = local.as_socket().unwrap_or(unknown);
            let origin = Origin {
                container: container.to_owned(),
                container_port: request.container_port,
                landings: Arc::clone(&forwarder.landings),
            };
            let sink = Arc::clone(sink);
            match transport {
                Transport::Udp => {
                    let socket = tokio::net::UdpSocket::from_std(socket.into());
                    let socket = socket.map_err(|error| failed(address, error))?;
                    forwarder.tasks.spawn(udp::forward(socket, origin, sink));
                }
                Transport::Tcp | Transport::Sctp => {
                    let listener = tokio::net::TcpListener::from_std(socket.into());
                    let listener = listener.map_err(|error| failed(address, error))?;
                    forwarder.tasks.spawn(tcp::forward(listener, origin, sink));
                }
            }
            forwarder.ports.push(GrantedPort {
                transport,
                address: address.ip(),
                port: address.port(),
                container_port: request.container_port,
            });
        }
        Ok(forwarder)
    }

    /// What is bound: one entry for each address of each request.
    pub fn ports(&self) -> &[GrantedPort] {
        &self.ports
    }

    /// From now on TCP connections are handed on with these landings, those to other ports without one.
    pub fn land(&self, landings: Vec<Landing>) {
        *self.landings.write().unwrap_or_else(PoisonError::into_inner) = landings;
    }

    /// Ends all listeners; when it returns, their ports are free. Connections made before go on.
    pub async fn close(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Whose port it is.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub container: String,
    pub container_port: u16,
    landings: Landings,
}

impl Origin {
    /// The header of a stream from `peer`.
    pub fn header(&self, transport: Transport, peer: std::net::SocketAddr) -> Header {
        let landings = || self.landings.read().unwrap_or_else(PoisonError::into_inner);
        let landing = match transport {
            Transport::Tcp => {
                landings().iter().find(|one| one.container_port == self.container_port).copied()
            }
            // The kernel's memory of flows of datagrams is too short for them: each has a stream of its own.
            Transport::Udp | Transport::Sctp => None,
        };
        Header {
            container: self.container.clone(),
            transport,
            container_port: self.container_port,
            peer,
            landing: landing.map(|landing| landing.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};
    use std::sync::mpsc;

    pub(crate) fn sink() -> (Sink, mpsc::Receiver<(Header, OwnedFd)>) {
        let (sender, receiver) = mpsc::channel();
        let sink = move |header, stream| sender.send((header, stream)).unwrap();
        (Arc::new(sink), receiver)
    }

    fn request(transport: Transport) -> PortRequest {
        let addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
        PortRequest { transport, addresses, first: 0, last: 0, container_port: 80 }
    }

    fn address(forwarder: &Forwarder) -> SocketAddr {
        SocketAddr::new(forwarder.ports()[0].address, forwarder.ports()[0].port)
    }

    async fn taken(receiver: mpsc::Receiver<(Header, OwnedFd)>) -> (Header, OwnedFd) {
        tokio::task::spawn_blocking(move || {
            receiver.recv_timeout(std::time::Duration::from_secs(60)).unwrap()
        })
        .await
        .unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_connection_is_handed_on_with_its_header() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (sink, streams) = sink();
        let forwarder = Forwarder::bind("c1", &[request(Transport::Tcp)], &sink).unwrap();
        let mut client = tokio::net::TcpStream::connect(address(&forwarder)).await.unwrap();
        let (header, stream) = taken(streams).await;
        assert_eq!((header.container.as_str(), header.container_port), ("c1", 80));
        assert_eq!((header.peer, header.landing), (client.local_addr().unwrap(), None));
        let mut far = tokio::net::TcpStream::from_std(std::net::TcpStream::from(stream)).unwrap();
        client.write_all(b"hi").await.unwrap();
        let mut said = [0; 2];
        far.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hi");
        // Closing frees the port and leaves the connection.
        let address = address(&forwarder);
        forwarder.close().await;
        std::net::TcpListener::bind(address).unwrap();
        far.write_all(b"ho").await.unwrap();
        client.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"ho");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn connections_land_where_was_said_last() {
        let at = |port| SocketAddr::from(([198, 18, 0, 3], port));
        let lands = |container_port, port| Landing { container_port, at: at(port) };
        let requests = [Transport::Tcp, Transport::Udp].map(request);
        let (first, streams) = sink();
        let forwarder = Forwarder::bind("c1", &requests, &first).unwrap();
        forwarder.land(vec![lands(81, 1), lands(80, 2)]);
        let client = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let udp = forwarder.ports()[1];
        client.send_to(b"one", (udp.address, udp.port)).await.unwrap();
        let (header, _stream) = taken(streams).await;
        assert_eq!((header.transport, header.landing), (Transport::Udp, None));

        for (landings, expected) in
            [(vec![lands(80, 2)], Some(at(2))), (vec![lands(80, 3)], Some(at(3))), (vec![], None)]
        {
            let (sink, streams) = sink();
            let forwarder = Forwarder::bind("c1", &requests[..1], &sink).unwrap();
            forwarder.land(vec![lands(80, 1)]);
            forwarder.land(landings);
            let _client = tokio::net::TcpStream::connect(address(&forwarder)).await.unwrap();
            assert_eq!(taken(streams).await.0.landing, expected);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn datagrams_of_one_peer_share_a_stream_and_answers_find_it() {
        use guest_protocol::forward::{DatagramDecoder, encode_datagram};
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (sink, streams) = sink();
        let forwarder = Forwarder::bind("c1", &[request(Transport::Udp)], &sink).unwrap();
        let client = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(b"one", address(&forwarder)).await.unwrap();
        client.send_to(b"", address(&forwarder)).await.unwrap();
        client.send_to(b"three", address(&forwarder)).await.unwrap();
        let (header, stream) = taken(streams).await;
        assert_eq!((header.transport, header.peer), (Transport::Udp, client.local_addr().unwrap()));
        let far = std::os::unix::net::UnixStream::from(stream);
        far.set_nonblocking(true).unwrap();
        let mut far = tokio::net::UnixStream::from_std(far).unwrap();
        let (mut decoder, mut seen, mut buffer) = (DatagramDecoder::default(), Vec::new(), [0; 64]);
        while seen.len() < 3 {
            let count = far.read(&mut buffer).await.unwrap();
            assert!(count > 0);
            decoder.push(&buffer[..count]);
            while let Some(datagram) = decoder.next_datagram() {
                seen.push(datagram.to_vec());
            }
        }
        assert_eq!(seen, [b"one".to_vec(), Vec::new(), b"three".to_vec()]);
        let mut answer = Vec::new();
        encode_datagram(b"back", &mut answer).unwrap();
        far.write_all(&answer).await.unwrap();
        let count = client.recv(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..count], b"back");
        forwarder.close().await;
        assert_eq!(far.read(&mut buffer).await.unwrap(), 0, "a closed forwarder ends its flows");
    }

    #[tokio::test]
    async fn all_or_nothing() {
        let (sink, _streams) = sink();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = taken.local_addr().unwrap().port();
        let free = {
            let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            probe.local_addr().unwrap().port()
        };
        let exactly = |port| PortRequest { first: port, last: port, ..request(Transport::Tcp) };
        let refused = Forwarder::bind("c1", &[exactly(free), exactly(number)], &sink).unwrap_err();
        assert!(matches!(refused, BindError::InUse { .. }), "{refused}");
        std::net::TcpListener::bind(("127.0.0.1", free)).unwrap();
    }
}

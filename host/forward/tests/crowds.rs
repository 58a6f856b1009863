//! Crowds at published ports, by real sockets: each client gets its own answers, and nothing is left of them.
//!
//! What this process holds is counted, so the tests take turns.
#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use guest_protocol::forward::{DatagramDecoder, Header, encode_datagram};
use guest_protocol::{PortRequest, Transport};
use host_forward::{Forwarder, Sink};
use tokio::runtime::Builder;

const CONNECTIONS: usize = 10_000;
/// Clients at a time.
const CLIENTS: usize = 4;
const SENDERS: usize = 200;
/// Longer than any flow lives in silence.
const LONG: Duration = Duration::from_secs(3600);

/// Runs `work`, alone in this process, and counts descriptors before and after.
fn nothing_is_left_of(work: impl Future<Output = ()>, runtime: &mut Builder) {
    static TURN: Mutex<()> = Mutex::new(());
    let _alone = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let runtime = runtime.enable_all().build().unwrap();
    let before = descriptors();
    runtime.block_on(work);
    let after = descriptors();
    assert!(after <= before, "{after} descriptors, {before} before");
}

fn bind(transport: Transport, sink: &Sink) -> (Forwarder, SocketAddr) {
    let addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let request = PortRequest { transport, addresses, first: 0, last: 0, container_port: 80 };
    let forwarder = Forwarder::bind("crowded", &[request], sink).unwrap();
    let granted = &forwarder.ports()[0];
    let address = SocketAddr::new(granted.address, granted.port);
    (forwarder, address)
}

fn sink() -> (Sink, mpsc::Receiver<(Header, OwnedFd)>) {
    let (sender, receiver) = mpsc::channel();
    // Streams that come when the test has ended go nowhere.
    (Arc::new(move |header, stream| drop(sender.send((header, stream)))), receiver)
}

#[test]
fn ten_thousand_connections_leave_nothing() {
    nothing_is_left_of(connections(), Builder::new_multi_thread().worker_threads(2));
}

#[test]
fn two_hundred_senders_have_flows_of_their_own_until_they_are_silent() {
    nothing_is_left_of(flows(), &mut Builder::new_current_thread());
}

async fn connections() {
    let (sink, streams) = sink();
    let (forwarder, address) = bind(Transport::Tcp, &sink);
    // The machine's part: says who called and what was said, once the client has ended, and ends first.
    let machine = std::thread::spawn(move || {
        let mut count = 0;
        for (header, stream) in streams {
            let mut stream = TcpStream::from(stream);
            stream.set_nonblocking(false).unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).unwrap();
            write!(stream, "{} {said}", header.peer).unwrap();
            count += 1;
        }
        count
    });
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            std::thread::spawn(move || {
                for number in (client..CONNECTIONS).step_by(CLIENTS) {
                    let mut stream = TcpStream::connect(address).unwrap();
                    write!(stream, "{number}").unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                    let mut heard = String::new();
                    stream.read_to_string(&mut heard).unwrap();
                    assert_eq!(heard, format!("{} {number}", stream.local_addr().unwrap()));
                }
            })
        })
        .collect();
    tokio::task::spawn_blocking(|| clients.into_iter().for_each(|client| client.join().unwrap()))
        .await
        .unwrap();
    forwarder.close().await;
    std::net::TcpListener::bind(address).unwrap();
    drop(sink);
    assert_eq!(machine.join().unwrap(), CONNECTIONS);
}

/// The machine's end of one flow.
struct Flow {
    peer: SocketAddr,
    stream: UnixStream,
    decoder: DatagramDecoder,
}

impl Flow {
    /// Sends back what has come.
    fn echo(&mut self) {
        let mut buffer = [0; 1024];
        let count = match self.stream.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        };
        assert!(count > 0, "a flow ended early");
        self.decoder.push(&buffer[..count]);
        while let Some(datagram) = self.decoder.next_datagram() {
            let mut answer = Vec::new();
            encode_datagram(format!("{} {}", self.peer, text(datagram)).as_bytes(), &mut answer).unwrap();
            self.stream.write_all(&answer).unwrap();
        }
    }
}

fn text(datagram: &[u8]) -> &str {
    std::str::from_utf8(datagram).unwrap()
}

async fn flows() {
    let (sink, streams) = sink();
    let (forwarder, address) = bind(Transport::Udp, &sink);
    let senders: Vec<UdpSocket> = (0..SENDERS)
        .map(|_| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(address).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        })
        .collect();
    let mut flows: Vec<Flow> = Vec::new();
    for round in ["first", "second"] {
        let mut waiting: Vec<usize> = (0..SENDERS).collect();
        while !waiting.is_empty() {
            // A few at a time: what finds a socket's buffer full is lost, and sent again.
            for number in waiting.iter().take(20) {
                senders[*number].send(format!("{round} {number}").as_bytes()).unwrap();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
            while let Ok((header, stream)) = streams.try_recv() {
                let stream = UnixStream::from(stream);
                stream.set_nonblocking(true).unwrap();
                flows.push(Flow { peer: header.peer, stream, decoder: DatagramDecoder::default() });
            }
            flows.iter_mut().for_each(Flow::echo);
            tokio::time::sleep(Duration::from_millis(1)).await;
            waiting.retain(|number| {
                let (mut buffer, mut answered) = ([0; 64], false);
                while let Ok(count) = senders[*number].recv(&mut buffer) {
                    let heard = text(&buffer[..count]);
                    let (peer, said) = heard.split_once(' ').unwrap();
                    assert_eq!(peer, senders[*number].local_addr().unwrap().to_string());
                    assert!(said.ends_with(&format!(" {number}")), "{said} came to {number}");
                    answered |= said.starts_with(round);
                }
                !answered
            });
        }
    }
    assert_eq!(flows.len(), SENDERS, "every sender has one flow");
    // Nothing more is said, and time passes.
    tokio::time::pause();
    tokio::time::advance(LONG).await;
    tokio::time::resume();
    for flow in &mut flows {
        flow.stream.set_nonblocking(false).unwrap();
        let ended = flow.stream.try_clone().unwrap();
        let count = tokio::task::spawn_blocking(move || (&ended).read(&mut [0; 1]).unwrap()).await.unwrap();
        assert_eq!(count, 0, "the flow of {} goes on", flow.peer);
    }
    drop((flows, senders));
    forwarder.close().await;
}

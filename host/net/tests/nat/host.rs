//! The whole of it against real host sockets on loopback: a guest on one end of a socket pair, the NAT's thread on
//! the other.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{GATEWAY, GUEST, Guest, HOST, dns_query, pattern, receive_pattern, send_pattern};
use host_net::{Config, Counters, Handle};
use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, IpEndpoint};

/// How long any one thing may take.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// A guest wired to a running NAT.
pub struct Bench {
    pub guest: Guest,
    stream: UnixStream,
    pub nat: Handle,
    start: Instant,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(Config::default(), Guest::new(1500))
    }

    fn with(config: Config, guest: Guest) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let nat = host_net::spawn(theirs, config).unwrap();
        Self { guest, stream: ours, nat, start: Instant::now(), input: Vec::new(), output: Vec::new() }
    }

    /// Moves frames once; sleeps a little when there was nothing to move.
    pub fn step(&mut self) {
        let mut moved = false;
        let mut buffer = [0; 65_536];
        while let Ok(count) = self.stream.read(&mut buffer) {
            assert_ne!(count, 0, "the NAT has gone");
            self.input.extend_from_slice(&buffer[..count]);
            moved = true;
            if self.input.len() > 1 << 20 {
                break;
            }
        }
        let mut at = 0;
        while let Some(prefix) = self.input.get(at..at + 4) {
            let length = u32::from_be_bytes(prefix.try_into().unwrap()) as usize;
            let Some(frame) = self.input.get(at + 4..at + 4 + length) else { break };
            self.guest.port.to_guest.push_back(frame.to_vec());
            at += 4 + length;
        }
        self.input.drain(..at);
        self.guest.poll(self.start.elapsed());
        for frame in self.guest.port.from_guest.drain(..) {
            self.output.extend((frame.len() as u32).to_be_bytes());
            self.output.extend(frame);
        }
        let mut sent = 0;
        while sent < self.output.len() {
            match self.stream.write(&self.output[sent..]) {
                Ok(count) => sent += count,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        moved |= sent > 0;
        self.output.drain(..sent);
        if !moved {
            thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done(&mut self.guest) {
            assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}; {}", self.nat.counters());
            self.step();
        }
    }

    pub fn until_counted(&mut self, what: &str, done: impl Fn(&Counters) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done(&self.nat.counters()) {
            assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}; {}", self.nat.counters());
            self.step();
        }
    }

    fn connect(&mut self, port: u16) -> SocketHandle {
        self.guest.connect(SocketAddr::new(HOST.into(), port), 256 * 1024)
    }
}

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

const BULK: usize = 64 << 20;

#[test]
fn sixty_four_mebibytes_go_each_way_at_once() {
    let (listener, port) = listener();
    let host = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = stream.try_clone().unwrap();
        let reading = thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            let mut at = 0;
            loop {
                match reader.read(&mut buffer).unwrap() {
                    0 => return at,
                    count => {
                        for byte in &buffer[..count] {
                            assert_eq!(*byte, pattern(at));
                            at += 1;
                        }
                    }
                }
            }
        });
        let bytes: Vec<u8> = (0..BULK).map(pattern).collect();
        (&stream).write_all(&bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        reading.join().unwrap()
    });
    let mut bench = Bench::new();
    let handle = bench.connect(port);
    let (mut sent, mut received) = (0, 0);
    bench.until("64 MiB each way", |guest| {
        let socket = guest.tcp(handle);
        send_pattern(socket, &mut sent, BULK);
        receive_pattern(socket, &mut received);
        if sent == BULK && socket.may_send() {
            socket.close();
        }
        received == BULK && !socket.may_recv()
    });
    assert_eq!(host.join().unwrap(), BULK);
    bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
    let counters = bench.nat.stop();
    // smoltcp repeats an ACK now and then; three of a kind look like a loss.
    assert!(counters.retransmissions < 100, "{counters}");
    assert_eq!(counters.drops.iter().sum::<u64>(), 0, "{counters}");
}

#[test]
fn the_host_may_answer_after_the_guest_has_finished_sending() {
    let (listener, port) = listener();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut question = String::new();
        stream.read_to_string(&mut question).unwrap();
        stream.write_all(question.to_uppercase().as_bytes()).unwrap();
    });
    let mut bench = Bench::new();
    let handle = bench.connect(port);
    bench.until("connected", |guest| guest.tcp(handle).can_send());
    bench.guest.tcp(handle).send_slice(b"question").unwrap();
    bench.guest.tcp(handle).close();
    let mut answer = Vec::new();
    bench.until("an answer", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).unwrap();
        }
        !socket.may_recv()
    });
    assert_eq!(answer, b"QUESTION");
    host.join().unwrap();
    bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
}

#[test]
fn the_guest_may_go_on_after_the_host_has_finished_sending() {
    let (listener, port) = listener();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"greeting").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest
    });
    let mut bench = Bench::new();
    let handle = bench.connect(port);
    bench.until("the host's end", |guest| {
        let socket = guest.tcp(handle);
        let mut received = 0;
        while socket.can_recv() {
            received += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        assert!(received == 0 || received == 8);
        socket.state() == tcp::State::CloseWait && !socket.can_recv()
    });
    let mut sent = 0;
    bench.until("a megabyte after that", |guest| {
        send_pattern(guest.tcp(handle), &mut sent, 1 << 20);
        sent == 1 << 20
    });
    bench.guest.tcp(handle).close();
    bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
    let rest = host.join().unwrap();
    assert_eq!(rest.len(), 1 << 20);
    assert!(rest.iter().enumerate().all(|(at, byte)| *byte == pattern(at)));
}

#[test]
fn a_closed_port_refuses_the_guest() {
    let (listener, port) = listener();
    drop(listener);
    let mut bench = Bench::new();
    let handle = bench.connect(port);
    bench.until("refused", |guest| guest.tcp(handle).state() == tcp::State::Closed);
    bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
}

#[test]
fn resets_pass_both_ways() {
    let (listener, port) = listener();
    let mut bench = Bench::new();

    let handle = bench.connect(port);
    bench.until("connected", |guest| guest.tcp(handle).can_send());
    let (mut stream, _) = listener.accept().unwrap();
    bench.guest.tcp(handle).abort();
    bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let handle = bench.connect(port);
    bench.until("connected", |guest| guest.tcp(handle).can_send());
    let (stream, _) = listener.accept().unwrap();
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    bench.until("reset", |guest| guest.tcp(handle).state() == tcp::State::Closed);
    bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
}

#[test]
fn a_slow_host_closes_the_guests_window_and_a_slow_guest_the_hosts() {
    let (listener, port) = listener();
    let mut bench = Bench::new();
    let handle = bench.connect(port);
    bench.until("connected", |guest| guest.tcp(handle).can_send());
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();

    // Neither end reads: everything stands still after the buffers are full, and nothing grows.
    let (mut from_guest, mut from_host) = (0, 0);
    let mut quiet = 0;
    while quiet < 300 {
        let before = (from_guest, from_host);
        send_pattern(bench.guest.tcp(handle), &mut from_guest, usize::MAX);
        let bytes: Vec<u8> = (from_host..from_host + 65_536).map(pattern).collect();
        if let Ok(count) = (&stream).write(&bytes) {
            from_host += count;
        }
        bench.step();
        quiet = if (from_guest, from_host) == before { quiet + 1 } else { 0 };
    }
    assert!(from_guest < 32 << 20 && from_host < 32 << 20, "{from_guest} and {from_host} bytes buffered");

    // Then both read, and get all of it.
    bench.guest.tcp(handle).close();
    stream.shutdown(Shutdown::Write).unwrap();
    let (mut at_guest, mut at_host) = (0, 0);
    let mut buffer = vec![0; 65_536];
    let mut host_ended = false;
    bench.until("the rest", |guest| {
        receive_pattern(guest.tcp(handle), &mut at_guest);
        match (&stream).read(&mut buffer) {
            Ok(0) => host_ended = true,
            Ok(count) => {
                for byte in &buffer[..count] {
                    assert_eq!(*byte, pattern(at_host));
                    at_host += 1;
                }
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        host_ended && !guest.tcp(handle).may_recv()
    });
    assert_eq!((at_guest, at_host), (from_host, from_guest));
    bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn ten_thousand_short_connections_leave_nothing() {
    // In a process of its own, so that other tests' descriptors do not count.
    if std::env::var_os("HOST_NET_ALONE").is_none() {
        let name = "host::ten_thousand_short_connections_leave_nothing";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env("HOST_NET_ALONE", "1")
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
        return;
    }
    const CONNECTIONS: usize = 10_000;
    const AT_ONCE: usize = 50;
    let (listener, port) = listener();
    let host = thread::spawn(move || {
        for number in 0..CONNECTIONS {
            let (mut stream, _) = listener.accept().unwrap();
            let mut word = [0; 4];
            stream.read_exact(&mut word).unwrap();
            stream.write_all(&word).unwrap();
            // Half of them are closed by the host first.
            if number % 2 == 0 {
                drop(stream);
            } else {
                thread::spawn(move || stream.read(&mut word).unwrap());
            }
        }
    });
    let mut bench = Bench::new();
    bench.step();
    let files = open_files();
    let (mut started, mut ended) = (0, 0);
    let mut open: Vec<(SocketHandle, bool)> = Vec::new();
    bench.until("10,000 connections", |guest| {
        while open.len() < AT_ONCE && started < CONNECTIONS {
            open.push((guest.connect(SocketAddr::new(HOST.into(), port), 4096), false));
            started += 1;
        }
        open.retain_mut(|(handle, asked)| {
            let socket = guest.tcp(*handle);
            if socket.may_send() && !*asked {
                socket.send_slice(b"word").unwrap();
                *asked = true;
            }
            if socket.can_recv() {
                let mut word = [0; 4];
                assert_eq!(socket.recv_slice(&mut word), Ok(4));
                assert_eq!(&word, b"word");
                socket.close();
            }
            let done = matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait);
            if done {
                assert!(*asked, "closed before it was used");
                guest.sockets.remove(*handle);
                ended += 1;
            }
            !done
        });
        ended == CONNECTIONS
    });
    host.join().unwrap();
    bench.until_counted("the flow table is empty", |counters| counters.flows_open == 0);
    let deadline = Instant::now() + DEADLINE;
    while open_files() > files {
        assert!(Instant::now() < deadline, "{} files open, {files} before", open_files());
        bench.step();
    }
    let counters = bench.nat.stop();
    assert_eq!(counters.flows_opened, CONNECTIONS as u64);
}

#[test]
fn datagrams_go_out_and_answers_come_back_fragmented_if_need_be() {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let host = thread::spawn(move || {
        let mut buffer = [0; 65_536];
        for _ in 0..3 {
            let (count, from) = socket.recv_from(&mut buffer).unwrap();
            let answer: Vec<u8> = buffer[..count].iter().rev().copied().collect();
            socket.send_to(&answer, from).unwrap();
        }
    });
    let mut bench = Bench::new();
    let handle = bench.guest.bind_udp();
    let to = IpEndpoint::new(IpAddress::Ipv4(HOST), port);
    for word in [&b"one"[..], b"two", &[7; 1400]] {
        bench.guest.get::<udp::Socket<'_>>(handle).send_slice(word, to).unwrap();
        let mut answer = Vec::new();
        bench.until("an answer", |guest| {
            let socket = guest.get::<udp::Socket<'_>>(handle);
            if socket.can_recv() {
                let (bytes, from) = socket.recv().unwrap();
                assert_eq!(from.endpoint, to);
                answer = bytes.to_vec();
            }
            !answer.is_empty()
        });
        answer.reverse();
        assert_eq!(answer, word);
    }
    host.join().unwrap();
    assert_eq!(bench.nat.counters().flows_opened, 1);
}

#[test]
fn a_refused_datagram_is_reported_by_icmp() {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    drop(socket);
    let mut bench = Bench::new();
    let handle = bench.guest.bind_udp();
    let to = IpEndpoint::new(IpAddress::Ipv4(HOST), port);
    bench.guest.get::<udp::Socket<'_>>(handle).send_slice(b"anybody?", to).unwrap();
    let before = bench.nat.counters().frames_out;
    // The answer to ARP, and the ICMP error.
    bench.until_counted("an error", |counters| counters.frames_out >= before + 2);
}

fn ask(bench: &mut Bench, message: &[u8]) -> Vec<u8> {
    let handle = bench.guest.bind_udp();
    let to = IpEndpoint::new(IpAddress::Ipv4(GATEWAY), 53);
    bench.guest.get::<udp::Socket<'_>>(handle).send_slice(message, to).unwrap();
    let mut answer = Vec::new();
    bench.until("an answer", |guest| {
        let socket = guest.get::<udp::Socket<'_>>(handle);
        if socket.can_recv() {
            answer = socket.recv().unwrap().0.to_vec();
        }
        !answer.is_empty()
    });
    answer
}

#[test]
fn own_names_are_answered_and_others_fail_when_no_resolver_listens() {
    let folder = tempfile::tempdir().unwrap();
    let resolv_conf: PathBuf = folder.path().join("resolv.conf");
    // Nobody listens on port 53 of this loopback address.
    std::fs::write(&resolv_conf, "nameserver 127.99.88.77\n").unwrap();
    let mut bench = Bench::with(Config { resolv_conf, ..Config::default() }, Guest::new(1500));
    assert!(ask(&mut bench, &dns_query(3, "host.docker.internal")).ends_with(&[198, 18, 0, 254]));
    let failure = ask(&mut bench, &dns_query(4, "example.com"));
    assert_eq!(failure[..4], [0, 4, 0x81, 0x82], "SERVFAIL at once: every resolver refused");
    bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
}

#[test]
fn dhcp_gives_the_guest_its_address() {
    let mut bench = Bench::with(Config::default(), Guest::without_address(1500));
    let handle = bench.guest.sockets.add(dhcpv4::Socket::new());
    let mut lease = None;
    bench.until("a lease", |guest| {
        if let Some(dhcpv4::Event::Configured(config)) = guest.get::<dhcpv4::Socket<'_>>(handle).poll() {
            lease = Some((config.address, config.router, config.dns_servers.first().copied()));
        }
        lease.is_some()
    });
    let (address, router, dns) = lease.unwrap();
    assert_eq!((address.address(), address.prefix_len()), (GUEST, 24));
    assert_eq!((router, dns), (Some(GATEWAY), Some(GATEWAY)));
}

/// Where unprivileged echo sockets are not allowed (`net.ipv4.ping_group_range`), or the host has no address but
/// loopback, the guest's ping is counted and goes unanswered; the rest of the NAT is not disturbed.
#[test]
fn a_ping_of_the_world_is_answered_where_the_host_allows_it() {
    let outside = || {
        let probe = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        probe.connect((Ipv4Addr::new(203, 0, 113, 1), 9)).ok()?;
        match probe.local_addr().ok()? {
            SocketAddr::V4(address) => Some(*address.ip()),
            SocketAddr::V6(_) => None,
        }
    };
    let allowed =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, Some(socket2::Protocol::ICMPV4))
            .is_ok();
    let target = outside().unwrap_or(Ipv4Addr::new(203, 0, 113, 1));
    let answerable = allowed && outside().is_some();

    let mut bench = Bench::new();
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 1024]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(0x1234)).unwrap();
    let request = Icmpv4Repr::EchoRequest { ident: 0x1234, seq_no: 7, data: b"are you there?" };
    let bytes = socket.send(request.buffer_len(), IpAddress::Ipv4(target)).unwrap();
    request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
    let handle = bench.guest.sockets.add(socket);
    if !answerable {
        bench.until_counted("a ping that cannot be sent", |counters| {
            counters.flows_opened == 1 && (!allowed || counters.flows_open == 1)
        });
        return;
    }
    let mut reply = Vec::new();
    bench.until("a reply", |guest| {
        if let Ok((bytes, from)) = guest.get::<icmp::Socket<'_>>(handle).recv() {
            assert_eq!(from, IpAddress::Ipv4(target));
            reply = bytes.to_vec();
        }
        !reply.is_empty()
    });
    let packet = Icmpv4Packet::new_checked(&reply[..]).unwrap();
    let reply = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap();
    assert_eq!(reply, Icmpv4Repr::EchoReply { ident: 0x1234, seq_no: 7, data: b"are you there?" });
}

#[test]
fn the_thread_ends_when_told_and_when_the_guest_goes() {
    let bench = Bench::new();
    assert!(!bench.nat.is_finished());
    bench.nat.stop();

    let Bench { stream, nat, .. } = Bench::new();
    drop(stream);
    let deadline = Instant::now() + DEADLINE;
    while !nat.is_finished() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
    nat.stop();
}

#[test]
fn a_connection_under_way_does_not_keep_the_thread_from_ending() {
    let (_listener, port) = listener();
    let mut bench = Bench::new();
    let handle = bench.connect(port);
    bench.until("connected", |guest| guest.tcp(handle).can_send());
    let counters = bench.nat.stop();
    assert_eq!(counters.flows_open, 1);
    drop(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap());
}

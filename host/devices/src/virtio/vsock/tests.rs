//! The socket device against a guest in this process: its driver and, as far as needed, its stream sockets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::connection::BUFFER_BYTES;
use super::packet::{HEADER_BYTES, Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::driver::{self, DriverQueue, Piece};

const GUEST: Cid = Cid(3);
const SERVED: u32 = 1024;

const RX_QUEUE: u64 = 0;
const TX_QUEUE: u64 = 0x1_0000;
const EVENT_QUEUE: u64 = 0x2_0000;
const EVENT_BUFFER: u64 = 0x3_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER_BYTES: u32 = 4096;
const RX_COUNT: u16 = 128;
const TX_SLOTS: u64 = 0x20_0000;
const TX_SLOT_BYTES: u64 = 0x2_0000;
const TX_COUNT: usize = 32;

/// What the guest's socket of one stream knows. Named by guest port and host port.
#[derive(Default, Debug)]
struct Stream {
    accepted: bool,
    reset: bool,
    shutdown: u32,
    host_buffer_bytes: u32,
    host_forwarded: u32,
    sent: u32,
    /// Data that came and has not been taken by the test.
    inbox: Vec<u8>,
    /// Data that came, and how much of it the host has been told was taken.
    received: u32,
    told: u32,
    asked: u32,
}

/// The guest's socket buffer.
const GUEST_BUFFER_BYTES: u32 = 256 * 1024;

impl Stream {
    fn room(&self) -> usize {
        self.host_buffer_bytes.saturating_sub(self.sent.wrapping_sub(self.host_forwarded)) as usize
    }

    fn taken(&self) -> u32 {
        self.received.wrapping_sub(self.inbox.len() as u32)
    }
}

type Name = (u32, u32);

struct Guest {
    device: Vsock,
    handle: Handle,
    accepted: Receiver<(u32, OwnedFd)>,
    memory: Arc<GuestMemoryMmap>,
    rx: DriverQueue,
    tx: DriverQueue,
    rx_buffers: HashMap<u16, u64>,
    tx_slots: Vec<u64>,
    tx_used: HashMap<u16, u64>,
    streams: HashMap<Name, Stream>,
    /// Requests of the host, answered at once if true.
    listening: bool,
    requests: Vec<Name>,
}

impl Guest {
    fn new() -> Self {
        Self::with(true, RX_BUFFER_BYTES)
    }

    fn device() -> (Vsock, Receiver<(u32, OwnedFd)>) {
        let (sender, accepted) = mpsc::channel();
        let backend = Backend {
            ports: Ports::from([SERVED]),
            accepted: Box::new(move |port, socket| {
                let _test_is_over = sender.send((port, socket));
            }),
        };
        (Vsock::new(GUEST, backend).unwrap(), accepted)
    }

    /// Goes on with another device, restored from what this one has saved, and its event queue, which is empty.
    fn moved(mut self) -> (Self, DriverQueue) {
        let states = [0, 1].map(|queue| self.device.stop_queue(queue).unwrap());
        let saved = self.device.save().unwrap();
        let (mut device, accepted) = Self::device();
        device.restore(&saved).unwrap();
        device.ack_features(device.features());
        let event = DriverQueue::new(&self.memory, EVENT_QUEUE, 16, true);
        device.start_queue(0, self.rx.resume(states[0])).unwrap();
        device.start_queue(1, self.tx.resume(states[1])).unwrap();
        device.start_queue(2, event.resources()).unwrap();
        let handle = device.handle();
        (Self { device, handle, accepted, ..self }, event)
    }

    fn with(event_idx: bool, rx_buffer_bytes: u32) -> Self {
        let (mut device, accepted) = Self::device();
        let memory = driver::memory(8 << 20);
        let rx = DriverQueue::new(&memory, RX_QUEUE, 128, event_idx);
        let tx = DriverQueue::new(&memory, TX_QUEUE, 256, event_idx);
        device.ack_features(device.features());
        device.start_queue(0, rx.resources()).unwrap();
        device.start_queue(1, tx.resources()).unwrap();
        let mut guest = Self {
            handle: device.handle(),
            device,
            accepted,
            memory,
            rx,
            tx,
            rx_buffers: HashMap::new(),
            tx_slots: (0..TX_COUNT as u64).map(|slot| TX_SLOTS + slot * TX_SLOT_BYTES).collect(),
            tx_used: HashMap::new(),
            streams: HashMap::new(),
            listening: true,
            requests: Vec::new(),
        };
        for buffer in 0..u64::from(RX_COUNT) {
            guest.offer(RX_BUFFERS + buffer * u64::from(RX_BUFFER_BYTES), rx_buffer_bytes);
        }
        guest.rx.notify();
        guest
    }

    fn offer(&mut self, address: u64, length: u32) {
        let head = self.rx.add(&[Piece { address, length, writable: true }]);
        self.rx_buffers.insert(head, address);
    }

    fn header(name: Name, operation: Operation, flags: u32, length: u32, stream: &Stream) -> Header {
        Header {
            source_cid: GUEST.0,
            destination_cid: 2,
            source_port: name.0,
            destination_port: name.1,
            length,
            kind: TYPE_STREAM,
            operation: operation as u16,
            flags,
            buffer_bytes: GUEST_BUFFER_BYTES,
            forwarded: stream.taken(),
        }
    }

    /// Sends header and data in pieces that end at `cuts` (offsets from the start of the header).
    fn send_raw(&mut self, header: Header, data: &[u8], cuts: &[usize]) {
        while self.tx_slots.is_empty() || self.tx.free() < cuts.len() + 1 {
            self.pump(Duration::from_millis(100));
        }
        let slot = self.tx_slots.pop().unwrap();
        self.memory.write_slice(&header.to_bytes(), GuestAddress(slot)).unwrap();
        self.memory.write_slice(data, GuestAddress(slot + HEADER_BYTES as u64)).unwrap();
        let mut pieces = Vec::new();
        let mut start = 0;
        for end in cuts.iter().copied().chain([HEADER_BYTES + data.len()]) {
            pieces.push(Piece {
                address: slot + start as u64,
                length: (end - start) as u32,
                writable: false,
            });
            start = end;
        }
        let head = self.tx.add(&pieces);
        self.tx_used.insert(head, slot);
        self.tx.notify();
    }

    fn control(&mut self, name: Name, operation: Operation, flags: u32) {
        let stream = self.streams.entry(name).or_default();
        stream.told = stream.taken();
        let header = Self::header(name, operation, flags, 0, stream);
        self.send_raw(header, &[], &[]);
    }

    /// Sends data that fits into the host's credit, in pages like Linux does.
    fn send(&mut self, name: Name, data: &[u8]) {
        let stream = self.streams.get_mut(&name).unwrap();
        assert!(stream.room() >= data.len());
        stream.sent = stream.sent.wrapping_add(data.len() as u32);
        stream.told = stream.taken();
        let header = Self::header(name, Operation::Data, 0, data.len() as u32, stream);
        let mut cuts = vec![HEADER_BYTES];
        if data.len() > 32 << 10 {
            cuts.extend((1..data.len().div_ceil(4096)).map(|page| HEADER_BYTES + page * 4096));
        }
        self.send_raw(header, data, &cuts);
    }

    /// Takes everything that was received for a stream and tells the host now and then.
    fn take(&mut self, name: Name) -> Vec<u8> {
        let stream = self.streams.get_mut(&name).unwrap();
        let data = std::mem::take(&mut stream.inbox);
        if stream.taken().wrapping_sub(stream.told) > GUEST_BUFFER_BYTES / 2 {
            self.control(name, Operation::CreditUpdate, 0);
        }
        data
    }

    /// Takes what the device has used, waiting for the first of it for a time.
    fn pump(&mut self, timeout: Duration) {
        let mut progress = false;
        while let Some((head, _)) = self.tx.take_used() {
            self.tx_slots.push(self.tx_used.remove(&head).unwrap());
            progress = true;
        }
        while let Some((head, length)) = self.rx.take_used() {
            let address = self.rx_buffers.remove(&head).unwrap();
            self.packet(address, length);
            self.offer(address, RX_BUFFER_BYTES);
            self.rx.notify();
            progress = true;
        }
        if !progress {
            driver::wait(&[&self.rx.call, &self.tx.call], timeout);
        }
    }

    fn packet(&mut self, address: u64, length: u32) {
        let mut bytes = [0; HEADER_BYTES];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        let header = Header::from_bytes(&bytes);
        assert_eq!((header.source_cid, header.destination_cid), (2, GUEST.0));
        assert_eq!(header.length + HEADER_BYTES as u32, length);
        let name = (header.destination_port, header.source_port);
        let operation = Operation::from_number(header.operation).unwrap();
        let new = operation == Operation::Request;
        assert!(new || self.streams.contains_key(&name), "{operation:?} for an unknown stream {name:?}");
        let stream = self.streams.entry(name).or_default();
        // A packet in flight to a stream that was reset is answered once more.
        assert!(!stream.reset || operation == Operation::Reset, "{operation:?} after a reset");
        stream.host_buffer_bytes = header.buffer_bytes;
        stream.host_forwarded = header.forwarded;
        match operation {
            Operation::Request => {
                self.requests.push(name);
                if self.listening {
                    stream.accepted = true;
                    self.control(name, Operation::Response, 0);
                }
            }
            Operation::Response => stream.accepted = true,
            Operation::Reset => stream.reset = true,
            Operation::Shutdown => stream.shutdown |= header.flags,
            Operation::Data => {
                assert_eq!(stream.shutdown & SHUTDOWN_SEND, 0, "data after the host shut its sending");
                let start = stream.inbox.len();
                stream.inbox.resize(start + header.length as usize, 0);
                let at = GuestAddress(address + HEADER_BYTES as u64);
                self.memory.read_slice(&mut stream.inbox[start..], at).unwrap();
                stream.received = stream.received.wrapping_add(header.length);
                let unknown = stream.received.wrapping_sub(stream.told);
                assert!(unknown <= GUEST_BUFFER_BYTES, "the host ignores our credit");
            }
            Operation::CreditUpdate => {}
            Operation::CreditRequest => {
                stream.asked += 1;
                self.control(name, Operation::CreditUpdate, 0);
            }
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !done(self) {
            assert!(
                Instant::now() < deadline,
                "waited in vain until {what}; streams: {:?}",
                self.streams.len()
            );
            self.pump(Duration::from_millis(50));
        }
    }

    /// A stream from the host, given as one end of a socket pair, and its name.
    fn host_opens(&mut self) -> (UnixStream, Name) {
        let (near, far) = UnixStream::pair().unwrap();
        let name = self.connect(far.into());
        (near, name)
    }

    fn connect(&mut self, socket: OwnedFd) -> Name {
        self.handle.connect(2375, Vec::new(), socket).unwrap();
        self.until("the host asks for a stream", |guest| !guest.requests.is_empty());
        self.requests.pop().unwrap()
    }

    /// A stream from the guest's `port`, and the host's end of it.
    fn guest_opens(&mut self, port: u32) -> (UnixStream, Name) {
        let name = (port, SERVED);
        self.control(name, Operation::Request, 0);
        self.until("the host accepts a stream", |guest| guest.streams[&name].accepted);
        let (served, socket) = self.accepted.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(served, SERVED);
        (socket.into(), name)
    }

    fn until_reset(&mut self, name: Name) {
        self.until("the host resets", |guest| guest.streams[&name].reset);
    }

    fn until_shutdown(&mut self, name: Name, flags: u32) {
        self.until("the host shuts down", |guest| guest.streams[&name].shutdown & flags == flags);
    }

    fn until_closed(&mut self) {
        self.until("no stream is left", |guest| guest.device.counters().open_streams() == 0);
    }
}

/// A long text without a short period, to see every lost, doubled or moved byte.
struct Text(Vec<u8>);

const PERIOD: usize = 65_521;

impl Text {
    fn new() -> Self {
        // Twice, so that any window of a period's length is one slice.
        Self((0..2 * PERIOD).map(|position| (((position % PERIOD) * 40503) >> 7) as u8).collect())
    }

    fn at(&self, position: usize, length: usize) -> &[u8] {
        &self.0[position % PERIOD..][..length]
    }

    fn check(&self, mut position: usize, mut data: &[u8]) {
        while !data.is_empty() {
            let (chunk, rest) = data.split_at(data.len().min(PERIOD));
            assert!(chunk == self.at(position, chunk.len()), "other bytes near position {position}");
            position += chunk.len();
            data = rest;
        }
    }
}

fn read_exactly(socket: &mut UnixStream, length: usize) -> Vec<u8> {
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut data = vec![0; length];
    socket.read_exact(&mut data).unwrap();
    data
}

fn read_to_end(socket: &mut impl Read) -> Vec<u8> {
    let mut data = Vec::new();
    socket.read_to_end(&mut data).unwrap();
    data
}

#[test]
fn one_packet_of_64_kib_in_several_descriptors_arrives_whole() {
    let text = Text::new();
    let mut guest = Guest::new();
    let (mut host, name) = guest.guest_opens(5000);
    guest.send(name, text.at(0, 65_521));
    text.check(0, &read_exactly(&mut host, 65_521));
    let header = Guest::header(name, Operation::Data, 0, 65_536, &guest.streams[&name]);
    let data: Vec<u8> = (0..65_536).map(|byte| byte as u8).collect();
    // Header and data cut into uneven pieces, some across their border.
    guest.streams.get_mut(&name).unwrap().sent += 65_536;
    guest.send_raw(header, &data, &[10, 100, 101, 9000, 9000, 65_000]);
    assert!(read_exactly(&mut host, 65_536) == data);
}

#[test]
fn a_header_may_be_cut_anywhere() {
    let mut guest = Guest::new();
    let (mut host, name) = guest.guest_opens(5000);
    for cut in 1..HEADER_BYTES {
        let header = Guest::header(name, Operation::Data, 0, 3, &guest.streams[&name]);
        guest.send_raw(header, &[cut as u8, 2, 3], &[cut]);
        guest.send_raw(header, &[cut as u8, 5, 6], &[cut, cut + 1, HEADER_BYTES + 1]);
        assert_eq!(read_exactly(&mut host, 6), [cut as u8, 2, 3, cut as u8, 5, 6]);
    }
}

#[test]
fn small_buffers_of_the_guest_are_filled_and_useless_ones_handed_back() {
    let text = Text::new();
    // Room for the header and a little; after the first round the buffers are of ordinary size.
    let mut guest = Guest::with(false, HEADER_BYTES as u32 + 10);
    let (mut host, name) = guest.host_opens();
    host.write_all(text.at(0, 5000)).unwrap();
    guest.until("all has come", |guest| guest.streams[&name].inbox.len() == 5000);
    text.check(0, &guest.take(name));
    let mut guest = Guest::with(false, 20);
    // The driver takes them back as empty packets, which this guest does not expect.
    guest.until("useless buffers are handed back", |guest| {
        if guest.device.counters().opened.get() == 0 {
            let (_, far) = UnixStream::pair().unwrap();
            guest.handle.connect(1, Vec::new(), far.into()).unwrap();
        }
        guest.device.counters().malformed.get() >= 1 || guest.rx.take_used().is_some()
    });
}

/// Sends `total` bytes each way at once: the host's end is read slowly and in odd sizes.
fn both_ways(guest: &mut Guest, host: UnixStream, name: Name, total: usize) {
    let text = Arc::new(Text::new());
    let writer = thread::spawn({
        let (mut host, text) = (host.try_clone().unwrap(), Arc::clone(&text));
        move || {
            let mut position = 0;
            while position < total {
                let length = (total - position).min(1 + position * 7 % 50_000);
                host.write_all(text.at(position, length)).unwrap();
                position += length;
            }
            host.shutdown(std::net::Shutdown::Write).unwrap();
        }
    });
    let reader = thread::spawn({
        let (mut host, text) = (host, Arc::clone(&text));
        move || {
            let mut position = 0;
            let mut buffer = vec![0; 40_000];
            loop {
                let window = 1 + position * 13 % buffer.len();
                let length = host.read(&mut buffer[..window]).unwrap();
                if length == 0 {
                    return position;
                }
                text.check(position, &buffer[..length]);
                position += length;
                if position % 61 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    });
    let (mut sent, mut received, mut rounds) = (0, 0, 0u64);
    let mut shut = false;
    let deadline = Instant::now() + Duration::from_secs(120);
    while received < total || !shut || guest.streams[&name].shutdown == 0 && !guest.streams[&name].reset {
        assert!(Instant::now() < deadline, "stuck: {sent} sent, {received} received of {total}");
        rounds += 1;
        let room = guest.streams[&name].room().min(65_521).min(total - sent);
        if room > 0 && !guest.tx_slots.is_empty() && guest.tx.free() > 20 {
            // Sometimes all there is room for, sometimes little.
            let length = if rounds.is_multiple_of(5) { room.min(777) } else { room };
            guest.send(name, text.at(sent, length));
            sent += length;
        }
        if sent == total && !shut {
            guest.control(name, Operation::Shutdown, SHUTDOWN_SEND);
            shut = true;
        }
        guest.pump(Duration::from_millis(2));
        // A slow reader: it takes only when a good part of its buffer is full, or now and then.
        if guest.streams[&name].inbox.len() > 100_000 || rounds.is_multiple_of(10) {
            let data = guest.take(name);
            text.check(received, &data);
            received += data.len();
        }
    }
    writer.join().unwrap();
    assert_eq!(reader.join().unwrap(), total);
    assert_eq!((sent, received), (total, total));
    // It says by itself when it has room again, hundreds of times; a stall of this test may be taken for silence.
    let asked = guest.streams[&name].asked;
    assert!(asked < 20, "the guest was asked {asked} times for news of its room");
}

#[test]
fn sixty_four_mebibytes_each_way_through_a_unix_socket() {
    let mut guest = Guest::new();
    let (host, name) = guest.guest_opens(5000);
    both_ways(&mut guest, host, name, 64 << 20);
    guest.until_reset(name);
    guest.until_closed();
}

#[test]
fn sixty_four_mebibytes_each_way_with_a_tiny_socket_buffer() {
    let mut guest = Guest::with(false, RX_BUFFER_BYTES);
    let (near, far) = UnixStream::pair().unwrap();
    for socket in [&near, &far] {
        rustix::net::sockopt::set_socket_send_buffer_size(socket, 4096).unwrap();
    }
    let name = guest.connect(far.into());
    both_ways(&mut guest, near, name, 64 << 20);
    guest.until_reset(name);
    guest.until_closed();
}

#[test]
fn a_preface_comes_first_whatever_its_length() {
    for length in [1, RX_BUFFER_BYTES as usize, 3 * RX_BUFFER_BYTES as usize] {
        let mut guest = Guest::new();
        let (mut host, far) = UnixStream::pair().unwrap();
        host.write_all(b"behind").unwrap();
        guest.handle.connect(2376, vec![b'p'; length], far.into()).unwrap();
        guest.until("the host asks for a stream", |guest| !guest.requests.is_empty());
        let name = guest.requests.pop().unwrap();
        guest.until("all has come", |guest| guest.streams[&name].inbox.len() == length + 6);
        let inbox = guest.take(name);
        assert!(inbox[..length].iter().all(|byte| *byte == b'p') && inbox.ends_with(b"behind"));
        drop(host);
        guest.until_reset(name);
        guest.until_closed();
    }
}

#[test]
fn a_response_survives_the_guests_half_close() {
    let mut guest = Guest::new();
    let (mut host, name) = guest.guest_opens(5000);
    guest.send(name, b"question");
    guest.control(name, Operation::Shutdown, SHUTDOWN_SEND);
    assert_eq!(read_to_end(&mut host), b"question");
    host.write_all(b"a late answer").unwrap();
    guest.until("the answer has come", |guest| guest.streams[&name].inbox == b"a late answer");
    assert!(!guest.streams[&name].reset);
    drop(host);
    guest.until_reset(name);
    guest.until_closed();
}

#[test]
fn a_response_survives_the_hosts_half_close() {
    let mut guest = Guest::new();
    let (mut host, name) = guest.host_opens();
    host.write_all(b"question").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    guest.until_shutdown(name, SHUTDOWN_SEND);
    assert_eq!(guest.take(name), b"question");
    assert_eq!(guest.streams[&name].shutdown, SHUTDOWN_SEND);
    guest.send(name, b"answer");
    assert_eq!(read_exactly(&mut host, 6), b"answer");
    guest.control(name, Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert!(read_to_end(&mut host).is_empty());
    guest.until_reset(name);
    guest.until_closed();
}

#[test]
fn what_the_guest_sent_before_closing_arrives_however_slowly() {
    let text = Text::new();
    let mut guest = Guest::new();
    let (near, far) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&far, 4096).unwrap();
    let name = guest.connect(far.into());
    guest.until("there is credit", |guest| guest.streams[&name].room() >= 65_521);
    guest.send(name, text.at(0, 65_521));
    guest.control(name, Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    // Over for the guest at once, so that its ports are free; the device still holds what the host has not read.
    guest.until_reset(name);
    assert_eq!(guest.device.counters().open_streams(), 1);
    let mut near = near;
    let data = read_to_end(&mut near);
    assert_eq!(data.len(), 65_521);
    text.check(0, &data);
    guest.until_closed();
}

/// Connects a TCP client to the guest, and hands it the beginning of an answer.
fn half_an_answer(guest: &mut Guest) -> (TcpStream, Name) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let name = guest.connect(server.into());
    guest.send(name, b"half an ans");
    client.read_exact(&mut [0; 11]).unwrap();
    (client, name)
}

#[test]
fn a_reset_of_the_guest_reaches_a_tcp_client_as_a_reset() {
    let mut guest = Guest::new();
    let (mut client, name) = half_an_answer(&mut guest);
    guest.control(name, Operation::Reset, 0);
    guest.until_closed();
    let error = client.read(&mut [0; 11]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// Linux in the guest shuts both directions when a socket is closed that had shut neither.
#[test]
fn a_close_in_the_middle_reaches_a_tcp_client_as_a_reset() {
    for (flags, is_reset) in [
        (&[SHUTDOWN_SEND | SHUTDOWN_RECEIVE][..], true),
        (&[SHUTDOWN_SEND, SHUTDOWN_SEND | SHUTDOWN_RECEIVE], false),
    ] {
        let mut guest = Guest::new();
        let (mut client, name) = half_an_answer(&mut guest);
        for flags in flags {
            guest.control(name, Operation::Shutdown, *flags);
        }
        guest.until_reset(name);
        guest.until_closed();
        let end = client.read(&mut [0; 1]).map_err(|error| error.kind());
        assert_eq!(end, if is_reset { Err(io::ErrorKind::ConnectionReset) } else { Ok(0) });
    }
}

#[test]
fn a_reset_of_the_guest_closes_a_unix_socket() {
    let mut guest = Guest::new();
    let (mut host, name) = guest.guest_opens(5000);
    guest.control(name, Operation::Reset, 0);
    assert!(read_to_end(&mut host).is_empty());
    assert_eq!(host.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    guest.until_closed();
}

#[test]
fn a_reset_of_a_tcp_client_reaches_the_guest() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let mut guest = Guest::new();
    let name = guest.connect(server.into());
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    guest.until_reset(name);
    guest.until_closed();
}

#[test]
fn a_host_that_is_gone_ends_an_idle_stream() {
    let mut guest = Guest::new();
    let (mut host, name) = guest.host_opens();
    host.write_all(b"bye").unwrap();
    drop(host);
    guest.until_reset(name);
    assert_eq!(guest.take(name), b"bye");
    guest.until_closed();
}

#[test]
fn a_host_that_reads_no_more_is_told_to_the_guest() {
    let mut guest = Guest::new();
    let (host, name) = guest.guest_opens(5000);
    host.shutdown(std::net::Shutdown::Read).unwrap();
    guest.send(name, b"into the void");
    guest.until_shutdown(name, SHUTDOWN_RECEIVE);
    // In flight while the guest was told: dropped, and no reason to end the other direction.
    guest.send(name, b"more");
    (&host).write_all(b"still talking").unwrap();
    guest.until("the host is heard", |guest| guest.streams[&name].inbox == b"still talking");
    drop(host);
    guest.until_reset(name);
    guest.until_closed();
}

#[test]
fn ports_nobody_serves_are_refused() {
    let mut guest = Guest::new();
    for (guest_port, host_port) in [(1, SERVED + 1), (2, 0), (3, u32::MAX)] {
        guest.control((guest_port, host_port), Operation::Request, 0);
        guest.until_reset((guest_port, host_port));
    }
    // Packets of streams that do not exist, but for resets.
    guest.control((9, SERVED), Operation::Data, 0);
    guest.until_reset((9, SERVED));
    guest.control((10, SERVED), Operation::Reset, 0);
    guest.control((11, SERVED), Operation::Shutdown, 3);
    guest.until_reset((11, SERVED));
    assert!(!guest.streams[&(10, SERVED)].reset);
    assert!(guest.accepted.try_recv().is_err());
}

#[test]
fn a_guest_that_refuses_closes_the_hosts_socket() {
    let mut guest = Guest::new();
    guest.listening = false;
    let (mut host, name) = guest.host_opens();
    guest.control(name, Operation::Reset, 0);
    assert!(read_to_end(&mut host).is_empty());
    guest.until_closed();
}

#[test]
fn a_host_that_leaves_before_the_answer_is_still_heard() {
    let mut guest = Guest::new();
    guest.listening = false;
    let (mut host, name) = guest.host_opens();
    host.write_all(b"power off").unwrap();
    drop(host);
    guest.control(name, Operation::Response, 0);
    guest.until_reset(name);
    assert_eq!(guest.take(name), b"power off");
    guest.until_closed();
}

#[test]
fn a_guest_that_does_not_answer_in_time_is_given_up() {
    let poll = mio::Poll::new().unwrap();
    let backend = Backend { ports: Ports::new(), accepted: Box::new(|_, _| {}) };
    let counters = Arc::new(Counters::default());
    let mut muxer = Muxer::new(GUEST, poll.registry().try_clone().unwrap(), backend, Arc::clone(&counters));
    let (mut host, far) = UnixStream::pair().unwrap();
    let now = Instant::now();
    muxer.connect(1, Vec::new(), far.into(), now);
    assert_eq!(muxer.deadline(), Some(now + Duration::from_secs(10)));
    muxer.tick(now + Duration::from_secs(9));
    assert_eq!(counters.open_streams(), 1);
    muxer.tick(now + Duration::from_secs(10));
    assert_eq!((counters.open_streams(), muxer.deadline()), (0, None));
    assert!(read_to_end(&mut host).is_empty());
}

#[test]
fn only_stream_sockets_are_taken() {
    let guest = Guest::new();
    let file = tempfile::tempfile().unwrap();
    let error = guest.handle.connect(80, Vec::new(), file.into()).unwrap_err();
    assert_eq!(error.to_string(), "cannot connect guest port 80: the descriptor is not a stream socket");
    let (_, datagrams) = std::os::unix::net::UnixDatagram::pair().unwrap();
    assert!(guest.handle.connect(80, Vec::new(), datagrams.into()).is_err());
}

#[test]
fn after_the_device_sockets_are_refused() {
    let guest = Guest::new();
    let handle = guest.handle.clone();
    let (mut host, far) = UnixStream::pair().unwrap();
    drop(guest);
    let error = handle.connect(80, Vec::new(), far.into()).unwrap_err();
    assert_eq!(error.to_string(), "cannot connect guest port 80: the socket device has stopped");
    assert!(read_to_end(&mut host).is_empty());
}

#[test]
fn a_guest_that_sends_more_than_its_credit_loses_that_stream_only() {
    let mut guest = Guest::new();
    let (_slow, greedy) = guest.guest_opens(5000);
    let (mut other, good) = guest.guest_opens(5001);
    let data = vec![1; 65_536];
    // What the host socket itself takes comes on top of the credit.
    for _ in 0..(BUFFER_BYTES / 65_536 + 8) {
        let header = Guest::header(greedy, Operation::Data, 0, 65_536, &guest.streams[&greedy]);
        guest.send_raw(header, &data, &[]);
    }
    guest.until_reset(greedy);
    guest.send(good, b"unharmed");
    assert_eq!(read_exactly(&mut other, 8), b"unharmed");
}

#[test]
fn a_guest_without_credit_is_asked_once_and_gets_nothing() {
    let mut guest = Guest::new();
    let (mut host, name) = guest.host_opens();
    let text = Text::new();
    let writer = thread::spawn(move || {
        for position in 0..20 {
            if host.write_all(text.at(position * 60_000, 60_000)).is_err() {
                return;
            }
        }
    });
    // Nothing is taken, so the buffer of the guest fills up, is asked about, and stays full.
    guest.until("the guest is asked", |guest| guest.streams[&name].asked > 0);
    for _ in 0..10 {
        guest.pump(Duration::from_millis(5));
    }
    assert_eq!(guest.streams[&name].asked, 1);
    assert_eq!(guest.streams[&name].inbox.len(), GUEST_BUFFER_BYTES as usize);
    let mut received = 0;
    while received < 1_200_000 {
        let data = guest.take(name);
        Text::new().check(received % PERIOD, &[]);
        received += data.len();
        guest.control(name, Operation::CreditUpdate, 0);
        guest.pump(Duration::from_millis(5));
    }
    writer.join().unwrap();
}

#[test]
fn a_reset_of_the_device_closes_every_stream() {
    let mut guest = Guest::new();
    let (mut first, _) = guest.guest_opens(5000);
    let (mut second, _) = guest.host_opens();
    guest.device.reset();
    assert!(read_to_end(&mut first).is_empty());
    assert!(read_to_end(&mut second).is_empty());
    assert_eq!(guest.device.counters().open_streams(), 0);
}

#[test]
fn a_state_without_a_port_is_refused() {
    let (mut device, _) = Guest::device();
    let saved = device.save().unwrap();
    assert_eq!(saved.model, 0x8000_0000u32.to_le_bytes());
    for model in [Vec::new(), vec![0; 4], vec![0xff; 4], vec![0x80; 5]] {
        let error = device.restore(&crate::virtio::DeviceState { model, ..saved.clone() }).unwrap_err();
        let expected = "the vsock device cannot go on from its saved state: the port of its next stream is none of the host's";
        assert_eq!(error.to_string(), expected);
    }
    device.restore(&saved).unwrap();
}

/// A buffer for events of this length.
fn event_buffer(length: u32) -> [Piece; 1] {
    [Piece { address: EVENT_BUFFER, length, writable: true }]
}

#[test]
fn a_restored_guest_is_told_first_that_its_streams_are_gone() {
    let mut guest = Guest::new();
    let (mut from_host, lost) = guest.host_opens();
    let (mut from_guest, _) = guest.guest_opens(5000);
    let (mut guest, mut event) = guest.moved();
    assert!(read_to_end(&mut from_host).is_empty());
    assert!(read_to_end(&mut from_guest).is_empty());
    // Neither a new stream nor the answer to a packet of one that is gone overtakes the news.
    let (_near, far) = UnixStream::pair().unwrap();
    guest.handle.connect(2375, Vec::new(), far.into()).unwrap();
    // The new stream does not have the ports of the old one, or this would be its data.
    guest.send(lost, b"late");
    guest.until("the packet is taken", |guest| guest.tx_slots.len() == TX_COUNT);
    assert!(guest.requests.is_empty() && !guest.streams[&lost].reset);
    // A buffer that is too small is no place for it.
    event.add(&event_buffer(3));
    event.notify();
    assert_eq!(event.wait_used().1, 0);
    assert!(guest.rx.take_used().is_none());
    guest.memory.write_slice(&[0xff; 8], GuestAddress(EVENT_BUFFER)).unwrap();
    event.add(&event_buffer(8));
    event.add(&event_buffer(8));
    event.notify();
    assert_eq!(event.wait_used().1, 4);
    assert_eq!(guest.memory.read_obj::<u64>(GuestAddress(EVENT_BUFFER)).unwrap(), 0xffff_ffff << 32);
    guest.until_reset(lost);
    guest.until("the host asks for a stream", |guest| !guest.requests.is_empty());
    let (_served, _) = guest.guest_opens(5001);
    assert_eq!(event.take_used(), None, "it is told once");
    assert_eq!(guest.device.counters().malformed.get(), 1);
}

#[test]
fn a_driver_that_starts_over_has_no_streams_to_lose() {
    let (mut guest, _) = Guest::new().moved();
    guest.device.reset();
    let mut guest = Guest { streams: HashMap::new(), ..guest };
    let mut event = DriverQueue::new(&guest.memory, EVENT_QUEUE, 16, true);
    event.add(&event_buffer(8));
    guest.rx = DriverQueue::new(&guest.memory, RX_QUEUE, 128, true);
    guest.tx = DriverQueue::new(&guest.memory, TX_QUEUE, 256, true);
    guest.offer(RX_BUFFERS, RX_BUFFER_BYTES);
    guest.device.ack_features(guest.device.features());
    for (index, queue) in [&guest.rx, &guest.tx, &event].into_iter().enumerate() {
        guest.device.start_queue(index, queue.resources()).unwrap();
    }
    let (_near, _) = guest.host_opens();
    assert_eq!(event.take_used(), None);
}

#[test]
fn streams_take_turns() {
    let mut guest = Guest::new();
    let (mut loud, loud_name) = guest.host_opens();
    let (mut quiet, quiet_name) = guest.host_opens();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flood = thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) && loud.write_all(&[1; 32_768]).is_ok() {}
        }
    });
    for round in 0..50u8 {
        quiet.write_all(&[round]).unwrap();
        let before = guest.device.counters().bytes_to_guest.get();
        guest.until("the quiet one is heard", |guest| {
            guest.take(loud_name);
            !guest.streams[&quiet_name].inbox.is_empty()
        });
        assert_eq!(guest.take(quiet_name), [round]);
        let overtaken = guest.device.counters().bytes_to_guest.get() - before;
        assert!(overtaken < 4 << 20, "{overtaken} bytes overtook a single one");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    guest.control(loud_name, Operation::Reset, 0);
    flood.join().unwrap();
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The only test whose outcome depends on what else its process does, so it runs in one of its own.
#[test]
fn ten_thousand_short_streams_leave_nothing_behind() {
    const MARK: &str = "HOST_DEVICES_TEST_ALONE";
    if std::env::var_os(MARK).is_none() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "virtio::vsock::tests::ten_thousand_short_streams_leave_nothing_behind"])
            .args(["--nocapture", "--test-threads=1"])
            .env(MARK, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let mut guest = Guest::new();
    let before = open_descriptors();
    for round in 0..5_000u32 {
        let (mut host, name) = guest.host_opens();
        host.write_all(&round.to_le_bytes()).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        guest.until_shutdown(name, SHUTDOWN_SEND);
        let question = guest.take(name);
        guest.send(name, &question);
        guest.control(name, Operation::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        assert_eq!(read_to_end(&mut host), round.to_le_bytes());
        guest.until_reset(name);
        guest.streams.remove(&name);

        let (mut host, name) = guest.guest_opens(10_000 + round);
        guest.send(name, &round.to_le_bytes());
        assert_eq!(read_exactly(&mut host, 4), round.to_le_bytes());
        drop(host);
        guest.until_reset(name);
        guest.streams.remove(&name);
    }
    guest.until_closed();
    let counters = guest.device.counters();
    assert_eq!((counters.opened.get(), counters.closed.get()), (10_000, 10_000));
    assert_eq!((counters.malformed.get(), counters.replies_dropped.get()), (0, 0));
    assert_eq!(open_descriptors(), before);
}

#[test]
fn many_streams_at_once_all_end() {
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for port in 0..200 {
        hosts.push(guest.guest_opens(20_000 + port));
    }
    for (position, (host, name)) in hosts.iter_mut().enumerate() {
        host.write_all(&[position as u8; 1000]).unwrap();
        guest.send(*name, &[position as u8; 1000]);
    }
    for (position, (host, _)) in hosts.iter_mut().enumerate() {
        assert_eq!(read_exactly(host, 1000), [position as u8; 1000]);
    }
    let names: Vec<Name> = hosts.into_iter().map(|(_, name)| name).collect();
    for name in names {
        guest.until_reset(name);
        assert_eq!(guest.streams[&name].inbox.len(), 1000);
    }
    guest.until_closed();
}

/// One packet of a guest that means no good.
#[derive(Clone, Debug)]
struct Hostile {
    header: Header,
    data: usize,
    cut: usize,
}

fn hostile() -> impl Strategy<Value = Hostile> {
    let cids =
        (prop_oneof![8 => Just(3u64), 1 => any::<u64>()], prop_oneof![8 => Just(2u64), 1 => any::<u64>()]);
    let ports = (1u32..4, prop_oneof![4 => Just(SERVED), 1 => Just(0x8000_0000u32), 1 => any::<u32>()]);
    let kind =
        (prop_oneof![8 => Just(1u16), 1 => any::<u16>()], prop_oneof![8 => 0u16..9, 1 => any::<u16>()]);
    let words =
        (0u32..8, any::<u32>(), any::<u32>(), prop_oneof![4 => Just(None), 1 => any::<u32>().prop_map(Some)]);
    (cids, ports, kind, words, 0usize..70_000, 0usize..100).prop_map(
        |(cids, ports, kind, words, data, cut)| {
            let header = Header {
                source_cid: cids.0,
                destination_cid: cids.1,
                source_port: ports.0,
                destination_port: ports.1,
                length: words.3.unwrap_or(data as u32),
                kind: kind.0,
                operation: kind.1,
                flags: words.0,
                buffer_bytes: words.1,
                forwarded: words.2,
            };
            Hostile { header, data, cut: cut.min(HEADER_BYTES + data) }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_packets_harm_the_device(packets in prop::collection::vec(hostile(), 1..60)) {
        let mut guest = Guest::new();
        guest.handle.connect(1, Vec::new(), UnixStream::pair().unwrap().1.into()).unwrap();
        let zeroes = vec![0; 70_000];
        for packet in &packets {
            while guest.tx_slots.is_empty() {
                // The answers are not looked at: the guest takes back its buffers and offers new ones.
                while let Some((head, _)) = guest.tx.take_used() {
                    guest.tx_slots.push(guest.tx_used.remove(&head).unwrap());
                }
                driver::wait(&[&guest.tx.call], Duration::from_millis(10));
            }
            guest.send_raw(packet.header, &zeroes[..packet.data], &[packet.cut]);
        }
        while !guest.tx_used.is_empty() {
            if let Some((head, _)) = guest.tx.take_used() {
                guest.tx_slots.push(guest.tx_used.remove(&head).unwrap());
            } else {
                driver::wait(&[&guest.tx.call], Duration::from_millis(10));
            }
        }
        prop_assert!(guest.device.counters().open_streams() <= packets.len() as u64 + 1);
        // Fresh queues, as after a reboot, and everything works.
        guest.device.reset();
        prop_assert_eq!(guest.device.counters().open_streams(), 0);
        let device = &mut guest.device;
        guest.rx = DriverQueue::new(&guest.memory, RX_QUEUE, 128, true);
        guest.tx = DriverQueue::new(&guest.memory, TX_QUEUE, 256, true);
        device.start_queue(0, guest.rx.resources()).unwrap();
        device.start_queue(1, guest.tx.resources()).unwrap();
        guest.streams.clear();
        guest.rx_buffers.clear();
        while guest.accepted.try_recv().is_ok() {}
        for buffer in 0..u64::from(RX_COUNT) {
            guest.offer(RX_BUFFERS + buffer * u64::from(RX_BUFFER_BYTES), RX_BUFFER_BYTES);
        }
        guest.rx.notify();
        let (mut host, name) = guest.guest_opens(77);
        guest.send(name, b"hello");
        prop_assert_eq!(read_exactly(&mut host, 5), b"hello");
    }
}

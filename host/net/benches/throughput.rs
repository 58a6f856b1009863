//! How fast the NAT carries TCP, on one core. `cargo bench -p host-net`.
//!
//! The first two figures are the pure stack alone: frames in memory, no sockets, one thread. The third is the whole
//! loop with a smoltcp guest on one end and a loopback socket on the other, both sides in this process.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a benchmark's output")]

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use host_net::{Config, FlowId, Operation, Stack};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpAddress, IpProtocol, Ipv4Packet,
    Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

const TOTAL: usize = 2 << 30;
const GUEST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), 40_000);
const PEER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 9), 80);

fn frame(control: TcpControl, seq: u32, ack: Option<u32>, payload: &[u8]) -> Vec<u8> {
    let checksums = ChecksumCapabilities::default();
    let segment = TcpRepr {
        src_port: GUEST.port(),
        dst_port: PEER.port(),
        control,
        seq_number: TcpSeqNumber(seq.cast_signed()),
        ack_number: ack.map(|ack| TcpSeqNumber(ack.cast_signed())),
        window_len: 60_000,
        window_scale: (control == TcpControl::Syn).then_some(7),
        max_seg_size: (control == TcpControl::Syn).then_some(u16::MAX),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let ip = Ipv4Repr {
        src_addr: *GUEST.ip(),
        dst_addr: *PEER.ip(),
        next_header: IpProtocol::Tcp,
        payload_len: segment.buffer_len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; 14 + 20 + segment.buffer_len()];
    EthernetRepr {
        src_addr: EthernetAddress([2, 0, 0, 0, 0, 2]),
        dst_addr: EthernetAddress::BROADCAST,
        ethertype: EthernetProtocol::Ipv4,
    }
    .emit(&mut EthernetFrame::new_unchecked(&mut bytes[..]));
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[14..]), &checksums);
    segment.emit(
        &mut TcpPacket::new_unchecked(&mut bytes[34..]),
        &IpAddress::Ipv4(*GUEST.ip()),
        &IpAddress::Ipv4(*PEER.ip()),
        &checksums,
    );
    bytes
}

struct Open {
    stack: Stack,
    flow: FlowId,
    /// Our next sequence number, as the guest acknowledges it.
    ours: u32,
}

fn open(mtu: u16) -> Open {
    let mut stack = Stack::new(Config { mtu, ..Config::default() }, 1);
    stack.receive_frame(&frame(TcpControl::Syn, 1000, None, b""), Duration::ZERO);
    let Some(Operation::Connect { flow, to: SocketAddr::V4(PEER), .. }) = stack.next_operation() else {
        unreachable!("a SYN opens a connection")
    };
    stack.connected(flow);
    let mut out = Vec::new();
    stack.next_frame(&mut out, Duration::ZERO);
    let ours = sequence(&out).wrapping_add(1);
    stack.receive_frame(&frame(TcpControl::None, 1001, Some(ours), b""), Duration::ZERO);
    Open { stack, flow, ours }
}

fn sequence(frame: &[u8]) -> u32 {
    u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]])
}

fn report(what: &str, mtu: u16, bytes: usize, time: Duration) {
    let rate = bytes as f64 / 1e6 / time.as_secs_f64();
    println!("{what}, MTU {mtu}: {rate:.0} MB/s");
}

/// Frames are made outside the measured time.
fn guest_to_host(mtu: u16) {
    let Open { mut stack, flow, ours } = open(mtu);
    let payload = vec![7; usize::from(mtu) - 40];
    let batch = (128 * 1024 / payload.len()).max(1);
    let (mut seq, mut time, mut carried) = (1001u32, Duration::ZERO, 0);
    let mut out = Vec::new();
    let mut socket = vec![0; 1 << 18];
    while carried < TOTAL {
        let frames: Vec<_> = (0..batch)
            .map(|number| {
                let at = seq.wrapping_add((number * payload.len()) as u32);
                frame(TcpControl::None, at, Some(ours), &payload)
            })
            .collect();
        seq = seq.wrapping_add((batch * payload.len()) as u32);
        let start = Instant::now();
        for frame in &frames {
            stack.receive_frame(frame, Duration::ZERO);
        }
        while stack.next_operation().is_some() {}
        let (first, second) = stack.outgoing(flow);
        let count = first.len() + second.len();
        // In place of write().
        socket[..first.len()].copy_from_slice(first);
        socket[first.len()..count].copy_from_slice(second);
        stack.host_took(flow, count);
        out.clear();
        while stack.next_frame(&mut out, Duration::ZERO).is_some() {}
        time += start.elapsed();
        carried += count;
    }
    report("guest to host, stack alone", mtu, carried, time);
}

fn host_to_guest(mtu: u16) {
    let Open { mut stack, flow, mut ours } = open(mtu);
    let bytes = vec![7; 64 * 1024];
    let (mut time, mut carried) = (Duration::ZERO, 0);
    let mut out = Vec::new();
    while carried < TOTAL {
        let start = Instant::now();
        while stack.room(flow) >= bytes.len() {
            stack.host_sent(flow, &bytes);
            carried += bytes.len();
            ours = ours.wrapping_add(bytes.len() as u32);
        }
        out.clear();
        while stack.next_frame(&mut out, Duration::ZERO).is_some() {}
        time += start.elapsed();
        let ack = frame(TcpControl::None, 1001, Some(ours), b"");
        let start = Instant::now();
        stack.receive_frame(&ack, Duration::ZERO);
        while stack.next_operation().is_some() {}
        time += start.elapsed();
    }
    report("host to guest, stack alone", mtu, carried, time);
}

fn main() {
    for mtu in [1500, 65_520] {
        guest_to_host(mtu);
        host_to_guest(mtu);
    }
    whole::run();
}

/// The loop with its sockets.
mod whole {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    const TOTAL: usize = 512 << 20;

    /// A guest that only acknowledges, or only sends: raw frames on the link, as cheap as possible.
    pub(super) fn run() {
        for mtu in [1500, 65_520] {
            download(mtu);
        }
    }

    fn download(mtu: u16) {
        let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)) else { return };
        let Ok(address) = listener.local_addr() else { return };
        let host = thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let bytes = vec![7; 1 << 18];
            for _ in 0..TOTAL / bytes.len() {
                stream.write_all(&bytes)?;
            }
            stream.shutdown(Shutdown::Write)
        });
        if let Err(error) = guest(mtu, address.port()) {
            println!("whole loop: {error}");
        }
        if !matches!(host.join(), Ok(Ok(()))) {
            println!("whole loop: the host's side failed");
        }
    }

    fn guest(mtu: u16, port: u16) -> std::io::Result<()> {
        let (mut link, theirs) = UnixStream::pair()?;
        let nat = host_net::spawn(theirs, Config { mtu, ..Config::default() })?;
        let to = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 254), port);
        let say = |link: &mut UnixStream, mut bytes: Vec<u8>| {
            // Redirect the frame to the host alias and its port.
            let mut ip = Ipv4Packet::new_unchecked(&mut bytes[14..]);
            ip.set_dst_addr(*to.ip());
            ip.fill_checksum();
            let mut tcp = TcpPacket::new_unchecked(&mut bytes[34..]);
            tcp.set_dst_port(to.port());
            tcp.fill_checksum(&IpAddress::Ipv4(*GUEST.ip()), &IpAddress::Ipv4(*to.ip()));
            link.write_all(&(bytes.len() as u32).to_be_bytes())?;
            link.write_all(&bytes)
        };
        say(&mut link, frame(TcpControl::Syn, 1000, None, b""))?;
        let mut input = vec![0; 1 << 20];
        let (mut end, mut received) = (0, 0);
        let start = Instant::now();
        let mut expected = None;
        while received < TOTAL {
            let count = link.read(&mut input[end..])?;
            end += count;
            let (mut at, mut ack) = (0, None);
            while let Some(prefix) = input[at..end].first_chunk::<4>() {
                let length = u32::from_be_bytes(*prefix) as usize;
                let Some(bytes) = input[..end].get(at + 4..at + 4 + length) else { break };
                let payload = length.saturating_sub(14 + 20 + usize::from(bytes[46] >> 4) * 4);
                let syn = usize::from(bytes[47] & 2 != 0);
                let seq = sequence(bytes);
                let next = seq.wrapping_add((payload + syn) as u32);
                assert!(expected.is_none_or(|expected| expected == seq || payload + syn == 0), "in order");
                expected = Some(next);
                ack = Some(next);
                received += payload;
                at += 4 + length;
            }
            input.copy_within(at..end, 0);
            end -= at;
            if let Some(ack) = ack {
                say(&mut link, frame(TcpControl::None, 1001, Some(ack), b""))?;
            }
        }
        report("host to guest, whole loop with sockets", mtu, received, start.elapsed());
        nat.stop();
        Ok(())
    }
}

//! Connections into the guest, whose host sockets stand before the guest hears of them.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use guest_protocol::{LANDING_V4, LANDING_V6};
use host_net::{DropReason, FLOW_CAPACITY, FlowId, Operation};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::tcp;
use smoltcp::wire::{
    EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpProtocol, TcpControl, TcpRepr, TcpSeqNumber,
};

use crate::host::{Bench, DEADLINE};
use crate::played::{Said, Script, fin, rst, segment, syn};
use crate::support::{
    GATEWAY, GUEST, GUEST_MAC, GUEST6, HOST, HOST6, pattern, receive_pattern, send_pattern,
};

/// Where the guest's own sequence numbers begin.
const FIRST: u32 = 7000;

/// A guest that has been heard of.
fn script() -> Script {
    let mut script = Script::new();
    script.ping(GATEWAY.into(), 1, 1, b"here");
    script.said();
    script
}

/// Offers a connection to a port of the guest's; the flow, and what the SYN says: from where, and its number.
fn offer(script: &mut Script, to: SocketAddr) -> (FlowId, SocketAddr, u32) {
    let flow = script.stack.land(to, script.now).unwrap();
    let (from, seq) = opening(script, to.port());
    (flow, from, seq)
}

fn opening(script: &mut Script, port: u16) -> (SocketAddr, u32) {
    let said = script.said();
    let [Said::Syn { from, to, seq, scale: Some(7), mss: Some(_), window: 65_535 }] = said[..] else {
        panic!("{said:?}")
    };
    assert_eq!(to, port);
    (from, seq)
}

/// The guest's consent.
fn syn_ack(seq: u32) -> TcpRepr<'static> {
    let ack = TcpSeqNumber(seq.wrapping_add(1) as i32);
    TcpRepr { ack_number: Some(ack), window_scale: Some(7), ..syn(FIRST) }
}

/// A connection that the guest has accepted; the flow, our end, and our next number.
fn landed(script: &mut Script, port: u16) -> (FlowId, SocketAddr, u32) {
    let (flow, from, seq) = offer(script, SocketAddr::new(GUEST.into(), port));
    script.tcp(port, from, syn_ack(seq));
    let said = script.said();
    assert!(
        matches!(said[..], [Said::Segment { control: TcpControl::None, ack, .. }] if ack == FIRST + 1),
        "{said:?}"
    );
    (flow, from, seq.wrapping_add(1))
}

#[test]
fn nothing_is_read_before_the_guest_has_accepted() {
    for (guest, host) in [(IpAddr::from(GUEST), IpAddr::from(HOST)), (GUEST6.into(), HOST6.into())] {
        let mut script = script();
        let (flow, from, seq) = offer(&mut script, SocketAddr::new(guest, 80));
        assert_eq!(from.ip(), host, "the host's address in the guest's network");
        assert_eq!(script.stack.room(flow), 0);
        script.stack.connected(flow);
        assert_eq!((script.operations(), script.said()), (vec![], vec![]), "it stood before");
        script.tcp(80, from, syn_ack(seq));
        assert_eq!(script.operations(), [Operation::Receive { flow }]);
        assert!(script.stack.room(flow) > 0);
        assert!(matches!(script.said()[..], [Said::Segment { .. }]));
        script.stack.host_sent(flow, b"question");
        let said = script.said();
        assert!(
            matches!(&said[..], [Said::Segment { seq: at, payload, .. }] if *at == seq.wrapping_add(1) && payload == b"question"),
            "{said:?}"
        );
        script.tcp(80, from, segment(FIRST + 1, seq.wrapping_add(9), b"answer"));
        assert_eq!(script.operations(), [Operation::Send { flow }]);
        assert_eq!(script.stack.outgoing(flow).0, b"answer");
    }
}

#[test]
fn each_direction_ends_on_its_own_and_the_flow_with_both() {
    let mut script = script();
    let (flow, from, ours) = landed(&mut script, 80);
    script.stack.host_ended(flow);
    let said = script.said();
    assert!(matches!(said[..], [Said::Segment { control: TcpControl::Fin, .. }]), "{said:?}");
    script.tcp(80, from, segment(FIRST + 1, ours.wrapping_add(1), b"late answer"));
    script.stack.host_took(flow, 11);
    script.tcp(80, from, fin(FIRST + 12, ours.wrapping_add(1)));
    assert!(script.stack.wants_shutdown(flow));
    script.stack.host_shut(flow);
    script.said();
    assert!(script.operations().ends_with(&[Operation::Close { flow }]));
    assert_eq!(script.stack.counters().flows_open, 0);
}

#[test]
fn a_guest_that_refuses_resets_the_hosts_socket() {
    let mut script = script();
    let (flow, from, seq) = offer(&mut script, SocketAddr::new(GUEST.into(), 80));
    let refusal = |ack: u32| TcpRepr { ack_number: Some(TcpSeqNumber(ack as i32)), ..rst(0) };
    script.tcp(80, from, rst(0));
    script.tcp(80, from, refusal(seq));
    script.tcp(80, from, refusal(seq.wrapping_add(2)));
    assert_eq!((script.operations(), script.said()), (vec![], vec![]), "not an answer to our SYN");
    script.tcp(80, from, refusal(seq.wrapping_add(1)));
    assert_eq!((script.operations(), script.said()), (vec![Operation::Reset { flow }], vec![]));
    assert_eq!(script.stack.counters().flows_open, 0);
}

#[test]
fn a_guest_that_keeps_silent_is_given_up() {
    let mut script = script();
    let (flow, from, seq) = offer(&mut script, SocketAddr::new(GUEST.into(), 80));
    let mut said = Vec::new();
    for _ in 0..70 {
        script.pass(Duration::from_secs(1));
        said.extend(script.said());
    }
    let last = said.pop();
    assert_eq!(last, Some(Said::Reset { to: 80, ack: None }), "should it have heard us after all");
    assert_eq!(said.len(), 5, "{said:?}");
    let same = |said: &Said| matches!(said, Said::Syn { from: again, seq: number, .. } if (*again, *number) == (from, seq));
    assert!(said.iter().all(same), "{said:?}");
    assert_eq!(script.operations(), [Operation::Reset { flow }]);
    assert_eq!((script.stack.counters().flows_open, script.stack.next_deadline()), (0, None));
}

#[test]
fn what_a_guest_remembers_of_a_connection_before_is_ended_first() {
    let mut script = script();
    let (flow, from, seq) = offer(&mut script, SocketAddr::new(GUEST.into(), 80));
    // What Linux answers to a SYN for a connection in TIME-WAIT or half open.
    script.tcp(80, from, segment(99, seq.wrapping_sub(5000), b""));
    assert_eq!(script.said(), [Said::Reset { to: 80, ack: None }]);
    assert_eq!(script.dropped(DropReason::NoConnection), 1);
    script.pass(Duration::from_secs(1));
    assert_eq!(opening(&mut script, 80), (from, seq));
    script.tcp(80, from, syn_ack(seq));
    assert!(script.stack.room(flow) > 0);
}

#[test]
fn a_consent_that_comes_again_is_confirmed_again() {
    let mut script = script();
    let (_, from, ours) = landed(&mut script, 80);
    script.pass(Duration::from_secs(1));
    script.tcp(80, from, syn_ack(ours.wrapping_sub(1)));
    let said = script.said();
    assert!(matches!(said[..], [Said::Segment { control: TcpControl::None, .. }]), "{said:?}");
}

#[test]
fn windows_are_scaled_if_the_guest_agrees() {
    let mut script = script();
    for (port, scale, shift) in [(80, None, 0), (81, Some(7), 7)] {
        let (_, from, seq) = offer(&mut script, SocketAddr::new(GUEST.into(), port));
        script.tcp(port, from, TcpRepr { window_scale: scale, ..syn_ack(seq) });
        let said = script.said();
        let [Said::Segment { window, .. }] = said[..] else { panic!("{said:?}") };
        assert!(u32::from(window) << shift >= 65_535, "{window}");
    }
}

/// A container on macvlan has a hardware address of its own.
#[test]
fn a_child_of_the_guests_interface_leads_nothing_astray() {
    let mut script = script();
    script.mac = EthernetAddress([0x02, 0x42, 0, 0, 0, 9]);
    // It joins a group before it has an address, and then has one.
    script.packet(Ipv4Addr::UNSPECIFIED.into(), [224, 0, 0, 22].into(), IpProtocol::Igmp, &[0x22; 16]);
    assert_eq!(script.said(), []);
    let mut echo = vec![0; 8];
    Icmpv4Repr::EchoRequest { ident: 1, seq_no: 1, data: &[] }
        .emit(&mut Icmpv4Packet::new_unchecked(&mut echo[..]), &ChecksumCapabilities::default());
    script.packet([198, 18, 0, 9].into(), GATEWAY.into(), IpProtocol::Icmp, &echo);
    assert!(matches!(script.said()[..], [Said::EchoReply { .. }]));
    script.mac = GUEST_MAC;
    for landing in [IpAddr::from(GUEST), LANDING_V4.into(), LANDING_V6.into()] {
        script.stack.land(SocketAddr::new(landing, 80), script.now).unwrap();
        opening(&mut script, 80);
    }
}

#[test]
fn what_cannot_land_is_refused_and_counted() {
    let mut deaf = Script::new();
    let to = SocketAddr::new(GUEST.into(), 80);
    assert_eq!(deaf.stack.land(to, deaf.now), Err(DropReason::NoLanding), "nobody has been heard of");
    deaf.assert_only_dropped(&[(DropReason::NoLanding, 1)]);
    let mut script = script();
    for address in [
        GATEWAY.into(),
        HOST.into(),
        Ipv4Addr::LOCALHOST.into(),
        IpAddr::from([203, 0, 113, 9]),
        HOST6.into(),
    ] {
        let refused = script.stack.land(SocketAddr::new(address, 80), script.now);
        assert_eq!(refused, Err(DropReason::NoLanding), "{address}");
    }
    script.assert_only_dropped(&[(DropReason::NoLanding, 5)]);
    for landing in [IpAddr::from(LANDING_V4), LANDING_V6.into()] {
        assert!(script.stack.land(SocketAddr::new(landing, 80), script.now).is_ok(), "{landing}");
    }
}

#[test]
fn no_two_connections_have_the_same_ends_and_a_full_table_takes_no_more() {
    let mut script = script();
    let to = SocketAddr::new(GUEST.into(), 80);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..FLOW_CAPACITY {
        let (_, from, _) = offer(&mut script, to);
        assert!(from.port() >= 1024 && seen.insert(from), "{from}");
    }
    assert_eq!(script.stack.land(to, script.now), Err(DropReason::FlowTableFull));
    assert_eq!(script.dropped(DropReason::FlowTableFull), 1);
    script.pass(Duration::from_secs(100));
    script.said();
    assert_eq!(script.operations().len(), FLOW_CAPACITY, "all are given up");
    let (_, from, _) = offer(&mut script, to);
    assert!(!seen.contains(&from), "not used again as long as there are others");
}

// ---- against sockets of the host ----------------------------------------------------------------------------------

/// A running NAT whose guest has said something, and a listener of the host.
fn bench() -> (Bench, TcpListener) {
    let mut bench = Bench::new();
    let gone = bench.guest.connect(SocketAddr::new(GATEWAY.into(), 9), 64);
    bench.until("the guest is heard of", |guest| guest.tcp(gone).state() == tcp::State::Closed);
    (bench, TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
}

/// A client whose connection is given to the guest.
fn client(bench: &Bench, listener: &TcpListener, to: IpAddr) -> TcpStream {
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    bench.nat.opener().open(SocketAddr::new(to, 80), accepted.into());
    client
}

const BULK: usize = 16 << 20;

#[test]
fn sixteen_mebibytes_go_each_way_at_once_in_both_families() {
    for guest in [IpAddr::from(GUEST), GUEST6.into()] {
        let (mut bench, listener) = bench();
        let handle = bench.guest.listen(80, 256 * 1024);
        let mut stream = client(&bench, &listener, guest);
        let mut reader = stream.try_clone().unwrap();
        let reading = thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == pattern(at)));
            bytes.len()
        });
        let writing = thread::spawn(move || {
            let bytes: Vec<u8> = (0..BULK).map(pattern).collect();
            stream.write_all(&bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            stream
        });
        let (mut sent, mut received) = (0, 0);
        bench.until("16 MiB each way", |guest| {
            let socket = guest.tcp(handle);
            send_pattern(socket, &mut sent, BULK);
            receive_pattern(socket, &mut received);
            if sent == BULK && socket.may_send() {
                socket.close();
            }
            received == BULK && !socket.may_recv()
        });
        bench.until_counted("the flow ends", |counters| counters.flows_open == 0);
        assert_eq!(reading.join().unwrap(), BULK);
        drop(writing.join().unwrap());
    }
}

#[test]
fn refusals_and_resets_reach_the_client() {
    let (mut bench, listener) = bench();
    let read =
        |stream: TcpStream| thread::spawn(move || (&stream).read(&mut [0; 8]).map_err(|error| error.kind()));
    let told = |bench: &mut Bench, stream: TcpStream| {
        let reading = read(stream);
        while !reading.is_finished() {
            bench.step();
        }
        assert_eq!(reading.join().unwrap(), Err(ErrorKind::ConnectionReset));
    };
    // Nobody listens.
    let refused = client(&bench, &listener, GUEST.into());
    told(&mut bench, refused);
    // Who listens goes away in the middle.
    let handle = bench.guest.listen(80, 1024);
    let broken = client(&bench, &listener, GUEST.into());
    bench.until("accepted", |guest| guest.tcp(handle).state() == tcp::State::Established);
    bench.guest.tcp(handle).abort();
    told(&mut bench, broken);
    // An address that is not of the guest's network.
    let elsewhere = client(&bench, &listener, Ipv4Addr::LOCALHOST.into());
    told(&mut bench, elsewhere);
}

#[test]
fn a_client_that_is_gone_resets_the_guest() {
    let (mut bench, listener) = bench();
    let handle = bench.guest.listen(80, 1024);
    let stream = client(&bench, &listener, GUEST.into());
    bench.until("accepted", |guest| guest.tcp(handle).state() == tcp::State::Established);
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    bench.until("reset", |guest| guest.tcp(handle).state() == tcp::State::Closed);
}

#[test]
fn a_nat_that_has_ended_takes_no_more() {
    let (bench, listener) = bench();
    let opener = bench.nat.opener();
    bench.nat.stop();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    opener.open(SocketAddr::new(GUEST.into(), 80), listener.accept().unwrap().0.into());
    assert_eq!(client.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

//! Scripted exchanges with the pure stack: a fake clock and fake host sockets, frame by frame.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use host_net::{DropReason, FLOW_CAPACITY, Failure, Operation};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv4Repr,
    TcpControl, TcpRepr,
};

use crate::played::{HOPS, PEER, Said, Script, datagram, fin, rst, segment, syn};
use crate::support::{GATEWAY, GUEST, GUEST_MAC, HOST, dns_query, pattern};

#[test]
fn a_syn_waits_for_the_hosts_connection() {
    let mut script = Script::new();
    let to = SocketAddr::new(HOST.into(), 8080);
    script.tcp(5000, to, TcpRepr { window_scale: Some(7), ..syn(1000) });
    let operations = script.operations();
    let [Operation::Connect { flow, to: host, hops: HOPS }] = operations[..] else {
        panic!("{operations:?}")
    };
    assert_eq!(host, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 8080), "the alias is the host's loopback");
    assert_eq!(script.said(), []);
    script.tcp(5000, to, syn(1000));
    assert_eq!((script.operations(), script.said()), (vec![], vec![]), "the guest's patience is not ours");

    script.stack.connected(flow);
    let said = script.said();
    let [Said::Segment { control: TcpControl::Syn, ack: 1001, scale: Some(7), mss: Some(1460), .. }] =
        said[..]
    else {
        panic!("{said:?}")
    };
}

#[test]
fn the_hosts_refusal_and_silence_reach_the_guest_as_they_are() {
    for (failure, expected) in [
        (Failure::Refused, None),
        (Failure::NoSocket, None),
        (Failure::HostUnreachable, Some([3, 1, 0])),
        (Failure::NetworkUnreachable, Some([3, 0, 0])),
    ] {
        let mut script = Script::new();
        script.tcp(5000, PEER, syn(1000));
        let operations = script.operations();
        let [Operation::Connect { flow, .. }] = operations[..] else { panic!("{operations:?}") };
        script.stack.failed(flow, failure, script.now);
        let expected = match expected {
            None => Said::Reset { to: 5000, ack: Some(1001) },
            Some(code) => Said::Error { code, by: GATEWAY.into(), about: PEER, from_port: 5000 },
        };
        assert_eq!(script.said(), [expected], "{failure:?}");
        assert_eq!(script.operations(), [Operation::Close { flow }]);
        assert_eq!(script.stack.counters().flows_open, 0);
    }
}

#[test]
fn a_broken_connection_resets_the_guest_and_a_reset_guest_the_connection() {
    let mut script = Script::new();
    let (flow, _) = script.open(5000, PEER);
    script.stack.failed(flow, Failure::Reset, script.now);
    assert_eq!(script.said(), [Said::Reset { to: 5000, ack: Some(1001) }]);
    assert_eq!(script.operations(), [Operation::Close { flow }]);

    let (flow, ours) = script.open(5001, PEER);
    script.tcp(5001, PEER, rst(1005));
    let said = script.said();
    assert!(matches!(said[..], [Said::Segment { ack: 1001, .. }]), "not quite right: asked back: {said:?}");
    script.tcp(5001, PEER, rst(999_999_999));
    assert_eq!(script.operations(), []);
    script.tcp(5001, PEER, rst(1001));
    assert_eq!(script.operations(), [Operation::Reset { flow }]);
    script.tcp(5001, PEER, segment(1001, ours, b"late"));
    assert_eq!(script.said(), [Said::Reset { to: 5001, ack: None }]);
    assert_eq!(script.dropped(DropReason::NoConnection), 1);
}

#[test]
fn segments_out_of_order_are_asked_for_at_once() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    for late in [b"def", b"ghi"] {
        script.tcp(5000, PEER, segment(1004, ours, late));
    }
    let said = script.said();
    assert_eq!(said.len(), 2, "one for each, so that the guest can count: {said:?}");
    assert!(said.iter().all(|said| matches!(said, Said::Segment { ack: 1001, .. })), "{said:?}");
    script.tcp(5000, PEER, segment(1001, ours, b"abc"));
    script.tcp(5000, PEER, segment(1001, ours, b"abcdef"));
    assert_eq!(script.stack.outgoing(flow).0, b"abcdef", "the known part once");
}

#[test]
fn a_slow_host_socket_closes_the_window_and_opens_it_again() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    let block = vec![7; 1460];
    let mut seq = 1001u32;
    let last = loop {
        script.tcp(5000, PEER, segment(seq, ours, &block));
        let said = script.said();
        let [Said::Segment { ack, window, .. }] = said[..] else { panic!("{said:?}") };
        seq = ack;
        if window == 0 {
            break ack;
        }
        assert!(ack - 1001 < 1 << 20, "no end of buffering");
    };
    script.tcp(5000, PEER, segment(last, ours, b"x"));
    let said = script.said();
    assert!(matches!(said[..], [Said::Segment { ack, window: 0, .. }] if ack == last), "a probe: {said:?}");
    script.stack.host_took(flow, 100);
    assert_eq!(script.said(), [], "too little to talk about");
    script.stack.host_took(flow, 100_000);
    let said = script.said();
    assert!(
        matches!(said[..], [Said::Segment { ack, window, .. }] if ack == last && window > 60_000),
        "{said:?}"
    );
}

#[test]
fn a_guest_that_vanishes_is_given_up() {
    let mut script = Script::new();
    script.tcp(5000, PEER, syn(1000));
    let operations = script.operations();
    let [Operation::Connect { flow, .. }] = operations[..] else { panic!("{operations:?}") };
    script.stack.connected(flow);
    let mut answers = 0;
    for _ in 0..200 {
        script.pass(Duration::from_secs(1));
        answers += script.said().iter().filter(|said| matches!(said, Said::Segment { .. })).count();
    }
    assert_eq!(answers, 6, "our SYN,ACK and five more");
    assert_eq!(script.operations(), [Operation::Reset { flow }]);

    let (flow, _) = script.open(5001, PEER);
    script.stack.host_sent(flow, b"hello?");
    let mut tries = 0;
    for _ in 0..2000 {
        script.pass(Duration::from_secs(1));
        tries += script.said().iter().filter(|said| matches!(said, Said::Segment { .. })).count();
    }
    assert_eq!(tries, 16);
    assert_eq!(script.operations(), [Operation::Reset { flow }]);
    assert_eq!((script.stack.counters().flows_open, script.stack.next_deadline()), (0, None));
}

#[test]
fn an_idle_connection_needs_no_timer() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    script.stack.host_sent(flow, b"word");
    assert_eq!(script.said().len(), 1);
    script.tcp(5000, PEER, segment(1001, ours + 4, b""));
    script.pass(Duration::from_secs(10));
    assert_eq!(script.stack.next_deadline(), None);
    script.pass(Duration::from_secs(1_000_000));
    assert_eq!(script.stack.counters().flows_open, 1);
}

#[test]
fn each_direction_ends_on_its_own_and_the_flow_with_the_second() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    script.tcp(5000, PEER, segment(1001, ours, b"last words"));
    script.tcp(5000, PEER, fin(1011, ours));
    assert_eq!(script.operations(), [Operation::Send { flow }]);
    assert!(!script.stack.wants_shutdown(flow), "not before the words have gone");
    script.stack.host_took(flow, 10);
    assert!(script.stack.wants_shutdown(flow));
    script.stack.host_shut(flow);
    let said = script.said();
    assert!(matches!(said[..], [Said::Segment { ack: 1012, .. }]), "{said:?}");

    script.stack.host_sent(flow, b"answer");
    script.stack.host_ended(flow);
    let said = script.said();
    let [Said::Segment { control: TcpControl::Fin, seq, ref payload, .. }] = said[..] else {
        panic!("{said:?}")
    };
    assert_eq!((seq, &payload[..]), (ours, &b"answer"[..]));
    assert_eq!(script.stack.counters().flows_open, 1);
    script.operations();
    script.tcp(5000, PEER, segment(1012, ours + 7, b""));
    assert_eq!(script.operations(), [Operation::Close { flow }]);
    assert_eq!(script.said(), []);
}

#[test]
fn a_full_table_refuses_new_connections_and_keeps_the_old() {
    let mut script = Script::new();
    for number in 0..FLOW_CAPACITY {
        let to = SocketAddr::new(Ipv4Addr::from(0x0a00_0000 + number as u32).into(), 80);
        script.tcp(5000, to, syn(1));
    }
    assert_eq!(script.operations().len(), FLOW_CAPACITY);
    script.tcp(6000, PEER, syn(1000));
    assert_eq!(script.said(), [Said::Reset { to: 6000, ack: Some(1001) }]);
    script.udp(6000, PEER, b"x");
    assert_eq!(script.dropped(DropReason::FlowTableFull), 2);
    assert_eq!(script.operations(), []);
}

#[test]
fn datagrams_share_a_socket_until_silence_ends_it() {
    let mut script = Script::new();
    script.udp(5000, PEER, b"one");
    script.udp(5000, PEER, b"two");
    let operations = script.operations();
    let Some(Operation::OpenUdp { flow, to }) = operations.first() else { panic!("{operations:?}") };
    assert_eq!(*to, PEER);
    let sent = |payload: &[u8]| Operation::SendDatagram {
        flow: *flow,
        payload: payload.to_vec(),
        // One less, as behind any router.
        hops: HOPS - 1,
        whole: true,
    };
    assert_eq!(operations[1..], [sent(b"one"), sent(b"two")]);
    script.stack.datagram(*flow, b"three", script.now);
    assert_eq!(script.said(), [Said::Datagram { from: PEER, to: 5000, payload: b"three".to_vec() }]);
    script.stack.failed(*flow, Failure::Refused, script.now);
    // A closed port is its host's affair, everything else the router's.
    let refusal = Said::Error { code: [3, 3, 0], by: PEER.ip(), about: PEER, from_port: 5000 };
    assert_eq!(script.said(), [refusal]);
    script.pass(Duration::from_secs(179));
    assert_eq!(script.operations(), []);
    script.pass(Duration::from_secs(2));
    assert_eq!(script.operations(), [Operation::Close { flow: *flow }]);
    assert_eq!(script.stack.next_deadline(), None);
}

#[test]
fn a_silent_resolver_is_followed_by_the_next_then_by_a_failure() {
    let mut script = Script::new();
    let dns = SocketAddr::new(GATEWAY.into(), 53);
    script.udp(5000, dns, &dns_query(7, "example.com"));
    script.udp(5000, dns, &dns_query(7, "example.com"));
    let mut asked = Vec::new();
    for _ in 0..20 {
        for operation in script.operations() {
            match operation {
                Operation::OpenUdp { to, .. } => asked.push(to.to_string()),
                Operation::SendDatagram { payload, .. } => {
                    assert_eq!(payload[2..], dns_query(7, "example.com")[2..])
                }
                Operation::Close { .. } => asked.push("closed".into()),
                other => panic!("{other:?}"),
            }
        }
        script.pass(Duration::from_secs(1));
    }
    assert_eq!(asked, ["10.0.0.1:53", "10.0.0.2:53", "10.0.0.1:53", "10.0.0.2:53", "closed"]);
    let said = script.said();
    let [Said::Datagram { from, to: 5000, ref payload }] = said[..] else { panic!("{said:?}") };
    assert_eq!((from, &payload[..4]), (dns, &[0, 7, 0x81, 0x82][..]));
    assert_eq!(script.stack.next_deadline(), None);
}

#[test]
fn an_answer_from_a_resolver_comes_back_under_the_guests_id() {
    let mut script = Script::new();
    let dns = SocketAddr::new(GATEWAY.into(), 53);
    script.udp(5000, dns, &dns_query(7, "example.com"));
    let operations = script.operations();
    let [Operation::OpenUdp { flow, .. }, Operation::SendDatagram { ref payload, .. }] = operations[..]
    else {
        panic!("{operations:?}")
    };
    let mut answer = payload.clone();
    answer[2] |= 0x80;
    answer.extend([9; 3000]);
    let mut forged = answer.clone();
    forged[0] ^= 1;
    script.stack.datagram(flow, &forged, script.now);
    assert_eq!(script.dropped(DropReason::UnexpectedMessage), 1);
    script.stack.datagram(flow, &answer, script.now);
    assert_eq!(script.operations(), [Operation::Close { flow }]);
    let mut frame = Vec::new();
    let mut frames = 0;
    while script.stack.next_frame(&mut frame, script.now).is_some() {
        frames += 1;
    }
    assert_eq!(frames, 3, "in fragments");
    assert_eq!(frame[14 + 20 + 8..][..2], [0, 7]);
}

#[test]
fn names_over_tcp_go_to_the_first_resolver() {
    let mut script = Script::new();
    script.tcp(5000, SocketAddr::new(GATEWAY.into(), 53), syn(1));
    let operations = script.operations();
    let [Operation::Connect { to, .. }] = operations[..] else { panic!("{operations:?}") };
    assert_eq!(to.to_string(), "10.0.0.1:53");
    script.tcp(5001, SocketAddr::new(GATEWAY.into(), 80), syn(1));
    assert_eq!(script.said(), [Said::Reset { to: 5001, ack: Some(2) }]);
}

#[test]
fn pings_of_the_gateway_are_answered_here_and_others_go_out() {
    let mut script = Script::new();
    for here in [GATEWAY, HOST].map(IpAddr::from) {
        script.ping(here, 3, 4, b"data");
        let reply = Said::EchoReply { from: here, ident: 3, sequence: 4, data: b"data".to_vec() };
        assert_eq!(script.said(), [reply]);
    }
    script.ping(PEER.ip(), 3, 4, b"data");
    let operations = script.operations();
    let [Operation::OpenEcho { flow, to }, Operation::SendDatagram { ref payload, .. }] = operations[..]
    else {
        panic!("{operations:?}")
    };
    assert_eq!(to, PEER.ip());
    // The host's kernel puts an identifier of its own in.
    let mut reply = payload.clone();
    (reply[0], reply[4], reply[5]) = (0, 0x77, 0x88);
    script.stack.datagram(flow, &reply, script.now);
    let reply = Said::EchoReply { from: PEER.ip(), ident: 3, sequence: 4, data: b"data".to_vec() };
    assert_eq!(script.said(), [reply]);
    script.pass(Duration::from_secs(31));
    assert_eq!(script.operations(), [Operation::Close { flow }]);
}

#[test]
fn only_our_addresses_answer_arp() {
    let mut script = Script::new();
    for (target, answered) in
        [(GATEWAY, true), (HOST, true), (GUEST, false), (Ipv4Addr::new(198, 18, 0, 9), false)]
    {
        let question = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: GUEST_MAC,
            source_protocol_addr: GUEST,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        let mut bytes = vec![0; question.buffer_len()];
        question.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
        script.frame(EthernetProtocol::Arp, &bytes);
        let said = script.said();
        match said[..] {
            [Said::Address { address, mac }] => assert!(answered && address == target && mac.is_unicast()),
            [] => assert!(!answered, "{target}"),
            _ => panic!("{said:?}"),
        }
    }
}

#[test]
fn what_is_not_carried_is_counted_and_starts_nothing() {
    let mut script = Script::new();
    script.frame(EthernetProtocol::Unknown(0x88cc), &[0; 60]);
    script.frame(EthernetProtocol::Ipv4, &[0; 60]);
    script.udp(5000, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53), b"the host's loopback");
    script.udp(5000, SocketAddr::new(Ipv4Addr::new(224, 0, 0, 251).into(), 5353), b"a group");
    script.packet(Ipv4Addr::new(10, 1, 1, 1).into(), PEER.ip(), IpProtocol::Udp, &[0; 20]);
    script.packet(GATEWAY.into(), PEER.ip(), IpProtocol::Udp, &[0; 20]);
    script.packet(GUEST.into(), PEER.ip(), IpProtocol::Igmp, &[0; 20]);
    script.assert_only_dropped(&[
        (DropReason::UnknownProtocol, 2),
        (DropReason::Malformed, 1),
        (DropReason::Martian, 1),
        (DropReason::Multicast, 1),
        (DropReason::Spoofed, 2),
    ]);
    assert_eq!(script.stack.counters().flows_opened, 0);
}

#[test]
fn a_datagram_in_fragments_goes_out_whole() {
    let mut script = Script::new();
    let payload: Vec<u8> = (0..3000).map(pattern).collect();
    let datagram = datagram(GUEST.into(), 5000, PEER, &payload);
    for (number, piece) in datagram.chunks(1480).enumerate() {
        let header = Ipv4Repr {
            src_addr: GUEST,
            dst_addr: Ipv4Addr::new(203, 0, 113, 9),
            next_header: IpProtocol::Udp,
            payload_len: piece.len(),
            hop_limit: 64,
        };
        let mut bytes = vec![0; 20 + piece.len()];
        bytes[20..].copy_from_slice(piece);
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
        header.emit(&mut packet, &ChecksumCapabilities::default());
        packet.set_dont_frag(false);
        packet.set_more_frags(number < 2);
        packet.set_frag_offset((number * 1480) as u16);
        packet.fill_checksum();
        script.frame(EthernetProtocol::Ipv4, &bytes);
    }
    let operations = script.operations();
    let [Operation::OpenUdp { flow, .. }, ref sent] = operations[..] else { panic!("{operations:?}") };
    // Cut once, it may be cut again.
    assert_eq!(*sent, Operation::SendDatagram { flow, payload, hops: HOPS - 1, whole: false });
}

#[test]
fn a_guest_without_window_scaling_is_served_within_64_kib() {
    let mut script = Script::new();
    let (flow, ours) = script.open(5000, PEER);
    script.stack.host_sent(flow, &vec![7; 200_000]);
    let sent: usize = script
        .said()
        .iter()
        .map(|said| match said {
            Said::Segment { payload, .. } => payload.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    assert!((64_000 - 1460..=64_000).contains(&sent), "{sent}");
    script.tcp(5000, PEER, segment(1001, ours + sent as u32, b""));
    assert!(!script.said().is_empty());
}

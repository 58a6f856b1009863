//! IPv6 from the guest's side: how it finds its router and its address, and that everything is carried as in IPv4. And
//! what routers and the host say of packets, in both families.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use host_net::{Config, DropReason, Failure, Operation, Reason, Stack, Trouble};
use smoltcp::wire::{
    EthernetProtocol, Icmpv6Repr, IpProtocol, NdiscNeighborFlags, NdiscRepr, RawHardwareAddress, TcpControl,
};

use crate::played::{HOPS, PEER, PEER6, Said, Script, datagram, segment, syn};
use crate::support::{GATEWAY, GATEWAY6, GUEST_MAC, GUEST6, HOST6, ROUTER, dns_query, pattern};

const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

fn ask_for_router(script: &mut Script, from: Ipv6Addr) {
    script.icmp6(from, ALL_ROUTERS, &Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { lladdr: None }));
}

fn ask_for(script: &mut Script, from: Ipv6Addr, target: Ipv6Addr) {
    let lladdr = (!from.is_unspecified()).then(|| RawHardwareAddress::from_bytes(&GUEST_MAC.0));
    let to = target.segments();
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | to[6] & 0xff, to[7]);
    script.icmp6(from, to, &Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr: target, lladdr }));
}

fn script() -> Script {
    Script { hops: 255, ..Script::new() }
}

#[test]
fn a_router_is_there_for_whoever_asks_and_reminds_of_itself() {
    let mut script = script();
    assert_eq!(script.stack.next_deadline(), None, "no timer for a guest without IPv6");
    ask_for_router(&mut script, LINK_LOCAL);
    assert_eq!(script.said(), [Said::Router { to: LINK_LOCAL }]);
    ask_for_router(&mut script, Ipv6Addr::UNSPECIFIED);
    assert_eq!(script.said(), [Said::Router { to: ALL_NODES }]);
    script.pass(Duration::from_secs(60 * 60 * 18));
    let said = script.said();
    assert_eq!(said, vec![Said::Router { to: ALL_NODES }; 6], "long before its lifetime ends");
}

#[test]
fn a_question_that_crossed_a_router_is_none() {
    let mut script = Script { hops: 254, ..Script::new() };
    ask_for_router(&mut script, LINK_LOCAL);
    ask_for(&mut script, LINK_LOCAL, ROUTER);
    assert_eq!((script.said(), script.stack.next_deadline()), (vec![], None));
}

#[test]
fn only_our_addresses_have_a_neighbour_behind_them() {
    let mut script = script();
    for (target, answered) in
        [(ROUTER, true), (GATEWAY6, true), (HOST6, true), (GUEST6, false), (LINK_LOCAL, false)]
    {
        // Who has it, and is it free? (RFC 4862 §5.4)
        for from in [LINK_LOCAL, GUEST6, Ipv6Addr::UNSPECIFIED] {
            ask_for(&mut script, from, target);
            let said = script.said();
            match said[..] {
                [Said::Address { address, mac }] => {
                    assert!(answered && address == target && mac.is_unicast(), "{target}");
                }
                [] => assert!(!answered, "{target}"),
                _ => panic!("{said:?}"),
            }
        }
    }
    for stranger in [ROUTER, Ipv6Addr::LOCALHOST, "2001:db8::5".parse().unwrap()] {
        ask_for(&mut script, stranger, GATEWAY6);
    }
    assert_eq!((script.said(), script.dropped(DropReason::Spoofed)), (vec![], 3));
}

#[test]
fn connections_are_carried_with_a_segment_size_that_fits() {
    let mut script = Script::new();
    script.tcp(5000, PEER6, syn(1000));
    let operations = script.operations();
    let [Operation::Connect { flow, to, hops }] = operations[..] else { panic!("{operations:?}") };
    assert_eq!((to, hops), (PEER6, HOPS - 1));
    script.stack.connected(flow);
    let said = script.said();
    assert!(
        matches!(said[..], [Said::Segment { control: TcpControl::Syn, mss: Some(1440), .. }]),
        "{said:?}"
    );
    let (flow, ours) = script.open(5001, PEER6);
    script.tcp(5001, PEER6, segment(1001, ours, b"words"));
    assert_eq!(script.stack.outgoing(flow).0, b"words");
    script.tcp(5002, SocketAddr::new(HOST6.into(), 8080), syn(1));
    let operations = script.operations();
    assert!(
        matches!(operations[..], [.., Operation::Connect { to, .. }] if to == "[::1]:8080".parse().unwrap()),
        "{operations:?}"
    );
}

/// What makes a client try IPv4 at once.
#[test]
fn a_host_without_ipv6_is_told_of_at_once() {
    for (failure, code) in [(Failure::NetworkUnreachable, [1, 0, 0]), (Failure::HostUnreachable, [1, 3, 0])] {
        let mut script = Script::new();
        script.tcp(5000, PEER6, syn(1000));
        let operations = script.operations();
        let [Operation::Connect { flow, .. }] = operations[..] else { panic!("{operations:?}") };
        script.stack.failed(flow, failure, script.now);
        let error = Said::Error { code, by: GATEWAY6.into(), about: PEER6, from_port: 5000 };
        assert_eq!(script.said(), [error]);

        script.udp(5000, PEER6, b"x");
        let operations = script.operations();
        let [_, Operation::OpenUdp { flow, .. }, _] = operations[..] else { panic!("{operations:?}") };
        script.stack.failed(flow, failure, script.now);
        let error = Said::Error { code, by: GATEWAY6.into(), about: PEER6, from_port: 5000 };
        assert_eq!(script.said(), [error]);
        assert_eq!(script.stack.counters().flows_open, 0);
    }
    let mut script = Script::new();
    script.tcp(5000, PEER6, syn(1000));
    let operations = script.operations();
    let [Operation::Connect { flow, .. }] = operations[..] else { panic!("{operations:?}") };
    script.stack.failed(flow, Failure::Refused, script.now);
    assert_eq!(script.said(), [Said::Reset { to: 5000, ack: Some(1001) }]);
}

#[test]
fn datagrams_names_and_pings_are_carried() {
    let mut script = Script::new();
    script.udp(5000, PEER6, b"one");
    let operations = script.operations();
    let [Operation::OpenUdp { flow, to }, Operation::SendDatagram { hops, whole, .. }] = operations[..]
    else {
        panic!("{operations:?}")
    };
    assert_eq!((to, hops, whole), (PEER6, HOPS - 1, true));
    script.stack.datagram(flow, b"two", script.now);
    assert_eq!(script.said(), [Said::Datagram { from: PEER6, to: 5000, payload: b"two".to_vec() }]);

    let dns = SocketAddr::new(GATEWAY6.into(), 53);
    script.udp(5001, dns, &dns_query(7, "gateway.docker.internal"));
    let said = script.said();
    let [Said::Datagram { from, ref payload, .. }] = said[..] else { panic!("{said:?}") };
    assert!(from == dns && payload.ends_with(&[198, 18, 0, 1]));
    script.udp(5001, dns, &dns_query(7, "example.com"));
    let operations = script.operations();
    let [Operation::OpenUdp { flow, .. }, Operation::SendDatagram { ref payload, .. }] = operations[..]
    else {
        panic!("{operations:?}")
    };
    let mut answer = payload.clone();
    answer[2] |= 0x80;
    script.stack.datagram(flow, &answer, script.now);
    script.operations();
    assert!(matches!(script.said()[..], [Said::Datagram { from, to: 5001, .. }] if from == dns));

    for here in [GATEWAY6, HOST6, ROUTER].map(IpAddr::from) {
        script.ping(here, 3, 4, b"data");
        let reply = Said::EchoReply { from: here, ident: 3, sequence: 4, data: b"data".to_vec() };
        assert_eq!(script.said(), [reply]);
    }
    script.ping(PEER6.ip(), 3, 4, b"data");
    let operations = script.operations();
    let [Operation::OpenEcho { flow, to }, Operation::SendDatagram { ref payload, .. }] = operations[..]
    else {
        panic!("{operations:?}")
    };
    assert_eq!((to, payload[0]), (PEER6.ip(), 128));
    let mut reply = payload.clone();
    (reply[0], reply[4], reply[5]) = (129, 0x77, 0x88);
    script.stack.datagram(flow, &reply, script.now);
    let reply = Said::EchoReply { from: PEER6.ip(), ident: 3, sequence: 4, data: b"data".to_vec() };
    assert_eq!(script.said(), [reply]);
}

#[test]
fn a_packet_with_no_hops_left_ends_here() {
    for (peer, gateway, code) in
        [(PEER, IpAddr::V4(GATEWAY), [11, 0, 0]), (PEER6, GATEWAY6.into(), [3, 0, 0])]
    {
        let mut script = Script { hops: 1, ..Script::new() };
        script.udp(5000, peer, b"how far?");
        script.tcp(5000, peer, syn(1));
        let error = |from_port| Said::Error { code, by: gateway, about: peer, from_port };
        assert_eq!(script.said(), [error(5000), error(5000)]);
        script.ping(peer.ip(), 3, 4, b"");
        assert!(
            matches!(script.said()[..], [Said::Error { code: found, by, .. }] if (found, by) == (code, gateway))
        );
        assert_eq!(script.operations(), []);
        script.hops = 2;
        script.udp(5000, peer, b"how far?");
        let operations = script.operations();
        assert!(matches!(operations[..], [_, Operation::SendDatagram { hops: 1, .. }]), "{operations:?}");
    }
}

#[test]
fn what_a_router_on_the_way_says_reaches_the_guest_in_its_name() {
    let router4: IpAddr = [10, 9, 9, 9].into();
    let router6: IpAddr = "2001:db8:9::9".parse().unwrap();
    for (peer, router, exceeded, too_large) in
        [(PEER, router4, [11, 0, 0], [3, 4, 1400]), (PEER6, router6, [3, 0, 0], [2, 0, 1400])]
    {
        let mut script = Script::new();
        script.udp(5000, peer, b"x");
        let operations = script.operations();
        let [Operation::OpenUdp { flow, .. }, _] = operations[..] else { panic!("{operations:?}") };
        let told = |reason, from| Trouble { reason, from, sequence: None };
        script.stack.trouble(flow, told(Reason::HopsExceeded, Some(router)), script.now);
        let error = Said::Error { code: exceeded, by: router, about: peer, from_port: 5000 };
        assert_eq!(script.said(), [error]);
        // The host's own word, in the router's name.
        script.stack.trouble(flow, told(Reason::TooLarge { mtu: 1400 }, None), script.now);
        let gateway = if peer.is_ipv4() { GATEWAY.into() } else { GATEWAY6.into() };
        let error = Said::Error { code: too_large, by: gateway, about: peer, from_port: 5000 };
        assert_eq!(script.said(), [error]);
        script.stack.trouble(flow, told(Reason::PortUnreachable, Some(router)), script.now);
        assert!(matches!(script.said()[..], [Said::Error { by, .. }] if by == peer.ip()));
        assert_eq!(script.stack.counters().flows_open, 1, "it goes on");

        script.ping(peer.ip(), 3, 4, b"");
        let operations = script.operations();
        let [Operation::OpenEcho { flow, .. }, _] = operations[..] else { panic!("{operations:?}") };
        let trouble = Trouble { reason: Reason::HopsExceeded, from: Some(router), sequence: Some(0x0908) };
        script.stack.trouble(flow, trouble, script.now);
        let said = script.said();
        assert!(
            matches!(said[..], [Said::Error { code, by, .. }] if (code, by) == (exceeded, router)),
            "{said:?}"
        );

        script.tcp(6000, peer, syn(1));
        let operations = script.operations();
        let [Operation::Connect { flow, .. }] = operations[..] else { panic!("{operations:?}") };
        script.stack.trouble(flow, told(Reason::HopsExceeded, Some(router)), script.now);
        let error = Said::Error { code: exceeded, by: router, about: peer, from_port: 6000 };
        assert_eq!(script.said(), [error]);
        assert_eq!(script.operations(), [Operation::Close { flow }]);
        let (flow, _) = script.open(6001, peer);
        script.stack.trouble(flow, told(Reason::HostUnreachable, Some(router)), script.now);
        assert_eq!((script.said(), script.operations()), (vec![], vec![]), "TCP itself deals with that");
    }
}

#[test]
fn a_datagram_in_fragments_goes_out_whole() {
    let mut script = Script::new();
    let payload: Vec<u8> = (0..3000).map(pattern).collect();
    let datagram = datagram(GUEST6.into(), 5000, PEER6, &payload);
    for (number, piece) in datagram.chunks(1448).enumerate() {
        let place = (number * 1448) as u16 | u16::from(number < 2);
        let [high, low] = place.to_be_bytes();
        let fragment = [&[17, 0, high, low, 9, 9, 9, 9], piece].concat();
        script.packet(GUEST6.into(), PEER6.ip(), IpProtocol::Ipv6Frag, &fragment);
    }
    let operations = script.operations();
    let [Operation::OpenUdp { flow, .. }, ref sent] = operations[..] else { panic!("{operations:?}") };
    assert_eq!(*sent, Operation::SendDatagram { flow, payload, hops: HOPS - 1, whole: false });
}

#[test]
fn what_is_not_carried_is_counted_and_starts_nothing() {
    let mut script = Script::new();
    script.frame(EthernetProtocol::Ipv6, &[0x60; 60]);
    for (to, payload) in [("::1", "the host's loopback"), ("::ffff:127.0.0.1", "in disguise")] {
        script.udp(5000, SocketAddr::new(to.parse().unwrap(), 53), payload.as_bytes());
    }
    script.udp(5000, "[ff02::fb]:5353".parse().unwrap(), b"a group");
    let peer = PEER6.ip();
    for stranger in ["2001:db8::1", "fe80::2", "fdc7:9a1e:5d28::1", "::", "::1"] {
        script.packet(stranger.parse().unwrap(), peer, IpProtocol::Udp, &[0; 20]);
    }
    script.packet(GUEST6.into(), peer, IpProtocol::Icmp, &[8; 20]);
    script.packet(GUEST6.into(), peer, IpProtocol::Ipv6Route, &[0; 24]);
    // A datagram without a checksum, which IPv6 does not know, and a ping with a wrong one.
    script.packet(GUEST6.into(), peer, IpProtocol::Udp, &[0, 9, 0, 9, 0, 8, 0, 0]);
    script.packet(GUEST6.into(), peer, IpProtocol::Icmpv6, &[128, 0, 1, 1, 0, 0, 0, 1]);
    // Told by a guest: nothing that we could pass on.
    let news =
        NdiscRepr::NeighborAdvert { flags: NdiscNeighborFlags::empty(), target_addr: GUEST6, lladdr: None };
    script.icmp6(GUEST6, GATEWAY6, &Icmpv6Repr::Ndisc(news));
    script.assert_only_dropped(&[
        (DropReason::Malformed, 3),
        (DropReason::Martian, 2),
        (DropReason::Multicast, 1),
        (DropReason::Spoofed, 5),
        (DropReason::UnknownProtocol, 2),
        (DropReason::UnsupportedIcmp, 1),
    ]);

    let small = Config { mtu: 1000, ..Config::default() };
    script.stack = Stack::new(small, 1);
    ask_for_router(&mut script, LINK_LOCAL);
    assert_eq!((script.said(), script.dropped(DropReason::Ipv6)), (vec![], 1), "too small for IPv6");
}

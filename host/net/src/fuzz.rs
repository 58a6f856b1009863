//! The entry for invented frames.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use guest_protocol::{LANDING_V4, LANDING_V6};

use crate::config::{Config, ROUTER_LINK_LOCAL};
use crate::flow::FLOW_CAPACITY;
use crate::icmp::{Reason, Trouble};
use crate::stack::{Failure, Operation, Stack};

/// Plays `data` to a NAT: each step is a tag, a length and so many bytes: a frame, the inside of one, or something that
/// happens on the host's side. The NAT must neither panic nor break its own limits.
///
/// # Panics
/// When it does.
pub fn fuzz_nat_frames(data: &[u8]) {
    let config = Config::default();
    let longest = usize::from(config.mtu) + 14;
    let mut stack = Stack::new(config.clone(), 1);
    stack.ignore_checksums();
    stack.set_resolvers(&[([10, 0, 0, 1], 53).into(), ([10, 0, 0, 2], 53).into()]);
    let mut now = Duration::ZERO;
    let (mut flows, mut opened) = (Vec::new(), Vec::new());
    let mut rest = data;
    while let [tag, length, tail @ ..] = rest {
        let (bytes, tail) = tail.split_at(usize::from(*length).min(tail.len()));
        rest = tail;
        let flow = flows.get(usize::from(*length) % flows.len().max(1)).copied();
        match (tag % 14, flow) {
            (0, _) => now += Duration::from_millis(u64::from(*length) * 100),
            (1, Some(flow)) => {
                let room = stack.room(flow);
                if !bytes.is_empty() && room >= bytes.len() {
                    stack.host_sent(flow, bytes);
                }
            }
            (2, Some(flow)) => stack.failed(
                flow,
                [Failure::Refused, Failure::Reset, Failure::HostUnreachable][usize::from(*tag) % 3],
                now,
            ),
            (3, Some(flow)) => stack.datagram(flow, bytes, now),
            (5, _) => stack.receive_frame(&packet(TCP, [198, 18, 0, 254], bytes), now),
            (6, _) => stack.receive_frame(&packet(UDP, [198, 18, 0, 1], bytes), now),
            (7, _) => stack.receive_frame(&packet(*length, [10, 0, 0, 9], bytes), now),
            (8, _) => stack.receive_frame(&packet6(TCP, &config.host_alias6(), bytes), now),
            (9, _) => stack.receive_frame(&packet6(ICMPV6, &ROUTER_LINK_LOCAL, bytes), now),
            (10, _) => stack.receive_frame(&packet6(*length, &FAR6, bytes), now),
            (12, _) => {
                let landing = if *length < 128 { LANDING_V4.into() } else { LANDING_V6.into() };
                if let Ok(flow) = stack.land(SocketAddr::new(landing, (*length).into()), now) {
                    flows.push(flow);
                    opened.push(flow);
                }
            }
            // What answers it, as far as its ports go.
            (13, _) => {
                if let Some((guest, remote)) = opened.last().and_then(|flow| stack.ends(*flow)) {
                    stack.receive_frame(&answer(guest, remote, bytes), now);
                }
            }
            (11, Some(flow)) => {
                let reason = [Reason::TooLarge { mtu: 1400 }, Reason::HopsExceeded, Reason::PortUnreachable]
                    [usize::from(*tag) % 3];
                let from = Some(if *length < 128 { [10, 0, 0, 3].into() } else { FAR6.into() });
                stack.trouble(flow, Trouble { reason, from, sequence: None }, now);
            }
            _ => stack.receive_frame(bytes, now),
        }
        stack.tick(now);
        while let Some(operation) = stack.next_operation() {
            match operation {
                Operation::Connect { flow, .. } => {
                    flows.push(flow);
                    stack.connected(flow);
                }
                Operation::OpenUdp { flow, .. } | Operation::OpenEcho { flow, .. } => flows.push(flow),
                Operation::Send { flow } => {
                    let (first, second) = stack.outgoing(flow);
                    let count = first.len() + second.len();
                    stack.host_took(flow, count);
                    if stack.wants_shutdown(flow) {
                        stack.host_shut(flow);
                    }
                }
                Operation::Close { flow } | Operation::Reset { flow } => flows.retain(|other| *other != flow),
                Operation::Receive { .. } | Operation::SendDatagram { .. } => {}
            }
        }
        let mut out = Vec::new();
        while let Some(length) = stack.next_frame(&mut out, now) {
            assert!(length <= longest, "a frame of {length} bytes");
        }
        assert!(stack.counters().flows_open as usize <= FLOW_CAPACITY);
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);

/// A segment between these ends whose rest is invented.
fn answer(from: SocketAddr, to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut segment = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    segment.extend(bytes);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => packet_from(from.octets(), TCP, to.octets(), &segment),
        (IpAddr::V6(from), IpAddr::V6(to)) => packet6_from(&from, TCP, &to, &segment),
        _ => Vec::new(),
    }
}

/// Honest headers around invented bytes, which so get further.
fn packet(protocol: u8, to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    packet_from([198, 18, 0, 2], protocol, to, payload)
}

fn packet_from(from: [u8; 4], protocol: u8, to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len() as u16).to_be_bytes();
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 2, 0x08, 0x00]);
    frame.extend([0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0]);
    frame.extend(from);
    frame.extend(to);
    frame.extend(payload);
    frame
}

/// The same in IPv6.
fn packet6(next: u8, to: &Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    packet6_from(&Ipv6Addr::new(0xfdc7, 0x9a1e, 0x5d28, 0, 0, 0, 0, 2), next, to, payload)
}

fn packet6_from(from: &Ipv6Addr, next: u8, to: &Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u16).to_be_bytes();
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 2, 0x86, 0xdd, 0x60, 0, 0, 0, length[0], length[1], next, 255]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(payload);
    frame
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_survived(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            fuzz_nat_frames(&data);
        }
    }
}

//! The one table of rules inside a sandbox: what it sends to 127.0.0.11, port 53, goes to our listener there.
//!
//! Written by netlink directly: a container's start has no time for a program that does it. The messages are those of
//! `nft add rule ip engine_dns output ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:PORT`
//! (linux/netfilter/nf_tables.h).

use std::io;
use std::net::Ipv4Addr;

use rtnetlink::sys::{Socket, SocketAddr, protocols};

const TABLE: &str = "engine_dns";
const CHAIN: &str = "output";
const DNS_PORT: u16 = 53;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DEL_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

const FAMILY_IPV4: u8 = 2;
const NESTED: u16 = 0x8000;
const NLMSG_ERROR: u16 = 2;

/// Replaces the table in the namespace of the calling thread.
pub(super) fn write(address: Ipv4Addr, udp_port: u16, tcp_port: u16) -> io::Result<()> {
    let socket = Socket::new(protocols::NETLINK_NETFILTER)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&batch(address, udp_port, tcp_port), 0)?;
    // A refusal of any message comes first; the acknowledgement of the last one tells that all went in.
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Some(length) = rest.first_chunk().map(|length| u32::from_ne_bytes(*length) as usize) {
            let Some(message) = rest.get(..length).filter(|message| message.len() >= 20) else { break };
            let kind = u16::from_ne_bytes([message[4], message[5]]);
            if kind == NLMSG_ERROR {
                let code = i32::from_ne_bytes([message[16], message[17], message[18], message[19]]);
                return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn batch(address: Ipv4Addr, udp_port: u16, tcp_port: u16) -> Vec<u8> {
    let name = || attribute(1, &text(TABLE));
    let chain = [
        name(),
        attribute(3, &text(CHAIN)),
        // Local output, where destinations are changed.
        attribute(4 | NESTED, &[word(1, 3), word(2, (-100_i32).cast_unsigned())].concat()),
        attribute(7, &text("nat")),
    ]
    .concat();
    let rule = |protocol, port| {
        let rule = [
            name(),
            attribute(2, &text(CHAIN)),
            attribute(4 | NESTED, &expressions(address, protocol, port)),
        ]
        .concat();
        (NEW_RULE, CREATE | APPEND, FAMILY_IPV4, rule)
    };
    let mut messages = vec![
        // So that there is something to delete.
        (NEW_TABLE, CREATE, FAMILY_IPV4, name()),
        (DEL_TABLE, 0, FAMILY_IPV4, name()),
        (NEW_TABLE, CREATE, FAMILY_IPV4, name()),
        (NEW_CHAIN, CREATE, FAMILY_IPV4, chain),
        rule(17, udp_port),
        rule(6, tcp_port),
    ];
    if let Some(last) = messages.last_mut() {
        last.1 |= ACK;
    }
    let mut bytes = message(BATCH_BEGIN, REQUEST, 0, SUBSYSTEM, &[]);
    for (kind, flags, family, body) in messages {
        bytes.extend(message(kind, REQUEST | flags, family, 0, &body));
    }
    bytes.extend(message(BATCH_END, REQUEST, 0, SUBSYSTEM, &[]));
    bytes
}

/// `ip daddr ADDRESS PROTOCOL dport 53 dnat to ADDRESS:PORT`.
fn expressions(address: Ipv4Addr, protocol: u8, port: u16) -> Vec<u8> {
    let value = |kind: u16, bytes: &[u8]| attribute(kind | NESTED, &attribute(1, bytes));
    let load = |base, offset, length| {
        expression("payload", &[word(1, 1), word(2, base), word(3, offset), word(4, length)].concat())
    };
    let equals = |bytes: &[u8]| expression("cmp", &[word(1, 1), word(2, 0), value(3, bytes)].concat());
    let constant =
        |register, bytes: &[u8]| expression("immediate", &[word(1, register), value(2, bytes)].concat());
    [
        load(1, 16, 4),
        equals(&address.octets()),
        expression("meta", &[word(1, 1), word(2, 16)].concat()),
        equals(&[protocol]),
        load(2, 2, 2),
        equals(&DNS_PORT.to_be_bytes()),
        constant(1, &address.octets()),
        constant(2, &port.to_be_bytes()),
        expression("nat", &[word(1, 1), word(2, FAMILY_IPV4.into()), word(3, 1), word(5, 2)].concat()),
    ]
    .concat()
}

fn expression(name: &str, data: &[u8]) -> Vec<u8> {
    attribute(1 | NESTED, &[attribute(1, &text(name)), attribute(2 | NESTED, data)].concat())
}

fn message(kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
    let length = 20 + body.len() as u32;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(body);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len() as u16;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn word(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_and_attribute_is_aligned() {
        let bytes = batch(Ipv4Addr::new(127, 0, 0, 11), 40000, 40001);
        let mut rest = bytes.as_slice();
        let mut kinds = Vec::new();
        while !rest.is_empty() {
            let length = u32::from_ne_bytes(*rest.first_chunk().unwrap()) as usize;
            assert_eq!(length % 4, 0);
            kinds.push(u16::from_ne_bytes([rest[4], rest[5]]));
            rest = &rest[length..];
        }
        assert_eq!(
            kinds,
            [BATCH_BEGIN, NEW_TABLE, DEL_TABLE, NEW_TABLE, NEW_CHAIN, NEW_RULE, NEW_RULE, BATCH_END]
        );
    }
}

//! ICMP: echo requests go out through the host's unprivileged echo sockets; errors come back as the guest expects
//! them, quoting the packet that caused them (RFC 792, RFC 1812 §4.3.2).

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use smoltcp::wire::{Icmpv4DstUnreachable, IpProtocol, Ipv4Repr};

/// Silence that ends an echo conversation.
const SILENCE: Duration = Duration::from_secs(30);
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// One `ping`: the host's socket replaces the identifier, so each has its own.
#[derive(Debug)]
pub(crate) struct Echo {
    pub(crate) guest: Ipv4Addr,
    pub(crate) remote: Ipv4Addr,
    pub(crate) ident: u16,
    expires: Duration,
}

impl Echo {
    pub(crate) fn new(guest: Ipv4Addr, remote: Ipv4Addr, ident: u16, now: Duration) -> Self {
        Self { guest, remote, ident, expires: now + SILENCE }
    }

    pub(crate) fn touch(&mut self, now: Duration) {
        self.expires = now + SILENCE;
    }

    pub(crate) fn expires(&self) -> Duration {
        self.expires
    }
}

/// An echo request as a host socket takes it; the kernel fills in identifier and checksum.
pub(crate) fn request(sequence: u16, data: &[u8]) -> Vec<u8> {
    let mut message = vec![ECHO_REQUEST, 0, 0, 0, 0, 0];
    message.extend(sequence.to_be_bytes());
    message.extend(data);
    message
}

/// Sequence number and data of an echo reply, with or without the IP header some systems deliver along.
pub(crate) fn parse_reply(message: &[u8]) -> Option<(u16, &[u8])> {
    let message = match message.first()? >> 4 {
        4 => message.get(usize::from(message[0] & 0xf) * 4..)?,
        _ => message,
    };
    match message {
        [ECHO_REPLY, 0, _, _, _, _, high, low, data @ ..] => Some((u16::from_be_bytes([*high, *low]), data)),
        _ => None,
    }
}

/// What an "unreachable" error says and quotes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unreachable {
    pub(crate) reason: Icmpv4DstUnreachable,
    pub(crate) header: Ipv4Repr,
    pub(crate) quote: [u8; 8],
}

impl Unreachable {
    /// About a SYN.
    pub(crate) fn tcp(
        reason: Icmpv4DstUnreachable,
        guest: SocketAddrV4,
        remote: SocketAddrV4,
        sequence: u32,
    ) -> Self {
        let mut quote = ports(guest, remote);
        quote[4..].copy_from_slice(&sequence.to_be_bytes());
        Self { reason, header: header(*guest.ip(), *remote.ip(), IpProtocol::Tcp), quote }
    }

    /// About a datagram of `length` bytes of payload.
    pub(crate) fn udp(
        reason: Icmpv4DstUnreachable,
        guest: SocketAddrV4,
        remote: SocketAddrV4,
        length: usize,
    ) -> Self {
        let mut quote = ports(guest, remote);
        let length = u16::try_from(length.saturating_add(8)).unwrap_or(u16::MAX);
        quote[4..6].copy_from_slice(&length.to_be_bytes());
        Self { reason, header: header(*guest.ip(), *remote.ip(), IpProtocol::Udp), quote }
    }

    /// About an echo request.
    pub(crate) fn echo(reason: Icmpv4DstUnreachable, echo: &Echo) -> Self {
        let mut quote = [ECHO_REQUEST, 0, 0, 0, 0, 0, 0, 0];
        quote[4..6].copy_from_slice(&echo.ident.to_be_bytes());
        Self { reason, header: header(echo.guest, echo.remote, IpProtocol::Icmp), quote }
    }
}

fn ports(guest: SocketAddrV4, remote: SocketAddrV4) -> [u8; 8] {
    let mut quote = [0; 8];
    quote[..2].copy_from_slice(&guest.port().to_be_bytes());
    quote[2..4].copy_from_slice(&remote.port().to_be_bytes());
    quote
}

fn header(guest: Ipv4Addr, remote: Ipv4Addr, next_header: IpProtocol) -> Ipv4Repr {
    Ipv4Repr { src_addr: guest, dst_addr: remote, next_header, payload_len: 8, hop_limit: 63 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_with_and_without_an_ip_header() {
        let bare = [0, 0, 9, 9, 1, 2, 0, 7, b'x'];
        assert_eq!(parse_reply(&bare), Some((7, &b"x"[..])));
        let mut whole = vec![0x45; 20];
        whole.extend(bare);
        assert_eq!(parse_reply(&whole), Some((7, &b"x"[..])));
        assert_eq!(parse_reply(&[]), None);
        assert_eq!(parse_reply(&[0x4f, 0]), None);
        assert_eq!(parse_reply(&[3, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn requests_carry_sequence_and_data() {
        assert_eq!(request(0x0102, b"ab"), [8, 0, 0, 0, 0, 0, 1, 2, b'a', b'b']);
    }
}

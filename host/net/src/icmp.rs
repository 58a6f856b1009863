//! ICMP and ICMPv6: echo requests go out through the host's unprivileged echo sockets; errors come back as the guest
//! expects them, quoting the packet that caused them (RFC 792, RFC 1812 §4.3.2, RFC 4443 §2.4).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpAddress, IpProtocol, IpRepr};

/// Silence that ends an echo conversation.
const SILENCE: Duration = Duration::from_secs(30);
/// Bytes of the transport header that an error quotes.
const QUOTE: usize = 8;
/// Before what an error quotes.
const ERROR_HEADER: usize = 8;

/// Types of the messages that are made or read here, by family (RFC 792, RFC 4443).
struct Types {
    request: u8,
    reply: u8,
}

const V4: Types = Types { request: 8, reply: 0 };
const V6: Types = Types { request: 128, reply: 129 };

fn types(address: IpAddr) -> Types {
    if address.is_ipv4() { V4 } else { V6 }
}

/// Why a packet did not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// There is no route.
    NetworkUnreachable,
    /// No answer from that host.
    HostUnreachable,
    /// Nobody listens there.
    PortUnreachable,
    /// Somebody does not let it pass, or the host gives no socket for it.
    Prohibited,
    /// It is larger than the way, and may not be cut.
    TooLarge {
        /// The largest packet that passes, in bytes.
        mtu: u32,
    },
    /// It had been through as many routers as its sender wanted.
    HopsExceeded,
}

impl Reason {
    /// Type, code, and what is in the header's second half.
    fn code(self, address: IpAddr) -> (u8, u8, u32) {
        match (self, address.is_ipv4()) {
            (Self::NetworkUnreachable, true) => (3, 0, 0),
            (Self::HostUnreachable, true) => (3, 1, 0),
            (Self::PortUnreachable, true) => (3, 3, 0),
            (Self::Prohibited, true) => (3, 13, 0),
            // RFC 1191 §4: the lower half of what was unused before.
            (Self::TooLarge { mtu }, true) => (3, 4, mtu.min(u16::MAX.into())),
            (Self::HopsExceeded, true) => (11, 0, 0),
            (Self::NetworkUnreachable, false) => (1, 0, 0),
            (Self::HostUnreachable, false) => (1, 3, 0),
            (Self::PortUnreachable, false) => (1, 4, 0),
            (Self::Prohibited, false) => (1, 1, 0),
            (Self::TooLarge { mtu }, false) => (2, 0, mtu),
            (Self::HopsExceeded, false) => (3, 0, 0),
        }
    }
}

/// What the host has heard about something sent on a flow's socket. The flow goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trouble {
    /// What it is.
    pub reason: Reason,
    /// The router that said so, if it was one.
    pub from: Option<IpAddr>,
    /// Which echo request it is about.
    pub sequence: Option<u16>,
}

/// One `ping`: the host's socket replaces the identifier, so each has its own.
#[derive(Debug)]
pub(crate) struct Echo {
    pub(crate) guest: IpAddr,
    pub(crate) remote: IpAddr,
    pub(crate) ident: u16,
    expires: Duration,
}

impl Echo {
    pub(crate) fn new(guest: IpAddr, remote: IpAddr, ident: u16, now: Duration) -> Self {
        Self { guest, remote, ident, expires: now + SILENCE }
    }

    pub(crate) fn touch(&mut self, now: Duration) {
        self.expires = now + SILENCE;
    }

    pub(crate) fn expires(&self) -> Duration {
        self.expires
    }
}

/// An echo message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EchoMessage<'a> {
    pub(crate) ident: u16,
    pub(crate) sequence: u16,
    pub(crate) data: &'a [u8],
}

impl<'a> EchoMessage<'a> {
    /// Reads a request of the guest's, whose checksum has been looked at.
    pub(crate) fn read_request(guest: IpAddr, message: &'a [u8]) -> Option<Self> {
        Self::read(types(guest).request, message)
    }

    /// Reads a reply to a host socket, with or without the IP header some systems deliver along.
    pub(crate) fn read_reply(remote: IpAddr, message: &'a [u8]) -> Option<Self> {
        let message = match message.first()? >> 4 {
            4 if remote.is_ipv4() => message.get(usize::from(message[0] & 0xf) * 4..)?,
            _ => message,
        };
        Self::read(types(remote).reply, message)
    }

    fn read(kind: u8, message: &'a [u8]) -> Option<Self> {
        let (header, data) = message.split_first_chunk::<8>()?;
        let [found, 0, _, _, ident @ .., sequence_high, sequence_low] = *header else { return None };
        let sequence = u16::from_be_bytes([sequence_high, sequence_low]);
        (found == kind).then_some(Self { ident: u16::from_be_bytes(ident), sequence, data })
    }

    /// A request as a host socket takes it; the kernel fills in identifier and checksum.
    pub(crate) fn request(&self, remote: IpAddr) -> Vec<u8> {
        self.message(types(remote).request, 0)
    }

    /// A reply for the guest, without its checksum.
    pub(crate) fn reply(&self, guest: IpAddr) -> Vec<u8> {
        self.message(types(guest).reply, self.ident)
    }

    fn message(&self, kind: u8, ident: u16) -> Vec<u8> {
        let mut message = vec![kind, 0, 0, 0];
        message.extend(ident.to_be_bytes());
        message.extend(self.sequence.to_be_bytes());
        message.extend(self.data);
        message
    }
}

/// An error about a packet of the guest's: what it says and quotes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Notice {
    pub(crate) reason: Reason,
    /// Who sent the packet.
    pub(crate) guest: IpAddr,
    /// Whom it was for.
    pub(crate) remote: IpAddr,
    protocol: IpProtocol,
    quote: [u8; QUOTE],
}

impl Notice {
    /// About a packet that is here.
    pub(crate) fn packet(
        reason: Reason,
        guest: IpAddr,
        remote: IpAddr,
        protocol: IpProtocol,
        bytes: &[u8],
    ) -> Self {
        let mut quote = [0; QUOTE];
        let length = bytes.len().min(QUOTE);
        quote[..length].copy_from_slice(&bytes[..length]);
        Self { reason, guest, remote, protocol, quote }
    }

    /// About a SYN.
    pub(crate) fn tcp(reason: Reason, guest: SocketAddr, remote: SocketAddr, sequence: u32) -> Self {
        let mut quote = ports(guest, remote);
        quote[4..].copy_from_slice(&sequence.to_be_bytes());
        Self { reason, guest: guest.ip(), remote: remote.ip(), protocol: IpProtocol::Tcp, quote }
    }

    /// About a datagram of `length` bytes of payload.
    pub(crate) fn udp(reason: Reason, guest: SocketAddr, remote: SocketAddr, length: usize) -> Self {
        let mut quote = ports(guest, remote);
        let length = u16::try_from(length.saturating_add(8)).unwrap_or(u16::MAX);
        quote[4..6].copy_from_slice(&length.to_be_bytes());
        Self { reason, guest: guest.ip(), remote: remote.ip(), protocol: IpProtocol::Udp, quote }
    }

    /// About an echo request.
    pub(crate) fn echo(reason: Reason, echo: &Echo, sequence: u16) -> Self {
        let mut quote = [types(echo.guest).request, 0, 0, 0, 0, 0, 0, 0];
        quote[4..6].copy_from_slice(&echo.ident.to_be_bytes());
        quote[6..].copy_from_slice(&sequence.to_be_bytes());
        let protocol = if echo.guest.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
        Self { reason, guest: echo.guest, remote: echo.remote, protocol, quote }
    }

    /// The message, without its checksum.
    pub(crate) fn message(&self) -> Vec<u8> {
        let (kind, code, rest) = self.reason.code(self.guest);
        let (source, destination) = (IpAddress::from(self.guest), IpAddress::from(self.remote));
        let header = IpRepr::new(source, destination, self.protocol, QUOTE, 63);
        let mut message = vec![0; ERROR_HEADER + header.header_len()];
        message[..2].copy_from_slice(&[kind, code]);
        message[4..ERROR_HEADER].copy_from_slice(&rest.to_be_bytes());
        header.emit(&mut message[ERROR_HEADER..], &ChecksumCapabilities::default());
        message.extend(self.quote);
        message
    }
}

fn ports(guest: SocketAddr, remote: SocketAddr) -> [u8; QUOTE] {
    let mut quote = [0; QUOTE];
    quote[..2].copy_from_slice(&guest.port().to_be_bytes());
    quote[2..4].copy_from_slice(&remote.port().to_be_bytes());
    quote
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const PEER6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

    #[test]
    fn replies_are_read_with_and_without_an_ip_header() {
        let reply = Some(EchoMessage { ident: 0x0102, sequence: 7, data: b"x" });
        let bare = [0, 0, 9, 9, 1, 2, 0, 7, b'x'];
        assert_eq!(EchoMessage::read_reply(PEER, &bare), reply);
        let mut whole = vec![0x45; 20];
        whole.extend(bare);
        assert_eq!(EchoMessage::read_reply(PEER, &whole), reply);
        assert_eq!(EchoMessage::read_reply(PEER6, &[129, 0, 9, 9, 1, 2, 0, 7, b'x']), reply);
        for nonsense in [&[][..], &[0x4f, 0], &[3, 0, 0, 0, 0, 0, 0, 0], &bare[..7]] {
            assert_eq!(EchoMessage::read_reply(PEER, nonsense), None, "{nonsense:?}");
            assert_eq!(EchoMessage::read_reply(PEER6, nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn requests_carry_sequence_and_data() {
        let message = EchoMessage { ident: 9, sequence: 0x0102, data: b"ab" };
        assert_eq!(message.request(PEER), [8, 0, 0, 0, 0, 0, 1, 2, b'a', b'b']);
        assert_eq!(message.request(PEER6), [128, 0, 0, 0, 0, 0, 1, 2, b'a', b'b']);
        assert_eq!(message.reply(PEER6), [129, 0, 0, 0, 0, 9, 1, 2, b'a', b'b']);
    }

    #[test]
    fn errors_quote_the_packet_and_tell_what_passes() {
        let ends = |guest: &str, remote: &str| (guest.parse().unwrap(), remote.parse().unwrap());
        let (guest, remote) = ends("198.18.0.2:1000", "10.0.0.1:53");
        let message = Notice::udp(Reason::TooLarge { mtu: 1400 }, guest, remote, 20).message();
        assert_eq!(message[..8], [3, 4, 0, 0, 0, 0, 0x05, 0x78]);
        assert_eq!((message[8], message[8 + 9]), (0x45, 17));
        assert_eq!(message[28..], [0x03, 0xe8, 0, 53, 0, 28, 0, 0]);
        let (guest, remote) = ends("[fd00::2]:1000", "[2001:db8::1]:53");
        let message = Notice::udp(Reason::TooLarge { mtu: 1400 }, guest, remote, 20).message();
        assert_eq!(message[..8], [2, 0, 0, 0, 0, 0, 0x05, 0x78]);
        assert_eq!((message[8], message[8 + 6]), (0x60, 17));
        assert_eq!(message[48..], [0x03, 0xe8, 0, 53, 0, 28, 0, 0]);
    }
}

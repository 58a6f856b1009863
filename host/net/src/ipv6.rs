//! IPv6 packets taken apart (RFC 8200): the header, and the extension headers that a guest on one link may use.

use std::net::Ipv6Addr;

use smoltcp::wire::IpProtocol;

/// Bytes of the header.
pub(crate) const HEADER_BYTES: usize = 40;
/// Bytes of a fragment header (§4.5).
pub(crate) const FRAGMENT_HEADER_BYTES: usize = 8;
/// Extension headers in a row that are looked through. Honest packets have one or two.
const EXTENSIONS_MAX: usize = 8;

/// A packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packet<'a> {
    pub(crate) source: Ipv6Addr,
    pub(crate) destination: Ipv6Addr,
    pub(crate) hops: u8,
    /// What the payload is: never an extension header that is looked through here.
    pub(crate) protocol: IpProtocol,
    pub(crate) payload: &'a [u8],
    /// Set when the payload is only a piece of it.
    pub(crate) fragment: Option<Fragment>,
}

/// Which piece of its packet a fragment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) ident: u32,
    pub(crate) offset: usize,
    pub(crate) more: bool,
}

/// Reads a packet; `None` when it makes no sense. Bytes behind its end are padding.
pub(crate) fn parse(bytes: &[u8]) -> Option<Packet<'_>> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let length = u16::from_be_bytes([header[4], header[5]]);
    let address = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&header[at..at + 16]);
        Ipv6Addr::from(octets)
    };
    let (protocol, payload) = upper(IpProtocol::from(header[6]), rest.get(..length.into())?)?;
    let packet = Packet {
        source: address(8),
        destination: address(24),
        hops: header[7],
        protocol,
        payload,
        fragment: None,
    };
    if protocol != IpProtocol::Ipv6Frag {
        return Some(packet);
    }
    let (header, piece) = payload.split_first_chunk::<FRAGMENT_HEADER_BYTES>()?;
    let [next, _, high, low, ident @ ..] = *header;
    let place = u16::from_be_bytes([high, low]);
    let fragment =
        Fragment { ident: u32::from_be_bytes(ident), offset: usize::from(place & !7), more: place & 1 != 0 };
    let protocol = IpProtocol::from(next);
    if fragment.offset == 0 && !fragment.more {
        // A fragment that is the whole of it (RFC 6946).
        let (protocol, payload) = upper(protocol, piece)?;
        return Some(Packet { protocol, payload, ..packet });
    }
    Some(Packet { protocol, payload: piece, fragment: Some(fragment), ..packet })
}

/// Looks through options, for everybody on the way and for the destination: none means anything to a NAT.
pub(crate) fn upper(mut protocol: IpProtocol, mut bytes: &[u8]) -> Option<(IpProtocol, &[u8])> {
    for _ in 0..EXTENSIONS_MAX {
        if !matches!(protocol, IpProtocol::HopByHop | IpProtocol::Ipv6Opts) {
            return Some((protocol, bytes));
        }
        let [next, length, ..] = *bytes else { return None };
        protocol = IpProtocol::from(next);
        bytes = bytes.get((usize::from(length) + 1) * 8..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 64];
        bytes.extend(Ipv6Addr::LOCALHOST.octets());
        bytes.extend(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9).octets());
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn options_are_looked_through_and_padding_is_cut_off() {
        let mut bytes =
            packet(0, &[&[60, 0, 5, 2, 0, 0, 0, 0][..], &[17, 0, 1, 4, 0, 0, 0, 0], b"udp"].concat());
        bytes.extend(b"padding");
        let packet = parse(&bytes).unwrap();
        assert_eq!((packet.protocol, packet.payload), (IpProtocol::Udp, &b"udp"[..]));
        assert_eq!((packet.source, packet.hops), (Ipv6Addr::LOCALHOST, 64));
        assert_eq!(packet.fragment, None);
    }

    #[test]
    fn fragments_are_told_from_whole_packets() {
        let bytes = packet(44, &[&[17, 0, 0x05, 0xa9, 1, 2, 3, 4][..], b"piece"].concat());
        let piece = parse(&bytes).unwrap();
        let expected = Fragment { ident: 0x0102_0304, offset: 0x05a8, more: true };
        assert_eq!((piece.fragment, piece.payload), (Some(expected), &b"piece"[..]));
        let bytes = packet(44, &[&[17, 0, 0, 0, 1, 2, 3, 4][..], b"whole"].concat());
        let whole = parse(&bytes).unwrap();
        assert_eq!((whole.fragment, whole.protocol, whole.payload), (None, IpProtocol::Udp, &b"whole"[..]));
    }

    #[test]
    fn what_ends_too_early_or_never_makes_no_sense() {
        assert_eq!(parse(&packet(0, &[17, 1, 0, 0, 0, 0, 0, 0])), None);
        assert_eq!(parse(&packet(44, &[17, 0, 0, 0])), None);
        assert_eq!(parse(&packet(60, &[60, 0, 0, 0, 0, 0, 0, 0].repeat(9))), None);
        let mut short = packet(17, b"four");
        short.pop();
        assert_eq!(parse(&short), None);
        assert_eq!(parse(&[0x45; 60]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..200), next in any::<u8>()) {
            if let [first, .., ] = &mut bytes[..] {
                *first = 0x60;
            }
            parse(&bytes);
            upper(IpProtocol::from(next), &bytes);
        }
    }
}

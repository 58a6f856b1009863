//! Which socket is in the way of a port: the kernel's tables of sockets, read (`man 5 proc_net`).
//!
//! Both halves refuse a taken port with the process that holds it: the daemon for its host, the engine where it runs
//! directly on one. Reading the tables' text is here; opening the files is theirs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::lease::Transport;

/// TCP's state of a socket that listens.
const LISTENING: &str = "0A";

/// The names of a protocol's tables below `/proc/net`.
#[must_use]
pub fn tables(transport: Transport) -> &'static [&'static str] {
    match transport {
        Transport::Tcp => &["tcp", "tcp6"],
        Transport::Udp => &["udp", "udp6"],
        // The kernel's SCTP has tables of another form, and nothing here binds it.
        Transport::Sctp => &[],
    }
}

/// A socket that holds a port, from one of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where. An IPv4 address in IPv6's clothes is an IPv4 address.
    pub address: SocketAddr,
    /// Which: the number in `/proc/PID/fd/N -> socket:[NUMBER]`. 0 for one that no process has open.
    pub inode: u64,
    /// It talks to one peer only (UDP): nobody else can reach it, and still nobody else can have its port.
    pub is_connected: bool,
}

impl Listener {
    /// Whether a socket at `wanted` cannot be bound because of this one.
    #[must_use]
    pub fn is_in_the_way_of(&self, wanted: SocketAddr) -> bool {
        let (own, wanted_ip) = (self.address.ip(), wanted.ip());
        let is_same_family = own.is_ipv6() == wanted_ip.is_ipv6();
        self.address.port() == wanted.port()
            && (own == wanted_ip
                // A listener at `::` has IPv4's addresses too, unless it was told not to; that cannot be seen.
                || own.is_unspecified() && (is_same_family || own.is_ipv6())
                || wanted_ip.is_unspecified() && is_same_family)
    }
}

/// The sockets in a table that hold a port: TCP's that listen, all of UDP.
///
/// Lines that make no sense are passed over.
pub fn listeners(table: &str, transport: Transport) -> impl Iterator<Item = Listener> {
    table.lines().skip(1).filter_map(move |line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let listener = Listener {
            address: endpoint(fields.get(1)?)?,
            inode: fields.get(9)?.parse().ok()?,
            is_connected: endpoint(fields.get(2)?)?.port() != 0,
        };
        (transport != Transport::Tcp || *fields.get(3)? == LISTENING).then_some(listener)
    })
}

/// `0100007F:1F90`: words of network byte order, printed as native numbers, and a port.
fn endpoint(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words: Vec<[u8; 4]> = (0..address.len().div_ceil(8))
        .map(|at| u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes))
        .collect::<Option<_>>()?;
    let address: IpAddr = match words.as_slice() {
        [word] => Ipv4Addr::from(*word).into(),
        [a, b, c, d] => Ipv6Addr::from([*a, *b, *c, *d].concat().first_chunk().copied()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
        0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n\
        1: 0100007F:1F90 0100007F:C000 01 00000000:00000000 00:00000000 00000000     0        0 4712 1\n\
        2: 00000000:0050 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4713 1\n\
        3: nonsense\n";

    fn in_the_way(transport: Transport, wanted: &str) -> Vec<u64> {
        let wanted = wanted.parse().unwrap();
        let all = listeners(TABLE, transport);
        all.filter(|listener| listener.is_in_the_way_of(wanted)).map(|listener| listener.inode).collect()
    }

    #[test]
    fn listeners_stand_in_the_way_of_their_own_addresses_only() {
        assert_eq!(in_the_way(Transport::Tcp, "127.0.0.1:8080"), [4711], "a connection is not in the way");
        assert_eq!(in_the_way(Transport::Tcp, "0.0.0.0:8080"), [4711], "it is in the way of all addresses");
        assert_eq!(in_the_way(Transport::Tcp, "127.0.0.2:8080"), Vec::<u64>::new());
        assert_eq!(in_the_way(Transport::Tcp, "[::]:8080"), Vec::<u64>::new());
        assert_eq!(in_the_way(Transport::Udp, "10.0.0.1:80"), [4713]);
        assert_eq!(in_the_way(Transport::Udp, "10.0.0.1:81"), Vec::<u64>::new());
    }

    #[test]
    fn a_listener_at_all_ipv6_addresses_has_ipv4s_too() {
        let both = Listener { address: "[::]:80".parse().unwrap(), inode: 1, is_connected: false };
        assert!(both.is_in_the_way_of("10.0.0.1:80".parse().unwrap()));
        let four = Listener { address: "0.0.0.0:80".parse().unwrap(), inode: 1, is_connected: false };
        assert!(!four.is_in_the_way_of("[::1]:80".parse().unwrap()));
    }

    #[test]
    fn addresses_are_read_in_both_families() {
        assert_eq!(endpoint("00000000000000000000000001000000:0050"), Some("[::1]:80".parse().unwrap()));
        assert_eq!(
            endpoint("0000000000000000FFFF00000100007F:0050"),
            Some("127.0.0.1:80".parse().unwrap()),
            "IPv4 in IPv6's clothes"
        );
        for nonsense in ["", ":", "0100007F", "0100007F:", "0100007:0050", "0100007F01:0050", "x:y"] {
            assert_eq!(endpoint(nonsense), None, "{nonsense}");
        }
    }

    proptest! {
        #[test]
        fn foreign_text_does_no_harm(text in ".{0,300}") {
            let table = format!("heading\n{text}");
            prop_assert!(listeners(&table, Transport::Tcp).count() < table.lines().count());
        }
    }
}

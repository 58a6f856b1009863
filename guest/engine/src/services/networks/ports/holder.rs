//! Which process holds a port: for the sentence that refuses one.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use guest_network::Protocol;

/// TCP's state of a socket that listens, in the kernel's table.
const LISTENING: &str = "0A";

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pid: u32,
    name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "process {}, `{}`", self.pid, self.name)
    }
}

/// The process that has a socket in the way of one at `address`. `None` when it cannot be told: it is another user's,
/// or has gone meanwhile.
pub fn find(protocol: Protocol, address: SocketAddr) -> Option<Holder> {
    let tables: &[&str] = match protocol {
        Protocol::Tcp => &["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => &["/proc/net/udp", "/proc/net/udp6"],
        Protocol::Sctp => return None,
    };
    let read = |path: &&str| std::fs::read_to_string(path).unwrap_or_default();
    let inode = tables.iter().find_map(|path| inode(&read(path), protocol, address))?;
    process(&format!("socket:[{inode}]"))
}

/// The number of the socket in the way, in one of the kernel's tables.
fn inode(table: &str, protocol: Protocol, wanted: SocketAddr) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (address, port) = fields.get(1)?.split_once(':')?;
        let address = hex_address(address)?;
        let clashes = u16::from_str_radix(port, 16).ok()? == wanted.port()
            && (address == wanted.ip()
                || address.is_unspecified()
                || (wanted.ip().is_unspecified() && address.is_ipv6() == wanted.is_ipv6()))
            && (protocol == Protocol::Udp || *fields.get(3)? == LISTENING);
        clashes.then(|| fields.get(9)?.parse().ok()).flatten()
    })
}

/// Words of network byte order, printed as native numbers.
fn hex_address(text: &str) -> Option<IpAddr> {
    let words: Vec<[u8; 4]> = (0..text.len() / 8)
        .map(|at| u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes))
        .collect::<Option<_>>()?;
    match words.as_slice() {
        [word] => Some(Ipv4Addr::from(*word).into()),
        [a, b, c, d] => {
            let octets: [u8; 16] = [*a, *b, *c, *d].concat().try_into().ok()?;
            Some(Ipv6Addr::from(octets).to_canonical())
        }
        _ => None,
    }
}

fn process(socket: &str) -> Option<Holder> {
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(descriptors) = std::fs::read_dir(entry.path().join("fd")) else { continue };
        let holds = descriptors
            .flatten()
            .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == socket));
        if holds {
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            return Some(Holder { pid, name: name.trim().to_owned() });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn the_kernels_tables_are_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n\
            1: 00000000:0050 00000000:0000 01 00000000:00000000 00:00000000 00000000     0        0 4712 1\n";
        let find = |address: &str| inode(table, Protocol::Tcp, address.parse().unwrap());
        assert_eq!(find("127.0.0.1:8080"), Some(4711));
        assert_eq!(find("0.0.0.0:8080"), Some(4711), "it is in the way of all addresses");
        assert_eq!(find("10.0.0.1:8080"), None);
        assert_eq!(find("0.0.0.0:80"), None, "a connection is not in the way");
        assert_eq!(inode(table, Protocol::Udp, "10.0.0.1:80".parse().unwrap()), Some(4712));
        assert_eq!(inode("garbage\nmore garbage\n", Protocol::Tcp, "10.0.0.1:80".parse().unwrap()), None);
        assert_eq!(hex_address("00000000000000000000000001000000"), Some("::1".parse().unwrap()));
    }

    #[test]
    fn our_own_socket_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let holder = find(Protocol::Tcp, listener.local_addr().unwrap()).unwrap();
        assert_eq!(holder.pid, std::process::id());
    }
}

//! Which process holds a port: for the sentence that refuses one.

use std::fmt;
use std::net::SocketAddr;

use guest_network::Protocol;
use guest_protocol::{Transport, sockets};

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
    let transport = match protocol {
        Protocol::Tcp => Transport::Tcp,
        Protocol::Udp => Transport::Udp,
        Protocol::Sctp => Transport::Sctp,
    };
    sockets::tables(transport).iter().find_map(|table| {
        let table = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        let found = sockets::listeners(&table, transport).find(|one| one.is_in_the_way_of(address));
        process(&format!("socket:[{}]", found?.inode))
    })
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
    fn our_own_socket_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let holder = find(Protocol::Tcp, listener.local_addr().unwrap()).unwrap();
        assert_eq!(holder.pid, std::process::id());
    }
}

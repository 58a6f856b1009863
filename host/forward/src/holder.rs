//! Who holds a port: the kernel's socket tables, and the process that has the socket open.

use std::fmt;
use std::net::SocketAddr;

use guest_protocol::Transport;
#[cfg(target_os = "linux")]
use guest_protocol::sockets;

/// A process with a socket on a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: i32,
    /// Its name, as the kernel keeps it.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "process {}, `{}`", self.pid, self.name)
    }
}

impl Holder {
    /// Who stands in the way of binding `address`; `None` when that cannot be seen, as with other users' processes.
    #[cfg(target_os = "linux")]
    pub fn of(transport: Transport, address: SocketAddr) -> Option<Self> {
        let listeners = sockets::tables(transport).iter().flat_map(|table| {
            let table = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
            sockets::listeners(&table, transport).collect::<Vec<_>>()
        });
        let sockets: Vec<String> = listeners
            .filter(|listener| listener.is_in_the_way_of(address))
            .map(|listener| format!("socket:[{}]", listener.inode))
            .collect();
        if sockets.is_empty() {
            return None;
        }
        std::fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            let open = std::fs::read_dir(process.path().join("fd")).ok()?;
            open.flatten().find(|fd| {
                std::fs::read_link(fd.path()).is_ok_and(|target| {
                    target.to_str().is_some_and(|target| sockets.iter().any(|socket| socket == target))
                })
            })?;
            let name = std::fs::read_to_string(process.path().join("comm")).ok()?.trim().to_owned();
            Some(Self { pid, name })
        })
    }

    /// Who stands in the way of binding `address`: not known on this system.
    #[cfg(not(target_os = "linux"))]
    pub fn of(_transport: Transport, _address: SocketAddr) -> Option<Self> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn our_own_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let holder = Holder::of(Transport::Tcp, listener.local_addr().unwrap()).unwrap();
        assert_eq!(holder.pid, i32::try_from(std::process::id()).unwrap());
        // The same port of another address is nobody's business.
        let neighbour = SocketAddr::from(([127, 0, 0, 77], listener.local_addr().unwrap().port()));
        assert_ne!(Holder::of(Transport::Tcp, neighbour), Some(holder));
    }
}

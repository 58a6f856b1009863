//! Who holds a port: the kernel's socket tables, and the process that has the socket open.

use std::fmt;
use std::net::SocketAddr;

use guest_protocol::Transport;

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
        let tables: &[&str] = match transport {
            Transport::Tcp => &["tcp", "tcp6"],
            Transport::Udp => &["udp", "udp6"],
            Transport::Sctp => &[],
        };
        let sockets: Vec<String> = tables
            .iter()
            .filter_map(|table| std::fs::read_to_string(format!("/proc/net/{table}")).ok())
            .flat_map(|table| inodes(&table, transport, address.port()))
            .map(|inode| format!("socket:[{inode}]"))
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

/// The sockets bound to a port in one of the kernel's tables (`man 5 proc_net`): a heading, then one line each with
/// the local address as hexadecimal in the second column, the state in the fourth and the inode in the tenth.
#[cfg(target_os = "linux")]
fn inodes(table: &str, transport: Transport, port: u16) -> Vec<u64> {
    const LISTEN: &str = "0A";
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let columns: Vec<&str> = line.split_ascii_whitespace().collect();
            let (_, local_port) = columns.get(1)?.rsplit_once(':')?;
            let bound = u16::from_str_radix(local_port, 16).ok()? == port;
            let listens = transport != Transport::Tcp || *columns.get(3)? == LISTEN;
            let inode = columns.get(9)?.parse().ok()?;
            (bound && listens && inode != 0).then_some(inode)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_table_is_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0 100 0\n   \
                     1: 0100007F:1F90 0100007F:C000 01 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0 20 4\n   \
                     2: nonsense\n";
        assert_eq!(inodes(table, Transport::Tcp, 8080), [4711]);
        assert_eq!(inodes(table, Transport::Udp, 8080), [4711, 4712]);
        assert_eq!(inodes(table, Transport::Tcp, 80), Vec::<u64>::new());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn our_own_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let holder = Holder::of(Transport::Tcp, listener.local_addr().unwrap()).unwrap();
        assert_eq!(holder.pid, i32::try_from(std::process::id()).unwrap());
    }
}

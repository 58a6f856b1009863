//! Containers on the machine's own network (`--network host`) listen where nobody on the computer around it looks. So
//! what they listen at is held on the computer's loopback addresses too, for as long as they listen.
//!
//! Nobody tells when a process begins to listen: while such containers run, the kernel's tables are looked at every
//! [`PERIOD`], and whose a socket is only when they have changed. Ports that cannot be had are told in the log; the
//! container runs on, as it does where a computer's own programs compete for a port.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use guest_network::forwarding;
use guest_protocol::sockets::{self, Listener};
use guest_protocol::{GrantedPort, PortRequest, Transport};
use rustix::net::sockopt::ipv6_v6only;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tokio_util::sync::CancellationToken;

use super::service::Networks;
use super::state::{Place, State};
use super::{landings, routes};
use crate::failure::Failure;
use crate::host::HostLeases;

/// Between two looks at the kernel's tables.
const PERIOD: Duration = Duration::from_secs(1);
/// UDP ports from here on are those of clients (the kernel's `ip_local_port_range`).
const EPHEMERAL_FIRST: u16 = 32768;
/// Ports one container can have on the computer.
const PORTS_MAX: usize = 1024;

/// A port that a container listens at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wish {
    container: String,
    transport: Transport,
    port: u16,
}

/// What is held for a [`Wish`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Led {
    /// Where it is answered, in the machine.
    pub target: SocketAddr,
    /// Where it is heard, on the computer.
    pub ports: Vec<GrantedPort>,
    /// The port of the landing addresses that is its own: see [`landings`].
    pub landing: Option<u16>,
}

impl Wish {
    /// The name of its lease: each port has one, so that one that is taken is not in the others' way.
    pub fn lease(&self) -> String {
        format!("{}/{}/{}", self.container, self.transport, self.port)
    }

    fn request(&self) -> PortRequest {
        PortRequest {
            transport: self.transport,
            addresses: vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
            first: self.port,
            last: self.port,
            container_port: self.port,
        }
    }
}

/// The kernel's tables as they are.
fn tables() -> Vec<(Transport, String)> {
    let read = |transport| {
        sockets::tables(transport).iter().map(move |table| {
            (transport, std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default())
        })
    };
    read(Transport::Tcp).chain(read(Transport::Udp)).collect()
}

/// The sockets in them that wait for others.
fn waiting(tables: &[(Transport, String)]) -> BTreeMap<u64, (Transport, SocketAddr)> {
    let is_open = |transport: Transport, listener: &Listener| {
        let is_clients = transport == Transport::Udp && listener.address.port() >= EPHEMERAL_FIRST;
        listener.inode != 0 && !listener.is_connected && !is_clients
    };
    tables
        .iter()
        .flat_map(|(transport, table)| {
            sockets::listeners(table, *transport)
                .filter(|listener| is_open(*transport, listener))
                .map(|listener| (listener.inode, (*transport, listener.address)))
        })
        .collect()
}

/// Whose a socket is.
struct Owner {
    container: String,
    /// Of one at all IPv6 addresses: IPv4 reaches it too. The kernel's tables do not tell.
    hears_ipv4: bool,
}

/// Which of the containers have which of the sockets open, by the names of their processes' cgroups.
fn owners(containers: &[String], waiting: &BTreeMap<u64, (Transport, SocketAddr)>) -> BTreeMap<u64, Owner> {
    let mut owners = BTreeMap::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        // A process that ends while it is looked at has nothing open.
        let Ok(cgroup) = std::fs::read_to_string(process.path().join("cgroup")) else { continue };
        let Some(container) = containers.iter().find(|id| cgroup.contains(id.as_str())) else { continue };
        for descriptor in std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let Ok(target) = std::fs::read_link(descriptor.path()) else { continue };
            let inode = target.to_str().and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']'));
            let Some(inode) = inode.and_then(|inode| inode.parse().ok()) else { continue };
            let Some((_, address)) = waiting.get(&inode) else { continue };
            let is_for_all = *address == SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port());
            let hears_ipv4 = is_for_all && hears_ipv4(&process.file_name(), &descriptor.file_name());
            owners.insert(inode, Owner { container: container.clone(), hears_ipv4 });
        }
    }
    owners
}

/// Whether an IPv6 socket is reached by IPv4 too; `false` when its process has ended.
fn hears_ipv4(process: &OsStr, descriptor: &OsStr) -> bool {
    let number = |name: &OsStr| name.to_str().and_then(|text| text.parse().ok());
    let (Some(process), Some(descriptor)) = (number(process).and_then(Pid::from_raw), number(descriptor))
    else {
        return false;
    };
    let socket = pidfd_open(process, PidfdFlags::empty())
        .and_then(|process| pidfd_getfd(process, descriptor, PidfdGetfdFlags::empty()));
    socket.and_then(ipv6_v6only).is_ok_and(|only| !only)
}

/// What is to be held, and where in the machine it leads.
fn wishes(
    waiting: &BTreeMap<u64, (Transport, SocketAddr)>,
    owners: &BTreeMap<u64, Owner>,
) -> BTreeMap<Wish, SocketAddr> {
    let mut wishes: BTreeMap<Wish, SocketAddr> = BTreeMap::new();
    for (inode, owner) in owners {
        let Some((transport, address)) = waiting.get(inode) else { continue };
        let wish = Wish { container: owner.container.clone(), transport: *transport, port: address.port() };
        let ip = match address.ip() {
            ip if !ip.is_unspecified() => ip,
            IpAddr::V6(_) if !owner.hears_ipv4 => Ipv6Addr::LOCALHOST.into(),
            _ => Ipv4Addr::LOCALHOST.into(),
        };
        let target = SocketAddr::new(ip, address.port());
        // Of several sockets on one port the one that hears IPv4.
        let known = wishes.entry(wish).or_insert(target);
        if known.is_ipv6() && target.is_ipv4() {
            *known = target;
        }
    }
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    wishes.retain(|wish, _| {
        let count = counts.entry(wish.container.clone()).or_default();
        *count += 1;
        *count <= PORTS_MAX
    });
    wishes
}

/// Where a port of a container on the machine's own network is heard on the computer, or why it is not. `None` where
/// it has not been seen to listen there yet.
pub(super) fn led(
    state: &State,
    container: &str,
    (transport, port): (Transport, u16),
) -> Option<Result<Vec<GrantedPort>, String>> {
    let wish = Wish { container: container.to_owned(), transport, port };
    let led = state.led.get(&wish).map(|led| Ok(led.ports.clone()));
    led.or_else(|| state.not_led.get(&wish).cloned().map(Err))
}

impl Networks {
    /// Keeps the computer's loopback addresses equal to what containers on the machine's own network listen at.
    /// Returns at `stop`, or at once where the engine runs directly on the computer.
    pub async fn follow_listeners(self: Arc<Self>, stop: CancellationToken) {
        let Some(outside) = self.outside.clone() else { return };
        let mut before = (Vec::new(), BTreeMap::new());
        loop {
            let next = async {
                match before.0.is_empty() {
                    // There is nobody to look at.
                    true => self.joined_host.notified().await,
                    false => tokio::time::sleep(PERIOD).await,
                }
            };
            if stop.run_until_cancelled(next).await.is_none() {
                return;
            }
            let containers: Vec<String> = {
                let state = self.state();
                let on_host = state.members.iter().filter(|(_, member)| member.place == Place::Host);
                on_host.map(|(id, _)| id.clone()).collect()
            };
            let looked = tokio::task::spawn_blocking(move || {
                let waiting = if containers.is_empty() { BTreeMap::new() } else { waiting(&tables()) };
                if (&containers, &waiting) == (&before.0, &before.1) {
                    return (None, before);
                }
                let owners = owners(&containers, &waiting);
                (Some(wishes(&waiting, &owners)), (containers, waiting))
            });
            // Only an engine that is ending loses its threads.
            let Ok((wishes, now)) = looked.await else { return };
            before = now;
            if let Some(wishes) = wishes {
                self.lead(&outside, wishes).await;
            }
        }
    }

    async fn lead(&self, outside: &HostLeases, wishes: BTreeMap<Wish, SocketAddr>) {
        let gone: Vec<Wish> = {
            let mut state = self.state();
            let gone: Vec<Wish> =
                state.led.keys().filter(|wish| !wishes.contains_key(*wish)).cloned().collect();
            gone.iter().for_each(|wish| drop(state.led.remove(wish)));
            state.not_led.retain(|wish, _| wishes.contains_key(wish));
            gone
        };
        gone.iter().for_each(|wish| outside.release(&wish.lease()));
        let mut changed = Vec::new();
        for (wish, target) in wishes {
            {
                let mut state = self.state();
                if let Some(led) = state.led.get_mut(&wish) {
                    if std::mem::replace(&mut led.target, target) != target {
                        changed.push(wish);
                    }
                    continue;
                }
                if state.not_led.contains_key(&wish) {
                    continue;
                }
            }
            match outside.acquire(&wish.lease(), vec![wish.request()]).await {
                Ok(ports) => {
                    let mut state = self.state();
                    let landing =
                        if wish.transport == Transport::Tcp { landings::next(&mut state) } else { None };
                    state.led.insert(wish.clone(), Led { target, ports, landing });
                    changed.push(wish);
                }
                Err(error) => {
                    tracing::warn!(container = &wish.container[..12], port = wish.port, transport = %wish.transport,
                        %error, "what it listens at cannot be reached on the computer's localhost");
                    self.state().not_led.insert(wish, error.to_string());
                }
            }
        }
        if !(gone.is_empty() && changed.is_empty()) {
            self.land_led(outside, &changed).await;
        }
    }

    /// Has the kernel lead connections to what is listened at, as far as it can, and the computer bring them there. Those for
    /// which it fails come by way of this engine, as all others do.
    async fn land_led(&self, outside: &HostLeases, changed: &[Wish]) {
        if let Err(failure) = self.let_landings_reach_loopback().await {
            tracing::warn!(error = %failure.message, "what listens on the machine's own network is reached by way of the engine");
            return;
        }
        for wish in changed {
            let landing = self.state().led.get(wish).and_then(landings::of_led).map(|(landing, _)| landing);
            if let Err(error) = outside.land(&wish.lease(), landing.into_iter().collect()).await {
                tracing::warn!(container = &wish.container[..12], port = wish.port, %error, "it is reached by way of the engine");
            }
        }
    }

    async fn let_landings_reach_loopback(&self) -> Result<(), Failure> {
        let uplink = routes::uplink().ok_or_else(|| Failure::broken("the machine has no default route"))?;
        forwarding::enable_loopback(&uplink)
            .map_err(|error| Failure::internal("cannot lead connections to loopback addresses", &error))?;
        self.firewall.refresh().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};
    use std::net::TcpListener;

    #[test]
    fn what_waits_for_others_is_led_and_nothing_else() {
        let table = |lines: &[&str]| format!("heading\n{}\n", lines.join("\n"));
        let line = |local: &str, remote: &str, state: &str, inode: u64| {
            format!("0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1")
        };
        let tcp = table(&[
            &line("0100007F:1F90", "00000000:0000", "0A", 1),
            &line("0100007F:1F90", "0100007F:C000", "01", 2),
        ]);
        let six = table(&[&line(
            "00000000000000000000000000000000:1F91",
            "00000000000000000000000000000000:0000",
            "0A",
            3,
        )]);
        let udp = table(&[
            &line("00000000:0035", "00000000:0000", "07", 4),
            &line("00000000:C350", "00000000:0000", "07", 5),
            &line("00000000:0036", "0100007F:0035", "01", 6),
        ]);
        let found = waiting(&[(Transport::Tcp, tcp), (Transport::Tcp, six), (Transport::Udp, udp)]);
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [1, 3, 4]);

        for (hears_ipv4, target) in [(false, "[::1]:8081"), (true, "127.0.0.1:8081")] {
            let owner = |container: &str, hears_ipv4| Owner { container: container.to_owned(), hears_ipv4 };
            // 4 is another program's.
            let wishes = wishes(&found, &[(1, owner("a", false)), (3, owner("b", hears_ipv4))].into());
            let shown: Vec<(String, String)> =
                wishes.iter().map(|(wish, target)| (wish.lease(), target.to_string())).collect();
            let expected = [("a/tcp/8080", "127.0.0.1:8080"), ("b/tcp/8081", target)];
            assert_eq!(shown, expected.map(|(lease, target)| (lease.to_owned(), target.to_owned())));
        }
    }

    #[test]
    fn our_own_sockets_are_ours_and_tell_whether_they_hear_ipv4() {
        let for_all = |only| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
            socket.set_only_v6(only).unwrap();
            socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into()).unwrap();
            socket.listen(1).unwrap();
            TcpListener::from(socket)
        };
        for (listener, hears_ipv4) in [
            (TcpListener::bind("127.0.0.1:0").unwrap(), false),
            (for_all(false), true),
            (for_all(true), false),
        ] {
            let address = listener.local_addr().unwrap();
            let mut found = waiting(&tables());
            found.retain(|_, at| *at == (Transport::Tcp, address));
            // Every process is in some cgroup below the root.
            let owners: Vec<Owner> = owners(&["/".to_owned()], &found).into_values().collect();
            let [owner] = owners.as_slice() else { panic!("{} owners", owners.len()) };
            assert_eq!((owner.container.as_str(), owner.hears_ipv4), ("/", hears_ipv4), "{address}");
        }
    }
}

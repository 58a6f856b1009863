//! Where ports are published: the place whose addresses and other programs they have to get along with.
//!
//! Natively that is this computer. In the machine the computer around it is asked instead ([`crate::host`]), and a
//! [`Lease`] only tells where connections go.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use guest_network::Protocol;
use socket2::{Domain, Socket, Type};
use tokio::sync::watch;

use super::Published;
use super::holder;
use super::relay::{Relay, Target};
use super::wanted::Wanted;
use crate::failure::Failure;

/// Connections the kernel keeps for a relay to take.
const BACKLOG: i32 = 128;
/// Where ports are taken from when nobody names one, unless the kernel says otherwise.
const EPHEMERAL: (u16, u16) = (32768, 60999);
/// SCTP's number, for kernels that know it.
const IPPROTO_SCTP: i32 = 132;

/// The place ports are published at.
#[derive(Default)]
pub struct PortHost {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Who has what, for the sentence of a conflict between containers.
    taken: BTreeMap<(Protocol, u16, IpAddr), String>,
    /// The port given last to someone who named none: it is the next one's turn, so that a port is not used again at once.
    last: u16,
}

/// What one container holds. Dropping it lets go of sockets and relays, [`Lease::close`] waits for that;
/// [`PortHost::release`] lets go of the rest.
pub struct Lease {
    pub published: Vec<Published>,
    targets: watch::Sender<Target>,
    held: Vec<Held>,
}

impl Lease {
    fn new(target: Target) -> Self {
        Self { published: Vec::new(), targets: watch::Sender::new(target), held: Vec::new() }
    }

    /// Ports that somebody else holds for the container: the computer around the machine.
    pub fn elsewhere(published: Vec<Published>, target: Target) -> Self {
        Self { published, ..Self::new(target) }
    }

    /// Connections go there from now on.
    pub fn lead_to(&self, target: Target) {
        self.targets.send_replace(target);
    }

    /// Returns once all sockets are closed.
    pub async fn close(self) {
        for held in self.held {
            if let Held::Relayed(relay) = held {
                relay.close().await;
            }
        }
    }
}

/// One reserved port.
enum Held {
    /// Bound, and served by a relay where the kernel cannot lead packets.
    Relayed(Relay),
    /// Bound.
    Bound(#[expect(dead_code, reason = "held for its drop")] OwnedFd),
    /// The kernel has no sockets of this protocol: only our own table keeps it.
    Noted,
}

impl PortHost {
    /// Reserves everything, or nothing. `container` is its name for others' refusals, `target` where connections go.
    pub fn acquire(&self, container: &str, wanted: &[Wanted], target: Target) -> Result<Lease, Failure> {
        let mut lease = Lease::new(target);
        for one in wanted {
            if let Err(failure) = self.acquire_one(container, one, &mut lease) {
                self.release(&lease.published);
                return Err(failure);
            }
        }
        Ok(lease)
    }

    /// Takes again what a container had before the engine was restarted. What somebody else took meanwhile is told in
    /// the log; the firewall leads it to the container all the same.
    pub fn reacquire(&self, container: &str, published: &[Published], target: Target) -> Lease {
        let mut lease = Lease::new(target);
        for port in published {
            match self.hold(container, port, &lease.targets) {
                Ok(held) => lease.held.push(held),
                Err(error) => tracing::warn!(container, host = %port.host, port = port.host_port, %error,
                    "a published port cannot be reserved again"),
            }
            lease.published.push(port.clone());
        }
        lease
    }

    /// Lets others have these.
    pub fn release(&self, published: &[Published]) {
        let mut state = self.state();
        for port in published {
            state.taken.remove(&(port.protocol, port.host_port, port.host));
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn acquire_one(&self, container: &str, wanted: &Wanted, lease: &mut Lease) -> Result<(), Failure> {
        let hosts = match wanted.host {
            Some(host) => vec![host],
            None if has_ipv6() => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
            None => vec![Ipv4Addr::UNSPECIFIED.into()],
        };
        let candidates: Vec<u16> = match wanted.candidates() {
            Some(range) => range.collect(),
            None => self.ephemeral(),
        };
        let only_one = candidates.len() == 1;
        let mut refusal = None;
        for host_port in candidates {
            match self.acquire_at(container, wanted, &hosts, host_port, &lease.targets) {
                Ok(got) => {
                    if wanted.host_ports.is_none() {
                        self.state().last = host_port;
                    }
                    for (port, held) in got {
                        lease.published.push(port);
                        lease.held.push(held);
                    }
                    return Ok(());
                }
                Err(failure) if only_one => return Err(failure),
                Err(failure) => refusal = Some(failure),
            }
        }
        Err(refusal.unwrap_or_else(|| Failure::broken("all ports are allocated")))
    }

    /// One port on each of the addresses.
    fn acquire_at(
        &self,
        container: &str,
        wanted: &Wanted,
        hosts: &[IpAddr],
        host_port: u16,
        targets: &watch::Sender<Target>,
    ) -> Result<Vec<(Published, Held)>, Failure> {
        let mut got: Vec<(Published, Held)> = Vec::new();
        for host in hosts {
            let port = Published {
                protocol: wanted.protocol,
                container_port: wanted.container_port,
                host: *host,
                host_port,
            };
            match self.hold(container, &port, targets) {
                Ok(held) => got.push((port, held)),
                Err(failure) => {
                    let published: Vec<Published> = got.into_iter().map(|(port, _)| port).collect();
                    self.release(&published);
                    return Err(failure);
                }
            }
        }
        Ok(got)
    }

    fn hold(
        &self,
        container: &str,
        port: &Published,
        targets: &watch::Sender<Target>,
    ) -> Result<Held, Failure> {
        let (protocol, host, number) = (port.protocol, port.host, port.host_port);
        {
            let mut state = self.state();
            let clash = state.taken.iter().find(|((other, at, address), _)| {
                *other == protocol
                    && *at == number
                    && address.is_ipv6() == host.is_ipv6()
                    && (*address == host || address.is_unspecified() || host.is_unspecified())
            });
            if let Some((_, holder)) = clash {
                return Err(Failure::broken(format!(
                    "Bind for {host}:{number} failed: port is already allocated (published by container `{holder}`)"
                )));
            }
            state.taken.insert((protocol, number, host), container.to_owned());
        }
        let held = reserve(port, targets).map_err(|error| {
            let holder = if error.kind() == io::ErrorKind::AddrInUse {
                holder::find(protocol, SocketAddr::new(host, number))
            } else {
                None
            };
            let held_by = holder.map(|holder| format!(" (held by {holder})")).unwrap_or_default();
            let reason = match error.kind() {
                io::ErrorKind::AddrInUse => "address already in use".to_owned(),
                io::ErrorKind::AddrNotAvailable => "cannot assign requested address".to_owned(),
                _ => error.to_string(),
            };
            let host = SocketAddr::new(host, number);
            let to = targets
                .borrow()
                .address(host.is_ipv6())
                .map(|address| SocketAddr::new(address, port.container_port));
            let to = to.map(|to| format!(":{to}")).unwrap_or_default();
            Failure::broken(format!("failed to bind host port for {host}{to}/{protocol}: {reason}{held_by}"))
        });
        if held.is_err() {
            self.release(std::slice::from_ref(port));
        }
        held
    }

    /// Every port of the ephemeral range, beginning after the one given last.
    fn ephemeral(&self) -> Vec<u16> {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let mut words = text.split_whitespace().map(str::parse::<u16>);
        let (first, last) = match (words.next(), words.next()) {
            (Some(Ok(first)), Some(Ok(last))) if first <= last => (first, last),
            _ => EPHEMERAL,
        };
        let start = match self.state().last {
            given if (first..last).contains(&given) => given + 1,
            _ => first,
        };
        (start..=last).chain(first..start).collect()
    }
}

/// Binds the socket that keeps the port.
fn reserve(port: &Published, targets: &watch::Sender<Target>) -> io::Result<Held> {
    let address = SocketAddr::new(port.host, port.host_port);
    let domain = Domain::for_address(address);
    let only_ipv6 = |socket: &Socket| {
        // Else it would take IPv4's port too.
        if address.is_ipv6() { socket.set_only_v6(true) } else { Ok(()) }
    };
    match port.protocol {
        Protocol::Tcp => {
            let socket = Socket::new(domain, Type::STREAM, None)?;
            only_ipv6(&socket)?;
            socket.set_reuse_address(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&address.into())?;
            // Only a listening socket keeps all others away.
            socket.listen(BACKLOG)?;
            let listener = tokio::net::TcpListener::from_std(socket.into())?;
            Ok(Held::Relayed(Relay::tcp(listener, targets.subscribe(), port.container_port)))
        }
        Protocol::Udp => {
            let socket = Socket::new(domain, Type::DGRAM, None)?;
            only_ipv6(&socket)?;
            socket.set_nonblocking(true)?;
            socket.bind(&address.into())?;
            // What the kernel leads to the container itself never comes here.
            let needs_relay = address.is_ipv6();
            if !needs_relay {
                return Ok(Held::Bound(socket.into()));
            }
            let socket = tokio::net::UdpSocket::from_std(socket.into())?;
            Ok(Held::Relayed(Relay::udp(socket, targets.subscribe(), port.container_port)))
        }
        Protocol::Sctp => {
            match Socket::new(domain, Type::STREAM, Some(socket2::Protocol::from(IPPROTO_SCTP))) {
                Ok(socket) => {
                    only_ipv6(&socket)?;
                    socket.bind(&address.into())?;
                    Ok(Held::Bound(socket.into()))
                }
                Err(_) => Ok(Held::Noted),
            }
        }
    }
}

fn has_ipv6() -> bool {
    std::fs::read("/proc/net/if_inet6").is_ok_and(|table| !table.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(host: Option<IpAddr>, host_ports: Option<(u16, u16)>) -> Wanted {
        Wanted { protocol: Protocol::Tcp, container_port: 80, host, host_ports }
    }

    const TARGET: Target = Target { v4: Some(Ipv4Addr::LOCALHOST), v6: None };
    const LOOPBACK: Option<IpAddr> = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));

    #[tokio::test]
    async fn a_port_is_had_once_and_again_after_release() {
        let ports = PortHost::default();
        let first = ports.acquire("web", &[want(LOOPBACK, None)], TARGET).unwrap();
        let number = first.published[0].host_port;
        let again = [want(LOOPBACK, Some((number, number)))];
        let failure = ports.acquire("other", &again, TARGET).err().unwrap();
        assert_eq!(
            failure.message,
            format!(
                "Bind for 127.0.0.1:{number} failed: port is already allocated (published by container `web`)"
            )
        );
        ports.release(&first.published);
        first.close().await;
        let second = ports.acquire("other", &again, TARGET).unwrap();
        assert_eq!(second.published[0].host_port, number);
    }

    #[tokio::test]
    async fn all_or_nothing_and_the_holder_is_named() {
        let ports = PortHost::default();
        let mine = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = mine.local_addr().unwrap().port();
        let wanted = [want(LOOPBACK, None), want(LOOPBACK, Some((number, number)))];
        let failure = ports.acquire("web", &wanted, TARGET).err().unwrap();
        assert!(
            failure.message.starts_with(&format!(
                "failed to bind host port for 127.0.0.1:{number}:127.0.0.1:80/tcp: address already in use"
            )),
            "{failure}"
        );
        assert!(failure.message.contains(&format!("process {}", std::process::id())), "{failure}");
        assert!(ports.state().taken.is_empty());
    }

    #[tokio::test]
    async fn a_range_gives_the_first_free_one_and_random_ports_differ() {
        let ports = PortHost::default();
        let one = ports.acquire("a", &[want(LOOPBACK, None)], TARGET).unwrap();
        let two = ports.acquire("b", &[want(LOOPBACK, None)], TARGET).unwrap();
        let (first, second) = (one.published[0].host_port, two.published[0].host_port);
        assert_ne!(first, second);
        let range = want(LOOPBACK, Some((first, first + 200)));
        let three = ports.acquire("c", &[range], TARGET).unwrap();
        assert!(three.published[0].host_port > first);
    }
}

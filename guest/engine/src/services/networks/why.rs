//! Why a container's port answers, or does not: the way to it link by link, up to the first that is broken.

use std::net::{IpAddr, SocketAddr};

use guest_api::network::WayLink;
use guest_network::Protocol;
use guest_protocol::{GrantedPort, Transport, sockets};

use super::listening;
use super::ports::{self, Published};
use super::service::Networks;
use super::state::{Member, Place, State};
use crate::services::containers::{Phase, View};

/// A port of a container.
pub type Port = (Protocol, u16);

/// Adds a link that holds.
pub(super) fn holds(link: &str, says: String) -> WayLink {
    WayLink { link: link.to_owned(), holds: true, says, cure: String::new() }
}

pub(super) fn broken(link: &str, says: String, cure: String) -> WayLink {
    WayLink { link: link.to_owned(), holds: false, says, cure }
}

/// What a process hears, from the tables of its network namespace.
fn heard(pid: i32, transport: Transport) -> Vec<SocketAddr> {
    let read = |table: &&str| std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
    let tables = sockets::tables(transport).iter().map(read);
    let listeners = tables.flat_map(|table| sockets::listeners(&table, transport).collect::<Vec<_>>());
    listeners.filter(|listener| !listener.is_connected).map(|listener| listener.address).collect()
}

fn listener((protocol, port): Port, pid: i32, name: &str, is_host: bool) -> WayLink {
    let transport = match protocol {
        Protocol::Tcp => Transport::Tcp,
        Protocol::Udp => Transport::Udp,
        Protocol::Sctp => return holds("listener", format!("who listens at {port}/sctp cannot be seen")),
    };
    let (ours, others): (Vec<SocketAddr>, Vec<SocketAddr>) =
        heard(pid, transport).into_iter().partition(|address| address.port() == port);
    let open = ours.iter().find(|address| is_host || !address.ip().is_loopback());
    if let Some(address) = open {
        return holds("listener", format!("a program in {name} listens at {address}/{transport}"));
    }
    if let Some(address) = ours.first() {
        return broken(
            "listener",
            format!("the program in {name} listens at {address}/{transport} only, which is its own loopback"),
            format!("make the program listen at 0.0.0.0:{port}"),
        );
    }
    let mut ports: Vec<u16> = others.iter().map(SocketAddr::port).collect();
    ports.sort_unstable();
    ports.dedup();
    let instead = match ports.as_slice() {
        [] => format!("nothing in {name} listens at any {transport} port"),
        ports => {
            let ports: Vec<String> = ports.iter().take(8).map(ToString::to_string).collect();
            format!("nothing in {name} listens at {port}/{transport}, but at {}", ports.join(", "))
        }
    };
    broken(
        "listener",
        instead,
        format!("see `engine logs {name}` for whether its program started, and which port it uses"),
    )
}

fn networks(state: &State, member: &Member) -> WayLink {
    let nets = state.networks_of(member);
    let name = &member.record.name;
    for net in nets.clone() {
        let interface = &net.record.interface;
        if net.settings.bridge().is_some() && !super::raise::is_interface(interface) {
            return broken(
                "network",
                format!("the interface `{interface}` of network {} is gone", net.record.name),
                format!("`engine restart {name}` makes it again"),
            );
        }
    }
    let shown = |internal: bool| {
        let names = nets.clone().filter(|net| net.record.internal == internal);
        names.map(|net| net.record.name.clone()).collect::<Vec<_>>().join(", ")
    };
    let (open, sealed) = (shown(false), shown(true));
    if open.is_empty() {
        return broken(
            "network",
            format!("{name} is on internal networks only ({sealed}), which nothing outside reaches"),
            format!("`engine network connect bridge {name}`"),
        );
    }
    holds(
        "network",
        format!(
            "it is on {open}{}",
            if sealed.is_empty() { String::new() } else { format!(", and sealed on {sealed}") }
        ),
    )
}

fn leases(name: &str, (protocol, port): Port, published: &[Published]) -> WayLink {
    let at: Vec<String> = published
        .iter()
        .filter(|one| (one.protocol, one.container_port) == (protocol, port))
        .map(|one| SocketAddr::new(one.host, one.host_port).to_string())
        .collect();
    if at.is_empty() {
        return broken(
            "lease",
            format!("{port}/{protocol} of {name} is not published on the host"),
            format!("run it with `-p {port}:{port}{}`", if protocol == Protocol::Tcp { "" } else { "/udp" }),
        );
    }
    holds("lease", format!("{port}/{protocol} is published at {}", at.join(" and ")))
}

/// The same for a container on the machine's own network, whose listeners the computer's localhost has.
fn led_lease(name: &str, (protocol, port): Port, led: Option<Result<Vec<GrantedPort>, String>>) -> WayLink {
    match led {
        Some(Ok(ports)) => {
            let at: Vec<String> =
                ports.iter().map(|port| SocketAddr::new(port.address, port.port).to_string()).collect();
            holds("lease", format!("{port}/{protocol} is heard on the computer at {}", at.join(" and ")))
        }
        Some(Err(why)) => broken(
            "lease",
            format!("{port}/{protocol} of {name} is not heard on the computer's localhost: {why}"),
            format!("`engine restart {name}` tries again once that is put right"),
        ),
        None => broken(
            "lease",
            format!("{port}/{protocol} of {name} is not heard on the computer's localhost yet"),
            "wait a second: listeners of such containers are looked for that often".to_owned(),
        ),
    }
}

impl Networks {
    /// The links of the way to a container, or to one of its ports; the last one is the first that does not hold.
    pub async fn why(&self, view: &View, port: Option<Port>) -> Vec<WayLink> {
        let name = view.record.name.clone();
        let mut links = Vec::new();
        let Some(live) = view.live.as_ref().filter(|_| matches!(view.phase, Phase::Running | Phase::Paused))
        else {
            let says = format!("{name} does not run");
            let cure = format!("`engine start {name}`; `engine logs {name}` tells how it ended");
            return vec![broken("name", says, cure)];
        };
        links.push(holds("name", format!("{name} is container {}, and runs", view.record.short_id())));
        if view.phase == Phase::Paused {
            links.push(broken("name", format!("{name} is paused"), format!("`engine unpause {name}`")));
            return links;
        }
        let (mut found, is_host, published, way_in) = {
            let state = self.state();
            let Some(member) = state.members.get(&view.record.id) else {
                let says = format!("the engine has no network for {name}");
                links.push(broken("address", says, format!("`engine restart {name}`")));
                return links;
            };
            // One that uses another's network is reached as that one is.
            let owner = match &member.place {
                Place::Shared(other) => state.members.get(other).unwrap_or(member),
                Place::Own | Place::Host => member,
            };
            let way_in = super::foreign::way_in(&state, owner);
            (address(&state, owner), owner.place == Place::Host, owner.ports.clone(), way_in)
        };
        links.append(&mut found);
        if links.iter().any(|link| !link.holds) {
            return links;
        }
        let Some(port) = port else { return links };
        if !is_host {
            links.push(self.rules(&published).await);
            let hosts = published.iter().filter(|one| (one.protocol, one.container_port) == port);
            let hosts: Vec<IpAddr> = hosts.map(|one| one.host).collect();
            // What comes from the host itself is not passed on.
            if hosts.is_empty() || !hosts.iter().all(IpAddr::is_loopback) {
                links.extend(self.foreign_rules(way_in, port, !hosts.is_empty()).await);
            }
        }
        links.push(listener(port, live.pid, &name, is_host));
        if !is_host {
            links.push(leases(&name, port, &published));
        } else if self.outside.is_some()
            && let (Protocol::Tcp, number) | (Protocol::Udp, number) = port
        {
            let transport = if port.0 == Protocol::Tcp { Transport::Tcp } else { Transport::Udp };
            let led = listening::led(&self.state(), &view.record.id, (transport, number));
            links.push(led_lease(&name, port, led));
        }
        let whole = links.iter().position(|link| !link.holds).map_or(links.len(), |first| first + 1);
        links.truncate(whole);
        links
    }

    async fn rules(&self, published: &[Published]) -> WayLink {
        match self.firewall.stands().await {
            Ok(true) if published.is_empty() => holds("rule", "the engine's firewall table is there".to_owned()),
            Ok(true) => holds("rule", format!("the engine's firewall table leads {} published ports", published.len())),
            Ok(false) => broken(
                "rule",
                "the engine's firewall table is gone: another program has removed it".to_owned(),
                "it is written again at the next change of any network, such as `engine restart` of a container".to_owned(),
            ),
            Err(error) => broken("rule", error.to_string(), "`nft list ruleset` shows what is there".to_owned()),
        }
    }
}

/// Where it is, and on which networks.
fn address(state: &State, member: &Member) -> Vec<WayLink> {
    let name = &member.record.name;
    if member.place == Place::Host {
        return vec![holds("address", format!("{name} uses the host's own network"))];
    }
    let addresses: Vec<IpAddr> =
        member.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).map(ipnet::IpNet::addr).collect();
    if addresses.is_empty() {
        return vec![broken(
            "address",
            format!("{name} has no address: it is on no network"),
            format!("`engine network connect bridge {name}`"),
        )];
    }
    let shown: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let mut links = vec![holds("address", format!("it has {}", shown.join(", ")))];
    links.push(networks(state, member));
    let target = super::publish::target(state, member);
    if links.iter().all(|link| link.holds) && target == ports::Target::default() {
        links.push(broken(
            "network",
            format!("none of the networks of {name} is one that ports can be published from"),
            format!("`engine network connect bridge {name}`, or ask for its own address"),
        ));
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_seen_and_a_missing_one_told() {
        let open = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let loopback = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let at = |listener: &std::net::TcpListener| listener.local_addr().unwrap().port();
        let look = |port, is_host| listener((Protocol::Tcp, port), pid, "web", is_host);
        assert!(look(at(&open), false).holds);
        let own = look(at(&loopback), false);
        assert!(
            !own.holds && own.says.contains("its own loopback") && own.cure.contains("0.0.0.0"),
            "{own:?}"
        );
        assert!(look(at(&loopback), true).holds, "the host's loopback is the host's");
        let port = at(&open);
        drop(open);
        let missing = look(port, false);
        assert!(!missing.holds && missing.cure.contains("engine logs web"), "{missing:?}");
    }

    #[test]
    fn an_unpublished_port_is_told_with_its_cure() {
        let one = Published {
            protocol: Protocol::Tcp,
            container_port: 80,
            host: IpAddr::from([127, 0, 0, 1]),
            host_port: 8080,
        };
        let link = leases("web", (Protocol::Tcp, 80), std::slice::from_ref(&one));
        assert_eq!((link.holds, link.says.as_str()), (true, "80/tcp is published at 127.0.0.1:8080"));
        let link = leases("web", (Protocol::Udp, 80), &[one]);
        assert_eq!((link.holds, link.cure.as_str()), (false, "run it with `-p 80:80/udp`"));
    }

    #[test]
    fn a_host_containers_port_that_the_computer_refuses_is_told_with_the_reason() {
        let tell = |led| led_lease("web", (Protocol::Tcp, 80), led);
        let refused = tell(Some(Err("port 80 is for administrators".to_owned())));
        assert!(!refused.holds && refused.says.contains("port 80 is for administrators"), "{refused:?}");
        assert!(!tell(None).holds);
        let address = IpAddr::from([127, 0, 0, 1]);
        let granted = GrantedPort { transport: Transport::Tcp, address, port: 80, container_port: 80 };
        let heard = tell(Some(Ok(vec![granted])));
        assert!(heard.holds && heard.says.contains("127.0.0.1:80"), "{heard:?}");
    }
}

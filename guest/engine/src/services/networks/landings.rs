//! Where connections to published TCP ports enter the machine: each container's port has a port of the landing addresses,
//! from which the firewall leads to wherever the container is. What containers on the machine's own network listen at in
//! IPv4 has one too, from which the firewall leads to 127.0.0.1.
//!
//! The number is the container's for as long as it runs. Which address it is of follows from the family in which the
//! container is reached. UDP has none, nor has what the kernel alone cannot lead to (`::1`): those ports are carried by the
//! engine.

use std::collections::BTreeSet;
use std::collections::btree_map::Entry;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use guest_network::Protocol;
use guest_protocol::{LANDING_V4, LANDING_V6, Landing};

use super::listening::Led;
use super::publish;
use super::state::{Member, State};

/// The first port to give; those below are given too, but later.
const FIRST: u16 = 1024;

/// The addresses at which connections land here, if they do: only in the machine.
pub fn addresses(state: &State) -> Vec<IpAddr> {
    if state.relays { Vec::new() } else { vec![LANDING_V4.into(), LANDING_V6.into()] }
}

/// The numbers that somebody has.
fn taken(state: &State) -> BTreeSet<u16> {
    let members = state.members.values().flat_map(|member| member.landings.values().copied());
    members.chain(state.led.values().filter_map(|led| led.landing)).collect()
}

/// The next number after `last` that is not taken. Each in turn, so that one is not used again as long as anybody may think
/// it another container's. `None` when all are taken.
fn give(last: &mut u16, taken: &mut BTreeSet<u16>) -> Option<u16> {
    // What an engine before this one gave last is not known, but what is left of it.
    let from = if *last == 0 { taken.last().copied().unwrap_or(FIRST - 1) } else { *last };
    let free = (from..=u16::MAX).skip(1).chain(1..=from).find(|one| !taken.contains(one))?;
    taken.insert(free);
    *last = free;
    Some(free)
}

/// A number that nobody has; who asks keeps it in `state`.
pub fn next(state: &mut State) -> Option<u16> {
    let mut taken = taken(state);
    give(&mut state.last_landing, &mut taken)
}

/// Gives each TCP port that a container publishes a landing, as long as there are any.
pub fn choose(state: &mut State, container: &str) {
    let mut taken = taken(state);
    let State { members, last_landing, .. } = state;
    let Some(member) = members.get_mut(container) else { return };
    let published = member.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    let ports: BTreeSet<u16> = published.map(|port| port.container_port).collect();
    member.landings.retain(|port, _| ports.contains(port));
    for port in ports {
        if let Entry::Vacant(place) = member.landings.entry(port) {
            let Some(number) = give(last_landing, &mut taken) else { return };
            place.insert(number);
        }
    }
}

/// The landing of a port that a container on the machine's own network listens at, if the kernel alone can lead there.
pub fn of_led(led: &Led) -> Option<(Landing, SocketAddr)> {
    let number = led.landing.filter(|_| led.target.ip() == Ipv4Addr::LOCALHOST)?;
    let landing = Landing { container_port: led.target.port(), at: (LANDING_V4, number).into() };
    Some((landing, led.target))
}

/// A container's landings, each with where it leads now; none while nothing leads to the container.
pub fn of(state: &State, member: &Member) -> impl Iterator<Item = (Landing, SocketAddr)> {
    let address =
        (!member.landings.is_empty()).then(|| publish::target(state, member).address(false)).flatten();
    let landings = address.map(|address| {
        let at = if address.is_ipv4() { LANDING_V4.into() } else { IpAddr::from(LANDING_V6) };
        member.landings.iter().map(move |(&container_port, &port)| {
            (Landing { container_port, at: (at, port).into() }, SocketAddr::new(address, container_port))
        })
    });
    landings.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::super::ports::Published;
    use super::super::record::{Driver, EndpointRecord, NetworkRecord, PoolRecord};
    use super::super::state::{Net, Phase, Place};
    use super::*;
    use crate::services::containers::test_record;

    fn network(id: &str, subnet: &str, gateway: &str) -> NetworkRecord {
        NetworkRecord {
            id: id.to_owned(),
            name: id.to_owned(),
            created: test_record().created,
            driver: Driver::Bridge,
            ipv4: subnet.contains('.'),
            ipv6: subnet.contains(':'),
            pools: vec![PoolRecord {
                subnet: subnet.parse().unwrap(),
                range: None,
                gateway: Some(gateway.parse().unwrap()),
                auxiliary: BTreeMap::new(),
                given: None,
            }],
            ipam_driver: "default".to_owned(),
            ipam_options: None,
            internal: false,
            attachable: false,
            ingress: false,
            config_only: false,
            config_from: String::new(),
            options: BTreeMap::new(),
            labels: BTreeMap::new(),
            interface: format!("{id}0"),
            owns_interface: true,
        }
    }

    fn endpoint(network: &str, address: &str, gateway: &str) -> EndpointRecord {
        EndpointRecord {
            network_id: network.to_owned(),
            network: network.to_owned(),
            id: "e".repeat(64),
            slot: 0,
            interface: format!("eth-{network}"),
            addresses: vec![address.parse().unwrap()],
            gateways: vec![gateway.parse().unwrap()],
            mac: String::new(),
            priority: 0,
            names: Vec::new(),
            links: Vec::new(),
        }
    }

    fn published(protocol: Protocol, container_port: u16) -> Published {
        Published { protocol, container_port, host: [127, 0, 0, 1].into(), host_port: 8080 }
    }

    fn member(ports: Vec<Published>, endpoints: Vec<EndpointRecord>) -> Member {
        Member {
            record: Arc::new(test_record()),
            place: Place::Own,
            endpoints,
            ports,
            landings: BTreeMap::new(),
            lease: None,
            name_server: None,
        }
    }

    #[test]
    fn every_published_tcp_port_has_a_number_of_its_own() {
        let mut state = State::default();
        let ports =
            || vec![published(Protocol::Tcp, 80), published(Protocol::Tcp, 81), published(Protocol::Udp, 82)];
        for id in ["a", "b"] {
            state.members.insert(id.to_owned(), member(ports(), Vec::new()));
            choose(&mut state, id);
        }
        assert_eq!(state.members["a"].landings, [(80, 1024), (81, 1025)].into());
        assert_eq!(state.members["b"].landings, [(80, 1026), (81, 1027)].into());
        choose(&mut state, "a");
        assert_eq!(state.members["a"].landings, [(80, 1024), (81, 1025)].into(), "for as long as it runs");
        state.members.insert("a".to_owned(), member(ports(), Vec::new()));
        choose(&mut state, "a");
        assert_eq!(
            state.members["a"].landings,
            [(80, 1028), (81, 1029)].into(),
            "those of before not at once again"
        );
    }

    #[test]
    fn numbers_go_around_past_those_that_are_taken() {
        let mut state = State { last_landing: u16::MAX - 1, ..State::default() };
        let mut holder = member(Vec::new(), Vec::new());
        holder.landings = [(1, u16::MAX), (2, 1)].into();
        state.members.insert("holder".to_owned(), holder);
        state.members.insert("a".to_owned(), member(vec![published(Protocol::Tcp, 80)], Vec::new()));
        choose(&mut state, "a");
        assert_eq!(state.members["a"].landings, [(80, 2)].into());
        // An engine that starts again goes on after what is there.
        state.last_landing = 0;
        state.members.get_mut("holder").unwrap().landings = [(1, 5000)].into();
        state.members.insert("b".to_owned(), member(vec![published(Protocol::Tcp, 80)], Vec::new()));
        choose(&mut state, "b");
        assert_eq!(state.members["b"].landings, [(80, 5001)].into());
    }

    #[test]
    fn a_landing_leads_to_where_the_container_is_in_the_family_it_speaks() {
        let mut state = State::default();
        for record in [network("four", "10.0.0.0/24", "10.0.0.1"), network("six", "fd00::/64", "fd00::1")] {
            state.networks.insert(record.id.clone(), Net::new(record, Phase::Ready));
        }
        let (four, six) =
            (endpoint("four", "10.0.0.2/24", "10.0.0.1"), endpoint("six", "fd00::2/64", "fd00::1"));
        let shown = |endpoints: &[&EndpointRecord]| {
            let endpoints = endpoints.iter().map(|endpoint| (*endpoint).clone()).collect();
            let mut member = member(vec![published(Protocol::Tcp, 80)], endpoints);
            member.landings = [(80, 1024)].into();
            let shown = of(&state, &member)
                .map(|(landing, to)| format!("{} {} {to}", landing.container_port, landing.at));
            shown.collect::<Vec<_>>()
        };
        assert_eq!(shown(&[&four]), ["80 198.18.0.3:1024 10.0.0.2:80"]);
        assert_eq!(shown(&[&six, &four]), ["80 198.18.0.3:1024 10.0.0.2:80"]);
        assert_eq!(shown(&[&six]), ["80 [fdc7:9a1e:5d28::3]:1024 [fd00::2]:80"]);
        assert_eq!(shown(&[]), [] as [&str; 0]);
        assert_eq!(addresses(&state).len(), 2);
        assert_eq!(addresses(&State { relays: true, ..State::default() }), [] as [IpAddr; 0]);
    }

    #[test]
    fn listeners_that_hear_ipv4s_loopback_are_led_to_it() {
        let shown = |target: &str, landing| {
            let led = Led { target: target.parse().unwrap(), ports: Vec::new(), landing };
            of_led(&led).map(|(landing, to)| format!("{} {} {to}", landing.container_port, landing.at))
        };
        assert_eq!(shown("127.0.0.1:80", Some(7)).as_deref(), Some("80 198.18.0.3:7 127.0.0.1:80"));
        assert_eq!(shown("127.0.0.1:53", None), None, "UDP has none");
        for other in ["[::1]:80", "198.18.0.2:80"] {
            assert_eq!(shown(other, Some(7)), None);
        }
    }
}

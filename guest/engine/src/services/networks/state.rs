//! What the network service knows: networks with their addresses, and which running container is where.
//!
//! Everything here is plain data behind one lock that is held for look-ups and changes only, never over anything that
//! waits. A network that is being made or removed is in its place already, so that nobody takes its name, addresses or
//! interface meanwhile, and nobody attaches to it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use guest_network::dns::Server;
use guest_network::{
    FirewallLanding, FirewallLink, FirewallNetwork, FirewallPort, Gateway, Gateways, Ipam, Rules,
};
use ipnet::IpNet;
use tokio::sync::OnceCell;

use super::listening::{Led, Wish};
use super::options::{GatewayMode, Kind, Settings};
use super::ports::{self, Lease, Published};
use super::record::{Driver, EndpointRecord, GATEWAY_V4, GATEWAY_V6, NetworkRecord};
use crate::failure::Failure;
use crate::services::containers::{Record, link_targets};

#[derive(Default)]
pub struct State {
    /// By id.
    pub networks: BTreeMap<String, Net>,
    /// Containers that run, by id.
    pub members: BTreeMap<String, Member>,
    /// What containers on the machine's own network listen at, as held on the computer around it.
    pub led: BTreeMap<Wish, Led>,
    /// What could not be, and why; not asked for again while it listens.
    pub not_led: BTreeMap<Wish, String>,
    /// The engine itself carries what comes to a published port and is not led to the container by the kernel.
    pub relays: bool,
    /// The port of the landing addresses that was given last.
    pub last_landing: u16,
    /// What the settings say of names to containers that say nothing themselves.
    pub usual_names: UsualNames,
}

/// See [`crate::config::NetworkDefaults`].
#[derive(Default)]
pub struct UsualNames {
    pub servers: Vec<String>,
    pub options: Vec<String>,
}

/// One network.
pub struct Net {
    pub record: Arc<NetworkRecord>,
    pub settings: Arc<Settings>,
    /// One for each of the record's pools.
    pub ipams: Vec<Ipam>,
    pub phase: Phase,
    /// Resolves once its interface is there.
    pub raised: Arc<OnceCell<()>>,
    /// Its rules belong into the firewall.
    pub guarded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Making,
    Ready,
    Removing,
}

/// A container that runs.
pub struct Member {
    pub record: Arc<Record>,
    pub place: Place,
    pub endpoints: Vec<EndpointRecord>,
    pub ports: Vec<Published>,
    /// In the machine: by which port of the landing addresses each published TCP port is reached from the computer.
    pub landings: BTreeMap<u16, u16>,
    /// Holds the ports; `None` while there are none.
    pub lease: Option<Lease>,
    /// Answers what it asks at 127.0.0.11.
    pub name_server: Option<Server>,
}

/// Whose network namespace a container has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Its own.
    Own,
    Host,
    /// That of the container with this id.
    Shared(String),
}

impl Net {
    /// A network as stored, with nobody in it.
    pub fn new(record: NetworkRecord, phase: Phase) -> Self {
        let settings = Settings::of(&record);
        let mut net = Self {
            ipams: record.pools.iter().map(|pool| Ipam::new(pool.subnet, pool.range)).collect(),
            settings: Arc::new(settings),
            record: Arc::new(record),
            phase,
            raised: Arc::default(),
            guarded: false,
        };
        let fixed: Vec<(usize, IpAddr)> = net
            .record
            .pools
            .iter()
            .enumerate()
            .flat_map(|(index, pool)| {
                pool.gateway.iter().chain(pool.auxiliary.values()).map(move |address| (index, *address))
            })
            .collect();
        for (index, address) in fixed {
            // A gateway may be listed among the others too.
            let _ = net.ipams[index].reserve(address);
        }
        net
    }

    /// Takes an address of a family: this one, or any.
    pub fn take(&mut self, six: bool, wanted: Option<IpAddr>) -> Result<IpNet, Failure> {
        let mut full = None;
        for ipam in self.ipams.iter_mut().filter(|ipam| ipam.subnet().addr().is_ipv6() == six) {
            let taken = match wanted {
                Some(address) if !ipam.subnet().contains(&address) => continue,
                Some(address) => ipam.reserve(address),
                None => ipam.allocate(),
            };
            match taken {
                Ok(address) => return Ok(address),
                Err(error) => full = Some(error),
            }
        }
        match (full, wanted) {
            (Some(guest_network::IpamError::Taken { .. }), _) => {
                Err(Failure::new(guest_api::ErrorKind::Forbidden, "Address already in use"))
            }
            (None, Some(address)) => Err(Failure::invalid(format!(
                "invalid address {address}: It does not belong to any of this network's subnets"
            ))),
            _ => Err(Failure::broken(format!(
                "no available IPv{} addresses on this network's address pools: {} ({})",
                if six { 6 } else { 4 },
                self.record.name,
                self.record.id
            ))),
        }
    }

    /// Gives back an address.
    pub fn give_back(&mut self, address: IpNet) {
        for ipam in &mut self.ipams {
            ipam.release(address.addr());
        }
    }

    /// The gateway of a family.
    pub fn gateway(&self, six: bool) -> Option<IpAddr> {
        self.record.pools.iter().filter_map(|pool| pool.gateway).find(|gateway| gateway.is_ipv6() == six)
    }

    /// Where containers send what is for elsewhere: an address that was set aside for that under the name libnetwork's
    /// bridge driver knows, else the gateway.
    pub fn way_out(&self, six: bool) -> Option<IpAddr> {
        let name = if six { GATEWAY_V6 } else { GATEWAY_V4 };
        self.record.pools.iter().find_map(|pool| pool.auxiliary.get(name).copied()).or(self.gateway(six))
    }

    fn firewall(&self, relays: bool) -> Option<FirewallNetwork> {
        let bridge = self.settings.bridge().filter(|_| self.guarded)?;
        let subnets: Vec<IpNet> = self.record.pools.iter().map(|pool| pool.subnet).collect();
        let mode = |subnet: &IpNet| bridge.gateway_mode(subnet.addr().is_ipv6());
        let translated =
            |subnet: &&IpNet| matches!(mode(subnet), GatewayMode::Nat | GatewayMode::NatUnprotected);
        Some(FirewallNetwork {
            bridge: self.record.interface.clone(),
            hidden: if bridge.masquerade {
                subnets.iter().filter(translated).copied().collect()
            } else {
                Vec::new()
            },
            internal: self.record.internal,
            direct: bridge.direct,
            relayed: relays && !bridge.direct,
            open: [bridge.gateway_v4, bridge.gateway_v6].contains(&GatewayMode::NatUnprotected),
            trusted: bridge.trusted.clone(),
            subnets,
        })
    }
}

impl State {
    /// The networks a container is on, in the order of its endpoints.
    pub fn networks_of<'a>(&'a self, member: &'a Member) -> impl Iterator<Item = &'a Net> + Clone {
        member.endpoints.iter().filter_map(|endpoint| self.networks.get(&endpoint.network_id))
    }

    /// A network by id, name, or the start of its id.
    pub fn find(&self, wanted: &str) -> Result<&Net, Failure> {
        if let Some(net) = self.networks.get(wanted) {
            return Ok(net);
        }
        if let Some(net) = self.networks.values().find(|net| net.record.name == wanted) {
            return Ok(net);
        }
        let missing = || Failure::not_found(guest_api::error::no_such_network(wanted));
        if wanted.is_empty() {
            return Err(missing());
        }
        let mut found: Vec<&Net> = self.networks.range(wanted.to_owned()..).map(|(_, net)| net).collect();
        found.retain(|net| net.record.id.starts_with(wanted));
        match found.len() {
            1 => found.pop().ok_or_else(missing),
            0 => Err(missing()),
            count => Err(Failure::invalid(format!(
                "network {wanted} is ambiguous ({count} matches found based on ID prefix)"
            ))),
        }
    }

    /// The same, if it can be used.
    pub fn find_ready(&self, wanted: &str) -> Result<&Net, Failure> {
        let net = self.find(wanted)?;
        match net.phase {
            Phase::Ready => Ok(net),
            // As if it were not there yet, or any more.
            Phase::Making | Phase::Removing => {
                Err(Failure::not_found(guest_api::error::no_such_network(wanted)))
            }
        }
    }

    /// The endpoints in a network, with their containers.
    pub fn endpoints_of<'a>(
        &'a self,
        network: &'a str,
    ) -> impl Iterator<Item = (&'a Member, &'a EndpointRecord)> {
        self.members.values().flat_map(move |member| {
            let endpoints = member.endpoints.iter().filter(move |endpoint| endpoint.network_id == network);
            endpoints.map(move |endpoint| (member, endpoint))
        })
    }

    /// The default routes of a container with these endpoints: the highest priority wins, then what leads outside,
    /// then what speaks both families, then the first name.
    pub fn gateways(&self, endpoints: &[EndpointRecord]) -> Gateways {
        let mut candidates: Vec<(&EndpointRecord, &Net)> = endpoints
            .iter()
            .filter_map(|endpoint| Some((endpoint, self.networks.get(&endpoint.network_id)?)))
            .filter(|(_, net)| !net.record.internal && !matches!(net.settings.kind, Kind::None))
            .collect();
        candidates.sort_by_key(|(endpoint, _)| {
            (-endpoint.priority, usize::MAX - endpoint.gateways.len(), endpoint.network.clone())
        });
        let of_family = |six: bool| {
            candidates.iter().find_map(|(endpoint, net)| {
                let has_address = endpoint.addresses.iter().any(|net| net.addr().is_ipv6() == six);
                // Behind an ipvlan interface that routes there is no router to name.
                let is_way = matches!(
                    net.settings.kind,
                    Kind::Ipvlan { mode: guest_network::Ipvlan::L3 | guest_network::Ipvlan::L3s, .. }
                );
                let address = endpoint.gateway(six);
                (has_address && (is_way || address.is_some())).then(|| Gateway {
                    address: address.filter(|_| !is_way),
                    interface: endpoint.interface.clone(),
                })
            })
        };
        Gateways { v4: of_family(false), v6: of_family(true) }
    }

    /// What the firewall is to say.
    pub fn rules(&self) -> Rules {
        let networks = self.networks.values().filter_map(|net| net.firewall(self.relays)).collect();
        let mut ports = Vec::new();
        for member in self.members.values().filter(|member| !member.ports.is_empty()) {
            let target = super::publish::target(self, member);
            for port in &member.ports {
                let container =
                    if port.host.is_ipv6() { target.v6.map(IpAddr::V6) } else { target.v4.map(IpAddr::V4) };
                // A host address of a family the container does not speak is served by a relay.
                let Some(container) = container else { continue };
                ports.push(FirewallPort {
                    protocol: port.protocol,
                    host: port.host,
                    host_port: port.host_port,
                    container,
                    container_port: port.container_port,
                });
            }
        }
        let links = self.links().into_iter().map(|(_, _, link)| link).collect();
        let published = self.members.values().flat_map(|member| super::landings::of(self, member));
        let landings = published
            .chain(self.led.values().filter_map(super::landings::of_led))
            .map(|(landing, container)| FirewallLanding { at: landing.at, container });
        Rules {
            networks,
            ports,
            links,
            landing: super::landings::addresses(self),
            landings: landings.collect(),
        }
    }

    /// What links open where containers are apart, with the ids of those that ask and answer. Only the default network
    /// has such links: elsewhere they are names. As with dockerd they count for IPv4.
    fn links(&self) -> Vec<(&str, &str, FirewallLink)> {
        let mut links = Vec::new();
        for asks in self.members.values() {
            for answers in link_targets(&asks.record).filter_map(|id| self.members.get(id)) {
                let (Some((bridge, from)), Some((_, to))) = (self.apart(asks), self.apart(answers)) else {
                    continue;
                };
                let exposed = answers.record.config.exposed_ports.iter().flatten();
                for (protocol, port) in exposed.filter_map(|(port, _)| ports::parse(port).ok()) {
                    let link = FirewallLink { bridge: bridge.clone(), from, to, protocol, port };
                    links.push((asks.record.id.as_str(), answers.record.id.as_str(), link));
                }
            }
        }
        links
    }

    /// The bridge and the address of a container on the default network, if that keeps its containers apart.
    fn apart(&self, member: &Member) -> Option<(String, Ipv4Addr)> {
        let endpoint = member.endpoints.iter().find(|endpoint| endpoint.network == "bridge")?;
        let net = self.networks.get(&endpoint.network_id)?;
        net.settings.bridge().filter(|bridge| !bridge.direct)?;
        match endpoint.ipv4()?.addr() {
            IpAddr::V4(address) => Some((net.record.interface.clone(), address)),
            IpAddr::V6(_) => None,
        }
    }

    /// Whether the firewall opens something to or for a container because of a link.
    pub fn is_linked(&self, container: &str) -> bool {
        self.links().iter().any(|(asks, answers, _)| container == *asks || container == *answers)
    }

    /// Every subnet in use.
    pub fn subnets(&self) -> Vec<IpNet> {
        self.networks
            .values()
            .filter(|net| net.record.driver != Driver::Null)
            .flat_map(|net| net.record.pools.iter().map(|pool| pool.subnet))
            .collect()
    }
}

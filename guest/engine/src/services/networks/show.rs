//! What clients see of networks, and of containers' places in them, in dockerd's words.

use std::collections::BTreeMap;

use guest_api::Filters;
use guest_api::container::PortSummary;
use guest_api::filter::PortFilter;
use guest_api::network::{
    EndpointSettings, Ipam, IpamPool, Network, NetworkContainer, NetworkReference, NetworkSettings,
    PortBinding,
};
use sha2::{Digest, Sha256};

use super::record::{EndpointRecord, is_predefined};
use super::service::Networks;
use super::state::{Member, Net, Place, State};
use crate::failure::Failure;
use crate::services::containers::View;

const FILTERS: [&str; 7] = ["dangling", "driver", "id", "label", "name", "scope", "type"];

/// A network; with its containers if `detailed`.
pub fn network(state: &State, net: &Net, detailed: bool) -> Network {
    let record = &net.record;
    let containers = if detailed {
        state
            .endpoints_of(&record.id)
            .map(|(member, endpoint)| (member.record.id.clone(), container(member, endpoint)))
            .collect()
    } else {
        BTreeMap::new()
    };
    Network {
        name: record.name.clone(),
        id: record.id.clone(),
        created: format!("{:.9}", record.created),
        scope: "local".to_owned(),
        driver: record.driver.name().to_owned(),
        enable_ipv4: record.ipv4,
        enable_ipv6: record.ipv6,
        ipam: Ipam {
            driver: record.ipam_driver.clone(),
            options: record.ipam_options.clone(),
            config: Some(record.pools.iter().map(pool).collect::<Vec<_>>()).filter(|pools| !pools.is_empty()),
        },
        internal: record.internal,
        attachable: record.attachable,
        ingress: record.ingress,
        config_from: NetworkReference { network: record.config_from.clone() },
        config_only: record.config_only,
        containers,
        options: record.options.clone(),
        labels: record.labels.clone(),
    }
}

fn pool(pool: &super::record::PoolRecord) -> IpamPool {
    pool.given.clone().unwrap_or_else(|| IpamPool {
        subnet: pool.subnet.to_string(),
        gateway: pool.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        ..IpamPool::default()
    })
}

fn container(member: &Member, endpoint: &EndpointRecord) -> NetworkContainer {
    let text = |address: Option<ipnet::IpNet>| address.map(|net| net.to_string()).unwrap_or_default();
    NetworkContainer {
        name: member.record.name.clone(),
        endpoint_id: endpoint.id.clone(),
        mac_address: endpoint.mac.clone(),
        ipv4_address: text(endpoint.ipv4()),
        ipv6_address: text(endpoint.ipv6()),
    }
}

/// Those that the filters let through.
pub fn select(
    state: &State,
    networks: Vec<(&Net, Network)>,
    filters: &Filters,
) -> Result<Vec<Network>, Failure> {
    if let Some(unknown) = filters.keys().find(|key| !FILTERS.contains(key)) {
        return Err(Failure::invalid(format!("invalid filter '{unknown}'")));
    }
    let dangling = match filters.get("dangling").map(|values| values.iter().collect::<Vec<_>>()) {
        None => None,
        Some(values) => match values.as_slice() {
            [one] if matches!(one.as_str(), "1" | "true") => Some(true),
            [one] if matches!(one.as_str(), "0" | "false") => Some(false),
            [_] => {
                return Err(Failure::invalid(
                    "invalid value for filter 'dangling', must be \"true\" (or \"1\"), or \"false\" (or \"0\")",
                ));
            }
            _ => return Err(Failure::invalid("got more than one value for filter key \"dangling\"")),
        },
    };
    for kind in filters.get("type").into_iter().flatten() {
        if !matches!(kind.as_str(), "builtin" | "custom") {
            return Err(Failure::broken(format!("invalid filter: 'type'='{kind}'")));
        }
    }
    let wanted = |net: &Net, network: &Network| {
        let unused = || !is_predefined(&network.name) && state.endpoints_of(&net.record.id).next().is_none();
        filters.allows("name", |name| network.name.contains(name))
            && filters.allows("id", |id| network.id.contains(id))
            && filters.allows("driver", |driver| network.driver == driver)
            && filters.allows("scope", |scope| scope == "local")
            && filters.allows("type", |kind| (kind == "builtin") == is_predefined(&network.name))
            && dangling.is_none_or(|dangling| dangling == unused())
            && filters.allows_labels(&network.labels)
    };
    Ok(networks
        .into_iter()
        .filter(|(net, network)| wanted(net, network))
        .map(|(_, network)| network)
        .collect())
}

/// The filters of a prune: `label`, and `label!` for what must not be.
pub fn matches_prune_labels(filters: &Filters, labels: &BTreeMap<String, String>) -> bool {
    let has = |filter: &str| match filter.split_once('=') {
        Some((key, value)) => labels.get(key).is_some_and(|actual| actual == value),
        None => labels.contains_key(filter),
    };
    filters.allows_labels(labels)
        && !filters.get("label!").is_some_and(|values| values.iter().any(|value| has(value)))
}

impl Networks {
    /// `NetworkSettings` of a container.
    pub fn settings(&self, view: &View) -> NetworkSettings {
        let mut settings = NetworkSettings { networks: self.endpoints(view), ..NetworkSettings::default() };
        let state = self.state();
        let record = &view.record;
        if let Some(member) = state.members.get(&record.id).filter(|_| view.live.is_some()) {
            settings.ports = ports(member);
            if member.place != Place::Host {
                let key = match &member.place {
                    Place::Shared(other) => self.sandbox_path(other),
                    _ => self.sandbox_path(&record.id),
                };
                settings.sandbox_key = key.display().to_string();
                settings.sandbox_id = hex::encode(Sha256::digest(&settings.sandbox_key));
            }
        }
        if let Some(endpoint) = settings.networks.get("bridge") {
            settings.endpoint_id.clone_from(&endpoint.endpoint_id);
            settings.gateway.clone_from(&endpoint.gateway);
            settings.ip_address.clone_from(&endpoint.ip_address);
            settings.ip_prefix_len = endpoint.ip_prefix_len;
            settings.ipv6_gateway.clone_from(&endpoint.ipv6_gateway);
            settings.global_ipv6_address.clone_from(&endpoint.global_ipv6_address);
            settings.global_ipv6_prefix_len = endpoint.global_ipv6_prefix_len;
            settings.mac_address.clone_from(&endpoint.mac_address);
        }
        settings
    }

    /// A container's ports, for a list: published ones, and exposed ones that are not.
    pub fn port_summaries(&self, view: &View) -> Vec<PortSummary> {
        let state = self.state();
        let Some(member) = state.members.get(&view.record.id).filter(|_| view.live.is_some()) else {
            return Vec::new();
        };
        let mut summaries = Vec::new();
        for (port, bindings) in ports(member) {
            let (number, kind) = port.split_once('/').unwrap_or((&port, "tcp"));
            let Ok(private_port) = number.parse() else { continue };
            let bare = PortSummary { private_port, kind: kind.to_owned(), ..PortSummary::default() };
            match bindings {
                None => summaries.push(bare),
                Some(bindings) => summaries.extend(bindings.into_iter().map(|binding| PortSummary {
                    ip: binding.host_ip,
                    public_port: binding.host_port.parse().ok(),
                    ..bare.clone()
                })),
            }
        }
        summaries
    }

    /// Whether a container publishes one of these: `8080`, `8080/tcp`, `8000-8010`.
    pub fn publishes_any(&self, view: &View, wanted: &[PortFilter]) -> bool {
        self.port_summaries(view).iter().any(|port| {
            port.public_port.is_some_and(|public| wanted.iter().any(|wanted| wanted.has(public, &port.kind)))
        })
    }

    /// Whether a container is on one of these networks, named or by id.
    pub fn is_on_any(&self, view: &View, wanted: &std::collections::BTreeSet<String>) -> bool {
        self.endpoints(view)
            .iter()
            .any(|(name, settings)| wanted.contains(name) || wanted.contains(&settings.network_id))
    }

    /// The networks of a container, by name.
    pub fn endpoints(&self, view: &View) -> BTreeMap<String, EndpointSettings> {
        let record = &view.record;
        let state = self.state();
        let member = state.members.get(&record.id).filter(|_| view.live.is_some());
        let started = record.last.started_at.is_some() || member.is_some();
        record
            .networks()
            .into_iter()
            .map(|(name, mut settings)| {
                let net = state.find(super::attach::lookup_key(&name, &settings)).ok();
                let name = net.map_or(name, |net| net.record.name.clone());
                if let Some(net) = net {
                    settings.network_id.clone_from(&net.record.id);
                }
                if started && !is_predefined(&name) {
                    settings.dns_names = Some(record.dns_names(&settings));
                }
                let endpoint = member.and_then(|member| {
                    member.endpoints.iter().find(|endpoint| endpoint.network_id == settings.network_id)
                });
                match endpoint {
                    Some(endpoint) => fill(&mut settings, endpoint),
                    // The address asked for is shown until it was in use for the first time.
                    None if started => settings.mac_address.clear(),
                    None => {}
                }
                (name, settings)
            })
            .collect()
    }
}

fn fill(settings: &mut EndpointSettings, endpoint: &EndpointRecord) {
    settings.endpoint_id.clone_from(&endpoint.id);
    settings.mac_address.clone_from(&endpoint.mac);
    let gateway = |six| endpoint.gateway(six).map(|gateway| gateway.to_string()).unwrap_or_default();
    settings.gateway = gateway(false);
    settings.ipv6_gateway = gateway(true);
    if let Some(address) = endpoint.ipv4() {
        settings.ip_address = address.addr().to_string();
        settings.ip_prefix_len = address.prefix_len();
    }
    if let Some(address) = endpoint.ipv6() {
        settings.global_ipv6_address = address.addr().to_string();
        settings.global_ipv6_prefix_len = address.prefix_len();
    }
}

/// Published ports, and exposed ones that are not.
fn ports(member: &Member) -> BTreeMap<String, Option<Vec<PortBinding>>> {
    let exposed = member.record.config.exposed_ports.iter().flatten();
    let mut ports: BTreeMap<String, Option<Vec<PortBinding>>> =
        exposed.map(|(port, _)| (port.clone(), None)).collect();
    if member.place != Place::Own {
        ports.clear();
    }
    for port in &member.ports {
        let bindings = ports.entry(format!("{}/{}", port.container_port, port.protocol)).or_default();
        bindings
            .get_or_insert_default()
            .push(PortBinding { host_ip: port.host.to_string(), host_port: port.host_port.to_string() });
    }
    ports
}

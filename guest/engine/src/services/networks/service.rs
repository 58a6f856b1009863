//! The network service: owns the default bridge, its addresses, and which container has which.
//!
//! On a host the bridge and the firewall are made when the first container needs them, so that an engine whose
//! containers use no network touches nothing; in the machine they are made at once, beside everything else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use guest_api::Filters;
use guest_api::network::{
    EndpointSettings, Ipam as ApiIpam, IpamPool, Network, NetworkContainer, NetworkSettings,
};
use guest_network::{Bridge, BridgeSpec, Endpoint, EndpointSpec, Firewall, FirewallNetwork, Ipam, Sandbox};
use ipnet::Ipv4Net;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

use super::routes;
use crate::config::BridgeChoice;
use crate::failure::Failure;
use crate::services::containers::{EndpointRecord, View};

/// Interface of a container on the default bridge.
const INTERFACE: &str = "eth0";

/// Where a container is to be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Bridge,
    Host,
    /// Only loopback.
    None,
}

impl Place {
    /// The place a network mode names; create has refused all others.
    pub fn of(network_mode: &str) -> Self {
        match network_mode {
            "host" => Place::Host,
            "none" => Place::None,
            _ => Place::Bridge,
        }
    }

    fn network(self) -> &'static str {
        match self {
            Place::Bridge => "bridge",
            Place::Host => "host",
            Place::None => "none",
        }
    }
}

/// The network service.
pub struct Networks {
    choice: BridgeChoice,
    address: Ipv4Net,
    bridge: OnceCell<Bridge>,
    state: Mutex<State>,
    sandboxes: PathBuf,
    /// Makes the ids of the networks differ between engines.
    engine_id: String,
    created: Timestamp,
}

struct State {
    ipam: Ipam,
    endpoints: BTreeMap<String, (String, EndpointRecord)>,
}

impl Networks {
    /// Chooses the bridge's subnet; touches nothing yet. `sandboxes` is the folder for network namespaces.
    pub fn new(choice: BridgeChoice, sandboxes: &Path, engine_id: &str) -> anyhow::Result<Self> {
        let table = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
        let routes = routes::destinations(&table, &choice.name);
        let address = if choice.fixed {
            choice.candidates.first().copied()
        } else {
            routes::choose(&choice.candidates, &routes)
        };
        let address = address.ok_or_else(|| {
            anyhow::anyhow!(
                "every address range for the bridge `{}` overlaps a route of this computer; choose one with --bip",
                choice.name
            )
        })?;
        let ipam = Ipam::new(address.trunc(), Some(address.addr()))?;
        Ok(Self {
            choice,
            address,
            bridge: OnceCell::new(),
            state: Mutex::new(State { ipam, endpoints: BTreeMap::new() }),
            sandboxes: sandboxes.to_owned(),
            engine_id: engine_id.to_owned(),
            created: Timestamp::now(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bridge's own address.
    pub fn gateway(&self) -> std::net::Ipv4Addr {
        self.address.addr()
    }

    /// The network namespace file of a container.
    pub fn sandbox_path(&self, container: &str) -> PathBuf {
        self.sandboxes.join(&container[..12])
    }

    /// Whether to make the bridge before the first container needs it: in the machine, which has nothing else to do;
    /// on a host only when it is there from before.
    pub fn is_wanted_early(&self) -> bool {
        self.choice.early || Path::new("/sys/class/net").join(&self.choice.name).exists()
    }

    /// Makes the bridge and the firewall, once.
    pub async fn bridge(&self) -> Result<&Bridge, Failure> {
        self.bridge
            .get_or_try_init(|| async {
                let spec = BridgeSpec {
                    name: self.choice.name.clone(),
                    subnet: self.address.trunc(),
                    gateway: self.address.addr(),
                    mtu: self.choice.mtu,
                };
                let failed = |error: &(dyn std::error::Error + 'static)| {
                    Failure::internal("cannot set up the default bridge network", error)
                };
                let bridge = Bridge::ensure(&spec).await.map_err(|error| failed(&error))?;
                guest_network::forwarding::enable().map_err(|error| failed(&error))?;
                let rules = [FirewallNetwork { bridge: spec.name, subnet: spec.subnet }];
                Firewall::new(&self.choice.firewall_table)
                    .apply(&rules)
                    .await
                    .map_err(|error| failed(&error))?;
                Ok(bridge)
            })
            .await
    }

    /// Makes a network namespace for a container and, on the bridge, an interface with an address.
    /// On failure nothing is left.
    pub async fn attach(
        &self,
        container: &str,
        name: &str,
        place: Place,
        mac: Option<guest_network::Mac>,
    ) -> Result<Option<EndpointRecord>, Failure> {
        if place == Place::Host {
            return Ok(None);
        }
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::internal(
                format!("failed to set up container networking for {}", &container[..12]),
                error,
            )
        };
        let path = self.sandbox_path(container);
        if path.exists() {
            // An engine that was killed left it.
            self.delete_sandbox(container).await?;
        }
        if place == Place::None {
            Sandbox::create(&path).await.map_err(|error| failed(&error))?;
            return Ok(None);
        }
        let (bridge, sandbox) = tokio::join!(self.bridge(), Sandbox::create(&path));
        let sandbox = sandbox.map_err(|error| failed(&error))?;
        let attached = async {
            let bridge = bridge?;
            let address = self.state().ipam.allocate().map_err(|error| failed(&error))?;
            let spec = EndpointSpec {
                container: container.to_owned(),
                interface: INTERFACE.to_owned(),
                address,
                mac,
            };
            Endpoint::attach(bridge, &sandbox, &spec).await.map_err(|error| {
                self.state().ipam.release(address.addr());
                failed(&error)
            })
        };
        match attached.await {
            Ok(endpoint) => {
                let record = EndpointRecord {
                    network: "bridge".to_owned(),
                    id: hex::encode(Sha256::digest(format!("endpoint {container} {}", endpoint.address))),
                    address: endpoint.address,
                    gateway: endpoint.gateway,
                    mac: endpoint.mac.to_string(),
                };
                self.state().endpoints.insert(container.to_owned(), (name.to_owned(), record.clone()));
                Ok(Some(record))
            }
            Err(failure) => {
                if let Err(also) = self.delete_sandbox(container).await {
                    tracing::warn!(container = &container[..12], error = %also, "a network namespace stays behind");
                }
                Err(failure)
            }
        }
    }

    /// Takes everything of a container's network away. What is not there is fine.
    pub async fn detach(&self, container: &str, endpoint: Option<&EndpointRecord>) -> Result<(), Failure> {
        // The namespace takes the interface with it, in the kernel's own time; the name is free for the next start,
        // which replaces what it finds.
        let sandbox = self.delete_sandbox(container).await;
        let interface = match endpoint {
            Some(_) => Endpoint::cleanup(container).await.map(drop).map_err(|error| {
                Failure::internal(format!("cannot remove the interface of {}", &container[..12]), &error)
            }),
            None => Ok(()),
        };
        if let Some(endpoint) = endpoint {
            let mut state = self.state();
            state.endpoints.remove(container);
            state.ipam.release(endpoint.address.addr());
        }
        sandbox.and(interface)
    }

    async fn delete_sandbox(&self, container: &str) -> Result<(), Failure> {
        let path = self.sandbox_path(container);
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::internal(format!("cannot remove the network namespace of {}", &container[..12]), error)
        };
        let folder = Sandbox::list(&self.sandboxes).map_err(|error| failed(&error))?;
        match folder.into_iter().find(|sandbox| sandbox.path() == path) {
            Some(sandbox) => sandbox.delete().await.map_err(|error| failed(&error)),
            None => Ok(()),
        }
    }

    /// Takes over the address of a container that runs already.
    pub fn restore(&self, container: &str, name: &str, endpoint: &EndpointRecord) {
        let mut state = self.state();
        if let Err(error) = state.ipam.reserve(endpoint.address.addr()) {
            tracing::warn!(container = &container[..12], %error, "the address of a running container cannot be kept");
        }
        state.endpoints.insert(container.to_owned(), (name.to_owned(), endpoint.clone()));
    }

    /// Removes the network of every container not in `live`: what an engine that was killed left.
    pub async fn sweep(&self, live: &[String]) -> Vec<Failure> {
        let mut failures = Vec::new();
        let folder = match Sandbox::list(&self.sandboxes) {
            Ok(folder) => folder,
            Err(error) => return vec![Failure::internal("cannot list network namespaces", &error)],
        };
        let keep: Vec<PathBuf> = live.iter().map(|id| self.sandbox_path(id)).collect();
        for sandbox in folder.into_iter().filter(|sandbox| !keep.contains(&sandbox.path().to_owned())) {
            let container = sandbox.path().file_name().map(|name| name.to_string_lossy().into_owned());
            if let Err(error) = sandbox.delete().await {
                failures.push(Failure::internal("cannot remove a network namespace", &error));
            }
            if let Some(container) = container
                && let Err(error) = Endpoint::cleanup(&container).await
            {
                failures.push(Failure::internal("cannot remove an interface", &error));
            }
        }
        failures
    }

    /// Keeps a container's new name.
    pub fn renamed(&self, container: &str, name: &str) {
        if let Some((known, _)) = self.state().endpoints.get_mut(container) {
            name.clone_into(known);
        }
    }

    /// The id of one of our networks.
    pub fn network_id(&self, name: &str) -> String {
        hex::encode(Sha256::digest(format!("network {name} of {}", self.engine_id)))
    }

    /// Our networks that the filters let through.
    pub fn list(&self, filters: &Filters) -> Vec<Network> {
        [Place::Bridge, Place::Host, Place::None]
            .into_iter()
            .map(|place| self.network(place))
            .filter(|network| {
                filters.allows("name", |name| network.name.contains(name))
                    && filters.allows("id", |id| network.id.starts_with(id))
                    && filters.allows("driver", |driver| network.driver == driver)
                    && filters.allows("type", |kind| kind == "builtin")
                    && filters.allows("scope", |scope| scope == "local")
                    && filters.allows("dangling", |dangling| !matches!(dangling, "1" | "true"))
                    && filters.allows_labels(&network.labels)
            })
            .collect()
    }

    /// One network by name, id or the start of its id.
    pub fn inspect(&self, name: &str) -> Result<Network, Failure> {
        let all = self.list(&Filters::default());
        let exact = all.iter().find(|network| network.name == name || network.id == name);
        let prefix = || all.iter().find(|network| !name.is_empty() && network.id.starts_with(name));
        exact
            .or_else(prefix)
            .cloned()
            .ok_or_else(|| Failure::not_found(guest_api::error::no_such_network(name)))
    }

    fn network(&self, place: Place) -> Network {
        let mut network = Network {
            name: place.network().to_owned(),
            id: self.network_id(place.network()),
            created: self.created.to_string(),
            scope: "local".to_owned(),
            driver: if place == Place::None { "null" } else { place.network() }.to_owned(),
            enable_ipv4: true,
            ipam: ApiIpam { driver: "default".to_owned(), options: None, config: None },
            ..Network::default()
        };
        if place == Place::Bridge {
            network.ipam.config = Some(vec![IpamPool {
                subnet: self.address.trunc().to_string(),
                gateway: self.address.addr().to_string(),
                ..IpamPool::default()
            }]);
            network.containers = self
                .state()
                .endpoints
                .iter()
                .map(|(id, (name, endpoint))| {
                    let entry = NetworkContainer {
                        name: name.clone(),
                        endpoint_id: endpoint.id.clone(),
                        mac_address: endpoint.mac.clone(),
                        ipv4_address: endpoint.address.to_string(),
                        ipv6_address: String::new(),
                    };
                    (id.clone(), entry)
                })
                .collect();
            network.options = [
                ("com.docker.network.bridge.default_bridge", "true".to_owned()),
                ("com.docker.network.bridge.enable_ip_masquerade", "true".to_owned()),
                ("com.docker.network.bridge.name", self.choice.name.clone()),
                ("com.docker.network.driver.mtu", self.choice.mtu.to_string()),
            ]
            .map(|(key, value)| (key.to_owned(), value))
            .into();
        }
        network
    }

    /// `NetworkSettings` of a container.
    pub fn settings(&self, view: &View) -> NetworkSettings {
        let mut settings = NetworkSettings {
            networks: self.endpoints(view),
            ports: if view.live.is_some() {
                view.record
                    .config
                    .exposed_ports
                    .iter()
                    .flatten()
                    .map(|(port, _)| (port.clone(), None))
                    .collect()
            } else {
                BTreeMap::new()
            },
            ..NetworkSettings::default()
        };
        if view.live.is_some() && Place::of(&view.record.host.network_mode) != Place::Host {
            settings.sandbox_key = self.sandbox_path(&view.record.id).display().to_string();
            settings.sandbox_id = hex::encode(Sha256::digest(&settings.sandbox_key));
        }
        if let Some(endpoint) = settings.networks.get("bridge") {
            settings.endpoint_id.clone_from(&endpoint.endpoint_id);
            settings.gateway.clone_from(&endpoint.gateway);
            settings.ip_address.clone_from(&endpoint.ip_address);
            settings.ip_prefix_len = endpoint.ip_prefix_len;
            settings.mac_address.clone_from(&endpoint.mac_address);
        }
        settings
    }

    /// The networks of a container, by name.
    pub fn endpoints(&self, view: &View) -> BTreeMap<String, EndpointSettings> {
        let name = Place::of(&view.record.host.network_mode).network();
        let mut settings =
            EndpointSettings { network_id: self.network_id(name), ..EndpointSettings::default() };
        if let Some(endpoint) = view.live.as_ref().and_then(|live| live.endpoint.as_ref()) {
            settings.endpoint_id.clone_from(&endpoint.id);
            settings.gateway = endpoint.gateway.to_string();
            settings.ip_address = endpoint.address.addr().to_string();
            settings.ip_prefix_len = endpoint.address.prefix_len();
            settings.mac_address.clone_from(&endpoint.mac);
        }
        [(name.to_owned(), settings)].into()
    }
}

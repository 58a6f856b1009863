//! The network service: makes, finds, lists and removes networks.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest_api::network::{IpamPool, Network, NetworkCreate};
use guest_api::{ErrorKind, Filters};
use ipnet::IpNet;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use super::create::{self, Draft};
use super::firewall::FirewallWriter;
use super::pools;
use super::ports::PortHost;
use super::record::{Driver, GATEWAY_V4, NetworkRecord, PoolRecord, is_predefined};
use super::routes::{self, Route};
use super::state::{Net, Phase, State, UsualNames};
use super::{options, show};
use crate::config::{AddressPool, BridgeChoice, NetworkDefaults};
use crate::failure::Failure;
use crate::host::HostLeases;
use crate::services::events::Events;
use crate::store::{self, Store};

/// The network service.
pub struct Networks {
    pub(super) choice: BridgeChoice,
    defaults: NetworkDefaults,
    pub(super) state: Arc<Mutex<State>>,
    pub(super) firewall: FirewallWriter,
    pub(super) events: Events,
    /// Folder of network namespaces.
    pub(super) sandboxes: PathBuf,
    /// Folder of what is kept of running containers.
    pub(super) members: PathBuf,
    /// Folder of notes about networks that are being made or removed.
    pub(super) unfinished: PathBuf,
    pub(super) ports: PortHost,
    /// In the machine: ports are published on the computer around it.
    pub(super) outside: Option<HostLeases>,
    /// Told when a container joins the machine's own network.
    pub(super) joined_host: Notify,
    store: Store,
    pools: Vec<AddressPool>,
}

impl Networks {
    /// Reads the stored networks and chooses the default bridge's subnet; touches nothing yet. `run` is the folder for
    /// what ends with a reboot.
    pub fn open(
        choice: BridgeChoice,
        defaults: NetworkDefaults,
        run: &Path,
        engine_id: &str,
        store: Store,
        events: Events,
        outside: Option<HostLeases>,
    ) -> anyhow::Result<Self> {
        let stored: Vec<NetworkRecord> =
            store.all(store::NETWORKS)?.into_iter().map(|(_, record)| record).collect();
        let routes = routes::reserved(|name| {
            name == choice.name || stored.iter().any(|record| record.interface == name)
        });
        let mut taken: Vec<IpNet> = routes.iter().map(|route| route.subnet).collect();
        taken.extend(stored.iter().flat_map(|record| record.pools.iter().map(|pool| pool.subnet)));
        let free = |address: &&ipnet::Ipv4Net| {
            let subnet = IpNet::from(address.trunc());
            choice.fixed || !taken.iter().any(|other| pools::overlap(&subnet, other))
        };
        let address = choice.candidates.iter().find(free).copied().ok_or_else(|| {
            anyhow::anyhow!(
                "every address range for the bridge `{}` overlaps a network of this computer; choose one with --bip",
                choice.name
            )
        })?;
        let mut pools = defaults.pools.clone();
        if pools.is_empty() {
            pools = pools::defaults();
        }
        if !pools.iter().any(|pool| pool.base.addr().is_ipv6()) {
            pools.push(pools::unique_local(engine_id));
        }
        let usual_names = UsualNames {
            servers: defaults.dns.iter().map(ToString::to_string).collect(),
            options: defaults.dns_options.clone(),
        };
        let relays = outside.is_none();
        let mut state = State { relays, usual_names, ..State::default() };
        for record in predefined(&choice, &defaults, address, engine_id).into_iter().chain(stored) {
            state.networks.insert(record.id.clone(), Net::new(record, Phase::Ready));
        }
        let state = Arc::new(Mutex::new(state));
        Ok(Self {
            firewall: FirewallWriter::start(&choice.firewall_table, state.clone()),
            choice,
            defaults,
            state,
            events,
            sandboxes: run.join("netns"),
            members: run.join("network"),
            unfinished: run.join("networks"),
            ports: PortHost::default(),
            outside,
            joined_host: Notify::new(),
            store,
            pools,
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a network; its id.
    pub async fn create(&self, mut create: NetworkCreate) -> Result<String, Failure> {
        let driver = if create.driver.is_empty() { "bridge" } else { &create.driver };
        if let Some(defaults) = self.defaults.options.get(driver).filter(|_| create.config_from.is_none()) {
            for (name, value) in defaults {
                create.options.entry(name.clone()).or_insert_with(|| value.clone());
            }
        }
        let id = new_id(&self.state());
        let mut draft = create::read(create, &id, Timestamp::now())?;
        if !draft.record.config_from.is_empty() {
            draft = self.copy_settings(draft)?;
        }
        let routes = {
            let state = self.state();
            routes::reserved(|name| state.networks.values().any(|net| net.record.interface == name))
        };
        let record = self.reserve(draft, &routes)?;
        match self.make(&record).await {
            Ok(record) => {
                self.events.publish("network", "create", &id, event_attributes(&record));
                Ok(id)
            }
            Err(failure) => {
                self.unmake(&record).await;
                Err(failure)
            }
        }
    }

    /// The settings of the network that `--config-from` names, under the new one's name.
    fn copy_settings(&self, draft: Draft) -> Result<Draft, Failure> {
        let state = self.state();
        let from = &draft.record.config_from;
        let missing = || Failure::not_found(format!("configuration network \"{from}\" does not exist"));
        let source = state.find_ready(from).map_err(|_| missing())?;
        if !source.record.config_only {
            return Err(missing());
        }
        let source = &source.record;
        let mut record = draft.record.clone();
        (record.ipv4, record.ipv6) = (source.ipv4, source.ipv6);
        record.options = source.options.clone();
        record.labels = source.labels.clone();
        record.ipam_options = source.ipam_options.clone();
        let given = source
            .pools
            .iter()
            .map(|pool| create::Given {
                subnet: pool.subnet,
                range: pool.range,
                gateway: pool.gateway,
                auxiliary: pool.auxiliary.clone(),
                words: pool.given.clone().unwrap_or_default(),
            })
            .collect();
        create::finish(record, given)
    }

    /// Takes name, interface and addresses for a network that is about to be made.
    fn reserve(&self, draft: Draft, routes: &[Route]) -> Result<NetworkRecord, Failure> {
        let forbidden = |text: String| Failure::new(ErrorKind::Forbidden, text);
        let Draft { mut record, wanted } = draft;
        let settings = options::Settings::read(record.driver, &record.options, record.internal)?;
        let mut state = self.state();
        if state.networks.values().any(|net| net.record.name == record.name) {
            return Err(Failure::conflict(format!("network with name {} already exists", record.name)));
        }
        record.interface = match &settings.kind {
            options::Kind::Bridge(bridge) => {
                bridge.name.clone().unwrap_or_else(|| format!("br-{}", &record.id[..12]))
            }
            options::Kind::Macvlan { parent, .. } => {
                parent.clone().unwrap_or_else(|| format!("dm-{}", &record.id[..12]))
            }
            options::Kind::Ipvlan { parent, .. } => {
                parent.clone().unwrap_or_else(|| format!("di-{}", &record.id[..12]))
            }
            options::Kind::None => String::new(),
        };
        if record.driver == Driver::Bridge
            && let Some(other) = state.networks.values().find(|net| net.record.interface == record.interface)
        {
            return Err(forbidden(format!(
                "cannot create network {} ({}): conflicts with network {} ({}): networks have same bridge name",
                record.id, record.interface, other.record.id, other.record.interface
            )));
        }
        let mut taken = state.subnets();
        for wanted in wanted {
            let pool = match wanted.given {
                Some(given) => {
                    if record.driver != Driver::Null {
                        check_free(&given.subnet, &taken, routes, record.driver)?;
                    }
                    PoolRecord {
                        subnet: given.subnet,
                        range: given.range,
                        gateway: given.gateway,
                        auxiliary: given.auxiliary,
                        given: Some(given.words),
                    }
                }
                None => {
                    let mut avoid = taken.clone();
                    avoid.extend(routes.iter().map(|route| route.subnet));
                    let subnet = pools::choose(&self.pools, wanted.six, &avoid).ok_or_else(|| {
                        Failure::invalid("all predefined address pools have been fully subnetted")
                    })?;
                    PoolRecord { subnet, range: None, gateway: None, auxiliary: BTreeMap::new(), given: None }
                }
            };
            taken.push(pool.subnet);
            record.pools.push(with_gateway(pool, wanted.needs_gateway)?);
        }
        state.networks.insert(record.id.clone(), Net::new(record.clone(), Phase::Making));
        Ok(record)
    }

    /// Makes what was reserved: interface, rules, record.
    async fn make(&self, record: &NetworkRecord) -> Result<Arc<NetworkRecord>, Failure> {
        self.note_unfinished(record)?;
        self.raise(&record.id).await?;
        guest_fault::point("network.create.after-raise");
        let record = match self.state().networks.get(&record.id) {
            Some(net) => net.record.clone(),
            None => return Err(Failure::broken("a network that was being made is gone")),
        };
        self.store
            .put(store::NETWORKS, &record.id, record.as_ref())
            .await
            .map_err(|error| Failure::internal("cannot keep the network's record", &error))?;
        guest_fault::point("network.create.after-record");
        self.note_finished(&record.id);
        if let Some(net) = self.state().networks.get_mut(&record.id) {
            net.phase = Phase::Ready;
        }
        Ok(record)
    }

    /// Takes back what there is of a network that could not be made.
    async fn unmake(&self, record: &NetworkRecord) {
        if let Err(error) = self.lower(&record.id).await {
            tracing::warn!(network = record.name, %error, "a failed network leaves something behind");
        }
        self.note_finished(&record.id);
        self.state().networks.remove(&record.id);
    }

    /// Removes a network, by id, name, or the start of its id.
    pub async fn remove(&self, wanted: &str) -> Result<(), Failure> {
        let record = {
            let mut state = self.state();
            let record = state.find_ready(wanted)?.record.clone();
            let forbidden = |text: String| Err(Failure::new(ErrorKind::Forbidden, text));
            if is_predefined(&record.name) {
                return forbidden(format!("{} is a pre-defined network and cannot be removed", record.name));
            }
            if record.config_only && state.networks.values().any(|net| net.record.config_from == record.name)
            {
                return forbidden(format!(
                    "error while removing network: configuration network \"{}\" is in use",
                    record.name
                ));
            }
            let active: Vec<String> = state
                .endpoints_of(&record.id)
                .map(|(member, endpoint)| {
                    format!("name:\"{}\" id:\"{}\"", member.record.name, &endpoint.id[..12])
                })
                .collect();
            if !active.is_empty() {
                return forbidden(format!(
                    "error while removing network: network {} has active endpoints ({})",
                    record.name,
                    active.join(", ")
                ));
            }
            if let Some(net) = state.networks.get_mut(&record.id) {
                net.phase = Phase::Removing;
            }
            record
        };
        // The record first: an interface without a record is removed at the next start, the other way round the
        // network would come back.
        let removed = async {
            self.note_unfinished(&record)?;
            let removed = self.store.remove(store::NETWORKS, &record.id).await;
            removed.map_err(|error| Failure::internal("cannot remove the network's record", &error))?;
            guest_fault::point("network.remove.after-record");
            self.lower(&record.id).await?;
            self.note_finished(&record.id);
            Ok(())
        };
        if let Err(failure) = removed.await {
            if let Some(net) = self.state().networks.get_mut(&record.id) {
                net.phase = Phase::Ready;
            }
            return Err(failure);
        }
        self.state().networks.remove(&record.id);
        self.events.publish("network", "destroy", &record.id, event_attributes(&record));
        Ok(())
    }

    /// Removes the networks without containers that the filters let through; their names.
    pub async fn prune(&self, filters: &Filters, until: Option<Timestamp>) -> Vec<String> {
        let unused: Vec<Arc<NetworkRecord>> = {
            let state = self.state();
            let wanted = |net: &&Net| {
                let record = &net.record;
                !is_predefined(&record.name)
                    && !record.config_only
                    && net.phase == Phase::Ready
                    && until.is_none_or(|until| record.created <= until)
                    && show::matches_prune_labels(filters, &record.labels)
                    && state.endpoints_of(&record.id).next().is_none()
            };
            state.networks.values().filter(wanted).map(|net| net.record.clone()).collect()
        };
        let mut removed = Vec::new();
        for record in unused {
            match self.remove(&record.id).await {
                Ok(()) => removed.push(record.name.clone()),
                // Somebody came in, or removed it first.
                Err(error) => tracing::debug!(network = record.name, %error, "not pruned"),
            }
        }
        let attributes = [("reclaimed".to_owned(), "0".to_owned())].into();
        self.events.publish("network", "prune", "", attributes);
        removed
    }

    /// Our networks that the filters let through.
    pub fn list(&self, filters: &Filters, detailed: bool) -> Result<Vec<Network>, Failure> {
        let state = self.state();
        let ready = state.networks.values().filter(|net| net.phase != Phase::Making);
        let mut nets: Vec<&Net> = ready.collect();
        nets.sort_by(|a, b| (a.record.created, &a.record.name).cmp(&(b.record.created, &b.record.name)));
        let networks = nets.into_iter().map(|net| (net, show::network(&state, net, detailed))).collect();
        show::select(&state, networks, filters)
    }

    /// One network by name, id or the start of its id; of a scope, if one is named.
    pub fn inspect(&self, wanted: &str, scope: &str) -> Result<Network, Failure> {
        let state = self.state();
        let net = state.find_ready(wanted)?;
        if !matches!(scope, "" | "local") {
            return Err(Failure::not_found(guest_api::error::no_such_network(wanted)));
        }
        Ok(show::network(&state, net, true))
    }

    /// The id and name of a network, if it is there.
    pub fn id_and_name(&self, wanted: &str) -> Option<(String, String)> {
        let state = self.state();
        let net = state.find_ready(wanted).ok()?;
        Some((net.record.id.clone(), net.record.name.clone()))
    }

    /// What the settings say `host-gateway` stands for; empty when they do not.
    pub fn host_gateways(&self) -> &[IpAddr] {
        &self.defaults.host_gateway
    }

    /// The default bridge's own address.
    pub fn gateway(&self) -> std::net::Ipv4Addr {
        match self.state().find("bridge").ok().and_then(|net| net.gateway(false)) {
            Some(IpAddr::V4(address)) => address,
            _ => std::net::Ipv4Addr::LOCALHOST,
        }
    }
}

/// What a network's events carry.
pub fn event_attributes(record: &NetworkRecord) -> BTreeMap<String, String> {
    [("name".to_owned(), record.name.clone()), ("type".to_owned(), record.driver.name().to_owned())].into()
}

/// Whether a subnet that the user named is free.
fn check_free(subnet: &IpNet, taken: &[IpNet], routes: &[Route], driver: Driver) -> Result<(), Failure> {
    let forbidden = |text: String| Err(Failure::new(ErrorKind::Forbidden, text));
    if taken.iter().any(|other| pools::overlap(subnet, other)) {
        return forbidden(
            "invalid pool request: Pool overlaps with other one on this address space".to_owned(),
        );
    }
    // Children of the host's own interface are in the host's own subnet.
    let clash = routes.iter().find(|route| {
        driver == Driver::Bridge
            && route.subnet.prefix_len() < route.subnet.max_prefix_len()
            && pools::overlap(subnet, &route.subnet)
    });
    match clash {
        Some(route) => forbidden(format!(
            "invalid pool request: subnet {subnet} overlaps {}, which this computer reaches through interface `{}`; \
             choose another one",
            route.subnet, route.interface
        )),
        None => Ok(()),
    }
}

/// Settles a pool's gateway: the one named, or the first address there is.
fn with_gateway(mut pool: PoolRecord, needed: bool) -> Result<PoolRecord, Failure> {
    let mut ipam = guest_network::Ipam::new(pool.subnet, pool.range);
    let refused = |what: String| {
        move |error: guest_network::IpamError| {
            let kind = if matches!(error, guest_network::IpamError::Taken { .. }) {
                ErrorKind::Forbidden
            } else {
                ErrorKind::Invalid
            };
            Failure::new(kind, format!("{what}: {error}"))
        }
    };
    match pool.gateway {
        Some(gateway) => {
            ipam.reserve(gateway).map_err(refused(format!("failed to allocate gateway ({gateway})")))?;
        }
        None if needed => {
            for address in pool.auxiliary.values() {
                // Reserved again below, where a refusal is told.
                let _ = ipam.reserve(*address);
            }
            let gateway = ipam.allocate().map_err(refused("failed to allocate gateway ()".to_owned()))?;
            pool.gateway = Some(gateway.addr());
        }
        None => {}
    }
    let mut ipam = guest_network::Ipam::new(pool.subnet, pool.range);
    for address in pool.gateway.iter() {
        let _ = ipam.reserve(*address);
    }
    for (name, address) in &pool.auxiliary {
        let what = format!("failed to allocate secondary ip address ({name}:{address})");
        ipam.reserve(*address).map_err(refused(what))?;
    }
    Ok(pool)
}

/// A random id whose first digits no other network has: interfaces are named after them.
fn new_id(state: &State) -> String {
    loop {
        let id = hex::encode(rand::random::<[u8; 32]>());
        // A short id of digits alone could be taken for a number.
        let unusable = id[..12].bytes().all(|byte| byte.is_ascii_digit())
            || state.networks.keys().any(|other| other[..12] == id[..12]);
        if !unusable {
            return id;
        }
    }
}

/// The networks that are always there.
fn predefined(
    choice: &BridgeChoice,
    defaults: &NetworkDefaults,
    address: ipnet::Ipv4Net,
    engine_id: &str,
) -> Vec<NetworkRecord> {
    let record = |name: &str, driver| NetworkRecord {
        id: hex::encode(Sha256::digest(format!("network {name} of {engine_id}"))),
        name: name.to_owned(),
        created: Timestamp::now(),
        driver,
        ipv4: true,
        ipv6: false,
        pools: Vec::new(),
        ipam_driver: "default".to_owned(),
        ipam_options: None,
        internal: false,
        attachable: false,
        ingress: false,
        config_only: false,
        config_from: String::new(),
        options: BTreeMap::new(),
        labels: BTreeMap::new(),
        interface: String::new(),
        owns_interface: false,
    };
    let mut bridge = record("bridge", Driver::Bridge);
    bridge.interface.clone_from(&choice.name);
    bridge.owns_interface = true;
    let elsewhere: BTreeMap<String, IpAddr> =
        defaults.gateway.iter().map(|gateway| (GATEWAY_V4.to_owned(), (*gateway).into())).collect();
    bridge.pools = vec![PoolRecord {
        subnet: address.trunc().into(),
        range: defaults.fixed_range.map(Into::into),
        gateway: Some(address.addr().into()),
        auxiliary: elsewhere.clone(),
        given: Some(IpamPool {
            subnet: address.trunc().to_string(),
            gateway: address.addr().to_string(),
            ip_range: defaults.fixed_range.map(|range| range.to_string()).unwrap_or_default(),
            auxiliary_addresses: elsewhere.iter().map(|(name, at)| (name.clone(), at.to_string())).collect(),
        }),
    }];
    bridge.options = [
        (options::DEFAULT_BRIDGE, "true".to_owned()),
        (options::ICC, defaults.between_containers.to_string()),
        (options::MASQUERADE, defaults.masquerade.to_string()),
        (options::HOST_BINDING, defaults.publish_on.to_string()),
        (options::BRIDGE_NAME, choice.name.clone()),
        (options::MTU, choice.mtu.to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    vec![bridge, record("host", Driver::Host), record("none", Driver::Null)]
}

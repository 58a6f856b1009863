//! Putting containers onto networks and taking them off.
//!
//! Addresses are taken first, in one step under the lock: from then on the container is known as a member, and its
//! networks cannot be removed. Then the kernel does its part; a failure gives everything back. What a restarted engine
//! has to know is in a file per running container.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use guest_api::ErrorKind;
use guest_api::network::EndpointSettings;
use guest_network::{Endpoint, EndpointSpec, SLOTS_MAX, Sandbox, Uplink};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::options::Kind;
use super::ports::Lease;
use super::record::{EndpointRecord, MemberRecord, is_predefined};
use super::service::{Networks, event_attributes};
use super::state::{Member, Net, Place, State};
use crate::failure::Failure;
use crate::services::containers::Record;

/// Largest packet where nobody says otherwise.
const MTU_DEFAULT: u32 = 1500;
/// An endpoint's kernel settings, separated by commas.
const SYSCTLS: &str = "com.docker.network.endpoint.sysctls";
/// An endpoint's interface name.
const IFNAME: &str = "com.docker.network.endpoint.ifname";

/// Where a container that is about to start is on the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The file of its network namespace; `None` for the host's.
    pub namespace: Option<PathBuf>,
    /// The container whose /etc/hosts, /etc/hostname and /etc/resolv.conf it uses.
    pub files_of: Option<String>,
    /// Host and domain name, where they are another's.
    pub names: Option<(String, String)>,
    /// Its own addresses, for /etc/hosts.
    pub addresses: Vec<IpAddr>,
    /// It has a name server at 127.0.0.11.
    pub has_name_server: bool,
}

/// By what a container's network is looked up: names of the engine's own networks, ids of others, which survive a
/// network of the same name.
pub fn lookup_key<'a>(name: &'a str, settings: &'a EndpointSettings) -> &'a str {
    if is_predefined(name) || settings.network_id.is_empty() { name } else { &settings.network_id }
}

impl Networks {
    /// The network namespace file of a container.
    pub fn sandbox_path(&self, container: &str) -> PathBuf {
        self.sandboxes.join(&container[..12])
    }

    pub(super) fn member_path(&self, container: &str) -> PathBuf {
        self.members.join(format!("{}.json", &container[..12]))
    }

    /// Checks what a container asks of networks that are there; others may come before it starts.
    pub fn check(&self, networks: &BTreeMap<String, EndpointSettings>) -> Result<(), Failure> {
        let state = self.state();
        let errors: Vec<String> = networks
            .iter()
            .filter_map(|(name, settings)| {
                let net = state.find_ready(lookup_key(name, settings)).ok();
                let failure = check_endpoint(net, name, settings).err()?;
                Some(format!("invalid config for network {name}: {}", failure.message))
            })
            .collect();
        if errors.is_empty() { Ok(()) } else { Err(Failure::invalid(super::create::join_errors(&errors))) }
    }

    /// Checks what a container asks of one network.
    pub fn check_one(&self, name: &str, settings: &EndpointSettings) -> Result<(), Failure> {
        let state = self.state();
        let net = state.find_ready(lookup_key(name, settings)).ok();
        check_endpoint(net, net.map_or(name, |net| net.record.name.as_str()), settings)
    }

    /// Gives a container that is about to start its place: a namespace of its own with an endpoint in each of its
    /// networks, or somebody else's. On failure nothing is left.
    pub async fn attach(&self, record: &Record) -> Result<Attached, Failure> {
        let mode = record.host.network_mode.as_str();
        if let Some(other) = mode.strip_prefix("container:") {
            return self.share(record, other);
        }
        let place = if mode == "host" { Place::Host } else { Place::Own };
        let wanted = record.networks();
        let endpoints = {
            let mut state = self.state();
            let endpoints = take_endpoints(&mut state, record, &wanted, &[])?;
            let member = Member {
                record: Arc::new(record.clone()),
                place: place.clone(),
                endpoints: endpoints.clone(),
                ports: Vec::new(),
                landings: BTreeMap::new(),
                lease: None,
                name_server: None,
            };
            self.join(&mut state, member);
            endpoints
        };
        match self.plug(record, &place, &endpoints, &wanted).await {
            Ok(()) => {
                for endpoint in &endpoints {
                    self.tell(record, endpoint, "connect");
                }
                let addresses = endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
                Ok(Attached {
                    namespace: (place == Place::Own).then(|| self.sandbox_path(&record.id)),
                    files_of: None,
                    names: None,
                    has_name_server: self.has_name_server(&record.id),
                    addresses: addresses.map(IpNet::addr).collect(),
                })
            }
            Err(failure) => {
                if let Err(also) = self.detach(&record.id).await {
                    tracing::warn!(container = record.short_id(), error = %also, "the network stays behind");
                }
                Err(failure)
            }
        }
    }

    /// The kernel's part of [`Networks::attach`].
    async fn plug(
        &self,
        record: &Record,
        place: &Place,
        endpoints: &[EndpointRecord],
        wanted: &BTreeMap<String, EndpointSettings>,
    ) -> Result<(), Failure> {
        if *place == Place::Own {
            let failed = |error: &(dyn std::error::Error + 'static)| setup_failure(record, error);
            let path = self.sandbox_path(&record.id);
            if path.exists() {
                // An engine that was killed left it.
                self.delete_sandbox(&record.id).await?;
            }
            let raised = async {
                for endpoint in endpoints {
                    self.raise(&endpoint.network_id).await?;
                }
                Ok::<(), Failure>(())
            };
            raised.await?;
            let (specs, gateways) = {
                let state = self.state();
                let spec = |endpoint: &EndpointRecord| spec(&state, record, endpoint, wanted);
                (endpoints.iter().filter_map(spec).collect::<Vec<_>>(), state.gateways(endpoints))
            };
            let names: Vec<String> = specs.iter().map(|spec| spec.interface.clone()).collect();
            let made = Endpoint::attach_new(&path, &record.id, specs, gateways).await;
            let made = made.map_err(|error| failed(&error))?;
            if let Some(member) = self.state().members.get_mut(&record.id) {
                note_macs(member, &names, &made);
            }
            self.serve_names(&record.id).await?;
            if self.state().is_linked(&record.id) {
                self.firewall.refresh().await?;
            }
            self.publish(record).await?;
        }
        self.keep(&record.id)
    }

    /// Whether a container that runs has a name server at 127.0.0.11.
    pub fn has_name_server(&self, container: &str) -> bool {
        self.state().members.get(container).is_some_and(|member| member.name_server.is_some())
    }

    /// Gives a container the namespace of another one that runs.
    fn share(&self, record: &Record, wanted: &str) -> Result<Attached, Failure> {
        let mut state = self.state();
        let Some(target) = find_member(&state, wanted) else {
            return Err(Failure::conflict(format!(
                "cannot join network namespace of a non running container: {wanted}"
            )));
        };
        if target.record.id == record.id {
            return Err(Failure::broken("cannot join own network namespace"));
        }
        // Of one that shares itself, the one it shares with.
        let (owner, host) = match &target.place {
            Place::Shared(other) => (other.clone(), false),
            Place::Own => (target.record.id.clone(), false),
            Place::Host => (target.record.id.clone(), true),
        };
        let names = (target.record.config.hostname.clone(), target.record.config.domainname.clone());
        let place = if host { Place::Host } else { Place::Shared(owner.clone()) };
        let member = Member {
            record: Arc::new(record.clone()),
            place,
            endpoints: Vec::new(),
            ports: Vec::new(),
            landings: BTreeMap::new(),
            lease: None,
            name_server: None,
        };
        self.join(&mut state, member);
        drop(state);
        let namespace = (!host).then(|| self.sandbox_path(&owner));
        Ok(Attached {
            namespace,
            files_of: Some(owner),
            names: Some(names),
            addresses: Vec::new(),
            has_name_server: false,
        })
    }

    /// Takes everything of a container's network away. What is not there is fine.
    pub async fn detach(&self, container: &str) -> Result<(), Failure> {
        let member = self.state().members.get(container).map(|member| {
            let slots: Vec<u8> = member.endpoints.iter().map(|endpoint| endpoint.slot).collect();
            (member.place == Place::Own, slots)
        });
        let slots = match member {
            Some((true, slots)) => slots,
            Some((false, _)) => {
                self.forget(container);
                return Ok(());
            }
            None => Vec::new(),
        };
        let ends = Endpoint::host_ends(container, &slots).await.map_err(|error| {
            Failure::internal(format!("cannot remove the interfaces of {}", &container[..12]), &error)
        });
        let sandbox = self.delete_sandbox(container).await;
        let was_linked = self.state().is_linked(container);
        let lease = self.forget(container);
        let had_rules = was_linked || lease.is_some();
        if let Some(lease) = lease {
            lease.close().await;
        }
        let firewall = if had_rules { self.firewall.refresh().await } else { Ok(()) };
        // Nobody waits for the kernel to take interfaces apart.
        let ends = ends.map(|ends| {
            tokio::spawn(async move {
                if let Err(error) = ends.remove().await {
                    tracing::warn!(%error, "an interface stays behind");
                }
            });
        });
        ends.and(sandbox).and(firewall)
    }

    /// Gives back what a container held, but for the sockets of its ports, which are the caller's to close.
    fn forget(&self, container: &str) -> Option<Lease> {
        let mut state = self.state();
        let member = state.members.remove(container);
        if let Some(member) = &member {
            give_back(&mut state, &member.endpoints);
        }
        drop(state);
        let (ports, lease) = member.map(|member| (member.ports, member.lease)).unwrap_or_default();
        match &self.outside {
            Some(outside) if !ports.is_empty() => outside.release(container),
            Some(_) => {}
            None => self.ports.release(&ports),
        }
        match std::fs::remove_file(self.member_path(container)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(container = &container[..12], %error, "a network record stays behind");
            }
            _ => {}
        }
        lease
    }

    /// What a container is connected to right now, for the events of its end.
    pub fn tell_disconnected(&self, record: &Record, endpoints: &[EndpointRecord]) {
        for endpoint in endpoints {
            self.tell(record, endpoint, "disconnect");
        }
    }

    /// The places of a running container.
    pub fn places(&self, container: &str) -> Vec<EndpointRecord> {
        self.state().members.get(container).map(|member| member.endpoints.clone()).unwrap_or_default()
    }

    fn tell(&self, record: &Record, endpoint: &EndpointRecord, action: &str) {
        let attributes =
            self.state().networks.get(&endpoint.network_id).map(|net| event_attributes(&net.record));
        let mut attributes = attributes.unwrap_or_default();
        attributes.insert("container".to_owned(), record.id.clone());
        self.events.publish("network", action, &endpoint.network_id, attributes);
    }

    /// Connects a container that runs to one more network.
    pub async fn connect(
        &self,
        record: &Record,
        wanted: &str,
        settings: &EndpointSettings,
    ) -> Result<(), Failure> {
        let (endpoint, network) = {
            let mut state = self.state();
            let network = state.find_ready(wanted)?.record.clone();
            let member = state.members.get(&record.id);
            let member =
                member.ok_or_else(|| Failure::conflict(guest_api::error::not_running(&record.id)))?;
            if member.endpoints.iter().any(|endpoint| endpoint.network_id == network.id) {
                return Err(Failure::new(
                    ErrorKind::Forbidden,
                    format!("endpoint with name {} already exists in network {}", record.name, network.name),
                ));
            }
            if member.place != Place::Own {
                return Err(conflict_shared());
            }
            let present = member.endpoints.clone();
            let one = [(network.name.clone(), settings.clone())].into();
            let mut taken = take_endpoints(&mut state, record, &one, &present)?;
            let Some(endpoint) = taken.pop() else {
                return Err(Failure::broken("a network to connect to got lost"));
            };
            if let Some(member) = state.members.get_mut(&record.id) {
                member.endpoints.push(endpoint.clone());
            }
            (endpoint, network)
        };
        let one = [(network.name.clone(), settings.clone())].into();
        match self.plug_one(record, &endpoint, &one).await {
            Ok(()) => {
                self.tell(record, &endpoint, "connect");
                Ok(())
            }
            Err(failure) => {
                let mut state = self.state();
                if let Some(member) = state.members.get_mut(&record.id) {
                    member.endpoints.retain(|other| other.id != endpoint.id);
                }
                give_back(&mut state, std::slice::from_ref(&endpoint));
                Err(failure)
            }
        }
    }

    async fn plug_one(
        &self,
        record: &Record,
        endpoint: &EndpointRecord,
        wanted: &BTreeMap<String, EndpointSettings>,
    ) -> Result<(), Failure> {
        self.raise(&endpoint.network_id).await?;
        let failed = |error: &(dyn std::error::Error + 'static)| setup_failure(record, error);
        let sandbox = Sandbox::open(&self.sandbox_path(&record.id)).map_err(|error| failed(&error))?;
        let (spec, gateways) = {
            let state = self.state();
            let endpoints =
                state.members.get(&record.id).map(|member| member.endpoints.clone()).unwrap_or_default();
            (spec(&state, record, endpoint, wanted), state.gateways(&endpoints))
        };
        if let Some(spec) = spec {
            let names = [spec.interface.clone()];
            let made = Endpoint::attach(&sandbox, &record.id, vec![spec], gateways).await;
            let made = made.map_err(|error| failed(&error))?;
            guest_fault::point("network.connect.after-plug");
            if let Some(member) = self.state().members.get_mut(&record.id) {
                note_macs(member, &names, &made);
            }
        }
        self.serve_names(&record.id).await?;
        self.move_ports(record).await?;
        self.keep(&record.id)?;
        guest_fault::point("network.connect.after-keep");
        Ok(())
    }

    /// Leads published ports to where the container is reached by now.
    async fn move_ports(&self, record: &Record) -> Result<(), Failure> {
        let has_ports = {
            let state = self.state();
            let member = state.members.get(&record.id);
            let lease = member.and_then(|member| Some((member, member.lease.as_ref()?)));
            lease.map(|(member, lease)| lease.lead_to(super::publish::target(&state, member))).is_some()
        };
        if !has_ports {
            return self.publish(record).await;
        }
        self.admit_loopback(&record.id)?;
        self.firewall.refresh().await?;
        self.land(&record.id).await;
        Ok(())
    }

    /// Disconnects a container that runs from a network.
    pub async fn disconnect(&self, record: &Record, wanted: &str) -> Result<(), Failure> {
        let (endpoint, gateways) = {
            let state = self.state();
            let network = state.find(wanted)?.record.clone();
            let missing = || {
                Failure::broken(format!(
                    "container {} is not connected to network {}",
                    record.id, network.name
                ))
            };
            let member = state.members.get(&record.id).ok_or_else(missing)?;
            if member.place == Place::Host {
                return Err(Failure::invalid(
                    "cannot disconnect container from host network - container was created in host network mode",
                ));
            }
            let (gone, rest): (Vec<_>, Vec<_>) =
                member.endpoints.iter().cloned().partition(|endpoint| endpoint.network_id == network.id);
            let endpoint = gone.into_iter().next().ok_or_else(missing)?;
            let gateways = state.gateways(&rest);
            (endpoint, gateways)
        };
        let failed = |error: &(dyn std::error::Error + 'static)| {
            let what = format!("container {} failed to leave network {}", record.id, endpoint.network);
            Failure::internal(what, error)
        };
        let sandbox = Sandbox::open(&self.sandbox_path(&record.id)).map_err(|error| failed(&error))?;
        // Noted first: an engine that is killed from here on takes the interface away when it comes back.
        self.change_places(&record.id, |places| places.retain(|other| other.id != endpoint.id));
        let detached = async {
            self.keep(&record.id)?;
            guest_fault::point("network.disconnect.after-keep");
            Endpoint::detach(&sandbox, &record.id, endpoint.slot, &endpoint.interface, gateways)
                .await
                .map_err(|error| failed(&error))
        };
        if let Err(failure) = detached.await {
            self.change_places(&record.id, |places| places.push(endpoint.clone()));
            self.keep(&record.id)?;
            return Err(failure);
        }
        guest_fault::point("network.disconnect.after-unplug");
        give_back(&mut self.state(), std::slice::from_ref(&endpoint));
        self.move_ports(record).await?;
        self.tell(record, &endpoint, "disconnect");
        Ok(())
    }

    fn change_places(&self, container: &str, change: impl FnOnce(&mut Vec<EndpointRecord>)) {
        if let Some(member) = self.state().members.get_mut(container) {
            change(&mut member.endpoints);
        }
    }

    /// Writes what a restarted engine has to know, so that it appears whole or not at all.
    pub(super) fn keep(&self, container: &str) -> Result<(), Failure> {
        let kept = match self.state().members.get(container) {
            None => return Ok(()),
            Some(member) => MemberRecord {
                endpoints: member.endpoints.clone(),
                ports: member.ports.clone(),
                landings: member.landings.clone(),
            },
        };
        let path = self.member_path(container);
        let write = || {
            std::fs::create_dir_all(&self.members)?;
            let new = path.with_extension("new");
            std::fs::write(&new, serde_json::to_vec(&kept)?)?;
            std::fs::rename(&new, &path)
        };
        write()
            .map_err(|error: std::io::Error| Failure::internal("cannot keep the container's network", &error))
    }

    /// Takes over the place of a container that an earlier engine started and that still runs.
    pub fn restore(&self, record: &Record) {
        let kept = match std::fs::read(self.member_path(&record.id)) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(container = record.short_id(), %error, "its network record cannot be understood");
                MemberRecord::default()
            }),
            // One that shares another's, or uses the host's, has none.
            Err(_) => MemberRecord::default(),
        };
        let mode = record.host.network_mode.as_str();
        let mut state = self.state();
        let place = match mode.strip_prefix("container:") {
            Some(other) => match find_member(&state, other) {
                Some(target) => Place::Shared(target.record.id.clone()),
                None => Place::Shared(other.to_owned()),
            },
            None if mode == "host" => Place::Host,
            None => Place::Own,
        };
        for endpoint in &kept.endpoints {
            let Some(net) = state.networks.get_mut(&endpoint.network_id) else { continue };
            for address in &endpoint.addresses {
                if let Err(error) = net.take(address.addr().is_ipv6(), Some(address.addr()))
                    && !is_link_local(address.addr())
                {
                    tracing::warn!(container = record.short_id(), %error, "its address cannot be kept");
                }
            }
        }
        let member = Member {
            record: Arc::new(record.clone()),
            place,
            endpoints: kept.endpoints,
            ports: kept.ports,
            landings: kept.landings,
            lease: None,
            name_server: None,
        };
        self.join(&mut state, member);
    }

    fn join(&self, state: &mut State, member: Member) {
        if member.place == Place::Host {
            self.joined_host.notify_one();
        }
        state.members.insert(member.record.id.clone(), member);
    }

    /// Keeps a container's new name.
    pub fn renamed(&self, record: &Record) {
        if let Some(member) = self.state().members.get_mut(&record.id) {
            member.record = Arc::new(record.clone());
            let networks = record.networks();
            for endpoint in &mut member.endpoints {
                if let Some(settings) = networks.get(&endpoint.network) {
                    endpoint.names = record.dns_names(settings);
                }
            }
        }
    }

    async fn delete_sandbox(&self, container: &str) -> Result<(), Failure> {
        let path = self.sandbox_path(container);
        if !path.exists() {
            return Ok(());
        }
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::internal(format!("cannot remove the network namespace of {}", &container[..12]), error)
        };
        Sandbox::at(&path).delete().await.map_err(|error| failed(&error))
    }

    /// Removes the network of every container not in `live`: what an engine that was killed left.
    pub async fn sweep(&self, live: &[String]) -> Vec<Failure> {
        let mut failures = self.sweep_unfinished().await;
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
        let kept: Vec<PathBuf> = live.iter().map(|id| self.member_path(id)).collect();
        for entry in std::fs::read_dir(&self.members).into_iter().flatten().flatten() {
            if !kept.contains(&entry.path())
                && let Err(error) = std::fs::remove_file(entry.path())
            {
                failures.push(Failure::internal("cannot remove a network record", &error));
            }
        }
        failures
    }
}

fn setup_failure(record: &Record, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::internal(format!("failed to set up container networking for {}", record.short_id()), error)
}

fn conflict_shared() -> Failure {
    Failure::invalid(
        "container sharing network namespace with another container or host cannot be connected to any other network",
    )
}

/// A running container by id, name, or the start of its id.
fn find_member<'a>(state: &'a State, wanted: &str) -> Option<&'a Member> {
    let bare = wanted.strip_prefix('/').unwrap_or(wanted);
    state
        .members
        .get(bare)
        .or_else(|| state.members.values().find(|member| member.record.name == bare))
        .or_else(|| {
            let mut found = state.members.range(bare.to_owned()..).take_while(|(id, _)| id.starts_with(bare));
            match (found.next(), found.next()) {
                (Some((_, member)), None) if !bare.is_empty() => Some(member),
                _ => None,
            }
        })
}

/// Takes an address in each of the networks. `present`: what the container has already. On failure none is kept.
fn take_endpoints(
    state: &mut State,
    record: &Record,
    wanted: &BTreeMap<String, EndpointSettings>,
    present: &[EndpointRecord],
) -> Result<Vec<EndpointRecord>, Failure> {
    let mode = &record.host.network_mode;
    let mut order: Vec<(&String, &EndpointSettings)> = wanted.iter().collect();
    // The first interface is on the network the container is named for.
    order.sort_by_key(|(name, settings)| (*name != mode && settings.network_id != *mode, (*name).clone()));
    let mut taken: Vec<EndpointRecord> = Vec::new();
    for (name, settings) in order {
        let all: Vec<&EndpointRecord> = present.iter().chain(&taken).collect();
        match take_endpoint(state, name, settings, &all) {
            Ok(mut endpoint) => {
                endpoint.names = record.dns_names(settings);
                taken.push(endpoint);
            }
            Err(failure) => {
                give_back(state, &taken);
                return Err(failure);
            }
        }
    }
    Ok(taken)
}

fn take_endpoint(
    state: &mut State,
    name: &str,
    settings: &EndpointSettings,
    present: &[&EndpointRecord],
) -> Result<EndpointRecord, Failure> {
    let id = {
        let net = state.find_ready(lookup_key(name, settings)).map_err(|failure| {
            Failure::new(failure.kind, format!("failed to set up container networking: {}", failure.message))
        })?;
        check_endpoint(Some(net), &net.record.name, settings)?;
        net.record.id.clone()
    };
    let Some(net) = state.networks.get_mut(&id) else {
        return Err(Failure::not_found(guest_api::error::no_such_network(name)));
    };
    if net.record.config_only {
        return Err(Failure::new(
            ErrorKind::Forbidden,
            "cannot create endpoint on configuration-only network",
        ));
    }
    let has_interface = !matches!(net.settings.kind, Kind::None);
    let mut endpoint = EndpointRecord {
        network_id: net.record.id.clone(),
        network: net.record.name.clone(),
        id: hex::encode(rand::random::<[u8; 32]>()),
        slot: free_slot(present)?,
        interface: String::new(),
        addresses: Vec::new(),
        gateways: Vec::new(),
        mac: String::new(),
        priority: settings.gw_priority,
        names: Vec::new(),
        links: settings
            .links
            .iter()
            .flatten()
            .map(|link| {
                let (target, alias) = link.split_once(':').unwrap_or((link, link));
                (target.to_owned(), alias.to_owned())
            })
            .collect(),
    };
    if !has_interface {
        return Ok(endpoint);
    }
    endpoint.interface = interface_name(net, settings, present)?;
    let static_addresses = settings.ipam_config.clone().unwrap_or_default();
    for (six, on, text) in [
        (false, net.record.ipv4, &static_addresses.ipv4_address),
        (true, net.record.ipv6, &static_addresses.ipv6_address),
    ] {
        if !on {
            continue;
        }
        let fixed = text.parse::<IpAddr>().ok();
        match net.take(six, fixed) {
            Ok(address) => endpoint.addresses.push(address),
            Err(failure) => {
                for address in endpoint.addresses {
                    net.give_back(address);
                }
                return Err(failure);
            }
        }
        if !net.record.internal {
            endpoint.gateways.extend(net.way_out(six));
        }
    }
    endpoint.addresses.extend(static_addresses.link_local_ips.iter().filter_map(|text| link_local(text)));
    let mac = settings.mac_address.parse().ok();
    let mac = mac.or_else(|| endpoint.addresses.first().map(|net| guest_network::Mac::of(net.addr())));
    endpoint.mac = mac.map(|mac: guest_network::Mac| mac.to_string()).unwrap_or_default();
    Ok(endpoint)
}

fn link_local(text: &str) -> Option<IpNet> {
    Some(match text.parse().ok()? {
        IpAddr::V4(address) => Ipv4Net::new_assert(address, 16).into(),
        IpAddr::V6(address) => Ipv6Net::new_assert(address, 64).into(),
    })
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

pub(super) fn give_back(state: &mut State, endpoints: &[EndpointRecord]) {
    for endpoint in endpoints {
        if let Some(net) = state.networks.get_mut(&endpoint.network_id) {
            for address in &endpoint.addresses {
                net.give_back(*address);
            }
        }
    }
}

fn free_slot(present: &[&EndpointRecord]) -> Result<u8, Failure> {
    (0..SLOTS_MAX).find(|slot| !present.iter().any(|endpoint| endpoint.slot == *slot)).ok_or_else(|| {
        Failure::invalid(format!("a container cannot be connected to more than {SLOTS_MAX} networks"))
    })
}

fn interface_name(
    net: &Net,
    settings: &EndpointSettings,
    present: &[&EndpointRecord],
) -> Result<String, Failure> {
    let is_taken = |name: &str| present.iter().any(|endpoint| endpoint.interface == name);
    if let Some(name) = settings.driver_opts.as_ref().and_then(|options| options.get(IFNAME)) {
        if !guest_network::is_interface_name(name) || name == "lo" || is_taken(name) {
            return Err(Failure::invalid(format!("invalid interface name \"{name}\"")));
        }
        return Ok(name.clone());
    }
    let prefix = &net.settings.interface_prefix;
    let free = (0..=SLOTS_MAX).map(|number| format!("{prefix}{number}")).find(|name| !is_taken(name));
    free.ok_or_else(|| Failure::broken("no interface name is free"))
}

fn spec(
    state: &State,
    record: &Record,
    endpoint: &EndpointRecord,
    wanted: &BTreeMap<String, EndpointSettings>,
) -> Option<EndpointSpec> {
    let net = state.networks.get(&endpoint.network_id)?;
    let interface = net.record.interface.clone();
    let uplink = match &net.settings.kind {
        Kind::Bridge(bridge) => {
            let publishes = record.host.publish_all_ports
                || record
                    .host
                    .port_bindings
                    .iter()
                    .flat_map(BTreeMap::values)
                    .flatten()
                    .any(|list| !list.is_empty());
            Uplink::Bridge { name: interface, isolated: !bridge.direct, hairpin: publishes }
        }
        Kind::Macvlan { mode, .. } => Uplink::Macvlan { parent: interface, mode: *mode },
        Kind::Ipvlan { mode, .. } => Uplink::Ipvlan { parent: interface, mode: *mode },
        Kind::None => return None,
    };
    let settings = wanted.iter().find(|(name, settings)| {
        settings.network_id == endpoint.network_id
            || **name == endpoint.network
            || net.record.id.starts_with(*name)
    });
    let options = settings.and_then(|(_, settings)| settings.driver_opts.as_ref());
    let sysctls = options.and_then(|options| options.get(SYSCTLS)).map(|text| read_sysctls(text));
    Some(EndpointSpec {
        container: record.id.clone(),
        slot: endpoint.slot,
        interface: endpoint.interface.clone(),
        uplink,
        addresses: endpoint.addresses.clone(),
        mac: endpoint.mac.parse().ok(),
        mtu: net.settings.mtu.unwrap_or(MTU_DEFAULT),
        sysctls: sysctls.unwrap_or_default(),
    })
}

fn read_sysctls(text: &str) -> Vec<(String, String)> {
    let pairs = text.split(',').filter_map(|entry| entry.split_once('='));
    pairs.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect()
}

/// The kernel's word counts: an ipvlan interface has its parent's hardware address.
fn note_macs(member: &mut Member, names: &[String], made: &[Endpoint]) {
    for (name, made) in names.iter().zip(made) {
        if let Some(endpoint) = member.endpoints.iter_mut().find(|endpoint| endpoint.interface == *name) {
            endpoint.mac = made.mac.to_string();
        }
    }
}

/// Checks what is asked of one network, in dockerd's words; `net` where it is known.
pub fn check_endpoint(net: Option<&Net>, name: &str, settings: &EndpointSettings) -> Result<(), Failure> {
    let mut errors = Vec::new();
    let ipam = settings.ipam_config.clone().unwrap_or_default();
    if is_predefined(name) {
        if !ipam.ipv4_address.is_empty() || !ipam.ipv6_address.is_empty() {
            errors.push("user specified IP address is supported on user defined networks only".to_owned());
        }
        if settings.aliases.as_ref().is_some_and(|aliases| !aliases.is_empty()) {
            errors.push(
                "network-scoped alias is supported only for containers in user defined networks".to_owned(),
            );
        }
    }
    for (text, six, what) in [(&ipam.ipv4_address, false, "IPv4"), (&ipam.ipv6_address, true, "IPv6")] {
        if text.is_empty() {
            continue;
        }
        match text.parse::<IpAddr>() {
            Ok(address) if address.is_ipv6() == six && !address.is_unspecified() => {
                if let Some(net) = net.filter(|net| !is_predefined(&net.record.name)) {
                    errors.extend(out_of_range(net, address));
                }
            }
            _ => errors.push(format!("invalid {what} address: {text}")),
        }
    }
    for text in &ipam.link_local_ips {
        if text.parse::<IpAddr>().map_or(true, |address| address.is_unspecified()) {
            errors.push(format!("invalid link-local IP address: {text}"));
        }
    }
    if !settings.mac_address.is_empty() && settings.mac_address.parse::<guest_network::Mac>().is_err() {
        return Err(Failure::invalid(format!("invalid MAC address {}", settings.mac_address)));
    }
    if let Some(text) = settings.driver_opts.as_ref().and_then(|options| options.get(SYSCTLS)) {
        for entry in text.split(',') {
            let parts: Vec<&str> = entry.splitn(5, '.').collect();
            let known = parts.len() == 5
                && parts[0] == "net"
                && matches!(parts[1], "ipv4" | "ipv6" | "mpls")
                && parts[3].eq_ignore_ascii_case("ifname")
                && entry.contains('=')
                && !entry.contains('/');
            if !known {
                errors.push(format!(
                    "unrecognised network interface sysctl '{entry}'; represent 'net.X.Y.ethN.Z=V' as \
                     'net.X.Y.IFNAME.Z=V', 'X' must be 'ipv4', 'ipv6' or 'mpls'"
                ));
            }
        }
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(Failure::invalid(format!("invalid endpoint settings:\n{}", super::create::join_errors(&errors))))
}

fn out_of_range(net: &Net, address: IpAddr) -> Option<String> {
    let given: Vec<IpNet> = net
        .record
        .pools
        .iter()
        .filter(|pool| pool.given.is_some() && pool.subnet.addr().is_ipv6() == address.is_ipv6())
        .map(|pool| pool.subnet)
        .collect();
    if given.is_empty() {
        return Some(
            "user specified IP address is supported only when connecting to networks with user configured subnets"
                .to_owned(),
        );
    }
    (!given.iter().any(|subnet| subnet.contains(&address)))
        .then(|| format!("no configured subnet or ip-range contain the IP address {address}"))
}

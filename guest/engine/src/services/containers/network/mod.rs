//! A container's side of its networks: which ones its record names, and joining and leaving one while it exists.

mod files;
mod links;

use std::collections::BTreeMap;
use std::path::PathBuf;

use guest_api::network::EndpointSettings;

pub use self::files::extra_host;
pub use self::links::{resolve as resolve_links, shown as shown_links, targets as link_targets};
use super::record::Record;
use super::run::Context;
use crate::failure::Failure;
use crate::services::networks::{Attached, lookup_key};

/// What is asked of a container's networks.
#[derive(Clone, Debug)]
pub enum NetworkChange {
    Connect {
        network: String,
        settings: Box<EndpointSettings>,
    },
    Disconnect {
        network: String,
        force: bool,
    },
    /// Takes a link of the default network away.
    Unlink {
        alias: String,
    },
}

impl Record {
    /// The networks it is, or will be, on, by name. None for one that uses another's namespace.
    pub fn networks(&self) -> BTreeMap<String, EndpointSettings> {
        let mode = self.host.network_mode.as_str();
        if mode.starts_with("container:") {
            return BTreeMap::new();
        }
        // Records of earlier versions name one network, by mode alone.
        if self.networks.is_none() {
            let mode = if mode.is_empty() || mode == "default" { "bridge" } else { mode };
            let settings = EndpointSettings {
                mac_address: self.config.mac_address.clone(),
                ..EndpointSettings::default()
            };
            return [(mode.to_owned(), settings)].into();
        }
        self.networks.clone().unwrap_or_default()
    }

    /// The names other containers of a network know it by.
    pub fn dns_names(&self, settings: &EndpointSettings) -> Vec<String> {
        let mut names = vec![self.name.clone()];
        names.extend(settings.aliases.iter().flatten().cloned());
        names.push(self.short_id().to_owned());
        if !self.config.hostname.is_empty() {
            names.push(self.config.hostname.clone());
        }
        let mut seen = std::collections::BTreeSet::new();
        names.retain(|name| seen.insert(name.clone()));
        names
    }
}

/// Notes in the record which networks it is on by now: their ids, and their names where it had been given ids.
pub fn settle(context: &Context, record: &mut Record) {
    let places = context.networks.places(&record.id);
    let mut settled = BTreeMap::new();
    for (name, mut settings) in record.networks() {
        let found = context.networks.id_and_name(lookup_key(&name, &settings));
        let name = match found {
            Some((id, name)) if places.iter().any(|place| place.network_id == id) => {
                settings.network_id = id;
                name
            }
            _ => name,
        };
        settled.insert(name, settings);
    }
    if !record.host.network_mode.starts_with("container:") {
        record.networks = Some(settled);
    }
}

/// Takes a container that could not be started off its networks.
pub async fn leave(context: &Context, record: &Record) -> Result<(), Failure> {
    let places = context.networks.places(&record.id);
    context.networks.detach(&record.id).await?;
    context.networks.tell_disconnected(record, &places);
    Ok(())
}

/// The record with the names it goes by inside: one that uses another's network, or the host's, has their names.
pub fn named(record: &Record, attached: &Attached) -> Record {
    let mut record = record.clone();
    if let Some((hostname, domainname)) = &attached.names {
        record.config.hostname.clone_from(hostname);
        record.config.domainname.clone_from(domainname);
    }
    record
}

/// Writes /etc/hosts, /etc/hostname and /etc/resolv.conf for a container that is about to start. Returns their folder,
/// which is another's for one that uses its network. A resolv.conf that the user has changed stays.
pub fn write_files(context: &Context, record: &Record, attached: &Attached) -> Result<PathBuf, Failure> {
    if let Some(other) = &attached.files_of {
        return Ok(context.data_folder(other));
    }
    let folder = context.data_folder(&record.id);
    let (hostname, _) = host_names(record);
    let extra = record.host.extra_hosts.as_deref().unwrap_or_default();
    let mut hosts = files::hosts(
        &hostname,
        &record.config.domainname,
        &attached.addresses,
        extra,
        &context.host_gateways(),
    )?;
    for link in links::find(context, record)? {
        hosts.push_str(&link.hosts());
    }
    let resolv = resolv_conf(context, record, attached.namespace.is_none(), attached.has_name_server);
    let write = || {
        std::fs::write(folder.join("hosts"), hosts)?;
        std::fs::write(folder.join("hostname"), format!("{hostname}\n"))?;
        files::write_unless_edited(&folder, &resolv)
    };
    write()
        .map_err(|error: std::io::Error| Failure::internal("cannot write the container's files", &error))?;
    Ok(folder)
}

/// The variables of the environment that links bring.
pub fn link_environment(context: &Context, record: &Record) -> Result<Vec<String>, Failure> {
    let links = links::find(context, record)?;
    Ok(links.iter().flat_map(|link| link.environment(&record.name)).collect())
}

fn host_names(record: &Record) -> (String, String) {
    let hostname = if record.config.hostname.is_empty() {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        record.config.hostname.clone()
    };
    (hostname, record.config.domainname.clone())
}

fn resolv_conf(context: &Context, record: &Record, uses_host: bool, has_name_server: bool) -> String {
    let host = files::host_resolv_conf();
    let settings = files::NameSettings::of(&record.host, &context.defaults);
    if has_name_server {
        files::resolv_conf_of_server(&host, &settings)
    } else {
        files::resolv_conf(&host, &settings, uses_host)
    }
}

/// Keeps the files of a running container right when it has joined or left a network: only the lines that are about
/// that, and only where the user has not written something else.
fn refresh_files(context: &Context, record: &Record, before: &[std::net::IpAddr]) -> Result<(), Failure> {
    let folder = context.data_folder(&record.id);
    let places = context.networks.places(&record.id);
    let now: Vec<std::net::IpAddr> =
        places.iter().flat_map(|place| &place.addresses).map(ipnet::IpNet::addr).collect();
    let (hostname, domainname) = host_names(record);
    let gone: Vec<_> = before.iter().filter(|address| !now.contains(address)).copied().collect();
    let come: Vec<_> = now.iter().filter(|address| !before.contains(address)).copied().collect();
    let has_name_server = context.networks.has_name_server(&record.id);
    let write = || {
        let path = folder.join("hosts");
        let hosts = std::fs::read_to_string(&path)?;
        let changed = files::change_hosts(&hosts, &hostname, &domainname, &gone, &come);
        if changed != hosts {
            // In place: the container has this very file mounted.
            std::fs::write(&path, changed)?;
        }
        files::write_unless_edited(&folder, &resolv_conf(context, record, false, has_name_server))
    };
    write().map_err(|error: std::io::Error| Failure::internal("cannot change the container's files", &error))
}

/// Joins or leaves a network. `live`: the container runs, so that it happens at once; otherwise with its next start.
pub async fn change(
    context: &Context,
    record: &mut Record,
    live: bool,
    change: NetworkChange,
) -> Result<(), Failure> {
    let before: Vec<std::net::IpAddr> = context
        .networks
        .places(&record.id)
        .iter()
        .flat_map(|place| &place.addresses)
        .map(ipnet::IpNet::addr)
        .collect();
    change_now(context, record, live, change).await?;
    if live { refresh_files(context, record, &before) } else { Ok(()) }
}

async fn change_now(
    context: &Context,
    record: &mut Record,
    live: bool,
    change: NetworkChange,
) -> Result<(), Failure> {
    match change {
        NetworkChange::Connect { network, settings } => {
            connect(context, record, live, &network, *settings).await
        }
        NetworkChange::Disconnect { network, force } => {
            disconnect(context, record, live, &network, force).await
        }
        NetworkChange::Unlink { alias } => {
            record.host.links = links::without(record, &alias)?;
            Ok(())
        }
    }
}

async fn connect(
    context: &Context,
    record: &mut Record,
    live: bool,
    network: &str,
    mut settings: EndpointSettings,
) -> Result<(), Failure> {
    let mode = record.host.network_mode.clone();
    if mode.starts_with("container:") {
        return Err(conflict_shared());
    }
    // What is not the client's to say.
    settings = EndpointSettings {
        ipam_config: settings.ipam_config,
        links: settings.links,
        aliases: settings.aliases,
        mac_address: settings.mac_address,
        driver_opts: settings.driver_opts,
        gw_priority: settings.gw_priority,
        ..EndpointSettings::default()
    };
    let found = context.networks.id_and_name(network);
    let mut networks = record.networks();
    let name = match &found {
        Some((id, name)) => {
            settings.network_id.clone_from(id);
            name.clone()
        }
        // It may be there by the time the container starts.
        None if !live => network.to_owned(),
        None => return Err(Failure::not_found(guest_api::error::no_such_network(network))),
    };
    if name == "host" && mode != "host" {
        return Err(Failure::invalid(
            "cannot connect container to host network - container must be created in host network mode",
        ));
    }
    let others = networks.keys().filter(|other| **other != name);
    for other in others {
        if other == "host" || name == "host" {
            return Err(conflict_shared());
        }
        if other == "none" || name == "none" {
            return Err(Failure::invalid(
                "container cannot be connected to multiple networks with one of the networks in private (none) mode",
            ));
        }
    }
    context.networks.check_one(&name, &settings)?;
    if live {
        context.networks.connect(record, &name, &settings).await?;
    }
    networks.insert(name, settings);
    record.networks = Some(networks);
    Ok(())
}

async fn disconnect(
    context: &Context,
    record: &mut Record,
    live: bool,
    network: &str,
    force: bool,
) -> Result<(), Failure> {
    let mut networks = record.networks();
    let found = context.networks.id_and_name(network);
    if let (None, true, false) = (&found, live, force) {
        return Err(Failure::not_found(guest_api::error::no_such_network(network)));
    }
    let name = found.map_or_else(|| network.to_owned(), |(_, name)| name);
    let is_on = |networks: &BTreeMap<String, EndpointSettings>| networks.contains_key(&name);
    if live && !force {
        context.networks.disconnect(record, &name).await?;
    } else if !is_on(&networks) {
        let the = if live { "" } else { "the " };
        return Err(Failure::broken(format!(
            "container {} is not connected to {the}network {name}",
            record.id
        )));
    } else if live {
        context.networks.disconnect(record, &name).await?;
    }
    networks.remove(&name);
    record.networks = Some(networks);
    Ok(())
}

fn conflict_shared() -> Failure {
    Failure::invalid(
        "container sharing network namespace with another container or host cannot be connected to any other network",
    )
}

/// Checks what a create asks of networks, and gives each endpoint its settings. Names are looked at when the container
/// starts: a network may be made after the container.
pub fn resolve(
    mode: &str,
    mac_address: &str,
    mut endpoints: BTreeMap<String, EndpointSettings>,
) -> Result<BTreeMap<String, EndpointSettings>, Failure> {
    if mode.starts_with("container:") {
        return Ok(BTreeMap::new());
    }
    if let Some(settings) = endpoints.remove("default") {
        endpoints.entry(mode.to_owned()).or_insert(settings);
    }
    if endpoints.is_empty() {
        endpoints.insert(mode.to_owned(), EndpointSettings::default());
    }
    // One that is named for a network is on it, whatever else it is on; of the default one dockerd says it only by the
    // endpoints.
    if mode != "bridge" && !endpoints.contains_key(mode) {
        endpoints.entry(mode.to_owned()).or_default();
    }
    let is_special = |name: &str| matches!(name, "host" | "none");
    if endpoints.len() > 1 && (endpoints.keys().any(|name| is_special(name))) {
        return Err(if mode == "host" || endpoints.contains_key("host") {
            conflict_shared()
        } else {
            Failure::invalid(
                "container cannot be connected to multiple networks with one of the networks in private (none) mode",
            )
        });
    }
    for (name, settings) in &mut endpoints {
        let operational = std::mem::take(settings);
        *settings = EndpointSettings {
            ipam_config: operational.ipam_config,
            links: operational.links,
            aliases: operational.aliases,
            mac_address: operational.mac_address,
            driver_opts: operational.driver_opts,
            gw_priority: operational.gw_priority,
            ..EndpointSettings::default()
        };
        if name == mode && !mac_address.is_empty() {
            if settings.mac_address.is_empty() {
                mac_address.clone_into(&mut settings.mac_address);
            } else if settings.mac_address != mac_address {
                return Err(Failure::invalid(
                    "the container-wide MAC address must match the endpoint-specific MAC address for the main \
                     network, or be left empty",
                ));
            }
        }
    }
    Ok(endpoints)
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    fn endpoint(alias: &str) -> EndpointSettings {
        EndpointSettings {
            aliases: Some(vec![alias.to_owned()]),
            ip_address: "1.2.3.4".into(),
            ..EndpointSettings::default()
        }
    }

    #[test]
    fn a_container_is_on_the_network_it_is_named_for_and_on_those_it_lists() {
        let one = resolve("front", "02:42:ac:11:00:0a", BTreeMap::new()).unwrap();
        assert_eq!(one["front"].mac_address, "02:42:ac:11:00:0a");
        let listed = [("back".to_owned(), endpoint("b")), ("default".to_owned(), endpoint("f"))].into();
        let two = resolve("front", "", listed).unwrap();
        assert_eq!(two.keys().collect::<Vec<_>>(), ["back", "front"]);
        assert_eq!(two["front"].aliases.as_deref().unwrap(), ["f"]);
        assert_eq!(two["back"].ip_address, "", "not the client's to say");
        assert!(resolve("container:x", "", BTreeMap::new()).unwrap().is_empty());
    }

    #[test]
    fn the_hosts_network_and_none_stand_alone() {
        let with =
            |mode: &str| resolve(mode, "", [("back".to_owned(), endpoint("b"))].into()).unwrap_err().message;
        let listed = |name: &str| {
            let endpoints = [(name.to_owned(), endpoint("b")), ("back".to_owned(), endpoint("b"))].into();
            resolve("back", "", endpoints).unwrap_err().message
        };
        assert!(listed("host").starts_with("container sharing network namespace"));
        assert!(listed("none").starts_with("container cannot be connected to multiple networks"));
        assert!(with("host").starts_with("container sharing network namespace"));
        let mac: EndpointSettings =
            EndpointSettings { mac_address: "02:00:00:00:00:01".into(), ..endpoint("x") };
        let failure = resolve("front", "02:00:00:00:00:02", [("front".to_owned(), mac)].into()).unwrap_err();
        assert!(failure.message.starts_with("the container-wide MAC address must match"));
    }

    #[test]
    fn names_are_told_once_and_in_order() {
        let mut record = record();
        record.config.hostname = "web".into();
        let names = record.dns_names(&endpoint("alias"));
        assert_eq!(names, ["web", "alias", "3f2a9c1d77e0"]);
        assert_eq!(record.networks().keys().collect::<Vec<_>>(), ["bridge"]);
        record.host.network_mode = "container:abc".into();
        assert!(record.networks().is_empty());
    }
}

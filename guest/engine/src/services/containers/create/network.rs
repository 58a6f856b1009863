//! What a container asks of the network.

use std::collections::BTreeMap;

use guest_api::network::EndpointSettings;
use guest_api::{ContainerConfig, HostConfig};

use super::super::files::extra_host;
use super::unsupported;
use crate::failure::Failure;

/// Which network, and refusing what its endpoint settings ask beyond it.
pub fn resolve(
    config: &mut ContainerConfig,
    host: &mut HostConfig,
    endpoints: &BTreeMap<String, EndpointSettings>,
) -> Result<(), Failure> {
    if host.network_mode.is_empty() {
        host.network_mode = "default".to_owned();
    }
    if config.network_disabled {
        host.network_mode = "none".to_owned();
    }
    if host.network_mode == "default" {
        // What the stock client sends, and what dockerd stores, is "bridge" since API 1.44.
        host.network_mode = "bridge".to_owned();
    }
    match host.network_mode.as_str() {
        "bridge" | "none" | "host" => {}
        mode if mode.starts_with("container:") => {
            return Err(unsupported(&format!("sharing a container's network (NetworkMode {mode})")));
        }
        mode => return Err(Failure::not_found(guest_api::error::no_such_network(mode))),
    }
    for (name, endpoint) in endpoints {
        if name != "default" && *name != host.network_mode {
            return Err(match name.as_str() {
                "bridge" | "host" | "none" => unsupported("more than one network (NetworkingConfig)"),
                _ => Failure::not_found(guest_api::error::no_such_network(name)),
            });
        }
        let addresses = endpoint.ipam_config.as_ref();
        if addresses.is_some_and(|ipam| !ipam.ipv4_address.is_empty() || !ipam.ipv6_address.is_empty()) {
            return Err(Failure::invalid(
                "user specified IP address is supported on user defined networks only",
            ));
        }
        if endpoint.links.as_ref().is_some_and(|links| !links.is_empty()) {
            return Err(unsupported("links"));
        }
        if !endpoint.mac_address.is_empty() {
            config.mac_address.clone_from(&endpoint.mac_address);
        }
    }
    if !config.mac_address.is_empty() {
        config
            .mac_address
            .parse::<guest_network::Mac>()
            .map_err(|_| Failure::invalid(format!("invalid MAC address: {}", config.mac_address)))?;
    }
    Ok(())
}

/// Refuses what is not offered yet, and names and addresses that are none.
pub fn check(host: &HostConfig) -> Result<(), Failure> {
    if host.port_bindings.values().flatten().any(|list| !list.is_empty()) {
        return Err(unsupported("published ports (PortBindings)"));
    }
    if host.publish_all_ports {
        return Err(unsupported("published ports (PublishAllPorts)"));
    }
    if host.links.as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(unsupported("links (Links)"));
    }
    for entry in host.extra_hosts.iter().flatten() {
        extra_host(entry)?;
    }
    for server in host.dns.iter().flatten() {
        if server.parse::<std::net::IpAddr>().is_err() {
            return Err(Failure::invalid(format!("invalid DNS server: bad IP address: '{server}'")));
        }
    }
    Ok(())
}

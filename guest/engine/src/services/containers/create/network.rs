//! What a container asks of the network.

use std::collections::BTreeMap;

use guest_api::network::EndpointSettings;
use guest_api::{ContainerConfig, HostConfig};

use super::super::network::extra_host;
use crate::failure::Failure;
use crate::services::networks::check_ports;

/// Which networks, by name.
pub fn resolve(
    config: &mut ContainerConfig,
    host: &mut HostConfig,
    endpoints: BTreeMap<String, EndpointSettings>,
) -> Result<BTreeMap<String, EndpointSettings>, Failure> {
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
    if host.network_mode == "host" && host.links.as_ref().is_some_and(|links| !links.is_empty()) {
        return Err(Failure::invalid(
            "conflicting options: host type networking can't be used with links. This would result in undefined \
             behavior",
        ));
    }
    if !config.mac_address.is_empty() {
        if matches!(host.network_mode.as_str(), "host" | "none")
            || host.network_mode.starts_with("container:")
        {
            return Err(Failure::invalid("conflicting options: mac-address and the network mode"));
        }
        config
            .mac_address
            .parse::<guest_network::Mac>()
            .map_err(|_| Failure::invalid(format!("invalid MAC address: {}", config.mac_address)))?;
    }
    let networks = super::super::network::resolve(&host.network_mode, &config.mac_address, endpoints)?;
    // Where clients of earlier versions look for it.
    if let Some(main) = networks.get(&host.network_mode) {
        config.mac_address.clone_from(&main.mac_address);
    }
    Ok(networks)
}

/// What makes no sense for one that uses another's network.
fn check_shared(other: &str, config: &ContainerConfig, host: &HostConfig) -> Result<(), Failure> {
    let some = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let refusal = match () {
        () if other.is_empty() => "invalid network mode: invalid container format container:<name|id>",
        () if !config.hostname.is_empty() => "conflicting options: hostname and the network mode",
        () if some(&host.links) => {
            "conflicting options: container type network can't be used with links. This would result in undefined \
             behavior"
        }
        () if some(&host.dns) => "conflicting options: dns and the network mode",
        () if some(&host.extra_hosts) => {
            "conflicting options: custom host-to-IP mapping and the network mode"
        }
        () if host.port_bindings.as_ref().is_some_and(|ports| !ports.is_empty())
            || host.publish_all_ports =>
        {
            "conflicting options: port publishing and the container type network mode"
        }
        () if config.exposed_ports.as_ref().is_some_and(|ports| !ports.is_empty()) => {
            "conflicting options: port exposing and the container type network mode"
        }
        () => return Ok(()),
    };
    Err(Failure::invalid(refusal))
}

/// Refuses names, ports and addresses that are none.
pub fn check(config: &ContainerConfig, host: &HostConfig) -> Result<(), Failure> {
    if let Some(other) = host.network_mode.strip_prefix("container:") {
        check_shared(other, config, host)?;
    }
    check_ports(host)?;
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

//! Publishing a running container's ports.

use std::net::IpAddr;

use guest_network::forwarding;
use ipnet::IpNet;

use super::ports;
use super::service::Networks;
use super::state::{Member, Place, State};
use crate::failure::Failure;
use crate::services::containers::Record;

/// Where connections to a container's published ports go: its addresses on the networks that lead outside.
pub fn target(state: &State, member: &Member) -> ports::Target {
    let gateways = state.gateways(&member.endpoints);
    let address = |gateway: Option<guest_network::Gateway>, six: bool| {
        let interface = gateway?.interface;
        let endpoint = member.endpoints.iter().find(|endpoint| endpoint.interface == interface)?;
        // Children of the host's own interface are reached at their own addresses.
        state.networks.get(&endpoint.network_id)?.settings.bridge()?;
        endpoint.addresses.iter().map(IpNet::addr).find(|address| address.is_ipv6() == six)
    };
    let v4 = address(gateways.v4, false).and_then(|address| match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    });
    let v6 = address(gateways.v6, true).and_then(|address| match address {
        IpAddr::V6(address) => Some(address),
        IpAddr::V4(_) => None,
    });
    ports::Target { v4, v6 }
}

impl Networks {
    /// Publishes what a container asks for, all or nothing.
    pub(super) async fn publish(&self, record: &Record) -> Result<(), Failure> {
        let wanted = ports::wanted(&record.config, &record.host)?;
        let (target, bridges, binding) = {
            let state = self.state();
            let Some(member) = state.members.get(&record.id) else { return Ok(()) };
            let nets =
                member.endpoints.iter().filter_map(|endpoint| state.networks.get(&endpoint.network_id));
            let bridges: Vec<String> = nets
                .clone()
                .filter(|net| net.settings.bridge().is_some())
                .map(|net| net.record.interface.clone())
                .collect();
            let binding = nets.filter_map(|net| net.settings.bridge()?.host_binding).next();
            (target(&state, member), bridges, binding)
        };
        if wanted.is_empty() || target == ports::Target::default() {
            return Ok(());
        }
        let wanted: Vec<ports::Wanted> = wanted
            .into_iter()
            .map(|mut one| {
                one.host = one.host.or(binding.filter(|address| !address.is_unspecified()));
                one
            })
            .collect();
        let endpoint = || {
            let state = self.state();
            let id = state.members.get(&record.id).and_then(|member| member.endpoints.first());
            id.map(|endpoint| endpoint.id[..12].to_owned()).unwrap_or_default()
        };
        let lease = self.ports.acquire(&record.name, &wanted, target).map_err(|failure| {
            Failure::new(
                failure.kind,
                format!(
                    "failed to set up container networking: driver failed programming external connectivity on \
                     endpoint {} ({}): {}",
                    record.name,
                    endpoint(),
                    failure.message
                ),
            )
        })?;
        if let Some(member) = self.state().members.get_mut(&record.id) {
            member.ports = lease.published.clone();
            member.lease = Some(lease);
        }
        for bridge in bridges {
            forwarding::enable_loopback(&bridge)
                .map_err(|error| Failure::internal("cannot publish ports on the loopback address", &error))?;
        }
        self.firewall.refresh().await
    }

    /// Takes again what a container had published before the engine was restarted.
    pub(super) fn republish(&self, container: &str) {
        let (name, published, target) = {
            let state = self.state();
            let Some(member) = state.members.get(container) else { return };
            if member.ports.is_empty() || member.lease.is_some() || member.place != Place::Own {
                return;
            }
            (member.record.name.clone(), member.ports.clone(), target(&state, member))
        };
        let lease = self.ports.reacquire(&name, &published, target);
        if let Some(member) = self.state().members.get_mut(container) {
            member.lease = Some(lease);
        }
    }
}

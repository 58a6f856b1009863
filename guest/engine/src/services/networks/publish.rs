//! Publishing a running container's ports.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use guest_network::{Protocol, forwarding};
use guest_protocol::{GrantedPort, PortRequest, Transport};
use ipnet::IpNet;

use super::landings;
use super::ports::{self, Lease, Published};
use super::service::Networks;
use super::state::{Member, Place, State};
use crate::failure::Failure;
use crate::host::{HostLeases, Targets};
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

/// Has the computer around the machine hold the ports.
async fn acquire_outside(
    outside: &HostLeases,
    container: &str,
    wanted: &[ports::Wanted],
    target: ports::Target,
) -> Result<Lease, Failure> {
    let requests = wanted.iter().map(request).collect();
    let granted = outside.acquire(container, requests).await;
    let granted = granted.map_err(|error| Failure::broken(error.to_string()))?;
    Ok(Lease::elsewhere(granted.iter().map(published).collect(), target))
}

fn request(wanted: &ports::Wanted) -> PortRequest {
    let (first, last) = wanted.host_ports.unwrap_or((0, 0));
    PortRequest {
        transport: match wanted.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        },
        addresses: wanted.host.map_or_else(
            || vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
            |host| vec![host],
        ),
        first: if last == 0 { 0 } else { first.max(1) },
        last,
        container_port: wanted.container_port,
    }
}

fn published(granted: &GrantedPort) -> Published {
    Published {
        protocol: match granted.transport {
            Transport::Tcp => Protocol::Tcp,
            Transport::Udp => Protocol::Udp,
            Transport::Sctp => Protocol::Sctp,
        },
        container_port: granted.container_port,
        host: granted.address,
        host_port: granted.port,
    }
}

fn granted(published: &Published) -> GrantedPort {
    GrantedPort {
        transport: match published.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        },
        address: published.host,
        port: published.host_port,
        container_port: published.container_port,
    }
}

impl Targets for Networks {
    fn target(&self, container: &str, _: Transport, container_port: u16) -> Option<SocketAddr> {
        let state = self.state();
        if container.contains('/') {
            return state.led.iter().find(|(wish, _)| wish.lease() == container).map(|(_, led)| led.target);
        }
        let address = target(&state, state.members.get(container)?).address(false)?;
        Some(SocketAddr::new(address, container_port))
    }
}

impl Networks {
    /// What running containers hold on the computer around the machine.
    pub fn held_outside(&self) -> Vec<guest_protocol::Lease> {
        let state = self.state();
        let publishing = state.members.iter().filter(|(_, member)| !member.ports.is_empty());
        let published = publishing.map(|(id, member)| guest_protocol::Lease {
            container: id.clone(),
            ports: member.ports.iter().map(granted).collect(),
            landings: landings::of(&state, member).map(|(landing, _)| landing).collect(),
        });
        let led = state.led.iter().map(|(wish, led)| guest_protocol::Lease {
            container: wish.lease(),
            ports: led.ports.clone(),
            landings: landings::of_led(led).map(|(landing, _)| landing).into_iter().collect(),
        });
        published.chain(led).collect()
    }

    /// Publishes what a container asks for, all or nothing.
    pub(super) async fn publish(&self, record: &Record) -> Result<(), Failure> {
        let wanted = ports::wanted(&record.config, &record.host)?;
        let (target, binding) = {
            let state = self.state();
            let Some(member) = state.members.get(&record.id) else { return Ok(()) };
            let mut bindings =
                state.networks_of(member).filter_map(|net| net.settings.bridge()?.host_binding);
            (target(&state, member), bindings.next())
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
        let lease = match &self.outside {
            None => self.ports.acquire(&record.name, &wanted, target),
            Some(outside) => acquire_outside(outside, &record.id, &wanted, target).await,
        };
        let lease = lease.map_err(|failure| {
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
        {
            let mut state = self.state();
            if let Some(member) = state.members.get_mut(&record.id) {
                member.ports = lease.published.clone();
                member.lease = Some(lease);
            }
            if self.outside.is_some() {
                landings::choose(&mut state, &record.id);
            }
        }
        self.admit_loopback(&record.id)?;
        self.firewall.refresh().await?;
        self.land(&record.id).await;
        Ok(())
    }

    /// Lets what comes from a loopback address of this host to a published port pass to wherever the container is by now.
    pub(super) fn admit_loopback(&self, container: &str) -> Result<(), Failure> {
        let bridges: Vec<String> = {
            let state = self.state();
            let Some(member) = state.members.get(container) else { return Ok(()) };
            let bridges = state.networks_of(member).filter(|net| net.settings.bridge().is_some());
            bridges.map(|net| net.record.interface.clone()).collect()
        };
        for bridge in bridges {
            forwarding::enable_loopback(&bridge)
                .map_err(|error| Failure::internal("cannot publish ports on the loopback address", &error))?;
        }
        Ok(())
    }

    /// Tells the computer around the machine where connections to a container land by now; the firewall leads them
    /// already. Without that they come by way of this engine, which is slower and no failure.
    pub(super) async fn land(&self, container: &str) {
        let Some(outside) = &self.outside else { return };
        let landings = {
            let state = self.state();
            let Some(member) = state.members.get(container).filter(|member| !member.landings.is_empty())
            else {
                return;
            };
            landings::of(&state, member).map(|(landing, _)| landing).collect()
        };
        if let Err(error) = outside.land(container, landings).await {
            tracing::warn!(container = &container[..12], %error, "its ports are reached by way of the engine");
        }
    }

    /// Takes again what containers had published before the engine was restarted. It comes before the API answers: until
    /// then anybody could take their ports.
    pub fn republish_all(&self) {
        let containers: Vec<String> = self.state().members.keys().cloned().collect();
        for container in containers {
            self.republish(&container);
        }
    }

    fn republish(&self, container: &str) {
        let (name, published, target) = {
            let state = self.state();
            let Some(member) = state.members.get(container) else { return };
            if member.ports.is_empty() || member.lease.is_some() || member.place != Place::Own {
                return;
            }
            (member.record.name.clone(), member.ports.clone(), target(&state, member))
        };
        let lease = match &self.outside {
            None => self.ports.reacquire(&name, &published, target),
            // The session with the host tells it what is held.
            Some(_) => Lease::elsewhere(published, target),
        };
        if let Some(member) = self.state().members.get_mut(container) {
            member.lease = Some(lease);
        }
    }
}

//! One container's attachment to one bridge: a veth pair, one end in the sandbox, the other a port of the bridge.
//!
//! The host end's name follows from the container id and the interface's number: `ve` + 12 digits of the id + one
//! digit (`ve3f2a9c1d77e00`), so an endpoint needs no record to be found. Both ends come into being in one kernel
//! request, each in its place; there is no moment at which an interface belongs to nobody.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};

use ipnet::Ipv4Net;
use netlink_packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::bridge::{Bridge, is_interface_name};
use crate::mac::Mac;
use crate::netlink::{Netlink, NetlinkError, Refused};
use crate::sandbox::{Sandbox, SandboxError};

/// Digits of the container id in an interface name; what `docker ps` shows of an id.
const ID_DIGITS: usize = 12;

/// What an endpoint should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSpec {
    /// The container's id, at least 12 hexadecimal digits.
    pub container: String,
    /// The interface's name inside: `eth0` to `eth9`.
    pub interface: String,
    /// Its address, with the network's prefix length.
    pub address: Ipv4Net,
    /// Its hardware address; `None` for Docker's, derived from `address`.
    pub mac: Option<Mac>,
}

/// An endpoint that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The interface inside the sandbox.
    pub interface: String,
    /// The bridge's port.
    pub host_interface: String,
    /// Address and prefix length.
    pub address: Ipv4Net,
    /// The default route.
    pub gateway: Ipv4Addr,
    /// Hardware address inside.
    pub mac: Mac,
}

/// Why an endpoint could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The id cannot give interfaces their names.
    #[error("`{container}` is not a container id of at least {ID_DIGITS} hexadecimal digits")]
    Container {
        /// The id given.
        container: String,
    },
    /// The interface name has no number to derive the host's name from.
    #[error("`{interface}` is not an interface name from eth0 to eth9")]
    Interface {
        /// The name given.
        interface: String,
    },
    /// The address is not one of the bridge's network.
    #[error("address {address} of container {container} is not in the bridge's subnet {subnet}")]
    Address {
        /// The container.
        container: String,
        /// The address given.
        address: Ipv4Net,
        /// The bridge's.
        subnet: Ipv4Net,
    },
    /// The sandbox is gone.
    #[error("cannot use the network namespace of container {container}")]
    Sandbox {
        /// The container.
        container: String,
        /// Why.
        #[source]
        source: SandboxError,
    },
    /// The kernel refused.
    #[error("cannot set up interface `{interface}` of container {container}")]
    Kernel {
        /// The container.
        container: String,
        /// The interface inside.
        interface: String,
        /// What it refused.
        #[source]
        source: NetlinkError,
    },
    /// The kernel refused.
    #[error("cannot remove the interfaces of container {container}")]
    Remove {
        /// The container.
        container: String,
        /// What it refused.
        #[source]
        source: NetlinkError,
    },
}

impl Endpoint {
    /// Joins `sandbox` to `bridge` as `spec` says: address, default route through the bridge's gateway, both ends up.
    /// A leftover of the same name (an engine killed on the way) is replaced. On failure nothing is left.
    ///
    /// # Errors
    /// When the spec is impossible, the sandbox is gone, or the kernel refuses.
    pub async fn attach(
        bridge: &Bridge,
        sandbox: &Sandbox,
        spec: &EndpointSpec,
    ) -> Result<Self, EndpointError> {
        let host_interface = host_interface(&spec.container, &spec.interface)?;
        if bridge.spec().subnet.trunc() != spec.address.trunc() {
            return Err(EndpointError::Address {
                container: spec.container.clone(),
                address: spec.address,
                subnet: bridge.spec().subnet,
            });
        }
        let endpoint = Self {
            interface: spec.interface.clone(),
            host_interface,
            address: spec.address,
            gateway: bridge.spec().gateway,
            mac: spec.mac.unwrap_or_else(|| Mac::from_address(spec.address.addr())),
        };
        let namespace = sandbox
            .file()
            .map_err(|source| EndpointError::Sandbox { container: spec.container.clone(), source })?;
        let kernel = |source| EndpointError::Kernel {
            container: spec.container.clone(),
            interface: spec.interface.clone(),
            source,
        };

        let outside = Netlink::open().map_err(kernel)?;
        let inside = Netlink::open_in(namespace.as_fd()).map_err(kernel)?;
        endpoint.remove(&outside).await.map_err(kernel)?;
        let made = async {
            endpoint.create_pair(&outside, bridge, namespace.as_raw_fd()).await?;
            endpoint.configure(&inside).await
        };
        if let Err(error) = made.await {
            if let Err(also) = endpoint.remove(&outside).await {
                tracing::warn!(interface = endpoint.host_interface, error = %also, "a failed endpoint stays behind");
            }
            return Err(kernel(error));
        }
        Ok(endpoint)
    }

    /// Removes one endpoint, both ends. Returns whether it was there.
    ///
    /// # Errors
    /// When the names are impossible or the kernel refuses.
    pub async fn detach(container: &str, interface: &str) -> Result<bool, EndpointError> {
        let name = host_interface(container, interface)?;
        remove_where(container, |found| found == name).await.map(|count| count > 0)
    }

    /// Removes every endpoint of a container, whatever an engine that died left. Returns how many there were.
    ///
    /// # Errors
    /// When the id is impossible or the kernel refuses.
    pub async fn cleanup(container: &str) -> Result<usize, EndpointError> {
        let prefix = host_prefix(container)?;
        remove_where(container, |found| found.len() == prefix.len() + 1 && found.starts_with(&prefix)).await
    }

    async fn create_pair(
        &self,
        netlink: &Netlink,
        bridge: &Bridge,
        namespace: i32,
    ) -> Result<(), NetlinkError> {
        let inner = LinkMessageBuilder::<LinkUnspec>::new()
            .name(self.interface.clone())
            .mtu(bridge.spec().mtu)
            .address(self.mac.0.to_vec())
            .append_extra_attribute(LinkAttribute::NetNsFd(namespace))
            .build();
        let pair = LinkVeth::new(&self.host_interface, &self.interface)
            .mtu(bridge.spec().mtu)
            .controller(bridge.index())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(inner)))
            .up()
            .build();
        let action = || format!("create veth `{}` on bridge `{}`", self.host_interface, bridge.spec().name);
        netlink.handle.link().add(pair).execute().await.refused(action)
    }

    async fn configure(&self, inside: &Netlink) -> Result<(), NetlinkError> {
        let link = inside.link(&self.interface).await?.ok_or_else(|| NetlinkError::Refused {
            action: format!("find interface `{}`", self.interface),
            source: io::Error::from_raw_os_error(nix::libc::ENODEV),
        })?;
        let index = link.header.index;
        inside
            .handle
            .address()
            .add(index, IpAddr::V4(self.address.addr()), self.address.prefix_len())
            .execute()
            .await
            .refused(|| format!("add address {}", self.address))?;
        inside.up(index).await?;
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().gateway(self.gateway).output_interface(index).build();
        match inside
            .handle
            .route()
            .add(route)
            .execute()
            .await
            .refused(|| format!("route through {}", self.gateway))
        {
            // A container's first network gives the default route; the next ones leave it.
            Err(error) if error.errno() == Some(nix::libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    async fn remove(&self, netlink: &Netlink) -> Result<(), NetlinkError> {
        if let Some(link) = netlink.link(&self.host_interface).await? {
            netlink.remove_link(link.header.index).await?;
        }
        Ok(())
    }
}

async fn remove_where(container: &str, wanted: impl Fn(&str) -> bool) -> Result<usize, EndpointError> {
    let failed = |source| EndpointError::Remove { container: container.to_owned(), source };
    let netlink = Netlink::open().map_err(failed)?;
    let mut removed = 0;
    for (name, index) in netlink.links().await.map_err(failed)? {
        if wanted(&name) && netlink.remove_link(index).await.map_err(failed)? {
            removed += 1;
        }
    }
    Ok(removed)
}

fn host_prefix(container: &str) -> Result<String, EndpointError> {
    match container.get(..ID_DIGITS) {
        Some(digits) if digits.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(format!("ve{digits}")),
        _ => Err(EndpointError::Container { container: container.to_owned() }),
    }
}

fn host_interface(container: &str, interface: &str) -> Result<String, EndpointError> {
    let prefix = host_prefix(container)?;
    match interface.strip_prefix("eth").map(str::as_bytes) {
        Some([digit @ b'0'..=b'9']) => {
            let name = format!("{prefix}{}", char::from(*digit));
            debug_assert!(is_interface_name(&name));
            Ok(name)
        }
        _ => Err(EndpointError::Interface { interface: interface.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bridge_port_is_named_after_the_container() {
        let id = "3f2a9c1d77e04b5caaaa";
        assert_eq!(host_interface(id, "eth0").unwrap(), "ve3f2a9c1d77e00");
        assert_eq!(host_interface(id, "eth9").unwrap(), "ve3f2a9c1d77e09");
        assert!(is_interface_name(&host_interface(id, "eth9").unwrap()));
    }

    #[test]
    fn names_that_could_not_be_found_again_are_refused() {
        assert!(matches!(host_interface("3f2a", "eth0"), Err(EndpointError::Container { .. })));
        assert!(matches!(host_interface("zzzzzzzzzzzz", "eth0"), Err(EndpointError::Container { .. })));
        for interface in ["eth", "eth10", "wlan0", ""] {
            assert!(
                matches!(host_interface("3f2a9c1d77e0", interface), Err(EndpointError::Interface { .. })),
                "{interface}"
            );
        }
    }
}

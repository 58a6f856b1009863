//! A network's bridge: the switch its containers hang on, and their gateway.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{LinkBridge, LinkUnspec};

use crate::mac::Mac;
use crate::netlink::{Netlink, NetlinkError, Refused};

/// Interface names end here (IFNAMSIZ without the terminating zero).
pub(crate) const INTERFACE_NAME_MAX: usize = 15;

/// What a bridge should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeSpec {
    /// Interface name, at most 15 bytes.
    pub name: String,
    /// The network's addresses.
    pub subnet: Ipv4Net,
    /// The bridge's own address in `subnet`, the containers' default route.
    pub gateway: Ipv4Addr,
    /// Largest packet, in bytes; containers' interfaces get the same.
    pub mtu: u32,
}

/// A bridge that exists and is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    spec: BridgeSpec,
    index: u32,
}

/// Why a bridge could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// Not a name the kernel takes.
    #[error("`{name}` cannot name a bridge: 1 to {INTERFACE_NAME_MAX} bytes without `/` and spaces")]
    Name {
        /// The name asked for.
        name: String,
    },
    /// The gateway lies elsewhere.
    #[error("gateway {gateway} of bridge `{name}` is not in its subnet {subnet}")]
    Gateway {
        /// The bridge.
        name: String,
        /// The address asked for.
        gateway: Ipv4Addr,
        /// Where it should be.
        subnet: Ipv4Net,
    },
    /// Somebody else's interface has the name.
    #[error("interface `{name}` exists and is not a bridge")]
    NotABridge {
        /// The name asked for.
        name: String,
    },
    /// The kernel refused.
    #[error("cannot set up bridge `{name}`")]
    Kernel {
        /// The bridge.
        name: String,
        /// What it refused.
        #[source]
        source: NetlinkError,
    },
}

impl Bridge {
    /// Makes the bridge as `spec` says, or brings an existing one there: address, MTU, up. Doing it twice changes
    /// nothing. Not safe to drop halfway, but doing it again completes it.
    ///
    /// # Errors
    /// When the spec is impossible, the name belongs to another kind of interface, or the kernel refuses.
    pub async fn ensure(spec: &BridgeSpec) -> Result<Self, BridgeError> {
        let name = spec.name.clone();
        if !is_interface_name(&name) {
            return Err(BridgeError::Name { name });
        }
        if !spec.subnet.contains(&spec.gateway) {
            return Err(BridgeError::Gateway { name, gateway: spec.gateway, subnet: spec.subnet });
        }
        let kernel = |source| BridgeError::Kernel { name: spec.name.clone(), source };

        let netlink = Netlink::open().map_err(kernel)?;
        let link = match netlink.link(&spec.name).await.map_err(kernel)? {
            Some(link) => link,
            None => create(&netlink, spec).await.map_err(kernel)?,
        };
        if !is_bridge(&link) {
            return Err(BridgeError::NotABridge { name });
        }
        let index = link.header.index;
        let settings = LinkUnspec::new_with_index(index).mtu(spec.mtu).up().build();
        netlink
            .handle
            .link()
            .change(settings)
            .execute()
            .await
            .refused(|| format!("set MTU {}", spec.mtu))
            .map_err(kernel)?;
        set_address(&netlink, index, spec).await.map_err(kernel)?;
        Ok(Self { spec: spec.clone(), index })
    }

    /// Removes the bridge called `name`. Returns whether it was there; another kind of interface is left alone.
    ///
    /// # Errors
    /// When the name is not a bridge's or the kernel refuses.
    pub async fn remove(name: &str) -> Result<bool, BridgeError> {
        let kernel = |source| BridgeError::Kernel { name: name.to_owned(), source };
        let netlink = Netlink::open().map_err(kernel)?;
        match netlink.link(name).await.map_err(kernel)? {
            None => Ok(false),
            Some(link) if !is_bridge(&link) => Err(BridgeError::NotABridge { name: name.to_owned() }),
            Some(link) => netlink.remove_link(link.header.index).await.map_err(kernel),
        }
    }

    /// What the bridge is.
    pub fn spec(&self) -> &BridgeSpec {
        &self.spec
    }

    /// The kernel's number for the interface.
    pub fn index(&self) -> u32 {
        self.index
    }
}

/// A bridge without an own hardware address takes the lowest of its ports', and changes it when a container leaves;
/// the others' neighbour tables are then wrong for a while. So it gets one.
async fn create(netlink: &Netlink, spec: &BridgeSpec) -> Result<LinkMessage, NetlinkError> {
    let action = || format!("create bridge `{}`", spec.name);
    let message = LinkBridge::new(&spec.name).address(Mac::from_address(spec.gateway).0.to_vec()).build();
    match netlink.handle.link().add(message).execute().await.refused(action) {
        // Two callers at once: the other one made it.
        Err(error) if error.errno() == Some(nix::libc::EEXIST) => {}
        other => other?,
    }
    netlink
        .link(&spec.name)
        .await?
        .ok_or_else(|| NetlinkError::Refused { action: action(), source: nix::errno::Errno::ENODEV.into() })
}

/// Puts the gateway address on the bridge and takes addresses of earlier settings away.
async fn set_address(netlink: &Netlink, index: u32, spec: &BridgeSpec) -> Result<(), NetlinkError> {
    let prefix = spec.subnet.prefix_len();
    let addresses = netlink.handle.address();
    let present: Vec<_> = addresses
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await
        .refused(|| "list addresses".into())?;
    let mut found = false;
    for message in present {
        let Some(address) = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
            _ => None,
        }) else {
            continue;
        };
        if address == spec.gateway && message.header.prefix_len == prefix {
            found = true;
        } else {
            addresses.del(message).execute().await.refused(|| format!("remove old address {address}"))?;
        }
    }
    if found {
        return Ok(());
    }
    addresses
        .add(index, spec.gateway.into(), prefix)
        .replace()
        .execute()
        .await
        .refused(|| format!("add address {}/{prefix}", spec.gateway))
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}

pub(crate) fn is_interface_name(name: &str) -> bool {
    (1..=INTERFACE_NAME_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_kernel_would_refuse_are_refused_first() {
        for name in ["", "sixteen-bytes-xx", "a/b", "a b", "..", "a:1"] {
            assert!(!is_interface_name(name), "{name}");
        }
        assert!(is_interface_name("engine0") && is_interface_name("br-0123456789ab"));
    }

    #[tokio::test]
    async fn a_gateway_outside_the_subnet_is_refused_before_anything_happens() {
        let spec = BridgeSpec {
            name: "engine0".into(),
            subnet: "10.0.0.0/24".parse().unwrap(),
            gateway: Ipv4Addr::new(10, 0, 1, 1),
            mtu: 1500,
        };
        let error = Bridge::ensure(&spec).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "gateway 10.0.1.1 of bridge `engine0` is not in its subnet 10.0.0.0/24"
        );
    }
}

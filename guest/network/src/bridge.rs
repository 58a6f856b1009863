//! A network's bridge: the switch its containers hang on, and their gateway.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{AddressMessageBuilder, LinkBridge, LinkUnspec};

use crate::blocking;
use crate::mac::Mac;
use crate::netlink::{Netlink, NetlinkError, Request};

/// Interface names end here (IFNAMSIZ without the terminating zero).
pub(crate) const INTERFACE_NAME_MAX: usize = 15;

/// What a bridge should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeSpec {
    /// Interface name, at most 15 bytes.
    pub name: String,
    /// The bridge's own addresses, with their subnets' prefix lengths: the containers' gateways.
    pub addresses: Vec<IpNet>,
    /// Largest packet, in bytes; containers' interfaces get the same.
    pub mtu: u32,
    /// The bridge is ours: addresses it has beside these are of earlier settings, and go.
    pub owned: bool,
}

/// A bridge that exists and is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    spec: BridgeSpec,
    index: u32,
    made: bool,
}

/// Why a bridge could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// Not a name the kernel takes.
    #[error("`{name}` cannot name a bridge: 1 to {INTERFACE_NAME_MAX} bytes without `/`, quotes and spaces")]
    Name {
        /// The name asked for.
        name: String,
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
    /// Makes the bridge as `spec` says, or brings an existing one there: addresses, MTU, up. Doing it twice changes
    /// nothing. Not safe to drop halfway, but doing it again completes it.
    ///
    /// # Errors
    /// When the spec is impossible, the name belongs to another kind of interface, or the kernel refuses; then a
    /// bridge that was not there before is not there now.
    pub async fn ensure(spec: &BridgeSpec) -> Result<Self, BridgeError> {
        let spec = spec.clone();
        let name = spec.name.clone();
        blocking(move || Self::ensure_now(spec)).await.unwrap_or_else(|error| {
            let source = NetlinkError::Open(error);
            Err(BridgeError::Kernel { name, source })
        })
    }

    fn ensure_now(spec: BridgeSpec) -> Result<Self, BridgeError> {
        let name = spec.name.clone();
        if !is_interface_name(&name) {
            return Err(BridgeError::Name { name });
        }
        let kernel = |source| BridgeError::Kernel { name: spec.name.clone(), source };
        let mut netlink = Netlink::open().map_err(kernel)?;
        let (link, made) = match netlink.link(&spec.name).map_err(kernel)? {
            Some(link) => (link, false),
            None => (create(&mut netlink, &spec).map_err(kernel)?, true),
        };
        if !is_bridge(&link) {
            return Err(BridgeError::NotABridge { name });
        }
        let index = link.header.index;
        if let Err(error) = configure(&mut netlink, index, &spec) {
            if made && let Err(also) = netlink.remove_link(index) {
                tracing::warn!(bridge = name, error = %also, "a failed bridge stays behind");
            }
            return Err(kernel(error));
        }
        Ok(Self { spec, index, made })
    }

    /// Removes the bridge called `name`. Returns whether it was there; another kind of interface is left alone.
    ///
    /// # Errors
    /// When the name is not a bridge's or the kernel refuses.
    pub async fn remove(name: &str) -> Result<bool, BridgeError> {
        let (name, again) = (name.to_owned(), name.to_owned());
        let removed = blocking(move || {
            let kernel = |source| BridgeError::Kernel { name: name.clone(), source };
            let mut netlink = Netlink::open().map_err(kernel)?;
            match netlink.link(&name).map_err(kernel)? {
                None => Ok(false),
                Some(link) if !is_bridge(&link) => Err(BridgeError::NotABridge { name: name.clone() }),
                Some(link) => netlink.remove_link(link.header.index).map_err(kernel),
            }
        });
        removed.await.unwrap_or_else(|error| {
            Err(BridgeError::Kernel { name: again, source: NetlinkError::Open(error) })
        })
    }

    /// What the bridge is.
    pub fn spec(&self) -> &BridgeSpec {
        &self.spec
    }

    /// The kernel's number for the interface.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whether it was not there before.
    pub fn was_made(&self) -> bool {
        self.made
    }
}

/// A bridge without an own hardware address takes the lowest of its ports', and changes it when a container leaves;
/// the others' neighbour tables are then wrong for a while. So it gets one.
fn create(netlink: &mut Netlink, spec: &BridgeSpec) -> Result<LinkMessage, NetlinkError> {
    let action = || format!("create bridge `{}`", spec.name);
    let mac = spec.addresses.first().map_or_else(|| Mac::from_name(&spec.name), |net| Mac::of(net.addr()));
    let message = LinkBridge::new(&spec.name).address(mac.0.to_vec()).build();
    match netlink.ask(Request::create(action(), RouteNetlinkMessage::NewLink(message))) {
        // Two callers at once: the other one made it.
        Err(error) if error.errno() == Some(nix::libc::EEXIST) => {}
        other => other?,
    }
    netlink.link(&spec.name)?.ok_or_else(|| NetlinkError::refused(action(), nix::libc::ENODEV))
}

/// Sets MTU and addresses, takes addresses of earlier settings away, and switches it on.
fn configure(netlink: &mut Netlink, index: u32, spec: &BridgeSpec) -> Result<(), NetlinkError> {
    if spec.addresses.iter().any(|net| net.addr().is_ipv6()) {
        enable_ipv6(&spec.name).map_err(|source| NetlinkError::Refused {
            action: format!("switch on IPv6 on bridge `{}`", spec.name),
            source,
        })?;
    }
    let mut requests = Vec::new();
    let mut missing = spec.addresses.clone();
    for (address, message) in addresses(netlink, index)? {
        if let Some(position) = missing.iter().position(|wanted| *wanted == address) {
            missing.remove(position);
        } else if spec.owned && !is_link_local(address.addr()) {
            let action = format!("remove old address {address}");
            requests.push(Request::change(action, RouteNetlinkMessage::DelAddress(message)));
        }
    }
    requests.extend(missing.into_iter().map(|address| add_address(index, address)));
    let settings = LinkUnspec::new_with_index(index).mtu(spec.mtu).up().build();
    requests.push(Request::change(format!("set MTU {}", spec.mtu), RouteNetlinkMessage::SetLink(settings)));
    netlink.batch(&requests)
}

/// The addresses of a link.
fn addresses(netlink: &mut Netlink, index: u32) -> Result<Vec<(IpNet, AddressMessage)>, NetlinkError> {
    let all = netlink.list("list addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    Ok(all
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(message) if message.header.index == index => {
                // IPv6 has only the attribute `Address`; for IPv4 that is the far end of a point-to-point link.
                let local = message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) => Some(*address),
                    _ => None,
                });
                let address = local.or_else(|| {
                    message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Address(address) => Some(*address),
                        _ => None,
                    })
                })?;
                Some((IpNet::new(address, message.header.prefix_len).ok()?, message))
            }
            _ => None,
        })
        .collect())
}

/// Adds an address to a link. An IPv6 address is usable at once: nobody else can have it.
pub(crate) fn add_address(index: u32, address: IpNet) -> Request {
    let length = address.prefix_len();
    let mut message = match address.addr() {
        IpAddr::V4(address) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, length).build()
        }
        IpAddr::V6(address) => {
            AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(address, length).build()
        }
    };
    if address.addr().is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    if is_link_local(address.addr()) {
        message.header.scope = AddressScope::Link;
    }
    Request::replace(format!("add address {address}"), RouteNetlinkMessage::NewAddress(message))
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Switches IPv6 on for an interface of the calling thread's namespace. A kernel without IPv6 refuses the address
/// that follows.
pub(crate) fn enable_ipv6(interface: &str) -> io::Result<()> {
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "0") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}

/// Whether the kernel, and the firewall's text, can hold this interface name.
pub fn is_interface_name(name: &str) -> bool {
    (1..=INTERFACE_NAME_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.contains(|c: char| {
            matches!(c, '/' | ':' | '"' | '\\' | '*') || c.is_whitespace() || c.is_control()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_kernel_would_refuse_are_refused_first() {
        for name in ["", "sixteen-bytes-xx", "a/b", "a b", "..", "a:1", "a\"b", "a*"] {
            assert!(!is_interface_name(name), "{name}");
        }
        assert!(is_interface_name("engine0") && is_interface_name("br-0123456789ab"));
    }
}

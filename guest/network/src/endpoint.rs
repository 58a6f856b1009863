//! One container's attachment to one network: an interface in its sandbox, with addresses.
//!
//! On a bridge it is a veth pair. The host end's name follows from the container id and the endpoint's slot: `ve` + 12
//! digits of the id + one of 36 letters (`ve3f2a9c1d77e00`), so an endpoint needs no record to be found. Both ends come
//! into being in one kernel request, each in its place; there is no moment at which an interface belongs to nobody.
//! On a macvlan or ipvlan network it is a child of an interface of the host, which lives and ends with the sandbox.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, IpVlanMode, LinkAttribute, LinkInfo, LinkMessage, MacVlanMode,
};
use rtnetlink::{
    LinkBridgePort, LinkIpVlan, LinkMacVlan, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use crate::blocking;
use crate::bridge::{add_address, enable_ipv6, is_interface_name};
use crate::mac::Mac;
use crate::netlink::{Netlink, NetlinkError, Request, index_of, inside, name_of};
use crate::sandbox::{OWN_NAMESPACE, Sandbox, SandboxError};

/// Digits of the container id in an interface name; what `docker ps` shows of an id.
const ID_DIGITS: usize = 12;
/// Endpoints a container can have: a slot is one letter of the host interface's name.
pub const SLOTS_MAX: u8 = 36;
const SLOT_LETTERS: &[u8; SLOTS_MAX as usize] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// What an endpoint's interface hangs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uplink {
    /// A port of a bridge.
    Bridge {
        /// The bridge's interface name.
        name: String,
        /// Ports that are isolated reach the bridge and what is behind it, but not each other.
        isolated: bool,
        /// The bridge may send back what came from this port: the container reaches its own published ports, also
        /// where the firewall sees bridged packets.
        hairpin: bool,
    },
    /// A macvlan child.
    Macvlan {
        /// The host's interface.
        parent: String,
        /// `bridge`, `vepa`, `private` or `passthru`.
        mode: Macvlan,
    },
    /// An ipvlan child.
    Ipvlan {
        /// The host's interface.
        parent: String,
        /// `l2`, `l3` or `l3s`.
        mode: Ipvlan,
    },
}

/// How children of one macvlan parent reach each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Macvlan {
    /// Directly.
    #[default]
    Bridge,
    /// Through the outside switch.
    Vepa,
    /// Not at all.
    Private,
    /// There is only one child.
    Passthru,
}

/// What an ipvlan parent does with its children's packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ipvlan {
    /// Switch them.
    #[default]
    L2,
    /// Route them.
    L3,
    /// Route them, seen by the host's connection tracking.
    L3s,
}

/// What an endpoint should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSpec {
    /// The container's id, at least 12 hexadecimal digits.
    pub container: String,
    /// Which of the container's endpoints, below [`SLOTS_MAX`]: names the host's end.
    pub slot: u8,
    /// The interface's name inside.
    pub interface: String,
    /// What it hangs on.
    pub uplink: Uplink,
    /// Its addresses, with their networks' prefix lengths.
    pub addresses: Vec<IpNet>,
    /// Its hardware address; `None` for one derived from its first address.
    pub mac: Option<Mac>,
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// Kernel settings of the interface: `net.ipv4.conf.IFNAME.log_martians` and a value.
    pub sysctls: Vec<(String, String)>,
}

/// Which way packets leave a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// The router; `None` where the interface itself is the way.
    pub address: Option<IpAddr>,
    /// The interface it is behind.
    pub interface: String,
}

/// The default routes of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gateways {
    /// For IPv4.
    pub v4: Option<Gateway>,
    /// For IPv6.
    pub v6: Option<Gateway>,
}

/// An endpoint that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The interface inside the sandbox.
    pub interface: String,
    /// Hardware address inside.
    pub mac: Mac,
}

/// The host's ends of endpoints that are to go. They are told by number: the names may be another run's by then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostEnds {
    container: String,
    indexes: Vec<u32>,
}

impl HostEnds {
    /// Removes them, and the others with them; those that are gone are fine. The kernel takes its time for it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn remove(self) -> Result<(), EndpointError> {
        let Self { container, indexes } = self;
        let again = container.clone();
        let removed = blocking(move || {
            let failed = |source| EndpointError::Remove { container: container.clone(), source };
            let mut netlink = Netlink::open().map_err(failed)?;
            for index in indexes {
                netlink.remove_link(index).map_err(failed)?;
            }
            Ok(())
        });
        removed.await.unwrap_or_else(|error| {
            Err(EndpointError::Remove { container: again, source: NetlinkError::Open(error) })
        })
    }
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
    /// There is no such slot.
    #[error("a container cannot be connected to more than {SLOTS_MAX} networks")]
    Slot,
    /// The kernel would not take the name.
    #[error("`{interface}` cannot name an interface")]
    Interface {
        /// The name given.
        interface: String,
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
    #[error("cannot set the default route of container {container}")]
    Route {
        /// The container.
        container: String,
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
    /// Attaches `sandbox` as each spec says, in order, and sets its default routes. Leftovers of the same names (an
    /// engine killed on the way) are replaced. On failure none of them is left.
    ///
    /// # Errors
    /// When a spec is impossible, the sandbox is gone, or the kernel refuses.
    pub async fn attach(
        sandbox: &Sandbox,
        container: &str,
        specs: Vec<EndpointSpec>,
        gateways: Gateways,
    ) -> Result<Vec<Self>, EndpointError> {
        let (sandbox, container) = (sandbox.clone(), container.to_owned());
        with_netlink(container, sandbox, move |outside, within, namespace, container| {
            let made = attach_all(outside, within, namespace, &specs)?;
            match set_gateways(within, &gateways) {
                Ok(()) => Ok(made),
                Err(source) => {
                    remove_all(outside, within, &specs);
                    Err(EndpointError::Route { container: container.to_owned(), source })
                }
            }
        })
        .await
    }

    /// Makes a new sandbox at `path` and attaches it, on one thread: the shortest way for a container that starts. On
    /// failure the sandbox may be left, with nothing in it.
    ///
    /// # Errors
    /// As [`Sandbox::create`] and [`Endpoint::attach`].
    pub async fn attach_new(
        path: &Path,
        container: &str,
        specs: Vec<EndpointSpec>,
        gateways: Gateways,
    ) -> Result<Vec<Self>, EndpointError> {
        let (sandbox, container) = (Sandbox::at(path), container.to_owned());
        let again = container.clone();
        let done = blocking(move || {
            let failed = |source| EndpointError::Sandbox { container: container.clone(), source };
            let route = |source| EndpointError::Route { container: container.clone(), source };
            if specs.is_empty() {
                return sandbox.create_mount(Vec::new).map_err(failed);
            }
            let mut outside = Netlink::open().map_err(route)?;
            let attached = sandbox.create_mount(|| {
                let namespace =
                    File::open(OWN_NAMESPACE).map_err(|error| route(NetlinkError::Enter(error)))?;
                let mut within = Netlink::open().map_err(route)?;
                let made = attach_all(&mut outside, &mut within, namespace.as_raw_fd(), &specs)?;
                // A new namespace has no default routes to take away.
                for (gateway, six) in [(&gateways.v4, false), (&gateways.v6, true)] {
                    if gateway.is_some() {
                        set_gateway(&mut within, gateway.as_ref(), six).map_err(route)?;
                    }
                }
                Ok(made)
            });
            attached.map_err(failed)?
        });
        done.await.unwrap_or_else(|error| {
            Err(EndpointError::Route { container: again, source: NetlinkError::Open(error) })
        })
    }

    /// Removes one endpoint from a sandbox, both ends, and sets the default routes that then count. An endpoint that
    /// is gone is fine.
    ///
    /// # Errors
    /// When the sandbox is gone, or the kernel refuses.
    pub async fn detach(
        sandbox: &Sandbox,
        container: &str,
        slot: u8,
        interface: &str,
        gateways: Gateways,
    ) -> Result<(), EndpointError> {
        let (sandbox, interface) = (sandbox.clone(), interface.to_owned());
        with_netlink(container.to_owned(), sandbox, move |outside, within, _, container| {
            let host = host_interface(container, slot)?;
            remove_named(outside, within, &host, &interface)
                .map_err(|source| EndpointError::Remove { container: container.to_owned(), source })?;
            set_gateways(within, &gateways)
                .map_err(|source| EndpointError::Route { container: container.to_owned(), source })
        })
        .await
    }

    /// Finds the host's ends of these endpoints, to be removed while others wait for nothing.
    ///
    /// # Errors
    /// When the id is impossible or the kernel refuses.
    pub async fn host_ends(container: &str, slots: &[u8]) -> Result<HostEnds, EndpointError> {
        let names =
            slots.iter().map(|slot| host_interface(container, *slot)).collect::<Result<Vec<_>, _>>()?;
        let again = container.to_owned();
        let container = container.to_owned();
        let found = blocking(move || {
            let failed = |source| EndpointError::Remove { container: container.clone(), source };
            let mut netlink = Netlink::open().map_err(failed)?;
            let mut indexes = Vec::new();
            for name in names {
                let link = netlink.link(&name).map_err(failed)?;
                indexes.extend(link.map(|link| link.header.index));
            }
            Ok(HostEnds { container, indexes })
        });
        found.await.unwrap_or_else(|error| {
            Err(EndpointError::Remove { container: again, source: NetlinkError::Open(error) })
        })
    }

    /// Removes every endpoint of a container, whatever an engine that died left. Returns how many there were.
    ///
    /// # Errors
    /// When the id is impossible or the kernel refuses.
    pub async fn cleanup(container: &str) -> Result<usize, EndpointError> {
        let prefix = host_prefix(container)?;
        let container = container.to_owned();
        let again = container.clone();
        let removed = blocking(move || {
            let failed = |source| EndpointError::Remove { container: container.clone(), source };
            let mut netlink = Netlink::open().map_err(failed)?;
            let mut removed = 0;
            for link in netlink.links().map_err(failed)? {
                let is_ours = name_of(&link)
                    .is_some_and(|name| name.len() == prefix.len() + 1 && name.starts_with(&prefix));
                if is_ours && netlink.remove_link(link.header.index).map_err(failed)? {
                    removed += 1;
                }
            }
            Ok(removed)
        });
        removed.await.unwrap_or_else(|error| {
            Err(EndpointError::Remove { container: again, source: NetlinkError::Open(error) })
        })
    }
}

/// Runs `work` on a thread inside the sandbox, with a conversation with either side.
async fn with_netlink<T: Send + 'static>(
    container: String,
    sandbox: Sandbox,
    work: impl FnOnce(&mut Netlink, &mut Netlink, i32, &str) -> Result<T, EndpointError> + Send + 'static,
) -> Result<T, EndpointError> {
    let again = container.clone();
    let done = blocking(move || {
        let kernel = |source| EndpointError::Route { container: container.clone(), source };
        let namespace = sandbox
            .file()
            .map_err(|source| EndpointError::Sandbox { container: container.clone(), source })?;
        let mut outside = Netlink::open().map_err(kernel)?;
        let fd = namespace.as_raw_fd();
        let done = inside(namespace.as_fd(), || {
            let mut within = Netlink::open().map_err(kernel)?;
            work(&mut outside, &mut within, fd, &container)
        });
        done.map_err(kernel)?
    });
    done.await.unwrap_or_else(|error| {
        Err(EndpointError::Route { container: again, source: NetlinkError::Open(error) })
    })
}

/// Each spec in order. On failure none of them is left.
fn attach_all(
    outside: &mut Netlink,
    within: &mut Netlink,
    namespace: i32,
    specs: &[EndpointSpec],
) -> Result<Vec<Endpoint>, EndpointError> {
    let mut made = Vec::new();
    for spec in specs {
        match attach(outside, within, namespace, spec) {
            Ok(endpoint) => made.push(endpoint),
            Err(error) => {
                // The one that failed has cleaned up after itself.
                remove_all(outside, within, &specs[..made.len()]);
                return Err(error);
            }
        }
    }
    Ok(made)
}

fn remove_all(outside: &mut Netlink, within: &mut Netlink, specs: &[EndpointSpec]) {
    for spec in specs {
        if let Err(error) = remove(outside, within, spec) {
            tracing::warn!(interface = spec.interface, %error, "a failed endpoint stays behind");
        }
    }
}

fn attach(
    outside: &mut Netlink,
    within: &mut Netlink,
    namespace: i32,
    spec: &EndpointSpec,
) -> Result<Endpoint, EndpointError> {
    let host = host_interface(&spec.container, spec.slot)?;
    if !is_interface_name(&spec.interface) {
        return Err(EndpointError::Interface { interface: spec.interface.clone() });
    }
    let kernel = |source| EndpointError::Kernel {
        container: spec.container.clone(),
        interface: spec.interface.clone(),
        source,
    };
    let mac = spec
        .mac
        .or_else(|| spec.addresses.first().map(|net| Mac::of(net.addr())))
        .unwrap_or_else(|| Mac::from_name(&host));
    let made = (|| {
        match create(outside, namespace, &host, mac, spec) {
            // The host's end of an earlier run, which the kernel has yet to take away.
            Err(error) if error.errno() == Some(nix::libc::EEXIST) && remove_link(outside, &host)? => {
                create(outside, namespace, &host, mac, spec)?;
            }
            other => other?,
        }
        if !matches!(spec.uplink, Uplink::Bridge { .. }) {
            rename(within, &host, &spec.interface)?;
        }
        configure(within, mac, spec)
    })();
    match made {
        Ok(mac) => Ok(Endpoint { interface: spec.interface.clone(), mac }),
        Err(error) => {
            // An interface inside that was there before is not ours to remove; the pair was never made then.
            if error.errno() != Some(nix::libc::EEXIST)
                && let Err(also) = remove(outside, within, spec)
            {
                tracing::warn!(interface = host, error = %also, "a failed endpoint stays behind");
            }
            Err(kernel(error))
        }
    }
}

/// Makes the interface in the sandbox. A child of another interface gets the name `host` at first: the kernel wants the name
/// to be free outside too, where an `eth0` is likely.
fn create(
    outside: &mut Netlink,
    namespace: i32,
    host: &str,
    mac: Mac,
    spec: &EndpointSpec,
) -> Result<(), NetlinkError> {
    let inner = |message: LinkMessageBuilder<LinkUnspec>| {
        message.append_extra_attribute(LinkAttribute::NetNsFd(namespace)).mtu(spec.mtu)
    };
    match &spec.uplink {
        Uplink::Bridge { name, isolated, hairpin } => {
            let bridge = index_of(outside, name)?;
            let peer =
                inner(LinkMessageBuilder::<LinkUnspec>::new().name(&spec.interface).address(mac.0.to_vec()));
            let pair = LinkVeth::new(host, &spec.interface)
                .mtu(spec.mtu)
                .controller(bridge)
                .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())))
                .up()
                .build();
            let action = format!("create veth `{host}` on bridge `{name}`");
            outside.ask(Request::create(action, RouteNetlinkMessage::NewLink(pair)))?;
            if *isolated || *hairpin {
                let port = index_of(outside, host)?;
                let message = LinkBridgePort::new(port).isolated(*isolated).hairpin(*hairpin).build();
                let action = format!("set port `{host}` of bridge `{name}`");
                outside.ask(Request::change(action, RouteNetlinkMessage::NewLink(message)))?;
            }
            Ok(())
        }
        Uplink::Macvlan { parent, mode } => {
            let mode = match mode {
                Macvlan::Bridge => MacVlanMode::Bridge,
                Macvlan::Vepa => MacVlanMode::Vepa,
                Macvlan::Private => MacVlanMode::Private,
                Macvlan::Passthru => MacVlanMode::Passthrough,
            };
            let parent_index = index_of(outside, parent)?;
            let mut child = LinkMacVlan::new(host, parent_index, mode)
                .append_extra_attribute(LinkAttribute::NetNsFd(namespace));
            // Of a passthrough child the hardware address is the parent's own.
            if mode != MacVlanMode::Passthrough {
                child = child.address(mac.0.to_vec());
            }
            let action = format!("create a macvlan interface on `{parent}`");
            let made = outside.ask(Request::create(action, RouteNetlinkMessage::NewLink(child.build())));
            made.map_err(|error| without_driver(error, "macvlan"))
        }
        Uplink::Ipvlan { parent, mode } => {
            let mode = match mode {
                Ipvlan::L2 => IpVlanMode::L2,
                Ipvlan::L3 => IpVlanMode::L3,
                Ipvlan::L3s => IpVlanMode::L3S,
            };
            let parent_index = index_of(outside, parent)?;
            let child = LinkIpVlan::new(host, parent_index, mode)
                .append_extra_attribute(LinkAttribute::NetNsFd(namespace))
                .build();
            let action = format!("create an ipvlan interface on `{parent}`");
            let made = outside.ask(Request::create(action, RouteNetlinkMessage::NewLink(child)));
            made.map_err(|error| without_driver(error, "ipvlan"))
        }
    }
}

/// Gives an interface that was just made its name; without success it is removed again.
fn rename(within: &mut Netlink, made: &str, interface: &str) -> Result<(), NetlinkError> {
    let index = index_of(within, made)?;
    let message = LinkUnspec::new_with_index(index).name(interface).build();
    let action = format!("give interface `{made}` the name `{interface}`");
    let renamed = within.ask(Request::change(action, RouteNetlinkMessage::SetLink(message)));
    if renamed.is_err()
        && let Err(also) = within.remove_link(index)
    {
        tracing::warn!(interface = made, error = %also, "a failed endpoint stays behind");
    }
    renamed
}

/// Makes sure that the kernel knows `macvlan` or `ipvlan` interfaces; it loads their module if it has one. Nothing is made.
///
/// # Errors
/// When it does not, or cannot be asked.
pub async fn ensure_driver(driver: &'static str) -> Result<(), NetlinkError> {
    let probed = blocking(move || {
        let mut link = LinkMessage::default();
        let kind = if driver == "ipvlan" { InfoKind::IpVlan } else { InfoKind::MacVlan };
        link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
        let action = format!("create {driver} interfaces");
        let asked = Netlink::open()?.ask(Request::create(action, RouteNetlinkMessage::NewLink(link)));
        match asked {
            // It knows them, and that no parent was named.
            Err(error) if error.errno() == Some(nix::libc::EINVAL) => Ok(()),
            other => other.map_err(|error| without_driver(error, driver)),
        }
    });
    probed.await.unwrap_or_else(|error| Err(NetlinkError::Open(error)))
}

/// A kernel that does not know a kind of interface says "not supported", which could be anything.
pub(crate) fn without_driver(error: NetlinkError, driver: &str) -> NetlinkError {
    match error {
        NetlinkError::Refused { action, source } if source.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {
            let hint = format!(
                "{action}: this kernel has no {driver} driver (module `{driver}`); load it, or use another network driver"
            );
            NetlinkError::Refused { action: hint, source }
        }
        other => other,
    }
}

/// Returns the hardware address it has: that of an ipvlan child is its parent's.
fn configure(within: &mut Netlink, mac: Mac, spec: &EndpointSpec) -> Result<Mac, NetlinkError> {
    let interface = &spec.interface;
    let link = within
        .link(interface)?
        .ok_or_else(|| NetlinkError::refused(format!("find interface `{interface}`"), nix::libc::ENODEV))?;
    let index = link.header.index;
    settings(spec).map_err(|source| NetlinkError::Refused {
        action: format!("set the kernel's settings of interface `{interface}`"),
        source,
    })?;
    let mut requests: Vec<Request> =
        spec.addresses.iter().map(|address| add_address(index, *address)).collect();
    requests.push(Request::up(index));
    within.batch(&requests)?;
    Ok(hardware_address(&link).unwrap_or(mac))
}

/// Before it is up: whether it speaks IPv6, that it tells its neighbours of its addresses (which somebody else may
/// have had), and what the user asks.
fn settings(spec: &EndpointSpec) -> io::Result<()> {
    let interface = &spec.interface;
    let speaks_ipv6 = spec.addresses.iter().any(|net| net.addr().is_ipv6());
    let write = |path: String, value: &str| match std::fs::write(path, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    if speaks_ipv6 {
        enable_ipv6(interface)?;
        write(format!("/proc/sys/net/ipv6/conf/{interface}/ndisc_notify"), "1")?;
    } else {
        write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1")?;
    }
    write(format!("/proc/sys/net/ipv4/conf/{interface}/arp_notify"), "1")?;
    for (name, value) in &spec.sysctls {
        let path: Vec<String> = name
            .split('.')
            .map(|part| if part.eq_ignore_ascii_case("IFNAME") { interface.clone() } else { part.to_owned() })
            .collect();
        std::fs::write(format!("/proc/sys/{}", path.join("/")), value)
            .map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
    }
    Ok(())
}

fn set_gateways(within: &mut Netlink, gateways: &Gateways) -> Result<(), NetlinkError> {
    set_gateway(within, gateways.v4.as_ref(), false)?;
    set_gateway(within, gateways.v6.as_ref(), true)
}

fn set_gateway(within: &mut Netlink, gateway: Option<&Gateway>, six: bool) -> Result<(), NetlinkError> {
    let Some(gateway) = gateway else {
        let message = if six {
            RouteMessageBuilder::<Ipv6Addr>::new().build()
        } else {
            RouteMessageBuilder::<Ipv4Addr>::new().build()
        };
        let gone =
            within.ask(Request::change("remove the default route", RouteNetlinkMessage::DelRoute(message)));
        return match gone {
            // There was none; or there is no IPv6 at all.
            Err(error)
                if matches!(
                    error.errno(),
                    Some(nix::libc::ESRCH | nix::libc::EAFNOSUPPORT | nix::libc::EOPNOTSUPP)
                ) =>
            {
                Ok(())
            }
            other => other,
        };
    };
    let index = index_of(within, &gateway.interface)?;
    let action = match gateway.address {
        Some(address) => format!("route through {address}"),
        None => format!("route through interface `{}`", gateway.interface),
    };
    let route = |onlink: bool| {
        let message = match gateway.address {
            Some(IpAddr::V4(address)) => {
                let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(address).output_interface(index);
                if onlink { route.onlink() } else { route }.build()
            }
            Some(IpAddr::V6(address)) => {
                let route = RouteMessageBuilder::<Ipv6Addr>::new().gateway(address).output_interface(index);
                if onlink { route.onlink() } else { route }.build()
            }
            None if six => RouteMessageBuilder::<Ipv6Addr>::new().output_interface(index).build(),
            None => RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).build(),
        };
        Request::replace(action.clone(), RouteNetlinkMessage::NewRoute(message))
    };
    match within.ask(route(false)) {
        // A gateway outside the interface's own subnets, of a macvlan network perhaps.
        Err(error) if matches!(error.errno(), Some(nix::libc::ENETUNREACH | nix::libc::EHOSTUNREACH)) => {
            within.ask(route(true))
        }
        other => other,
    }
}

fn remove(outside: &mut Netlink, within: &mut Netlink, spec: &EndpointSpec) -> Result<(), NetlinkError> {
    let host = host_interface(&spec.container, spec.slot)
        .map_err(|error| NetlinkError::Open(io::Error::other(error)))?;
    remove_named(outside, within, &host, &spec.interface)
}

/// The host's end takes the other one with it; a child of a host's interface has only the inner one.
fn remove_named(
    outside: &mut Netlink,
    within: &mut Netlink,
    host: &str,
    interface: &str,
) -> Result<(), NetlinkError> {
    if !remove_link(outside, host)? {
        remove_link(within, interface)?;
    }
    Ok(())
}

fn remove_link(netlink: &mut Netlink, name: &str) -> Result<bool, NetlinkError> {
    let message = LinkUnspec::new_with_name(name).build();
    netlink.ask_gone(Request::change(
        format!("remove interface `{name}`"),
        RouteNetlinkMessage::DelLink(message),
    ))
}

fn hardware_address(link: &LinkMessage) -> Option<Mac> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}

fn host_prefix(container: &str) -> Result<String, EndpointError> {
    match container.get(..ID_DIGITS) {
        Some(digits) if digits.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(format!("ve{digits}")),
        _ => Err(EndpointError::Container { container: container.to_owned() }),
    }
}

fn host_interface(container: &str, slot: u8) -> Result<String, EndpointError> {
    let letter = SLOT_LETTERS.get(usize::from(slot)).ok_or(EndpointError::Slot)?;
    Ok(format!("{}{}", host_prefix(container)?, char::from(*letter)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bridge_port_is_named_after_the_container() {
        let id = "3f2a9c1d77e04b5caaaa";
        assert_eq!(host_interface(id, 0).unwrap(), "ve3f2a9c1d77e00");
        assert_eq!(host_interface(id, 35).unwrap(), "ve3f2a9c1d77e0z");
        assert!(is_interface_name(&host_interface(id, 35).unwrap()));
    }

    #[test]
    fn names_that_could_not_be_found_again_are_refused() {
        assert!(matches!(host_interface("3f2a", 0), Err(EndpointError::Container { .. })));
        assert!(matches!(host_interface("zzzzzzzzzzzz", 0), Err(EndpointError::Container { .. })));
        assert!(matches!(host_interface("3f2a9c1d77e0", SLOTS_MAX), Err(EndpointError::Slot)));
    }
}

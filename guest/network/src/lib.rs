//! Container networks in libnetwork's vocabulary: a [`Bridge`] is a network, a [`Sandbox`] one container's network
//! namespace, an [`Endpoint`] one attachment of a sandbox to a network; [`Ipam`] decides addresses and [`Firewall`]
//! writes the rules.
//!
//! This crate owns the kernel objects and their names, and nothing that lasts beyond them: which container has which
//! address is the caller's record. Every name follows from the container id, so that what an engine killed at any
//! moment left behind is found and removed from the outside: [`Sandbox::list`] finds namespaces,
//! [`Endpoint::cleanup`] removes interfaces, [`Firewall::apply`] says the table as a whole.
//!
//! The kernel is reached by netlink; the firewall by one `nft` transaction. Where the caller may not run in the host's
//! network namespace (tests, native mode), everything here acts on the namespace the calling process is in.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use guest_network::{Bridge, BridgeSpec, Endpoint, EndpointSpec, Gateway, Gateways, Sandbox, Uplink};
//!
//! let addresses = vec!["172.17.0.1/16".parse()?];
//! Bridge::ensure(&BridgeSpec { name: "engine0".into(), addresses, mtu: 1500, owned: true }).await?;
//! let container = "3f2a9c1d77e04b5c";
//! let sandbox = Sandbox::create(std::path::Path::new("/run/engine/netns/3f2a9c1d77e0")).await?;
//! let spec = EndpointSpec {
//!     container: container.into(),
//!     slot: 0,
//!     interface: "eth0".into(),
//!     uplink: Uplink::Bridge { name: "engine0".into(), isolated: false, hairpin: false },
//!     addresses: vec!["172.17.0.2/16".parse()?],
//!     mac: None,
//!     mtu: 1500,
//!     sysctls: Vec::new(),
//! };
//! let gateway = Gateway { address: Some("172.17.0.1".parse()?), interface: "eth0".into() };
//! let gateways = Gateways { v4: Some(gateway), v6: None };
//! let endpoints = Endpoint::attach(&sandbox, container, vec![spec], gateways).await?;
//! println!("{} {}", endpoints[0].interface, endpoints[0].mac);
//!
//! Endpoint::host_ends(container, &[0]).await?.remove().await?;
//! sandbox.delete().await?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod bridge;
pub mod dns;
mod endpoint;
mod firewall;
pub mod forwarding;
mod ipam;
mod mac;
mod netlink;
mod parent;
mod sandbox;

pub use bridge::{Bridge, BridgeError, BridgeSpec, is_interface_name};
pub use endpoint::{
    Endpoint, EndpointError, EndpointSpec, Gateway, Gateways, HostEnds, Ipvlan, Macvlan, SLOTS_MAX, Uplink,
    ensure_driver,
};
pub use firewall::{
    Firewall, FirewallError, FirewallLanding, FirewallLink, FirewallNetwork, FirewallPort, Foreign,
    GenerationError, Incoming, Protocol, Rules, Written, dropped_by,
};
pub use ipam::{Ipam, IpamError};
pub use mac::Mac;
pub use netlink::NetlinkError;
pub use parent::{ensure_dummy, ensure_vlan, remove_dummy, remove_vlan};
pub use sandbox::{Sandbox, SandboxError};

/// Runs work that blocks away from the async threads. The outer error: the program is ending.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(std::io::Error::other("the program is ending")),
        },
    }
}

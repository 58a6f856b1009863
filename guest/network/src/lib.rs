//! Container networks in libnetwork's vocabulary: a [`Bridge`] is a network, a [`Sandbox`] one container's network
//! namespace, an [`Endpoint`] one attachment of a sandbox to a bridge; [`Ipam`] decides addresses and [`Firewall`]
//! writes the rules.
//!
//! This crate owns the kernel objects and their names, and nothing that lasts beyond them: which container has which
//! address is the caller's record. Every name follows from the container id, so that what an engine killed at any
//! moment left behind is found and removed from the outside: [`Sandbox::list`] finds namespaces,
//! [`Endpoint::cleanup`] removes interfaces, [`Firewall::apply`] replaces the table as a whole.
//!
//! The kernel is reached by netlink; the firewall by one `nft` transaction. IPv4 only for now. Where the caller may
//! not run in the host's network namespace (tests, native mode), everything here acts on the namespace the calling
//! process is in.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use guest_network::{Bridge, BridgeSpec, Endpoint, EndpointSpec, Firewall, FirewallNetwork, Ipam, Sandbox};
//!
//! let bridge = Bridge::ensure(&BridgeSpec {
//!     name: "engine0".into(),
//!     subnet: "172.17.0.0/16".parse()?,
//!     gateway: "172.17.0.1".parse()?,
//!     mtu: 1500,
//! })
//! .await?;
//! guest_network::forwarding::enable()?;
//! Firewall::new("engine")
//!     .apply(&[FirewallNetwork { bridge: "engine0".into(), subnet: "172.17.0.0/16".parse()? }])
//!     .await?;
//!
//! let mut ipam = Ipam::new("172.17.0.0/16".parse()?, Some("172.17.0.1".parse()?))?;
//! let address = ipam.allocate()?;
//! let container = "3f2a9c1d77e04b5c";
//! let sandbox = Sandbox::create(std::path::Path::new("/run/engine/netns/3f2a9c1d77e04b5c")).await?;
//! let endpoint = Endpoint::attach(
//!     &bridge,
//!     &sandbox,
//!     &EndpointSpec { container: container.into(), interface: "eth0".into(), address, mac: None },
//! )
//! .await?;
//! println!("{} {}", endpoint.address, endpoint.mac);
//!
//! Endpoint::detach(container, "eth0").await?;
//! sandbox.delete().await?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod bridge;
mod endpoint;
mod firewall;
pub mod forwarding;
mod ipam;
mod mac;
mod netlink;
mod sandbox;

pub use bridge::{Bridge, BridgeError, BridgeSpec};
pub use endpoint::{Endpoint, EndpointError, EndpointSpec};
pub use firewall::{Firewall, FirewallError, FirewallNetwork};
pub use ipam::{Ipam, IpamError};
pub use mac::Mac;
pub use netlink::NetlinkError;
pub use sandbox::{Sandbox, SandboxError};

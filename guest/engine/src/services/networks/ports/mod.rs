//! Published ports: what a container asks for ([`wanted`]), what it got ([`Published`]), and who holds it ([`PortHost`]).
//!
//! A port is had in three steps: it is reserved where the host's programs are (a bound socket, so that nothing else
//! takes it, and so that a conflict is told before the container starts), the firewall leads it to the container, and
//! what the kernel cannot lead there (IPv6 to a container that speaks only IPv4, and `::1`) a relay in this process
//! carries. There is no process per port.

mod holder;
mod host;
mod relay;
mod wanted;

use std::net::IpAddr;

use guest_network::Protocol;
use serde::{Deserialize, Serialize};

pub use host::{Lease, PortHost};
pub use relay::Target;
pub use wanted::{Wanted, check, parse, wanted};

/// A port of a container that is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host: IpAddr,
    pub host_port: u16,
}

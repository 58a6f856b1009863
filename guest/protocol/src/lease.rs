//! What a container holds on the host: published ports.
//!
//! A [`Lease`] is granted as a whole and released as a whole. The guest's engine asks, so the host binds what it was
//! asked for or says why not, before the container starts; nothing is guessed from outside.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The address of the guest's network at which connections to published ports land, in IPv4. Nobody has it: the guest's
/// firewall leads each port of it to a container.
pub const LANDING_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 3);
/// The same in IPv6.
pub const LANDING_V6: Ipv6Addr = Ipv6Addr::new(0xfdc7, 0x9a1e, 0x5d28, 0, 0, 0, 0, 3);

/// The protocol above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP, which the host cannot forward.
    Sctp,
}

impl fmt::Display for Transport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// One published port, asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRequest {
    /// Its protocol.
    pub transport: Transport,
    /// The host's addresses to listen at, all with the same port. `0.0.0.0` and `::` stand for all addresses of their
    /// family; `::` does not include IPv4, and it and `::1` are left out on a host without IPv6 as long as another address is there.
    pub addresses: Vec<IpAddr>,
    /// The first port of the host that will do; 0 for any free one.
    pub first: u16,
    /// The last port that will do, `first` itself for exactly one.
    pub last: u16,
    /// The container's port.
    pub container_port: u16,
}

/// One published port, held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GrantedPort {
    /// Its protocol.
    pub transport: Transport,
    /// The host's address.
    pub address: IpAddr,
    /// The host's port.
    pub port: u16,
    /// The container's port.
    pub container_port: u16,
}

/// Everything one container holds on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The container's id.
    pub container: String,
    /// Its published ports.
    pub ports: Vec<GrantedPort>,
    /// Where connections to them land, of those for which the guest's kernel knows the way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub landings: Vec<Landing>,
}

/// An address of the guest's network from which its kernel leads TCP connections to a container's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Landing {
    /// The container's port.
    pub container_port: u16,
    /// Where the host's network connects to.
    pub at: SocketAddr,
}

//! What is kept of a network, and of a container's places in networks.

use std::collections::BTreeMap;
use std::net::IpAddr;

use guest_api::network::IpamPool;
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::ports::Published;

/// Names under which an address that is set aside is the containers' gateway, as in libnetwork's bridge driver.
pub const GATEWAY_V4: &str = "DefaultGatewayIPv4";
pub const GATEWAY_V6: &str = "DefaultGatewayIPv6";

/// What is stored about a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    pub id: String,
    pub name: String,
    pub created: Timestamp,
    pub driver: Driver,
    pub ipv4: bool,
    pub ipv6: bool,
    pub pools: Vec<PoolRecord>,
    pub ipam_driver: String,
    pub ipam_options: Option<BTreeMap<String, String>>,
    pub internal: bool,
    pub attachable: bool,
    pub ingress: bool,
    /// It only holds settings for others.
    pub config_only: bool,
    /// The network its settings came from; empty for none.
    pub config_from: String,
    pub options: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    /// The host's interface it hangs on: a bridge of its own, or a parent. Empty for none.
    pub interface: String,
    /// That interface was made for it, and goes with it.
    pub owns_interface: bool,
}

/// One subnet of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    pub subnet: IpNet,
    pub range: Option<IpNet>,
    pub gateway: Option<IpAddr>,
    pub auxiliary: BTreeMap<String, IpAddr>,
    /// As the user gave it; `None` when the engine chose.
    pub given: Option<IpamPool>,
}

/// What makes a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    Bridge,
    Macvlan,
    Ipvlan,
    Host,
    Null,
}

impl Driver {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Macvlan => "macvlan",
            Self::Ipvlan => "ipvlan",
            Self::Host => "host",
            Self::Null => "null",
        }
    }
}

impl NetworkRecord {
    /// One of the three that are always there.
    pub fn is_predefined(&self) -> bool {
        is_predefined(&self.name)
    }
}

/// Names that are the engine's own.
pub fn is_predefined(name: &str) -> bool {
    matches!(name, "bridge" | "host" | "none" | "default")
}

/// What is kept of a running container's place on the network: a file that goes with a reboot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    pub endpoints: Vec<EndpointRecord>,
    #[serde(default)]
    pub ports: Vec<Published>,
    /// See [`super::state::Member::landings`].
    #[serde(default)]
    pub landings: BTreeMap<u16, u16>,
}

/// A running container's place in one network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRecord {
    pub network_id: String,
    pub network: String,
    pub id: String,
    /// Names the host's end of its interface.
    pub slot: u8,
    pub interface: String,
    pub addresses: Vec<IpNet>,
    /// The network's ways out; `None` where it is internal.
    pub gateways: Vec<IpAddr>,
    pub mac: String,
    /// The one with the highest gives the default route.
    pub priority: i64,
    /// What others in the network call it.
    #[serde(default)]
    pub names: Vec<String>,
    /// What it calls others: their names, and its own for them.
    #[serde(default)]
    pub links: Vec<(String, String)>,
}

impl EndpointRecord {
    pub fn ipv4(&self) -> Option<IpNet> {
        self.addresses.iter().find(|net| net.addr().is_ipv4()).copied()
    }

    /// Its own, not a link-local one.
    pub fn ipv6(&self) -> Option<IpNet> {
        self.addresses.iter().find(|net| net.addr().is_ipv6()).copied()
    }

    pub fn gateway(&self, six: bool) -> Option<IpAddr> {
        self.gateways.iter().find(|gateway| gateway.is_ipv6() == six).copied()
    }
}

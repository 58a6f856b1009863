//! Published ports.

use std::net::IpAddr;

use guest_network::Protocol;
use serde::{Deserialize, Serialize};

/// A port of a container that is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host: IpAddr,
    pub host_port: u16,
}

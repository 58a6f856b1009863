//! Which bridge the default network gets.

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::bail;
use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};

/// Largest packet on a bridge.
const MTU: u32 = 1500;

/// The default bridge before the host's routes are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeChoice {
    pub name: String,
    /// Name of our table in nftables.
    pub firewall_table: String,
    /// Gateway address and prefix length, best first. One that overlaps a route of the host is passed over, except
    /// when it was asked for.
    pub candidates: Vec<Ipv4Net>,
    /// The user named the address.
    pub fixed: bool,
    pub mtu: u32,
    /// Make it at start.
    pub early: bool,
}

impl BridgeChoice {
    pub fn new(
        native: bool,
        data_root: &Path,
        name: Option<String>,
        address: Option<Ipv4Net>,
        mtu: Option<u32>,
    ) -> anyhow::Result<Self> {
        if let Some(address) = address
            && (address.addr() == address.network() || address.prefix_len() > 30)
        {
            bail!(
                "--bip {address}: give the bridge's own address in a subnet of at least four, such as 172.17.0.1/16"
            );
        }
        let hash = Sha256::digest(data_root.as_os_str().as_encoded_bytes());
        let own = if native { format!("eng-{}", hex::encode(&hash[..4])) } else { "engine0".to_owned() };
        let pools = default_pools();
        let first =
            if native { usize::from(u16::from_be_bytes([hash[4], hash[5]])) % pools.len() } else { 0 };
        let candidates = match address {
            Some(address) => vec![address],
            None => pools.iter().cycle().skip(first).take(pools.len()).copied().collect(),
        };
        Ok(Self {
            firewall_table: if native { own.replace('-', "_") } else { "engine".to_owned() },
            name: name.unwrap_or(own),
            candidates,
            fixed: address.is_some(),
            mtu: mtu.filter(|mtu| *mtu > 0).unwrap_or(MTU),
            early: !native,
        })
    }
}

/// Docker's pools for bridges, each as the gateway's address: 172.17–31.0.1/16, then 192.168.0–240.1/20.
fn default_pools() -> Vec<Ipv4Net> {
    let large = (17..=31).map(|second| Ipv4Net::new_assert(Ipv4Addr::new(172, second, 0, 1), 16));
    let small = (0..16).map(|third| Ipv4Net::new_assert(Ipv4Addr::new(192, 168, third * 16, 1), 20));
    large.chain(small).collect()
}

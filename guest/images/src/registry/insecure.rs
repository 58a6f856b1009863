//! Registries that may be spoken to without a certificate: by name, by network, and this computer itself.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::{Error, Result};

const LOOKUP_TIMEOUT: Duration = Duration::from_secs(15);

/// The list.
#[derive(Debug)]
pub(super) struct Insecure(Vec<Entry>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    /// `host` or `host:port`.
    Name(String),
    Network(IpAddr, u8),
}

/// Why a registry is insecure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listed {
    /// It is not.
    No,
    /// Its address lies in a network of the list, as every loopback address does.
    ByNetwork,
    /// Somebody wrote its name down.
    ByName,
}

impl Insecure {
    /// Fails when an entry can be neither a host nor a network.
    pub(super) fn new(entries: &[String]) -> Result<Self> {
        let mut all = vec![
            Entry::Network(IpAddr::from([127, 0, 0, 0]), 8),
            Entry::Network(IpAddr::from([0u16, 0, 0, 0, 0, 0, 0, 1]), 128),
        ];
        for entry in entries {
            all.push(Entry::parse(entry)?);
        }
        Ok(Self(all))
    }

    /// Names are looked up when a network is in the list beyond our own, as dockerd does.
    pub(super) async fn lists(&self, domain: &str) -> Listed {
        let (host, address) = host_of(domain);
        let named = |entry: &Entry| matches!(entry, Entry::Name(name) if name == domain || name == host);
        if self.0.iter().any(named) {
            return Listed::ByName;
        }
        let within = |address: IpAddr| {
            let contains = |entry: &Entry| matches!(entry, Entry::Network(network, bits) if contains(*network, *bits, address));
            if self.0.iter().any(contains) { Listed::ByNetwork } else { Listed::No }
        };
        if host == "localhost" {
            return Listed::ByNetwork;
        }
        if let Some(address) = address {
            return within(address);
        }
        let only_loopback = self.0.iter().all(|entry| match entry {
            Entry::Network(network, _) => network.is_loopback(),
            Entry::Name(_) => true,
        });
        if only_loopback {
            return Listed::No;
        }
        match tokio::time::timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((host, 443))).await {
            Ok(Ok(mut addresses)) => {
                let found = addresses.any(|address: SocketAddr| within(address.ip()) == Listed::ByNetwork);
                if found { Listed::ByNetwork } else { Listed::No }
            }
            _ => Listed::No,
        }
    }
}

impl Entry {
    fn parse(entry: &str) -> Result<Self> {
        let entry = entry.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
        let bad = || {
            Error::invalid(format!(
                "`{entry}` in the list of insecure registries is neither a host nor a network"
            ))
        };
        let Some((network, bits)) = entry.split_once('/') else {
            let host = !entry.is_empty() && !entry.contains(|c: char| c.is_whitespace() || c == '@');
            return if host { Ok(Self::Name(entry.to_owned())) } else { Err(bad()) };
        };
        let network: IpAddr = network.parse().map_err(|_| bad())?;
        let most = if network.is_ipv4() { 32 } else { 128 };
        let bits = bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(bad)?;
        Ok(Self::Network(network, bits))
    }
}

/// The host without its port, and the address it spells, if any.
fn host_of(domain: &str) -> (&str, Option<IpAddr>) {
    if let Some((host, _)) = domain.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, host.parse().ok());
    }
    let host = domain.split_once(':').map_or(domain, |(host, _)| host);
    (host, host.parse().ok())
}

/// Whether a registry is on this computer: such are never reached through a proxy.
pub(super) fn is_local(domain: &str) -> bool {
    let (host, address) = host_of(domain);
    host == "localhost" || address.is_some_and(|address| address.is_loopback())
}

fn contains(network: IpAddr, bits: u8, address: IpAddr) -> bool {
    let prefix = |value: u128, width: u32| if bits == 0 { 0 } else { value >> (width - u32::from(bits)) };
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            prefix(u128::from(network.to_bits()), 32) == prefix(u128::from(address.to_bits()), 32)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            prefix(network.to_bits(), 128) == prefix(address.to_bits(), 128)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn loopback_is_always_insecure_and_others_only_when_listed() {
        let entries = ["host.docker.internal", "10.1.0.0/16", "r.example:5000"].map(str::to_owned);
        let insecure = Insecure::new(&entries).expect("a list");
        for domain in ["localhost", "localhost:5000", "127.0.0.1:80", "127.9.9.9", "[::1]:5000", "10.1.2.3:1"]
        {
            assert_eq!(insecure.lists(domain).await, Listed::ByNetwork, "{domain}");
        }
        for domain in ["host.docker.internal:5000", "r.example:5000"] {
            assert_eq!(insecure.lists(domain).await, Listed::ByName, "{domain}");
        }
        for domain in ["10.2.0.1", "192.0.2.1:5000"] {
            assert_eq!(insecure.lists(domain).await, Listed::No, "{domain}");
        }
        for entry in ["10.0.0.0/33", "x/y", "", "a b"] {
            assert!(Insecure::new(&[entry.to_owned()]).is_err(), "{entry}");
        }
    }

    #[test]
    fn local_registries_are_told_by_their_spelling() {
        assert!(is_local("localhost:5000") && is_local("127.0.0.1") && is_local("[::1]:1"));
        assert!(!is_local("registry.example") && !is_local("10.0.0.1:5000"));
    }
}

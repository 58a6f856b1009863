//! What the guest's network looks like.

use std::net::Ipv4Addr;
use std::path::PathBuf;

/// The network between the guest and the NAT, and where the host's resolvers are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The router's address in the guest's network: gateway, DHCP server, name server.
    pub gateway: Ipv4Addr,
    /// The one address DHCP hands out.
    pub guest: Ipv4Addr,
    /// Connections to this address reach the host's own 127.0.0.1.
    pub host_alias: Ipv4Addr,
    /// Prefix length of the guest's network.
    pub prefix: u8,
    /// Largest IP packet on the link, in bytes (at least 576, at most 65535).
    pub mtu: u16,
    /// Every frame on the link begins with ten bytes that say what its sender leaves to its taker: checksums, and
    /// the cutting of large segments (`offload`).
    pub offloads: bool,
    /// Where the host's resolvers are listed; read again when it changes.
    pub resolv_conf: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            gateway: Ipv4Addr::new(198, 18, 0, 1),
            guest: Ipv4Addr::new(198, 18, 0, 2),
            host_alias: Ipv4Addr::new(198, 18, 0, 254),
            prefix: 24,
            mtu: 1500,
            offloads: false,
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
        }
    }
}

impl Config {
    pub(crate) fn netmask(&self) -> Ipv4Addr {
        let host_bits = 32u32.saturating_sub(self.prefix.into());
        Ipv4Addr::from(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }

    pub(crate) fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.gateway) | !u32::from(self.netmask()))
    }

    pub(crate) fn contains(&self, address: Ipv4Addr) -> bool {
        let mask = u32::from(self.netmask());
        u32::from(address) & mask == u32::from(self.gateway) & mask
    }

    /// Where a packet to `address` goes. This is the whole reach of a guest: above all, the host's loopback is
    /// reached by the alias only, never by 127.0.0.0/8.
    pub(crate) fn route(&self, address: Ipv4Addr) -> Route {
        if address == self.gateway {
            Route::Gateway
        } else if address == self.host_alias {
            Route::Outside(Ipv4Addr::LOCALHOST)
        } else if address.is_broadcast() || address.is_multicast() || address == self.broadcast() {
            Route::Multicast
        } else if address.octets()[0] == 0 || address.is_loopback() || address.octets()[0] >= 240 {
            Route::Nowhere
        } else if self.contains(address) {
            Route::Neighbour
        } else {
            Route::Outside(address)
        }
    }
}

/// What a destination address means to the NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// The NAT itself.
    Gateway,
    /// A host socket to this address.
    Outside(Ipv4Addr),
    /// Everybody, or a group: not carried.
    Multicast,
    /// An address of the guest's own network that nobody has.
    Neighbour,
    /// An address that must not appear on a wire.
    Nowhere,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_loopback_is_reached_by_the_alias_only() {
        let config = Config::default();
        let check = |address: [u8; 4], route| assert_eq!(config.route(address.into()), route, "{address:?}");
        check([198, 18, 0, 254], Route::Outside(Ipv4Addr::LOCALHOST));
        check([127, 0, 0, 1], Route::Nowhere);
        check([127, 255, 3, 1], Route::Nowhere);
        check([0, 0, 0, 0], Route::Nowhere);
        check([240, 0, 0, 1], Route::Nowhere);
        check([198, 18, 0, 1], Route::Gateway);
        check([198, 18, 0, 77], Route::Neighbour);
        check([198, 18, 0, 255], Route::Multicast);
        check([255, 255, 255, 255], Route::Multicast);
        check([224, 0, 0, 251], Route::Multicast);
        check([198, 18, 1, 1], Route::Outside([198, 18, 1, 1].into()));
        check([8, 8, 8, 8], Route::Outside([8, 8, 8, 8].into()));
    }
}

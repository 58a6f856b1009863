//! What the guest's network looks like.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

/// The least MTU of a link that carries IPv6 (RFC 8200 §5).
const IPV6_MTU_MIN: u16 = 1280;
/// The router's link-local address: its hardware address in the modified EUI-64 form (RFC 4291, appendix A).
pub(crate) const ROUTER_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x0065, 0x6eff, 0xfe67, 0x0001);

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
    /// The guest's network in IPv6: the first 64 bits of unique local addresses (RFC 4193), advertised to the guest,
    /// which makes its own address in it. The router is `::1` there, and `::fe` stands for the host's `::1`.
    pub prefix6: Ipv6Addr,
    /// Largest IP packet on the link, in bytes (at least 576, at most 65535). There is no IPv6 below 1280.
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
            prefix6: Ipv6Addr::new(0xfdc7, 0x9a1e, 0x5d28, 0, 0, 0, 0, 0),
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

    /// Whether the link is large enough for IPv6 (RFC 8200 §5).
    pub(crate) fn has_ipv6(&self) -> bool {
        self.mtu >= IPV6_MTU_MIN
    }

    /// The router's address in IPv6.
    pub(crate) fn gateway6(&self) -> Ipv6Addr {
        self.address6(1)
    }

    /// The host's loopback as the guest addresses it in IPv6.
    pub(crate) fn host_alias6(&self) -> Ipv6Addr {
        self.address6(0xfe)
    }

    fn address6(&self, last: u16) -> Ipv6Addr {
        let [a, b, c, d, ..] = self.prefix6.segments();
        Ipv6Addr::new(a, b, c, d, 0, 0, 0, last)
    }

    /// Whether the address is one of the guest's network in IPv6.
    pub(crate) fn contains6(&self, address: Ipv6Addr) -> bool {
        address.segments()[..4] == self.prefix6.segments()[..4]
    }

    /// The router's address in the family of `address`.
    pub(crate) fn gateway_for(&self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(_) => self.gateway.into(),
            IpAddr::V6(_) => self.gateway6().into(),
        }
    }

    /// Where a packet to `address` goes. This is the whole reach of a guest: above all, the host's loopback is
    /// reached by the alias only, never by 127.0.0.0/8 or `::1`, however written.
    pub(crate) fn route(&self, address: IpAddr) -> Route {
        match address {
            IpAddr::V4(address) => self.route4(address),
            IpAddr::V6(address) => self.route6(address),
        }
    }

    fn route4(&self, address: Ipv4Addr) -> Route {
        if address == self.gateway {
            Route::Gateway
        } else if address == self.host_alias {
            Route::Host(Ipv4Addr::LOCALHOST.into())
        } else if address.is_broadcast() || address.is_multicast() || address == self.broadcast() {
            Route::Multicast
        } else if address.octets()[0] == 0 || address.is_loopback() || address.octets()[0] >= 240 {
            Route::Nowhere
        } else if self.contains(address) {
            Route::Neighbour
        } else {
            Route::Outside(address.into())
        }
    }

    fn route6(&self, address: Ipv6Addr) -> Route {
        // Loopback and the unspecified address are among these, and IPv4's whole space in two disguises, behind which
        // the host's sockets would find 127.0.0.1.
        let disguised = matches!(address.segments(), [0, 0, 0, 0, 0, 0 | 0xffff, _, _]);
        if address == self.gateway6() || address == ROUTER_LINK_LOCAL {
            Route::Gateway
        } else if address == self.host_alias6() {
            Route::Host(Ipv6Addr::LOCALHOST.into())
        } else if address.is_multicast() {
            Route::Multicast
        } else if disguised {
            Route::Nowhere
        } else if self.contains6(address) || address.is_unicast_link_local() {
            Route::Neighbour
        } else {
            Route::Outside(address.into())
        }
    }
}

/// What a destination address means to the NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// The NAT itself.
    Gateway,
    /// A host socket to this address: the host's own loopback.
    Host(IpAddr),
    /// A host socket to this address.
    Outside(IpAddr),
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

    fn check(address: &str, route: Route) {
        assert_eq!(Config::default().route(address.parse().unwrap()), route, "{address}");
    }

    fn outside(address: &str) {
        check(address, Route::Outside(address.parse().unwrap()));
    }

    #[test]
    fn the_hosts_loopback_is_reached_by_the_alias_only() {
        check("198.18.0.254", Route::Host(Ipv4Addr::LOCALHOST.into()));
        for nowhere in ["127.0.0.1", "127.255.3.1", "0.0.0.0", "240.0.0.1"] {
            check(nowhere, Route::Nowhere);
        }
        check("198.18.0.1", Route::Gateway);
        check("198.18.0.77", Route::Neighbour);
        for everybody in ["198.18.0.255", "255.255.255.255", "224.0.0.251"] {
            check(everybody, Route::Multicast);
        }
        outside("198.18.1.1");
        outside("8.8.8.8");
    }

    #[test]
    fn and_so_in_ipv6_however_the_loopback_is_written() {
        check("fdc7:9a1e:5d28::fe", Route::Host(Ipv6Addr::LOCALHOST.into()));
        for nowhere in ["::1", "::", "::ffff:127.0.0.1", "::127.0.0.1", "::ffff:8.8.8.8"] {
            check(nowhere, Route::Nowhere);
        }
        check("fdc7:9a1e:5d28::1", Route::Gateway);
        check("fe80::65:6eff:fe67:1", Route::Gateway);
        check("fdc7:9a1e:5d28::77", Route::Neighbour);
        check("fe80::9", Route::Neighbour);
        check("ff02::2", Route::Multicast);
        outside("fdc7:9a1e:5d28:1::1");
        outside("2001:db8::1");
    }
}

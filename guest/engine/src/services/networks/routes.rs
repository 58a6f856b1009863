//! What the host reaches directly, so that no network of ours is put over it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use ipnet::{IpNet, Ipv4Net};

/// A route with a shorter prefix is half the world, not a neighbourhood (tunnels that replace the default route).
const PREFIX_MIN: u8 = 8;

/// A directly connected subnet of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub interface: String,
    pub subnet: IpNet,
}

/// The host's directly connected subnets, but those of the interfaces that `own` names, and its name servers. What is
/// behind a router may be anything from a desk to a continent; only its own neighbourhood is known to be taken.
pub fn reserved(own: impl Fn(&str) -> bool) -> Vec<Route> {
    let read = |path: &str| std::fs::read_to_string(Path::new(path)).unwrap_or_default();
    let mut routes = connected(&read("/proc/net/route"), own);
    routes.extend(name_servers(&read("/etc/resolv.conf")));
    routes
}

/// The directly connected subnets in `/proc/net/route`.
fn connected(table: &str, own: impl Fn(&str) -> bool) -> Vec<Route> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // The kernel prints the words of network byte order as native numbers.
            let address = |text: &str| {
                u32::from_str_radix(text, 16).ok().map(|word| Ipv4Addr::from(word.to_ne_bytes()))
            };
            let interface = *fields.first()?;
            let (destination, gateway) = (address(fields.get(1)?)?, address(fields.get(2)?)?);
            let subnet = Ipv4Net::with_netmask(destination, address(fields.get(7)?)?).ok()?;
            let taken = gateway.is_unspecified() && subnet.prefix_len() >= PREFIX_MIN && !own(interface);
            taken.then(|| Route { interface: interface.to_owned(), subnet: subnet.into() })
        })
        .collect()
}

fn name_servers(resolv_conf: &str) -> Vec<Route> {
    resolv_conf
        .lines()
        .filter_map(|line| {
            let address: IpAddr = line.trim().strip_prefix("nameserver")?.trim().parse().ok()?;
            Some(Route { interface: "/etc/resolv.conf".to_owned(), subnet: address.into() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Numbers as a little-endian machine prints them.
    #[cfg(target_endian = "little")]
    const TABLE: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        eth0\t0000000A\t0101A8C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0\n\
        tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n\
        docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
        eng-1\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn only_the_neighbourhood_counts_and_not_our_own() {
        let found = connected(TABLE, |name| name == "eng-1");
        let subnets: Vec<String> = found.iter().map(|route| route.subnet.to_string()).collect();
        assert_eq!(subnets, ["192.168.1.0/24", "172.17.0.0/16"]);
        assert!(connected("", |_| false).is_empty());
        assert!(connected("head\nbroken line\n", |_| false).is_empty());
    }

    #[test]
    fn name_servers_are_taken() {
        let found =
            name_servers("# by hand\nnameserver 172.17.0.9\nsearch x\nnameserver fd00::53\nnameserver x\n");
        let subnets: Vec<String> = found.iter().map(|route| route.subnet.to_string()).collect();
        assert_eq!(subnets, ["172.17.0.9/32", "fd00::53/128"]);
    }
}

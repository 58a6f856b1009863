//! The host's routes: what it reaches directly, so that no network of ours is put over it, and its way out.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

/// Of the network namespace of whoever asks.
const TABLE: &str = "/proc/thread-self/net/route";
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
    let mut routes = connected(&read(TABLE), own);
    routes.extend(name_servers(&read("/etc/resolv.conf")));
    routes
}

/// The interface of the default route.
pub fn uplink() -> Option<String> {
    default_route(&read(TABLE))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// A row of the kernel's table for IPv4.
struct Row<'a> {
    interface: &'a str,
    subnet: Ipv4Net,
    gateway: Ipv4Addr,
}

/// The rows of `/proc/net/route`, the kernel's order kept.
fn rows(table: &str) -> impl Iterator<Item = Row<'_>> {
    // The kernel prints the words of network byte order as native numbers.
    let address =
        |text: &str| u32::from_str_radix(text, 16).ok().map(|word| Ipv4Addr::from(word.to_ne_bytes()));
    table.lines().skip(1).filter_map(move |line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let subnet = Ipv4Net::with_netmask(address(fields.get(1)?)?, address(fields.get(7)?)?).ok()?;
        Some(Row { interface: fields[0], subnet, gateway: address(fields[2])? })
    })
}

fn connected(table: &str, own: impl Fn(&str) -> bool) -> Vec<Route> {
    let near = |row: &Row<'_>| row.gateway.is_unspecified() && row.subnet.prefix_len() >= PREFIX_MIN;
    rows(table)
        .filter(|row| near(row) && !own(row.interface))
        .map(|row| Route { interface: row.interface.to_owned(), subnet: row.subnet.into() })
        .collect()
}

fn default_route(table: &str) -> Option<String> {
    rows(table).find(|row| row.subnet.prefix_len() == 0).map(|row| row.interface.to_owned())
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
    const ROUTES: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        eth0\t0000000A\t0101A8C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0\n\
        tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n\
        docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
        eng-1\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn only_the_neighbourhood_counts_and_not_our_own() {
        let found = connected(ROUTES, |name| name == "eng-1");
        let subnets: Vec<String> = found.iter().map(|route| route.subnet.to_string()).collect();
        assert_eq!(subnets, ["192.168.1.0/24", "172.17.0.0/16"]);
        assert!(connected("", |_| false).is_empty());
        assert!(connected("head\nbroken line\n", |_| false).is_empty());
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_default_route_names_the_way_out() {
        assert_eq!(default_route(ROUTES).as_deref(), Some("eth0"));
        // Half the world is not all of it.
        let tunnel = "head\ntun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n";
        assert_eq!(default_route(tunnel), None);
    }

    #[test]
    fn name_servers_are_taken() {
        let found =
            name_servers("# by hand\nnameserver 172.17.0.9\nsearch x\nnameserver fd00::53\nnameserver x\n");
        let subnets: Vec<String> = found.iter().map(|route| route.subnet.to_string()).collect();
        assert_eq!(subnets, ["172.17.0.9/32", "fd00::53/128"]);
    }
}

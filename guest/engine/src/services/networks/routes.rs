//! Choosing a subnet that clashes with nothing the host already reaches.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// The destinations in `/proc/net/route`, without the default route and without those through `own` interface.
pub fn destinations(table: &str, own: &str) -> Vec<Ipv4Net> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (interface, destination) = (fields.next()?, fields.next()?);
            let mask = fields.nth(5)?;
            // The kernel prints the words of network byte order as native numbers.
            let address = |text: &str| {
                u32::from_str_radix(text, 16).ok().map(|word| Ipv4Addr::from(word.to_ne_bytes()))
            };
            let network = Ipv4Net::with_netmask(address(destination)?, address(mask)?).ok()?;
            (interface != own && network.prefix_len() > 0).then_some(network)
        })
        .collect()
}

/// The first candidate that overlaps none of the routes.
pub fn choose(candidates: &[Ipv4Net], routes: &[Ipv4Net]) -> Option<Ipv4Net> {
    let overlaps = |a: &Ipv4Net, b: &Ipv4Net| a.contains(&b.network()) || b.contains(&a.network());
    candidates.iter().find(|candidate| !routes.iter().any(|route| overlaps(candidate, route))).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Numbers as a little-endian machine prints them.
    #[cfg(target_endian = "little")]
    const TABLE: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
        eng-1\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn routes_are_read_without_the_default_and_our_own() {
        let found = destinations(TABLE, "eng-1");
        assert_eq!(found, ["192.168.1.0/24".parse().unwrap(), "172.17.0.0/16".parse::<Ipv4Net>().unwrap()]);
        assert!(destinations("", "x").is_empty());
        assert!(destinations("head\nbroken line\n", "x").is_empty());
    }

    #[test]
    fn the_first_free_candidate_is_taken() {
        let net = |text: &str| text.parse::<Ipv4Net>().unwrap();
        let candidates = [net("172.17.0.1/16"), net("192.168.0.1/20"), net("10.1.0.1/16")];
        assert_eq!(choose(&candidates, &[net("172.17.3.0/24"), net("192.168.0.0/16")]), Some(candidates[2]));
        assert_eq!(choose(&candidates, &[]), Some(candidates[0]));
        assert_eq!(choose(&candidates[..1], &[net("172.16.0.0/12")]), None);
    }
}

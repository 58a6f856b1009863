//! From which ranges the engine takes a subnet when nobody names one.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sha2::{Digest, Sha256};

use crate::config::AddressPool;

/// Docker's: 172.17–31.0.0/16, then 192.168.0–240.0/20.
pub fn defaults() -> Vec<AddressPool> {
    let pool = |address: [u8; 4], length, size| AddressPool {
        base: Ipv4Net::new_assert(Ipv4Addr::from(address), length).into(),
        size,
    };
    let mut pools: Vec<AddressPool> = (17..=31).map(|second| pool([172, second, 0, 0], 16, 16)).collect();
    pools.push(pool([192, 168, 0, 0], 16, 20));
    pools
}

/// The engine's own unique local range (RFC 4193), which follows from its id.
pub fn unique_local(engine_id: &str) -> AddressPool {
    let hash = Sha256::digest(engine_id);
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&hash[..5]);
    AddressPool { base: Ipv6Net::new_assert(Ipv6Addr::from(octets), 48).into(), size: 64 }
}

/// The first subnet of a family that overlaps nothing taken; `None` when there is none left.
pub fn choose(pools: &[AddressPool], six: bool, taken: &[IpNet]) -> Option<IpNet> {
    let of_family = |net: &IpNet| matches!(net, IpNet::V6(_)) == six;
    pools.iter().filter(|pool| of_family(&pool.base)).find_map(|pool| choose_in(pool, taken))
}

fn choose_in(pool: &AddressPool, taken: &[IpNet]) -> Option<IpNet> {
    let width = pool.base.max_prefix_len();
    let size = pool.size.clamp(pool.base.prefix_len(), width);
    let bits = u32::from(width - size);
    let step = 1_u128.checked_shl(bits)?;
    let last = number(pool.base.broadcast());
    let mut start = number(pool.base.network());
    while start <= last {
        let candidate = subnet(&pool.base, start, size)?;
        match taken.iter().find(|other| overlap(&candidate, other)) {
            None => return Some(candidate),
            // Past the end of what is in the way, however large it is, at the next boundary.
            Some(other) => {
                let end = number(other.broadcast()).max(start + (step - 1));
                start = (end >> bits).checked_add(1)?.checked_mul(step)?;
            }
        }
    }
    None
}

/// Whether two subnets have an address in common.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

fn number(address: std::net::IpAddr) -> u128 {
    match address {
        std::net::IpAddr::V4(address) => u32::from(address).into(),
        std::net::IpAddr::V6(address) => address.into(),
    }
}

fn subnet(base: &IpNet, start: u128, size: u8) -> Option<IpNet> {
    match base {
        IpNet::V4(_) => Some(Ipv4Net::new(u32::try_from(start).ok()?.into(), size).ok()?.into()),
        IpNet::V6(_) => Some(Ipv6Net::new(start.into(), size).ok()?.into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn dockers_pools_are_used_in_order() {
        let pools = defaults();
        let mut taken = Vec::new();
        for _ in 0..31 {
            taken.push(choose(&pools, false, &taken).unwrap());
        }
        assert_eq!(taken[0], net("172.17.0.0/16"));
        assert_eq!(taken[14], net("172.31.0.0/16"));
        assert_eq!(taken[15], net("192.168.0.0/20"));
        assert_eq!(taken[30], net("192.168.240.0/20"));
        assert_eq!(choose(&pools, false, &taken), None);
        assert_eq!(choose(&pools, true, &taken), None);
    }

    #[test]
    fn what_is_taken_is_passed_over_whatever_its_size() {
        let pools = [AddressPool { base: net("10.0.0.0/8"), size: 24 }];
        assert_eq!(choose(&pools, false, &[net("10.0.0.128/25")]), Some(net("10.0.1.0/24")));
        assert_eq!(choose(&pools, false, &[net("10.0.0.0/9")]), Some(net("10.128.0.0/24")));
        assert_eq!(choose(&pools, false, &[net("0.0.0.0/4")]), None);
        let whole = [AddressPool { base: net("255.255.255.255/32"), size: 32 }];
        assert_eq!(choose(&whole, false, &[net("255.255.255.255/32")]), None);
    }

    #[test]
    fn an_engine_has_its_own_ipv6_range() {
        let (a, b) = (unique_local("a"), unique_local("b"));
        assert_ne!(a, b);
        assert_eq!(a, unique_local("a"));
        let pools = [a];
        let first = choose(&pools, true, &[]).unwrap();
        let second = choose(&pools, true, &[first]).unwrap();
        assert!(first.to_string().starts_with("fd") && first.prefix_len() == 64 && first != second);
    }

    proptest! {
        #[test]
        fn a_chosen_subnet_overlaps_nothing(taken in prop::collection::vec((any::<u32>(), 8_u8..=32), 0..20)) {
            let taken: Vec<IpNet> =
                taken.into_iter().map(|(address, length)| Ipv4Net::new_assert(address.into(), length).trunc().into()).collect();
            let pools = [AddressPool { base: net("0.0.0.0/2"), size: 12 }];
            match choose(&pools, false, &taken) {
                Some(chosen) => {
                    prop_assert!(taken.iter().all(|other| !overlap(&chosen, other)));
                    prop_assert_eq!(chosen.prefix_len(), 12);
                    prop_assert!(overlap(&chosen, &pools[0].base));
                }
                None => prop_assert!(!taken.is_empty()),
            }
        }
    }
}

//! Which address of a subnet belongs to whom: pure arithmetic, no kernel. IPv4 and IPv6 alike.
//!
//! The caller keeps the record of who has what; after a restart it builds the pool again and [`Ipam::reserve`]s what
//! its containers hold. Addresses nobody may have (a network's own and its broadcast address) are never given away.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// One subnet's addresses.
#[derive(Debug, Clone)]
pub struct Ipam {
    subnet: IpNet,
    /// Where addresses are taken from when nobody asks for a certain one.
    range: IpNet,
    taken: BTreeSet<u128>,
}

/// Why an address cannot be had. The texts are dockerd's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// Every address is in use.
    #[error("no available IPv{} addresses on this network's address pools: ({subnet})", version(subnet))]
    Exhausted {
        /// The full subnet.
        subnet: IpNet,
    },
    /// The address lies in another network.
    #[error("requested address is out of range: {address} is not in {subnet}")]
    Outside {
        /// The address asked for.
        address: IpAddr,
        /// The subnet it should be in.
        subnet: IpNet,
    },
    /// Somebody, perhaps the gateway, has it already.
    #[error("Address already in use")]
    Taken {
        /// The address asked for.
        address: IpAddr,
    },
}

fn version(subnet: &IpNet) -> u8 {
    if matches!(subnet, IpNet::V4(_)) { 4 } else { 6 }
}

impl Ipam {
    /// A pool for `subnet`, whose free choice is limited to `range` if there is one.
    pub fn new(subnet: IpNet, range: Option<IpNet>) -> Self {
        let subnet = subnet.trunc();
        let mut taken = BTreeSet::new();
        let host_bits = subnet.max_prefix_len() - subnet.prefix_len();
        match subnet {
            // The two ends of a point-to-point link are hosts (RFC 3021).
            IpNet::V4(_) if host_bits <= 1 => {}
            IpNet::V4(subnet) => {
                taken.insert(number(subnet.network().into()));
                taken.insert(number(subnet.broadcast().into()));
            }
            // The routers' anycast address (RFC 4291, 2.6.1).
            IpNet::V6(subnet) => _ = taken.insert(number(subnet.network().into())),
        }
        Self { subnet, range: range.map_or(subnet, |range| range.trunc()), taken }
    }

    /// The subnet, with host bits cleared.
    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// Takes the lowest free address of the range, with the subnet's prefix length.
    ///
    /// # Errors
    /// When none is left.
    pub fn allocate(&mut self) -> Result<IpNet, IpamError> {
        let last = number(self.range.broadcast());
        let mut candidate = number(self.range.network());
        for taken in self.taken.range(candidate..=last) {
            if *taken != candidate {
                break;
            }
            // The very last address of all has no successor, and is past the end of every range that holds others.
            let Some(next) = candidate.checked_add(1) else {
                return Err(IpamError::Exhausted { subnet: self.subnet });
            };
            candidate = next;
        }
        if candidate > last {
            return Err(IpamError::Exhausted { subnet: self.subnet });
        }
        self.taken.insert(candidate);
        Ok(self.with_prefix(candidate))
    }

    /// Takes this very address: a fixed one the user asked for, or one found in a record.
    ///
    /// # Errors
    /// When it is not in the subnet or is in use.
    pub fn reserve(&mut self, address: IpAddr) -> Result<IpNet, IpamError> {
        if !self.subnet.contains(&address) {
            return Err(IpamError::Outside { address, subnet: self.subnet });
        }
        if !self.taken.insert(number(address)) {
            return Err(IpamError::Taken { address });
        }
        Ok(self.with_prefix(number(address)))
    }

    /// Gives an address back. Returns whether it was taken.
    pub fn release(&mut self, address: IpAddr) -> bool {
        self.subnet.contains(&address) && self.taken.remove(&number(address))
    }

    fn with_prefix(&self, address: u128) -> IpNet {
        let address = match self.subnet {
            // Numbers of an IPv4 pool are 32 bits wide.
            IpNet::V4(_) => IpAddr::V4(Ipv4Addr::from(address as u32)),
            IpNet::V6(_) => IpAddr::V6(Ipv6Addr::from(address)),
        };
        IpNet::new_assert(address, self.subnet.prefix_len())
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(subnet: &str) -> Ipam {
        Ipam::new(subnet.parse().unwrap(), None)
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_lowest_free_address_is_given() {
        let mut ipam = pool("172.17.0.0/16");
        assert_eq!(ipam.allocate().unwrap().to_string(), "172.17.0.1/16");
        assert_eq!(ipam.allocate().unwrap().to_string(), "172.17.0.2/16");
        assert!(ipam.release(address("172.17.0.1")));
        assert!(!ipam.release(address("172.17.0.1")));
        assert_eq!(ipam.allocate().unwrap().to_string(), "172.17.0.1/16");
        let mut six = pool("fd00:1::/64");
        assert_eq!(six.allocate().unwrap().to_string(), "fd00:1::1/64");
    }

    #[test]
    fn a_range_limits_only_the_free_choice() {
        let mut ipam = Ipam::new("172.28.0.0/16".parse().unwrap(), Some("172.28.5.0/30".parse().unwrap()));
        for last in 0..4 {
            assert_eq!(ipam.allocate().unwrap().to_string(), format!("172.28.5.{last}/16"));
        }
        assert!(matches!(ipam.allocate(), Err(IpamError::Exhausted { .. })));
        assert_eq!(ipam.reserve(address("172.28.9.9")).unwrap().to_string(), "172.28.9.9/16");
    }

    #[test]
    fn a_full_subnet_says_so() {
        let mut ipam = pool("10.1.0.0/30");
        ipam.allocate().unwrap();
        ipam.allocate().unwrap();
        let error = ipam.allocate().unwrap_err();
        assert_eq!(
            error.to_string(),
            "no available IPv4 addresses on this network's address pools: (10.1.0.0/30)"
        );
    }

    #[test]
    fn the_smallest_subnets_are_all_hosts() {
        let mut link = pool("10.0.0.0/31");
        assert_eq!(link.allocate().unwrap().to_string(), "10.0.0.0/31");
        assert_eq!(link.allocate().unwrap().to_string(), "10.0.0.1/31");
        assert!(link.allocate().is_err());
        assert_eq!(pool("10.0.0.7/32").allocate().unwrap().to_string(), "10.0.0.7/32");
        let mut last = pool("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127");
        last.allocate().unwrap();
        assert!(last.allocate().is_err());
    }

    #[test]
    fn addresses_outside_the_subnet_and_of_nobody_are_refused() {
        let mut ipam = pool("10.1.0.0/24");
        for text in ["10.2.0.1", "fd00::1"] {
            assert!(matches!(ipam.reserve(address(text)), Err(IpamError::Outside { .. })), "{text}");
        }
        for text in ["10.1.0.0", "10.1.0.255"] {
            assert!(matches!(ipam.reserve(address(text)), Err(IpamError::Taken { .. })), "{text}");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Allocate,
        Reserve(u8),
        Release(u8),
    }

    proptest! {
        #[test]
        fn no_address_is_ever_held_twice(steps in prop::collection::vec(prop_oneof![
            Just(Step::Allocate), any::<u8>().prop_map(Step::Reserve), any::<u8>().prop_map(Step::Release)
        ], 0..80), six: bool) {
            let subnet: IpNet = if six { "fd00::/123" } else { "10.9.8.0/27" }.parse().unwrap();
            let at = |last: u8| -> IpAddr {
                if six { Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into()).into() } else { Ipv4Addr::new(10, 9, 8, last).into() }
            };
            let hosts: Vec<IpAddr> = (1..if six { 32 } else { 31 }).map(at).collect();
            let mut ipam = Ipam::new(subnet, None);
            let mut held = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Allocate => match ipam.allocate() {
                        Ok(net) => {
                            let lowest = hosts.iter().find(|host| !held.contains(*host));
                            prop_assert_eq!(Some(&net.addr()), lowest);
                            held.insert(net.addr());
                        }
                        Err(error) => {
                            prop_assert_eq!(error, IpamError::Exhausted { subnet });
                            prop_assert_eq!(held.len(), hosts.len());
                        }
                    },
                    Step::Reserve(last) => {
                        if ipam.reserve(at(last)).is_ok() {
                            prop_assert!(held.insert(at(last)));
                        }
                    }
                    Step::Release(last) => {
                        // Those nobody may have are not given back by anyone.
                        if hosts.contains(&at(last)) {
                            prop_assert_eq!(ipam.release(at(last)), held.remove(&at(last)));
                        }
                    }
                }
                prop_assert!(held.iter().all(|address| hosts.contains(address)));
            }
        }
    }
}

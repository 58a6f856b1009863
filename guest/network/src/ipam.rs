//! Which address of a subnet belongs to whom: pure arithmetic, no kernel.
//!
//! The caller keeps the record of who has what; after a restart it builds the pool again and [`Ipam::reserve`]s what
//! its containers hold.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// One subnet's addresses. Network, broadcast and gateway addresses are never handed out.
#[derive(Debug, Clone)]
pub struct Ipam {
    subnet: Ipv4Net,
    gateway: Ipv4Addr,
    taken: BTreeSet<Ipv4Addr>,
}

/// Why an address cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// Every address is in use.
    #[error("no available IPv4 addresses on subnet {subnet}")]
    Exhausted {
        /// The full subnet.
        subnet: Ipv4Net,
    },
    /// The subnet has no room for a gateway and a container.
    #[error("subnet {subnet} is too small: a network needs at least a /30")]
    TooSmall {
        /// The subnet asked for.
        subnet: Ipv4Net,
    },
    /// The address lies in another network, or is the network's own or broadcast address.
    #[error("address {address} is not a host address of subnet {subnet}")]
    Outside {
        /// The address asked for.
        address: Ipv4Addr,
        /// The subnet it should be in.
        subnet: Ipv4Net,
    },
    /// Somebody, perhaps the gateway, has it already.
    #[error("address {address} is already in use")]
    Taken {
        /// The address asked for.
        address: Ipv4Addr,
    },
}

impl Ipam {
    /// A pool for `subnet`; without a `gateway` the first host address is taken for it, as Docker does.
    ///
    /// # Errors
    /// When the subnet is smaller than a /30 or the gateway is no host address of it.
    pub fn new(subnet: Ipv4Net, gateway: Option<Ipv4Addr>) -> Result<Self, IpamError> {
        let subnet = subnet.trunc();
        if subnet.prefix_len() > 30 {
            return Err(IpamError::TooSmall { subnet });
        }
        let first = Ipv4Addr::from(u32::from(subnet.network()) + 1);
        let mut ipam = Self { subnet, gateway: gateway.unwrap_or(first), taken: BTreeSet::new() };
        ipam.check_host(ipam.gateway)?;
        ipam.taken.insert(ipam.gateway);
        Ok(ipam)
    }

    /// The subnet, with host bits cleared.
    pub fn subnet(&self) -> Ipv4Net {
        self.subnet
    }

    /// The address of the bridge in this subnet.
    pub fn gateway(&self) -> Ipv4Addr {
        self.gateway
    }

    /// Takes the lowest free address, with the subnet's prefix length.
    ///
    /// # Errors
    /// When none is left.
    pub fn allocate(&mut self) -> Result<Ipv4Net, IpamError> {
        let mut candidate = u32::from(self.subnet.network()) + 1;
        for taken in &self.taken {
            if u32::from(*taken) != candidate {
                break;
            }
            candidate += 1;
        }
        let address = Ipv4Addr::from(candidate);
        self.check_host(address).map_err(|_| IpamError::Exhausted { subnet: self.subnet })?;
        self.taken.insert(address);
        Ok(self.with_prefix(address))
    }

    /// Takes this very address: a fixed one the user asked for, or one found in a record.
    ///
    /// # Errors
    /// When it is no host address of the subnet or is in use.
    pub fn reserve(&mut self, address: Ipv4Addr) -> Result<Ipv4Net, IpamError> {
        self.check_host(address)?;
        if !self.taken.insert(address) {
            return Err(IpamError::Taken { address });
        }
        Ok(self.with_prefix(address))
    }

    /// Gives an address back. Returns whether it was taken; the gateway never is given back.
    pub fn release(&mut self, address: Ipv4Addr) -> bool {
        address != self.gateway && self.taken.remove(&address)
    }

    fn check_host(&self, address: Ipv4Addr) -> Result<(), IpamError> {
        let is_host = self.subnet.contains(&address)
            && address != self.subnet.network()
            && address != self.subnet.broadcast();
        if is_host { Ok(()) } else { Err(IpamError::Outside { address, subnet: self.subnet }) }
    }

    fn with_prefix(&self, address: Ipv4Addr) -> Ipv4Net {
        Ipv4Net::new_assert(address, self.subnet.prefix_len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(subnet: &str) -> Ipam {
        Ipam::new(subnet.parse().unwrap(), None).unwrap()
    }

    #[test]
    fn the_first_container_gets_the_address_after_the_gateway() {
        let mut ipam = pool("172.17.0.0/16");
        assert_eq!(ipam.gateway(), Ipv4Addr::new(172, 17, 0, 1));
        assert_eq!(ipam.allocate().unwrap().to_string(), "172.17.0.2/16");
        assert_eq!(ipam.allocate().unwrap().to_string(), "172.17.0.3/16");
    }

    #[test]
    fn a_released_address_is_the_next_one_given() {
        let mut ipam = pool("10.1.0.0/24");
        let first = ipam.allocate().unwrap().addr();
        ipam.allocate().unwrap();
        assert!(ipam.release(first));
        assert!(!ipam.release(first));
        assert_eq!(ipam.allocate().unwrap().addr(), first);
    }

    #[test]
    fn a_full_subnet_says_so() {
        let mut ipam = pool("10.1.0.0/30");
        ipam.allocate().unwrap();
        let error = ipam.allocate().unwrap_err();
        assert_eq!(error.to_string(), "no available IPv4 addresses on subnet 10.1.0.0/30");
    }

    #[test]
    fn the_gateway_is_never_given_away() {
        let mut ipam = Ipam::new("10.1.0.0/24".parse().unwrap(), Some(Ipv4Addr::new(10, 1, 0, 2))).unwrap();
        assert!(!ipam.release(Ipv4Addr::new(10, 1, 0, 2)));
        assert_eq!(
            ipam.reserve(Ipv4Addr::new(10, 1, 0, 2)),
            Err(IpamError::Taken { address: [10, 1, 0, 2].into() })
        );
        assert_eq!(ipam.allocate().unwrap().addr(), Ipv4Addr::new(10, 1, 0, 1));
        assert_eq!(ipam.allocate().unwrap().addr(), Ipv4Addr::new(10, 1, 0, 3));
    }

    #[test]
    fn addresses_outside_the_subnet_are_refused() {
        let mut ipam = pool("10.1.0.0/24");
        for address in [[10, 1, 0, 0], [10, 1, 0, 255], [10, 2, 0, 1]] {
            let address = Ipv4Addr::from(address);
            assert!(matches!(ipam.reserve(address), Err(IpamError::Outside { .. })), "{address}");
        }
        assert!(matches!(Ipam::new("10.0.0.0/31".parse().unwrap(), None), Err(IpamError::TooSmall { .. })));
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
        ], 0..80)) {
            let subnet: Ipv4Net = "10.9.8.0/27".parse().unwrap();
            let mut ipam = Ipam::new(subnet, None).unwrap();
            let mut held = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Allocate => match ipam.allocate() {
                        Ok(net) => {
                            let lowest = subnet.hosts().find(|a| *a != ipam.gateway() && !held.contains(a));
                            prop_assert_eq!(Some(net.addr()), lowest);
                            held.insert(net.addr());
                        }
                        Err(error) => {
                            prop_assert_eq!(error, IpamError::Exhausted { subnet });
                            prop_assert_eq!(held.len(), 29);
                        }
                    },
                    Step::Reserve(last) => {
                        let address = Ipv4Addr::new(10, 9, 8, last);
                        if ipam.reserve(address).is_ok() {
                            prop_assert!(held.insert(address));
                        }
                    }
                    Step::Release(last) => {
                        let address = Ipv4Addr::new(10, 9, 8, last);
                        prop_assert_eq!(ipam.release(address), held.remove(&address));
                    }
                }
                prop_assert!(held.iter().all(|a| subnet.contains(a) && *a != ipam.gateway()));
            }
        }
    }
}

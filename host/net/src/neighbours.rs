//! Who is behind the link: the hardware address for each address a frame is for.
//!
//! One machine is, and containers may have interfaces of their own on its link (macvlan), each with another hardware address. What
//! one of them says must not lead the machine's packets to it.

use std::collections::HashMap;
use std::net::IpAddr;

use smoltcp::wire::EthernetAddress;

/// More than this beside the machine are not told apart from it.
const MAX_OTHERS: usize = 256;

/// The hardware addresses that have been heard.
#[derive(Debug)]
pub(crate) struct Neighbours {
    /// The machine's: all packets are for it, but those for addresses in `others`.
    machine: Option<EthernetAddress>,
    others: HashMap<IpAddr, EthernetAddress>,
    /// The machine's own address.
    address: IpAddr,
}

impl Neighbours {
    /// Nobody has been heard; the machine will speak from `address`.
    pub(crate) fn new(address: IpAddr) -> Self {
        Self { machine: None, others: HashMap::new(), address }
    }

    /// Whether the machine has said anything yet.
    pub(crate) fn knows_machine(&self) -> bool {
        self.machine.is_some()
    }

    /// Takes note that `source` has sent something from `address`.
    pub(crate) fn heard(&mut self, address: IpAddr, source: EthernetAddress) {
        if !source.is_unicast() {
            return;
        }
        // Who asks for an address has none yet: the first is the machine.
        if address == self.address || self.machine.is_none() {
            self.machine = Some(source);
        }
        if self.machine == Some(source) {
            // It forwards for others, and addresses move.
            if !self.others.is_empty() {
                self.others.remove(&address);
            }
        } else if !address.is_unspecified()
            && (self.others.len() < MAX_OTHERS || self.others.contains_key(&address))
        {
            self.others.insert(address, source);
        }
    }

    /// Where packets for `address` go; to everybody as long as nobody has been heard.
    pub(crate) fn of(&self, address: IpAddr) -> EthernetAddress {
        let other = if self.others.is_empty() { None } else { self.others.get(&address).copied() };
        other.or(self.machine).unwrap_or(EthernetAddress::BROADCAST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 2]);
    const CHILD: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 9]);

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_child_of_the_machines_interface_has_its_own_packets_only() {
        let own = address("198.18.0.2");
        let mut neighbours = Neighbours::new(own);
        assert_eq!(neighbours.of(own), EthernetAddress::BROADCAST);
        // It asks for an address.
        neighbours.heard(address("0.0.0.0"), MACHINE);
        assert_eq!(neighbours.of(own), MACHINE);
        for from in ["0.0.0.0", "::", "fe80::9", "198.18.0.9"] {
            neighbours.heard(address(from), CHILD);
        }
        let all = ["198.18.0.2", "198.18.0.3", "fe80::2", "198.18.0.9", "fe80::9"];
        assert_eq!(all.map(|to| neighbours.of(address(to))), [MACHINE, MACHINE, MACHINE, CHILD, CHILD]);
        // The child has gone, and the machine has its address.
        neighbours.heard(address("198.18.0.9"), MACHINE);
        assert_eq!(neighbours.of(address("198.18.0.9")), MACHINE);
        // The machine has another card.
        neighbours.heard(own, CHILD);
        assert_eq!(neighbours.of(own), CHILD);
    }

    #[test]
    fn a_crowd_is_not_remembered() {
        let mut neighbours = Neighbours::new(address("198.18.0.2"));
        neighbours.heard(address("198.18.0.2"), MACHINE);
        for number in 0..=u16::MAX {
            neighbours.heard(IpAddr::from([10, 0, (number >> 8) as u8, number as u8]), CHILD);
        }
        assert_eq!(neighbours.others.len(), MAX_OTHERS);
        // Who is known may still move.
        neighbours.heard(address("10.0.0.1"), EthernetAddress([2, 0, 0, 0, 0, 7]));
        assert_eq!(neighbours.of(address("10.0.0.1")), EthernetAddress([2, 0, 0, 0, 0, 7]));
    }
}

//! ARP (RFC 826): the NAT has the gateway's address and the host alias, and no other.

use smoltcp::wire::{ArpOperation, ArpRepr, EthernetAddress};

use crate::config::Config;

/// The NAT's hardware address (locally administered).
pub(crate) const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x02, 0x65, 0x6e, 0x67, 0x00, 0x01]);

/// The answer to a question about one of the NAT's addresses.
pub(crate) fn answer(config: &Config, question: &ArpRepr) -> Option<ArpRepr> {
    match *question {
        ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } if target_protocol_addr == config.gateway || target_protocol_addr == config.host_alias => {
            Some(ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: GATEWAY_MAC,
                source_protocol_addr: target_protocol_addr,
                target_hardware_addr: source_hardware_addr,
                target_protocol_addr: source_protocol_addr,
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_addresses_are_answered_for() {
        let config = Config::default();
        let ask = |target| ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: EthernetAddress([2, 0, 0, 0, 0, 9]),
            source_protocol_addr: config.guest,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        assert!(answer(&config, &ask(config.gateway)).is_some());
        assert!(answer(&config, &ask(config.host_alias)).is_some());
        // The guest asks whether its own address is free (RFC 5227): it must be.
        assert!(answer(&config, &ask(config.guest)).is_none());
    }
}

//! The DHCP server (RFC 2131): one lease, always the same, for whoever asks. The link has one guest.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};

use crate::config::Config;

/// The lease never changes hands; a day lets the guest's renewal run through the ordinary path now and then.
const LEASE_SECONDS: u32 = 24 * 60 * 60;
const OPTION_DNS: u8 = 6;
const OPTION_MTU: u8 = 26;

/// A reply and where it goes.
pub(crate) struct Reply {
    pub(crate) to: Ipv4Addr,
    pub(crate) broadcast: bool,
    pub(crate) message: Vec<u8>,
}

/// Answers one message; `None` when it needs no answer or makes no sense.
pub(crate) fn answer(config: &Config, message: &[u8]) -> Option<Reply> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    let for_us = request.server_identifier.is_none_or(|server| server == config.gateway);
    let message_type = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if !for_us => return None,
        DhcpMessageType::Request => {
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            if wanted == config.guest { DhcpMessageType::Ack } else { DhcpMessageType::Nak }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let refused = message_type == DhcpMessageType::Nak;
    let informed = request.message_type == DhcpMessageType::Inform;
    let leased = !refused && !informed;
    let mtu = config.mtu.to_be_bytes();
    let dns = config.gateway.octets();
    let options = [DhcpOption { kind: OPTION_DNS, data: &dns }, DhcpOption { kind: OPTION_MTU, data: &mtu }];
    let reply = DhcpRepr {
        message_type,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if refused { Ipv4Addr::UNSPECIFIED } else { request.client_ip },
        your_ip: if leased { config.guest } else { Ipv4Addr::UNSPECIFIED },
        server_ip: if refused { Ipv4Addr::UNSPECIFIED } else { config.gateway },
        router: (!refused).then_some(config.gateway),
        subnet_mask: (!refused).then_some(config.netmask()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(config.gateway),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: leased.then_some(LEASE_SECONDS),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if refused { &[] } else { &options },
    };
    let mut bytes = vec![0; reply.buffer_len()];
    reply.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).ok()?;
    let known = !refused && !request.client_ip.is_unspecified() && !request.broadcast;
    Some(Reply {
        to: if known { request.client_ip } else { Ipv4Addr::BROADCAST },
        broadcast: refused || request.broadcast,
        message: bytes,
    })
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::EthernetAddress;

    use super::*;

    fn ask(
        message_type: DhcpMessageType,
        requested_ip: Option<Ipv4Addr>,
        server: Option<Ipv4Addr>,
    ) -> Vec<u8> {
        let repr = DhcpRepr {
            message_type,
            transaction_id: 0x1234_5678,
            secs: 0,
            client_hardware_address: EthernetAddress([2, 0, 0, 0, 0, 9]),
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip,
            client_identifier: None,
            server_identifier: server,
            parameter_request_list: Some(&[1, 3, 6, 26]),
            dns_servers: None,
            max_size: Some(1500),
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut bytes = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
        bytes
    }

    fn option(reply: &Reply, kind: u8) -> Option<Vec<u8>> {
        let packet = DhcpPacket::new_checked(&reply.message[..]).unwrap();
        packet.options().find(|option| option.kind == kind).map(|option| option.data.to_vec())
    }

    #[test]
    fn the_lease_names_gateway_resolver_and_mtu() {
        let config = Config::default();
        let offer = answer(&config, &ask(DhcpMessageType::Discover, None, None)).unwrap();
        assert_eq!(option(&offer, 53), Some(vec![2]));
        let request = ask(DhcpMessageType::Request, Some(config.guest), Some(config.gateway));
        let ack = answer(&config, &request).unwrap();
        assert_eq!(option(&ack, 53), Some(vec![5]));
        assert_eq!(option(&ack, 1), Some(vec![255, 255, 255, 0]));
        assert_eq!(option(&ack, 3), Some(vec![198, 18, 0, 1]));
        assert_eq!(option(&ack, OPTION_DNS), Some(vec![198, 18, 0, 1]));
        assert_eq!(option(&ack, OPTION_MTU), Some(vec![0x05, 0xdc]));
        assert_eq!(option(&ack, 51), Some(LEASE_SECONDS.to_be_bytes().to_vec()));
        let packet = DhcpPacket::new_checked(&ack.message[..]).unwrap();
        assert_eq!(packet.your_ip(), config.guest);
    }

    #[test]
    fn another_networks_address_is_refused() {
        let config = Config::default();
        let request = ask(DhcpMessageType::Request, Some(Ipv4Addr::new(192, 168, 1, 4)), None);
        let nak = answer(&config, &request).unwrap();
        assert_eq!(option(&nak, 53), Some(vec![6]));
        assert!(nak.broadcast && nak.to.is_broadcast());
    }

    #[test]
    fn what_is_not_for_this_server_gets_no_answer() {
        let config = Config::default();
        let other = Some(Ipv4Addr::new(198, 18, 0, 3));
        assert!(answer(&config, &ask(DhcpMessageType::Request, Some(config.guest), other)).is_none());
        assert!(answer(&config, &ask(DhcpMessageType::Release, None, None)).is_none());
        assert!(answer(&config, b"nonsense").is_none());
    }
}

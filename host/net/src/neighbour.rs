//! Neighbour discovery (RFC 4861): the NAT is the link's router, advertises the network the guest makes its address in
//! (RFC 4862) and the name server (RFC 8106), and answers for its own addresses.
//!
//! Whether an address of ours is free is answered too: it is not (RFC 4862 §5.4).

use std::net::Ipv6Addr;
use std::time::Duration;

use crate::arp::GATEWAY_MAC;
use crate::config::{Config, ROUTER_LINK_LOCAL};

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// All of these have crossed no router (§6.1.1, §7.1.1).
pub(crate) const HOPS: u8 = 255;
/// How long the guest believes in the router without hearing of it: the most that can be said (RFC 8319).
const ROUTER_SECONDS: u16 = u16::MAX;
/// Pause between advertisements that nobody asked for; many are missed before a guest loses its route.
pub(crate) const ADVERTISE_EVERY: Duration = Duration::from_secs(3 * 60 * 60);
const FOR_EVER: [u8; 4] = [0xff; 4];

/// Everybody on the link.
pub(crate) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// What a message of the guest's asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question {
    /// Is there a router?
    Router,
    /// Who has this address?
    Neighbour(Ipv6Addr),
}

/// Reads a message whose checksum has been looked at; `None` when it asks nothing.
pub(crate) fn read(hops: u8, message: &[u8]) -> Option<Question> {
    let [kind, 0, ..] = *message else { return None };
    match kind {
        _ if hops != HOPS => None,
        ROUTER_SOLICITATION if message.len() >= 8 => Some(Question::Router),
        SOLICITATION => {
            let target: &[u8; 16] = message.get(8..)?.first_chunk()?;
            Some(Question::Neighbour(Ipv6Addr::from(*target)))
        }
        _ => None,
    }
}

/// Whether an address is one of ours.
pub(crate) fn is_own(config: &Config, address: Ipv6Addr) -> bool {
    address == config.gateway6() || address == config.host_alias6() || address == ROUTER_LINK_LOCAL
}

/// Says that there is a router, without checksum (§4.2).
pub(crate) fn router_advertisement(config: &Config) -> Vec<u8> {
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    message.extend(ROUTER_SECONDS.to_be_bytes());
    // Nothing is said about reachability and retransmission.
    message.extend([0; 8]);
    message.extend([1, 1]);
    message.extend(GATEWAY_MAC.0);
    message.extend([5, 1, 0, 0]);
    message.extend(u32::from(config.mtu).to_be_bytes());
    // The prefix: of this link (L), to make addresses of (A), for ever.
    message.extend([3, 4, 64, 0xc0]);
    message.extend([FOR_EVER, FOR_EVER, [0; 4]].concat());
    message.extend(config.prefix6.octets());
    // The name server.
    message.extend([25, 3, 0, 0]);
    message.extend(FOR_EVER);
    message.extend(config.gateway6().octets());
    message
}

/// Says that an address is ours, without checksum (§4.4). `solicited` when somebody with an address asked.
pub(crate) fn advertisement(address: Ipv6Addr, solicited: bool) -> Vec<u8> {
    let flags = if solicited { 0xe0 } else { 0xa0 };
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(GATEWAY_MAC.0);
    message
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr, NdiscRepr};

    use super::*;

    #[test]
    fn questions_from_beyond_the_link_are_none() {
        let mut message = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        message.extend(ROUTER_LINK_LOCAL.octets());
        assert_eq!(read(255, &message), Some(Question::Neighbour(ROUTER_LINK_LOCAL)));
        assert_eq!(read(254, &message), None);
        assert_eq!(read(255, &message[..23]), None);
        assert_eq!(read(255, &[ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0]), Some(Question::Router));
        assert_eq!(read(255, &[ROUTER_SOLICITATION, 0, 0, 0]), None);
        assert_eq!(read(255, &[]), None);
    }

    #[test]
    fn another_implementation_reads_what_is_advertised() {
        let config = Config::default();
        let read = |mut message: Vec<u8>| {
            let mut packet = Icmpv6Packet::new_unchecked(&mut message[..]);
            packet.fill_checksum(&ROUTER_LINK_LOCAL, &ALL_NODES);
            let packet = Icmpv6Packet::new_checked(&message[..]).unwrap();
            let parsed =
                Icmpv6Repr::parse(&ROUTER_LINK_LOCAL, &ALL_NODES, &packet, &Default::default()).unwrap();
            let Icmpv6Repr::Ndisc(said) = parsed else { panic!("{parsed:?}") };
            match said {
                NdiscRepr::RouterAdvert { router_lifetime, lladdr, mtu, prefix_info, .. } => {
                    let prefix = prefix_info.unwrap();
                    assert_eq!(lladdr.unwrap().as_bytes(), GATEWAY_MAC.0);
                    assert_eq!((mtu, prefix.prefix, prefix.prefix_len), (Some(1500), config.prefix6, 64));
                    router_lifetime.secs()
                }
                NdiscRepr::NeighborAdvert { target_addr, lladdr, .. } => {
                    assert_eq!(
                        (target_addr, lladdr.unwrap().as_bytes()),
                        (config.gateway6(), &GATEWAY_MAC.0[..])
                    );
                    0
                }
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(read(router_advertisement(&config)), 65_535);
        assert_eq!(read(advertisement(config.gateway6(), true)), 0);
        let words = router_advertisement(&config);
        assert!(words.ends_with(&config.gateway6().octets()), "the name server");
    }
}

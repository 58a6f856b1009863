//! A DHCP client (RFC 2131, client states of §4.4) as a pure state machine: datagrams and a clock in, datagrams and
//! the address to use out.
//!
//! ```text
//!            ┌──────────────── nak, or the lease ran out ◀────────────┐
//!            ▼                                                        │
//!       Selecting ──offer──▶ Requesting ──ack──▶ Bound ──T1──▶ Renewing ──T2──▶ Rebinding
//!            ▲                   │                 ▲                │               │
//!            └─ nak, no answer ──┘                 └───────────────ack──────────────┘
//! ```
//!
//! There is no check whether the address is in use (§3.1 step 5): the machine is alone on its link with the host's
//! network stack.

use std::net::Ipv4Addr;
use std::time::Duration;

use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress};
use tracing::debug;

/// The client's and the server's UDP port.
pub const CLIENT_PORT: u16 = 68;
/// The server's UDP port.
pub const SERVER_PORT: u16 = 67;

/// The first pause before a message is repeated. The server is a process on the same computer, so this is far below
/// the four seconds that RFC 2131 suggests for a network of strangers.
const RETRY_FIRST: Duration = Duration::from_millis(500);
/// The longest pause.
const RETRY_LONGEST: Duration = Duration::from_secs(16);
/// Unanswered requests after which the offer is forgotten.
const REQUESTS_MAX: u32 = 4;

const OPTION_MTU: u8 = 26;
/// Subnet mask, router, name servers, MTU, lease time, server, T1, T2.
const WANTED: &[u8] = &[1, 3, 6, OPTION_MTU, 51, 54, 58, 59];

/// What the server gave us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Our address.
    pub address: Ipv4Addr,
    /// Bits of the address that name the network.
    pub prefix_length: u8,
    /// Where everything beyond the network goes.
    pub router: Option<Ipv4Addr>,
    /// Name servers in order of preference.
    pub dns_servers: Vec<Ipv4Addr>,
    /// The largest packet, if the server says.
    pub mtu: Option<u16>,
}

/// A datagram to send from [`CLIENT_PORT`] to [`SERVER_PORT`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// The server, or everyone.
    pub to: Ipv4Addr,
    /// The message.
    pub payload: Vec<u8>,
}

/// What changed for the interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Use this from now on. Also comes with each renewal.
    Configured(Lease),
    /// What was configured may not be used any more.
    Lost,
}

#[derive(Clone, Debug)]
enum State {
    Selecting,
    Requesting { offer: Offer, tries: u32 },
    Bound(Granted),
    Renewing(Granted),
    Rebinding(Granted),
}

#[derive(Clone, Copy, Debug)]
struct Offer {
    address: Ipv4Addr,
    server: Ipv4Addr,
}

#[derive(Clone, Copy, Debug)]
struct Granted {
    offer: Offer,
    renew_at: Duration,
    rebind_at: Duration,
    ends_at: Duration,
}

/// The client of one interface. Times are durations since any fixed moment.
#[derive(Debug)]
pub struct Client {
    hardware_address: [u8; 6],
    transaction: u32,
    began: Duration,
    state: State,
    retry: Duration,
    /// When something is to be sent or decided next.
    due: Duration,
}

impl Client {
    /// A client without an address, which wants to speak at once. `transaction` should differ from boot to boot.
    pub fn new(hardware_address: [u8; 6], transaction: u32, now: Duration) -> Self {
        Self {
            hardware_address,
            transaction,
            began: now,
            state: State::Selecting,
            retry: RETRY_FIRST,
            due: now,
        }
    }

    /// When to call [`Client::poll`] next.
    pub fn next_deadline(&self) -> Duration {
        self.due
    }

    /// Does what is due: gives a datagram to send, and may give up the lease.
    pub fn poll(&mut self, now: Duration) -> (Option<Transmit>, Option<Change>) {
        if now < self.due {
            return (None, None);
        }
        let mut change = None;
        match &mut self.state {
            State::Selecting => {}
            State::Requesting { tries, .. } if *tries < REQUESTS_MAX => *tries += 1,
            State::Requesting { .. } => self.start_over(now),
            State::Bound(granted) | State::Renewing(granted) | State::Rebinding(granted) => {
                let granted = *granted;
                if now >= granted.ends_at {
                    self.start_over(now);
                    change = Some(Change::Lost);
                } else if now >= granted.rebind_at {
                    self.begin(State::Rebinding(granted), now);
                } else {
                    self.begin(State::Renewing(granted), now);
                }
            }
        }
        let message = self.message(now);
        self.schedule_retry(now);
        (Some(message), change)
    }

    /// Takes a datagram that arrived on [`CLIENT_PORT`]. Whatever is not an answer to us is ignored.
    pub fn receive(&mut self, payload: &[u8], now: Duration) -> Option<Change> {
        let packet = DhcpPacket::new_checked(payload).ok()?;
        let reply = DhcpRepr::parse(&packet).ok()?;
        if reply.transaction_id != self.transaction
            || reply.client_hardware_address != EthernetAddress(self.hardware_address)
        {
            return None;
        }
        let server = reply.server_identifier?;
        match (&self.state, reply.message_type) {
            (State::Selecting, DhcpMessageType::Offer) if usable(reply.your_ip) => {
                self.state = State::Requesting { offer: Offer { address: reply.your_ip, server }, tries: 0 };
                self.retry = RETRY_FIRST;
                self.due = now;
                None
            }
            (State::Requesting { offer, .. }, DhcpMessageType::Ack) if offer.server == server => {
                self.bind(&reply, mtu(&packet), now)
            }
            (State::Renewing(_) | State::Rebinding(_), DhcpMessageType::Ack) => {
                self.bind(&reply, mtu(&packet), now)
            }
            (State::Requesting { .. }, DhcpMessageType::Nak) => {
                self.start_over(now);
                None
            }
            (State::Renewing(_) | State::Rebinding(_), DhcpMessageType::Nak) => {
                self.start_over(now);
                Some(Change::Lost)
            }
            (_, kind) => {
                debug!(?kind, "ignoring a DHCP message out of place");
                None
            }
        }
    }

    fn bind(&mut self, reply: &DhcpRepr<'_>, mtu: Option<u16>, now: Duration) -> Option<Change> {
        let server = reply.server_identifier?;
        if !usable(reply.your_ip) {
            return None;
        }
        // RFC 2131 §4.4.5: T1 is half of the lease and T2 seven eighths, unless the server says otherwise. A lease
        // without an end is a long one; one of a second would keep us busy for nothing.
        let lease = reply.lease_duration.unwrap_or(u32::MAX).max(10);
        let rebind = reply.rebind_duration.filter(|rebind| *rebind < lease).unwrap_or(lease - lease / 8);
        let renew = reply.renew_duration.filter(|renew| *renew < rebind).unwrap_or(lease / 2).min(rebind);
        let after = |seconds: u32| now + Duration::from_secs(seconds.into());
        let granted = Granted {
            offer: Offer { address: reply.your_ip, server },
            renew_at: after(renew),
            rebind_at: after(rebind),
            ends_at: after(lease),
        };
        self.due = granted.renew_at;
        self.state = State::Bound(granted);
        let mask = u32::from(reply.subnet_mask.unwrap_or(Ipv4Addr::BROADCAST));
        Some(Change::Configured(Lease {
            address: reply.your_ip,
            prefix_length: u8::try_from(mask.leading_ones()).unwrap_or(32),
            router: reply.router,
            dns_servers: reply.dns_servers.iter().flatten().copied().collect(),
            mtu,
        }))
    }

    /// Enters a state whose messages are a transaction of their own, unless it is the state already.
    fn begin(&mut self, state: State, now: Duration) {
        if std::mem::discriminant(&self.state) != std::mem::discriminant(&state) {
            self.transaction = self.transaction.wrapping_add(1);
            self.began = now;
            self.retry = RETRY_FIRST;
        }
        self.state = state;
    }

    fn start_over(&mut self, now: Duration) {
        self.transaction = self.transaction.wrapping_add(1);
        self.began = now;
        self.retry = RETRY_FIRST;
        self.due = now;
        self.state = State::Selecting;
    }

    fn schedule_retry(&mut self, now: Duration) {
        let next = now + self.retry;
        self.retry = (self.retry * 2).min(RETRY_LONGEST);
        self.due = match &self.state {
            State::Renewing(granted) => next.min(granted.rebind_at),
            State::Rebinding(granted) => next.min(granted.ends_at),
            _ => next,
        };
    }

    fn message(&self, now: Duration) -> Transmit {
        let none = Ipv4Addr::UNSPECIFIED;
        // RFC 2131 table 5: who says what in which state.
        let (message_type, client_ip, requested_ip, server_identifier, to) = match &self.state {
            State::Selecting => (DhcpMessageType::Discover, none, None, None, Ipv4Addr::BROADCAST),
            State::Requesting { offer, .. } => {
                (DhcpMessageType::Request, none, Some(offer.address), Some(offer.server), Ipv4Addr::BROADCAST)
            }
            State::Bound(granted) | State::Renewing(granted) => {
                (DhcpMessageType::Request, granted.offer.address, None, None, granted.offer.server)
            }
            State::Rebinding(granted) => {
                (DhcpMessageType::Request, granted.offer.address, None, None, Ipv4Addr::BROADCAST)
            }
        };
        let repr = DhcpRepr {
            message_type,
            transaction_id: self.transaction,
            secs: u16::try_from(now.saturating_sub(self.began).as_secs()).unwrap_or(u16::MAX),
            client_hardware_address: EthernetAddress(self.hardware_address),
            client_ip,
            your_ip: none,
            server_ip: none,
            router: None,
            subnet_mask: None,
            relay_agent_ip: none,
            // Without an address of our own the kernel drops what is sent to the address we are about to get.
            broadcast: client_ip.is_unspecified(),
            requested_ip,
            client_identifier: Some(EthernetAddress(self.hardware_address)),
            server_identifier,
            parameter_request_list: Some(WANTED),
            dns_servers: None,
            max_size: Some(1472),
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut payload = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut payload))
            .expect("the buffer has the length it asked for");
        Transmit { to, payload }
    }
}

fn usable(address: Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_broadcast() || address.is_multicast() || address.is_loopback())
}

fn mtu(packet: &DhcpPacket<&[u8]>) -> Option<u16> {
    let option = packet.options().find(|option| option.kind == OPTION_MTU)?;
    let bytes: [u8; 2] = option.data.try_into().ok()?;
    // RFC 2132 §5.1: 68 is the least; below 1280 something is wrong.
    Some(u16::from_be_bytes(bytes)).filter(|mtu| *mtu >= 1280)
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::wire::DhcpOption;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const SERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
    const OURS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn with_repr<T>(payload: &[u8], look: impl FnOnce(&DhcpRepr<'_>) -> T) -> T {
        look(&DhcpRepr::parse(&DhcpPacket::new_checked(payload).unwrap()).unwrap())
    }

    /// The server's answer to a message of ours.
    fn answer(request: &Transmit, message_type: DhcpMessageType, lease: u32) -> Vec<u8> {
        with_repr(&request.payload, |request| {
            let mtu = [DhcpOption { kind: OPTION_MTU, data: &[0x05, 0xDC] }];
            let repr = DhcpRepr {
                message_type,
                your_ip: if message_type == DhcpMessageType::Nak { Ipv4Addr::UNSPECIFIED } else { OURS },
                router: Some(SERVER),
                subnet_mask: Some(Ipv4Addr::new(255, 255, 255, 0)),
                server_identifier: Some(SERVER),
                dns_servers: Some([SERVER].into_iter().collect()),
                lease_duration: Some(lease),
                requested_ip: None,
                parameter_request_list: None,
                additional_options: &mtu,
                ..request.clone()
            };
            let mut payload = vec![0; repr.buffer_len()];
            repr.emit(&mut DhcpPacket::new_unchecked(&mut payload)).unwrap();
            // Replies carry the operation code 2, which the library derives from the type for these.
            payload
        })
    }

    fn lease() -> Lease {
        Lease {
            address: OURS,
            prefix_length: 24,
            router: Some(SERVER),
            dns_servers: vec![SERVER],
            mtu: Some(1500),
        }
    }

    /// A client with a lease of 1000 s since second 0.
    fn bound() -> Client {
        let mut client = Client::new(MAC, 7, at(0));
        let discover = client.poll(at(0)).0.unwrap();
        assert_eq!(client.receive(&answer(&discover, DhcpMessageType::Offer, 1000), at(0)), None);
        let request = client.poll(at(0)).0.unwrap();
        let change = client.receive(&answer(&request, DhcpMessageType::Ack, 1000), at(0));
        assert_eq!(change, Some(Change::Configured(lease())));
        client
    }

    #[test]
    fn an_address_takes_four_messages_and_no_waiting() {
        let mut client = Client::new(MAC, 7, at(0));
        let (discover, _) = client.poll(at(0));
        let discover = discover.unwrap();
        assert_eq!(discover.to, Ipv4Addr::BROADCAST);
        with_repr(&discover.payload, |repr| {
            assert_eq!(repr.message_type, DhcpMessageType::Discover);
            assert!(repr.broadcast, "we cannot hear a unicast answer yet");
        });
        client.receive(&answer(&discover, DhcpMessageType::Offer, 1000), at(0));
        assert_eq!(client.next_deadline(), at(0));
        let request = client.poll(at(0)).0.unwrap();
        with_repr(&request.payload, |repr| {
            assert_eq!(repr.message_type, DhcpMessageType::Request);
            assert_eq!((repr.requested_ip, repr.server_identifier), (Some(OURS), Some(SERVER)));
        });
        client.receive(&answer(&request, DhcpMessageType::Ack, 1000), at(0));
        assert_eq!(client.next_deadline(), at(500), "half of the lease");
        assert_eq!(client.poll(at(499)), (None, None));
    }

    #[test]
    fn a_silent_server_is_asked_again_ever_less_often() {
        let mut client = Client::new(MAC, 7, at(0));
        let mut pauses = Vec::new();
        let mut now = at(0);
        for _ in 0..8 {
            assert!(client.poll(now).0.is_some());
            pauses.push((client.next_deadline() - now).as_millis());
            now = client.next_deadline();
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16000, 16000, 16000]);
    }

    #[test]
    fn an_offer_whose_request_is_not_answered_is_forgotten() {
        let mut client = Client::new(MAC, 7, at(0));
        let discover = client.poll(at(0)).0.unwrap();
        client.receive(&answer(&discover, DhcpMessageType::Offer, 1000), at(0));
        let mut kinds = Vec::new();
        for _ in 0..6 {
            let message = client.poll(client.next_deadline()).0.unwrap();
            kinds.push(with_repr(&message.payload, |repr| repr.message_type));
        }
        use DhcpMessageType::{Discover, Request};
        assert_eq!(kinds, [Request, Request, Request, Request, Discover, Discover]);
    }

    #[test]
    fn a_lease_is_renewed_with_the_server_at_half_time() {
        let mut client = bound();
        let renewal = client.poll(at(500)).0.unwrap();
        assert_eq!(renewal.to, SERVER);
        with_repr(&renewal.payload, |repr| {
            assert_eq!((repr.client_ip, repr.requested_ip, repr.server_identifier), (OURS, None, None));
            assert_ne!(repr.transaction_id, 7, "a transaction of its own");
        });
        let change = client.receive(&answer(&renewal, DhcpMessageType::Ack, 1000), at(501));
        assert_eq!(change, Some(Change::Configured(lease())));
        assert_eq!(client.next_deadline(), at(1001));
    }

    #[test]
    fn an_unanswered_renewal_goes_to_everyone_and_then_the_lease_is_lost() {
        let mut client = bound();
        let (mut to_server, mut to_all) = (0, 0);
        loop {
            let now = client.next_deadline();
            let (message, change) = client.poll(now);
            let message = message.unwrap();
            if let Some(change) = change {
                assert_eq!((change, now), (Change::Lost, at(1000)));
                with_repr(&message.payload, |repr| assert_eq!(repr.message_type, DhcpMessageType::Discover));
                break;
            }
            match message.to {
                SERVER => to_server += 1,
                _ => to_all += 1,
            }
        }
        assert!(to_server > 5 && to_all > 3, "{to_server} {to_all}");
    }

    #[test]
    fn a_refused_renewal_loses_the_address_at_once() {
        let mut client = bound();
        let renewal = client.poll(at(500)).0.unwrap();
        let change = client.receive(&answer(&renewal, DhcpMessageType::Nak, 0), at(500));
        assert_eq!(change, Some(Change::Lost));
        assert_eq!(client.next_deadline(), at(500));
    }

    #[test]
    fn answers_to_others_and_foreign_bytes_are_ignored() {
        let mut client = Client::new(MAC, 7, at(0));
        let discover = client.poll(at(0)).0.unwrap();
        let offer = answer(&discover, DhcpMessageType::Offer, 1000);
        for index in [4, 28] {
            let mut other = offer.clone();
            other[index] ^= 0xFF;
            assert_eq!(client.receive(&other, at(0)), None);
        }
        for length in 0..offer.len() {
            client.receive(&offer[..length], at(0));
        }
        for index in 0..offer.len() {
            for value in [0, 1, 0x7F, 0xFF] {
                let mut mutant = offer.clone();
                mutant[index] = value;
                Client::new(MAC, 7, at(0)).receive(&mutant, at(0));
            }
        }
    }
}

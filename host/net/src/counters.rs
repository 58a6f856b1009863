//! What the NAT did, in numbers. Data paths count; they do not log.

use std::fmt;

/// Why a packet was not carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// Not a well-formed frame, header or checksum.
    Malformed,
    /// For another machine's hardware address.
    NotForUs,
    /// IPv6, on a link too small for it.
    Ipv6,
    /// Neither ARP nor IP, or an IP protocol other than TCP, UDP and ICMP.
    UnknownProtocol,
    /// A source address that is not the guest's.
    Spoofed,
    /// A destination that must not appear on a wire (loopback, 0.0.0.0/8, 240.0.0.0/4).
    Martian,
    /// Broadcast and multicast other than ARP, DHCP and neighbour discovery.
    Multicast,
    /// A fragment that fits nothing; what it belonged to is discarded too.
    Fragment,
    /// No room in the flow table.
    FlowTableFull,
    /// No room in the queue of frames to the guest.
    LinkQueueFull,
    /// The host gave no socket.
    HostSocket,
    /// The host's socket buffer was full (datagrams only).
    HostQueueFull,
    /// A TCP segment of no known connection; answered with a reset.
    NoConnection,
    /// ICMP other than echo and neighbour discovery.
    UnsupportedIcmp,
    /// A DHCP or DNS message that makes no sense, or an answer nobody asked for.
    UnexpectedMessage,
    /// A connection for the guest, which has not said yet where it is, or not to an address of its network.
    NoLanding,
    /// A connection for the guest, while too many others waited to be taken.
    OfferQueueFull,
}

impl DropReason {
    /// Every reason, in the order of [`Counters::drops`].
    pub const ALL: [Self; 17] = [
        Self::Malformed,
        Self::NotForUs,
        Self::Ipv6,
        Self::UnknownProtocol,
        Self::Spoofed,
        Self::Martian,
        Self::Multicast,
        Self::Fragment,
        Self::FlowTableFull,
        Self::LinkQueueFull,
        Self::HostSocket,
        Self::HostQueueFull,
        Self::NoConnection,
        Self::UnsupportedIcmp,
        Self::UnexpectedMessage,
        Self::NoLanding,
        Self::OfferQueueFull,
    ];
}

/// A snapshot of the numbers since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Frames from the guest.
    pub frames_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Frames to the guest.
    pub frames_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Flows opened.
    pub flows_opened: u64,
    /// Flows open now.
    pub flows_open: u64,
    /// TCP segments sent again.
    pub retransmissions: u64,
    /// Packets not carried, by [`DropReason`].
    pub drops: [u64; DropReason::ALL.len()],
}

impl Counters {
    /// How often packets were not carried for `reason`.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    pub(crate) fn count(&mut self, reason: DropReason) {
        self.drops[reason as usize] += 1;
    }
}

impl fmt::Display for Counters {
    /// One line; reasons that never happened are left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "in {} frames {} bytes, out {} frames {} bytes, flows {} open {} ever, {} retransmissions",
            self.frames_in,
            self.bytes_in,
            self.frames_out,
            self.bytes_out,
            self.flows_open,
            self.flows_opened,
            self.retransmissions
        )?;
        for reason in DropReason::ALL {
            match self.dropped(reason) {
                0 => {}
                count => write!(f, ", {reason:?} {count}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_place() {
        let mut counters = Counters::default();
        for reason in DropReason::ALL {
            counters.count(reason);
        }
        assert!(counters.drops.iter().all(|count| *count == 1));
    }
}

//! Packets that the guest sends in fragments (RFC 791 §3.2, RFC 8200 §4.5), put together again in bounded room.
//!
//! Fragments that overlap, or do not fit, discard the whole packet: an honest sender makes neither. There is no timer:
//! what stays incomplete makes room for the next, or is found too old when one comes.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use smoltcp::wire::IpProtocol;

/// Packets under way at a time. A link that loses nothing has one.
const PENDING_MAX: usize = 16;
/// Largest payload of a packet: IPv4's, whose header counts too.
const PAYLOAD_MAX: usize = 65_515;
/// As long as Linux waits.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the fragments of one packet have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: IpProtocol,
    pub(crate) ident: u32,
}

#[derive(Debug)]
struct Pending {
    name: Name,
    since: Duration,
    pieces: BTreeMap<usize, Vec<u8>>,
    /// Known once the last piece is here.
    length: Option<usize>,
}

/// What became of a fragment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Others are still to come.
    Kept,
    /// The packet's payload is whole.
    Whole(Vec<u8>),
    /// It, and what belongs to it, is of no use.
    Discarded,
}

#[derive(Debug, Default)]
pub(crate) struct Reassembly {
    pending: VecDeque<Pending>,
}

impl Reassembly {
    /// Takes the piece at `offset`; `more` says that it is not the last.
    pub(crate) fn insert(
        &mut self,
        name: Name,
        offset: usize,
        more: bool,
        piece: &[u8],
        now: Duration,
    ) -> Outcome {
        self.pending.retain(|pending| now.saturating_sub(pending.since) < PATIENCE);
        let place = match self.pending.iter().position(|pending| pending.name == name) {
            Some(place) => place,
            None => {
                if self.pending.len() == PENDING_MAX {
                    self.pending.pop_front();
                }
                self.pending.push_back(Pending { name, since: now, pieces: BTreeMap::new(), length: None });
                self.pending.len() - 1
            }
        };
        let pending = &mut self.pending[place];
        if !pending.add(offset, more, piece) {
            self.pending.remove(place);
            return Outcome::Discarded;
        }
        if !pending.is_whole() {
            return Outcome::Kept;
        }
        let pieces = self.pending.remove(place).map(|pending| pending.pieces).unwrap_or_default();
        Outcome::Whole(pieces.into_values().flatten().collect())
    }
}

impl Pending {
    fn add(&mut self, offset: usize, more: bool, piece: &[u8]) -> bool {
        let end = offset + piece.len();
        let sound = !piece.is_empty() && end <= PAYLOAD_MAX && (!more || piece.len().is_multiple_of(8));
        let before = self.pieces.range(..=offset).next_back().map_or(0, |(at, piece)| at + piece.len());
        let after = self.pieces.range(offset..).next().map_or(PAYLOAD_MAX, |(at, _)| *at);
        if !sound || before > offset || after < end || self.length.is_some_and(|length| end > length) {
            return false;
        }
        if !more {
            if self.length.is_some() || after != PAYLOAD_MAX {
                return false;
            }
            self.length = Some(end);
        }
        self.pieces.insert(offset, piece.to_vec());
        true
    }

    /// Pieces never overlap, so they cover everything when their lengths add up.
    fn is_whole(&self) -> bool {
        self.length == Some(self.pieces.values().map(Vec::len).sum())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(ident: u32) -> Name {
        let (source, destination) = ([198, 18, 0, 2].into(), [10, 0, 0, 1].into());
        Name { source, destination, protocol: IpProtocol::Udp, ident }
    }

    #[test]
    fn pieces_fit_together_in_any_order() {
        let whole: Vec<u8> = (0..100).collect();
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut reassembly = Reassembly::default();
            let mut outcome = Outcome::Kept;
            for number in order {
                assert_eq!(outcome, Outcome::Kept);
                let at = number * 40;
                let piece = &whole[at..(at + 40).min(100)];
                outcome = reassembly.insert(name(1), at, number < 2, piece, Duration::ZERO);
            }
            assert_eq!(outcome, Outcome::Whole(whole.clone()));
            assert!(reassembly.pending.is_empty());
        }
    }

    #[test]
    fn overlaps_and_oversizes_discard_the_packet() {
        let mut reassembly = Reassembly::default();
        let mut insert =
            |offset, more, length| reassembly.insert(name(1), offset, more, &vec![7; length], Duration::ZERO);
        assert_eq!(insert(0, true, 16), Outcome::Kept);
        assert_eq!(insert(8, true, 16), Outcome::Discarded, "overlap");
        assert_eq!(insert(0, true, 16), Outcome::Kept);
        assert_eq!(insert(0, true, 16), Outcome::Discarded, "twice");
        assert_eq!(insert(65_528, false, 100), Outcome::Discarded, "ping of death");
        assert_eq!(insert(0, true, 15), Outcome::Discarded, "not a multiple of eight");
        assert_eq!(insert(80, false, 8), Outcome::Kept);
        assert_eq!(insert(88, true, 8), Outcome::Discarded, "beyond the end");
        assert!(reassembly.pending.is_empty());
    }

    #[test]
    fn the_oldest_makes_room_and_age_ends_waiting() {
        let mut reassembly = Reassembly::default();
        for ident in 0..PENDING_MAX as u32 + 1 {
            reassembly.insert(name(ident), 0, true, &[7; 8], Duration::ZERO);
        }
        assert_eq!(reassembly.pending.len(), PENDING_MAX);
        assert_eq!(
            reassembly.insert(name(0), 8, false, b"end", Duration::ZERO),
            Outcome::Kept,
            "its start is gone"
        );
        reassembly.insert(name(99), 0, true, &[7; 8], PATIENCE);
        assert_eq!(reassembly.pending.len(), 1);
    }

    proptest! {
        #[test]
        fn any_pieces_are_survived_in_bounded_room(
            pieces in prop::collection::vec((0..4u32, 0..9000usize, any::<bool>(), 0..2000usize), 0..200)
        ) {
            let mut reassembly = Reassembly::default();
            for (ident, offset, more, length) in pieces {
                let outcome = reassembly.insert(name(ident), offset * 8, more, &vec![7; length], Duration::ZERO);
                if let Outcome::Whole(bytes) = outcome {
                    prop_assert!(bytes.len() <= PAYLOAD_MAX);
                }
                prop_assert!(reassembly.pending.len() <= PENDING_MAX);
            }
        }
    }
}

//! What a frame's sender leaves to its taker, on a link with [`crate::Config::offloads`]: ten bytes before each frame.
//!
//! ```text
//! 0        1        2          4           6           8           10
//! | flags  | kind   | headers  | cut to    | from      | behind    |
//! ```
//!
//! Little-endian, as a virtio network card has them (virtio 1.3 §5.1.6). Flag 1: the transport checksum is missing; it
//! is made of everything from `from` on and goes `behind` bytes behind that, where the sum of the pseudo header is now.
//! Kind 1: a TCP segment over IPv4 that is to be cut so that each has `cut to` bytes of payload; kind 4: so one over
//! IPv6; kind 5: so a UDP datagram. `headers` is how long all headers are.

use std::net::IpAddr;

use host_frames::OFFLOAD_BYTES;

use crate::counters::DropReason;

const CHECKSUM_MISSING: u8 = 1;
const WHOLE: u8 = 0;
const TCP4: u8 = 1;
const TCP6: u8 = 4;
const DATAGRAMS: u8 = 5;

/// The most datagrams that come as one frame.
const DATAGRAMS_MAX: usize = 1024;

/// What is left to do for a frame of the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offload {
    /// The transport checksum is not there: nothing happened to the frame since its bytes were written.
    pub checksum_missing: bool,
    /// The frame stands for several datagrams with this many bytes of payload each, but for the last.
    pub datagram_bytes: Option<u16>,
}

impl Offload {
    /// Splits a frame from what comes before it. `None` when that makes no sense here.
    pub fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, frame) = bytes.split_first_chunk::<OFFLOAD_BYTES>()?;
        let [flags, kind, _, _, low, high, ..] = *header;
        let size = u16::from_le_bytes([low, high]);
        // A large TCP segment is taken as it is.
        let datagram_bytes = match kind {
            WHOLE | TCP4 | TCP6 => None,
            DATAGRAMS if size > 0 => Some(size),
            _ => return None,
        };
        Some((Self { checksum_missing: flags & CHECKSUM_MISSING != 0, datagram_bytes }, frame))
    }

    /// The datagrams that `payload` stands for.
    pub(crate) fn datagrams(self, payload: &[u8]) -> Result<impl Iterator<Item = &[u8]>, DropReason> {
        let size = self.datagram_bytes.map_or(payload.len(), usize::from).max(1);
        if payload.len().div_ceil(size) > DATAGRAMS_MAX {
            return Err(DropReason::Malformed);
        }
        // An empty datagram is one too.
        let empty = payload.is_empty().then_some(payload);
        Ok(payload.chunks(size).chain(empty))
    }
}

/// What is left to the guest for a TCP segment from `source`: its checksum, and cutting it if it has more than `limit`
/// bytes of payload.
pub(crate) fn of_segment(
    source: IpAddr,
    transport: usize,
    headers: usize,
    payload: usize,
    limit: usize,
) -> [u8; OFFLOAD_BYTES] {
    let [start, checksum] = [transport as u16, 16].map(u16::to_le_bytes);
    let mut bytes = [CHECKSUM_MISSING, WHOLE, 0, 0, 0, 0, start[0], start[1], checksum[0], checksum[1]];
    if payload > limit {
        bytes[1] = if source.is_ipv4() { TCP4 } else { TCP6 };
        bytes[2..4].copy_from_slice(&(headers as u16).to_le_bytes());
        bytes[4..6].copy_from_slice(&(limit as u16).to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_leaves_is_read() {
        let check = |header: [u8; 6], expected: Option<(bool, Option<u16>)>| {
            let bytes = [&header[..], &[0; 4], b"frame"].concat();
            let split = Offload::split(&bytes).map(|(offload, frame)| {
                assert_eq!(frame, b"frame");
                (offload.checksum_missing, offload.datagram_bytes)
            });
            assert_eq!(split, expected, "{header:?}");
        };
        check([0; 6], Some((false, None)));
        check([1, 1, 54, 0, 0xb4, 5], Some((true, None)));
        check([1, 5, 0, 0, 0xb4, 5], Some((true, Some(1460))));
        check([1, 5, 0, 0, 0, 0], None);
        check([1, 4, 74, 0, 0xa0, 5], Some((true, None)));
        check([1, 3, 0, 0, 1, 0], None);
        assert_eq!(Offload::split(&[0; 9]), None);
    }

    #[test]
    fn a_large_datagram_is_many() {
        let lengths = |payload: usize, datagram_bytes| {
            let offload = Offload { datagram_bytes, ..Offload::default() };
            let payload = vec![0; payload];
            offload.datagrams(&payload).map(|all| all.map(<[u8]>::len).collect::<Vec<_>>())
        };
        assert_eq!(lengths(3000, Some(1200)), Ok(vec![1200, 1200, 600]));
        assert_eq!(lengths(3000, None), Ok(vec![3000]));
        assert_eq!(lengths(0, None), Ok(vec![0]));
        assert_eq!(lengths(0, Some(5)), Ok(vec![0]));
        assert_eq!(lengths(1025, Some(1)), Err(DropReason::Malformed));
    }
}

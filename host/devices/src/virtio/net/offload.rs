//! What a frame's sender has left to others: a checksum to fill in, or a large segment to cut (virtio 1.3 §5.1.6).
//!
//! Pure: bytes in, bytes out. Nothing a frame says about itself is believed before it has been checked against its
//! length; what does not fit together is `None`, and the frame is dropped.

use host_frames::OFFLOAD_BYTES;

/// The checksum from `checksum_start` on is still to be made.
const NEEDS_CHECKSUM: u8 = 1;
/// The checksum is known to be good.
const CHECKSUM_GOOD: u8 = 2;

const SEGMENTS_TCP4: u8 = 1;
const SEGMENTS_TCP6: u8 = 4;
const SEGMENTS_UDP: u8 = 5;

/// The most frames that one becomes. Below an MSS of 64 bytes a sender is up to no good.
const SEGMENTS_MAX: usize = 1024;

const ETHERNET_BYTES: usize = 14;
const VLAN_BYTES: usize = 4;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const IPV6_BYTES: usize = 40;
const TCP: u8 = 6;
const UDP: u8 = 17;
const UDP_BYTES: usize = 8;
const TCP_BYTES: usize = 20;
const FIN: u8 = 0x01;
const PUSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// How a large frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segmentation {
    /// It is one frame.
    None,
    /// Into TCP segments over IPv4.
    Tcp4,
    /// Into TCP segments over IPv6.
    Tcp6,
    /// Into UDP datagrams.
    Udp,
}

/// What is left to do for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    /// Where the checksum is to be made from, and where behind that it goes, if it is missing. Its place holds the sum
    /// of the pseudo header.
    pub checksum: Option<(u16, u16)>,
    /// Nobody needs to look at the checksum.
    pub checksum_good: bool,
    /// How the frame is to be cut.
    pub segmentation: Segmentation,
    /// Bytes of payload in each frame but the last, if it is to be cut.
    pub segment_bytes: u16,
}

impl Offload {
    /// Nothing is left to do.
    pub const NONE: Self =
        Self { checksum: None, checksum_good: false, segmentation: Segmentation::None, segment_bytes: 0 };

    /// Reads a header. `None` for what no sender of ours says.
    pub fn parse(bytes: [u8; OFFLOAD_BYTES]) -> Option<Self> {
        let [flags, segmentation, _, _, size_low, size_high, start_low, start_high, offset_low, offset_high] =
            bytes;
        let segmentation = match segmentation {
            0 => Segmentation::None,
            SEGMENTS_TCP4 => Segmentation::Tcp4,
            SEGMENTS_TCP6 => Segmentation::Tcp6,
            SEGMENTS_UDP => Segmentation::Udp,
            _ => return None,
        };
        let checksum = (flags & NEEDS_CHECKSUM != 0).then(|| {
            (u16::from_le_bytes([start_low, start_high]), u16::from_le_bytes([offset_low, offset_high]))
        });
        let segment_bytes = match segmentation {
            Segmentation::None => 0,
            _ => u16::from_le_bytes([size_low, size_high]),
        };
        let offload =
            Self { checksum, checksum_good: flags & CHECKSUM_GOOD != 0, segmentation, segment_bytes };
        // A frame is cut by somebody who makes checksums (§5.1.6.2).
        let whole = segmentation == Segmentation::None || (segment_bytes > 0 && checksum.is_some());
        whole.then_some(offload)
    }

    /// The header. `headers` is the length of the frame's headers, a hint to the driver.
    pub fn to_bytes(self, headers: u16) -> [u8; OFFLOAD_BYTES] {
        let flags = match (self.checksum, self.checksum_good) {
            (Some(_), _) => NEEDS_CHECKSUM,
            (None, true) => CHECKSUM_GOOD,
            (None, false) => 0,
        };
        let segmentation = match self.segmentation {
            Segmentation::None => 0,
            Segmentation::Tcp4 => SEGMENTS_TCP4,
            Segmentation::Tcp6 => SEGMENTS_TCP6,
            Segmentation::Udp => SEGMENTS_UDP,
        };
        let headers = if segmentation == 0 { 0 } else { headers };
        let (start, offset) = self.checksum.unwrap_or_default();
        let mut bytes = [flags, segmentation, 0, 0, 0, 0, 0, 0, 0, 0];
        for (place, value) in [(2, headers), (4, self.segment_bytes), (6, start), (8, offset)] {
            bytes[place..place + 2].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }
}

/// Fills in a checksum; `None` when its place is not in the frame.
pub fn complete(frame: &mut [u8], (start, offset): (u16, u16)) -> Option<()> {
    let from = usize::from(start);
    let place = from + usize::from(offset);
    if place + 2 > frame.len() {
        return None;
    }
    let sum = !folded(sum(&frame[from..], 0));
    // Zero would mean to UDP that there is none; to everybody else both zeroes are the same.
    let sum = if sum == 0 { 0xffff } else { sum };
    frame[place..place + 2].copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// Where the parts of a TCP or UDP frame are.
#[derive(Clone, Copy)]
struct Layout {
    ip: usize,
    is_ipv6: bool,
    transport: usize,
    payload: usize,
}

impl Layout {
    fn of(frame: &[u8], segmentation: Segmentation) -> Option<Self> {
        let mut ip = ETHERNET_BYTES;
        let mut kind = word(frame, ip - 2)?;
        if kind == VLAN {
            ip += VLAN_BYTES;
            kind = word(frame, ip - 2)?;
        }
        let (transport, protocol, is_ipv6) = match kind {
            IPV4 => {
                let length = usize::from(*frame.get(ip)? & 15) * 4;
                (ip + length.max(20), *frame.get(ip + 9)?, false)
            }
            // Headers between are none that segments are sent with.
            IPV6 => (ip + IPV6_BYTES, *frame.get(ip + 6)?, true),
            _ => return None,
        };
        let payload = match (segmentation, protocol, is_ipv6) {
            (Segmentation::Tcp4, TCP, false) | (Segmentation::Tcp6, TCP, true) => {
                let length = usize::from(*frame.get(transport + 12)? >> 4) * 4;
                transport + length.max(TCP_BYTES)
            }
            (Segmentation::Udp, UDP, _) => transport + UDP_BYTES,
            _ => return None,
        };
        (payload <= frame.len()).then_some(Self { ip, is_ipv6, transport, payload })
    }
}

/// Cuts a frame, and gives every piece to `take`, whole and with its checksums. `None`, before the first piece, when the
/// frame is not what its header says.
pub fn cut(frame: &[u8], offload: Offload, mut take: impl FnMut(&[u8])) -> Option<()> {
    let layout = Layout::of(frame, offload.segmentation)?;
    let Layout { ip, is_ipv6, transport, payload } = layout;
    let step = usize::from(offload.segment_bytes).max(1);
    let data = &frame[payload..];
    let pieces = data.len().div_ceil(step).max(1);
    if pieces > SEGMENTS_MAX {
        return None;
    }
    let identification = word(frame, ip + 4)?;
    let sequence = u32::from_be_bytes(*frame.get(transport + 4..)?.first_chunk()?);
    let is_tcp = offload.segmentation != Segmentation::Udp;
    let flags = if is_tcp { *frame.get(transport + 13)? } else { 0 };
    let mut piece = Vec::with_capacity(payload + step.min(data.len()));
    for number in 0..pieces {
        let part = &data[number * step..data.len().min((number + 1) * step)];
        piece.clear();
        piece.extend_from_slice(&frame[..payload]);
        piece.extend_from_slice(part);
        let piece_bytes = piece.len();
        let transport_bytes = (piece_bytes - transport) as u16;
        if is_ipv6 {
            set(&mut piece, ip + 4, transport_bytes);
        } else {
            set(&mut piece, ip + 2, (piece_bytes - ip) as u16);
            set(&mut piece, ip + 4, identification.wrapping_add(number as u16));
            set(&mut piece, ip + 10, 0);
            let header = !folded(sum(&piece[ip..transport], 0));
            set(&mut piece, ip + 10, header);
        }
        let checksum = if is_tcp {
            let begin = sequence.wrapping_add((number * step) as u32);
            piece[transport + 4..transport + 8].copy_from_slice(&begin.to_be_bytes());
            let mut cleared = 0;
            if number > 0 {
                cleared |= CWR;
            }
            if number + 1 < pieces {
                cleared |= FIN | PUSH;
            }
            piece[transport + 13] = flags & !cleared;
            16
        } else {
            set(&mut piece, transport + 4, transport_bytes);
            6
        };
        let addresses = if is_ipv6 { ip + 8..ip + 40 } else { ip + 12..ip + 20 };
        let protocol = if is_tcp { TCP } else { UDP };
        let pseudo = sum(&piece[addresses], u64::from(protocol) + u64::from(transport_bytes));
        set(&mut piece, transport + checksum, folded(pseudo));
        complete(&mut piece, (transport as u16, checksum as u16))?;
        take(&piece);
    }
    Some(())
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|word| u16::from_be_bytes(*word))
}

fn set(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Adds 16-bit words, big-endian (RFC 1071), without folding.
fn sum(bytes: &[u8], start: u64) -> u64 {
    // Four words at a time: the sum of 32-bit halves folds to the same.
    let (chunks, rest) = bytes.as_chunks::<8>();
    let mut total = start;
    for chunk in chunks {
        let eight = u64::from_be_bytes(*chunk);
        total += (eight >> 32) + (eight & 0xffff_ffff);
    }
    for pair in rest.chunks(2) {
        total += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
    }
    total
}

fn folded(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame with `payload`, whose transport checksum is left to others.
    pub(in crate::virtio::net) fn frame(
        segmentation: Segmentation,
        ipv6: bool,
        payload: &[u8],
    ) -> (Vec<u8>, Offload) {
        let is_tcp = segmentation != Segmentation::Udp;
        let (transport_bytes, protocol) = if is_tcp { (TCP_BYTES, TCP) } else { (UDP_BYTES, UDP) };
        let length = transport_bytes + payload.len();
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if ipv6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((length as u16).to_be_bytes());
            frame.extend([protocol, 64]);
            frame.extend([7; 32]);
        } else {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + length as u16).to_be_bytes());
            frame.extend([0xff, 0xff, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        let addresses = if ipv6 { 22..54 } else { 26..34 };
        let transport = frame.len();
        if is_tcp {
            frame.extend([0, 80, 1, 0, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0x50, 0x19 | CWR, 1, 0, 0, 0, 0, 0]);
        } else {
            frame.extend([0, 53, 1, 0]);
            frame.extend((length as u16).to_be_bytes());
            frame.extend([0, 0]);
        }
        let place = if is_tcp { 16 } else { 6 };
        let pseudo = folded(sum(&frame[addresses], u64::from(protocol) + length as u64));
        set(&mut frame, transport + place, pseudo);
        frame.extend_from_slice(payload);
        let checksum = Some((transport as u16, place as u16));
        (frame, Offload { checksum, segmentation, segment_bytes: 1000, ..Offload::NONE })
    }

    /// Whether all checksums of a frame of ours are right.
    pub(in crate::virtio::net) fn is_sound(frame: &[u8], ipv6: bool) -> bool {
        let (transport, addresses) = if ipv6 { (54, 22..54) } else { (34, 26..34) };
        let protocol = if ipv6 { frame[20] } else { frame[23] };
        let length = frame.len() - transport;
        let pseudo = sum(&frame[addresses], u64::from(protocol) + length as u64);
        let header = ipv6 || folded(sum(&frame[14..34], 0)) == 0xffff;
        let lengths = match ipv6 {
            true => usize::from(word(frame, 18).unwrap()) == length,
            false => usize::from(word(frame, 16).unwrap()) == length + 20,
        };
        header && lengths && folded(sum(&frame[transport..], pseudo)) == 0xffff
    }

    #[test]
    fn a_header_survives_its_bytes() {
        let check = |offload: Offload| assert_eq!(Offload::parse(offload.to_bytes(54)), Some(offload));
        check(Offload::NONE);
        check(Offload { checksum_good: true, ..Offload::NONE });
        check(Offload { checksum: Some((34, 16)), ..Offload::NONE });
        for segmentation in [Segmentation::Tcp4, Segmentation::Tcp6, Segmentation::Udp] {
            check(Offload {
                checksum: Some((34, 16)),
                checksum_good: false,
                segmentation,
                segment_bytes: 1460,
            });
        }
        // Cutting without checksums, without a size, with ECN, into fragments.
        for bytes in [[0, 1, 0, 0, 9, 0], [1, 1, 0, 0, 0, 0], [1, 0x81, 0, 0, 9, 0], [1, 3, 0, 0, 9, 0]] {
            let mut header = [0; OFFLOAD_BYTES];
            header[..6].copy_from_slice(&bytes);
            assert_eq!(Offload::parse(header), None, "{bytes:?}");
        }
    }

    #[test]
    fn a_checksum_goes_where_it_belongs() {
        let (mut frame, offload) = frame(Segmentation::Tcp4, false, b"hello, odd length");
        // The test's IP header has no checksum of its own.
        let header = !folded(sum(&frame[14..34], 0));
        set(&mut frame, 24, header);
        assert!(!is_sound(&frame, false));
        complete(&mut frame, offload.checksum.unwrap()).unwrap();
        assert!(is_sound(&frame, false));
        for outside in [(0, u16::MAX), (u16::MAX, 0), (frame.len() as u16 - 1, 0), (u16::MAX, u16::MAX)] {
            assert_eq!(complete(&mut frame, outside), None);
        }
    }

    #[test]
    fn segments_make_up_the_frame() {
        let payload: Vec<u8> = (0..4500u32).map(|byte| byte as u8).collect();
        for (segmentation, ipv6) in [
            (Segmentation::Tcp4, false),
            (Segmentation::Tcp6, true),
            (Segmentation::Udp, false),
            (Segmentation::Udp, true),
        ] {
            let (frame, offload) = frame(segmentation, ipv6, &payload);
            let headers = frame.len() - payload.len();
            let transport = usize::from(offload.checksum.unwrap().0);
            let mut whole = Vec::new();
            let mut count = 0;
            cut(&frame, offload, |piece| {
                assert!(is_sound(piece, ipv6), "piece {count} of {segmentation:?}");
                if segmentation != Segmentation::Udp {
                    let sequence = u32::from_be_bytes(*piece[transport + 4..].first_chunk().unwrap());
                    assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(whole.len() as u32));
                    let flags = [0x10 | CWR, 0x10, 0x10, 0x10, 0x19];
                    assert_eq!(piece[transport + 13], flags[count]);
                }
                if !ipv6 {
                    assert_eq!(word(piece, 18), Some(0xffffu16.wrapping_add(count as u16)));
                }
                whole.extend_from_slice(&piece[headers..]);
                count += 1;
            })
            .unwrap();
            assert_eq!((count, &whole), (5, &payload));
        }
    }

    #[test]
    fn a_frame_that_is_something_else_is_not_cut() {
        let check = |frame: &[u8], offload| {
            assert_eq!(cut(frame, offload, |_| panic!("a piece of nonsense")), None);
        };
        let (whole, offload) = frame(Segmentation::Tcp4, false, &[1; 3000]);
        check(&whole, Offload { segmentation: Segmentation::Udp, ..offload });
        check(&whole, Offload { segmentation: Segmentation::Tcp6, ..offload });
        check(&whole, Offload { segment_bytes: 1, ..offload });
        for length in 0..54 {
            check(&whole[..length], offload);
        }
        let (whole, offload) = frame(Segmentation::Tcp6, true, &[1; 3000]);
        check(&whole, Offload { segmentation: Segmentation::Tcp4, ..offload });
        let mut arp = whole;
        arp[12..14].copy_from_slice(&[8, 6]);
        check(&arp, offload);
    }

    proptest! {
        #[test]
        fn no_frame_harms(mut bytes in prop::collection::vec(any::<u8>(), 0..300), header in any::<[u8; 10]>(), shaped in any::<bool>()) {
            if shaped && bytes.len() > 14 {
                bytes[12..15].copy_from_slice(&[8, 0, 0x45]);
            }
            if let Some(offload) = Offload::parse(header) {
                if let Some(checksum) = offload.checksum {
                    complete(&mut bytes, checksum);
                }
                cut(&bytes, offload, |piece| assert!(piece.len() <= bytes.len()));
            }
        }
    }
}

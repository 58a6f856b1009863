//! A network card that leaves work to the NAT and does the NAT's: what stands between a plain guest and a link with
//! offloads.

use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, TcpPacket};

const BEFORE: usize = 10;

/// What the card makes of a guest's frame: TCP's checksum is spoilt and left to the NAT.
pub fn leave(mut frame: Vec<u8>) -> Vec<u8> {
    let mut before = [0; BEFORE];
    if is_tcp(&frame) {
        before[..].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
        frame[34 + 16] ^= 0x55;
    }
    [&before[..], &frame].concat()
}

/// What the card makes of the NAT's frame, whose checksum it fills in; and how many packets it stands for.
///
/// # Panics
/// When what the NAT says does not fit the frame.
pub fn finish(bytes: &[u8]) -> (Vec<u8>, usize) {
    let (before, frame) = bytes.split_at(BEFORE);
    let mut frame = frame.to_vec();
    if !is_tcp(&frame) {
        assert_eq!(before, [0; BEFORE]);
        return (frame, 1);
    }
    assert_eq!((before[0], &before[6..]), (1, &[34, 0, 16, 0][..]));
    let (source, destination) = {
        let packet = Ipv4Packet::new_checked(&frame[14..]).unwrap();
        assert!(packet.verify_checksum());
        (IpAddress::Ipv4(packet.src_addr()), IpAddress::Ipv4(packet.dst_addr()))
    };
    let length = frame.len() - 34;
    let (headers, payload, left) = {
        let packet = TcpPacket::new_checked(&frame[34..]).unwrap();
        let header = usize::from(packet.header_len());
        (34 + header, length - header, packet.checksum())
    };
    // Going on from what was left comes to the same as a checksum made by one.
    frame[50..52].fill(0);
    let pairs =
        frame[34..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = u32::from(left) + pairs.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let mut packet = TcpPacket::new_unchecked(&mut frame[34..]);
    packet.fill_checksum(&source, &destination);
    assert_eq!(packet.checksum(), !(sum as u16));
    let word = |at: usize| usize::from(u16::from_le_bytes([before[at], before[at + 1]]));
    match before[1] {
        0 => {
            assert!(payload <= 1460 && word(2) == 0 && word(4) == 0);
            (frame, 1)
        }
        1 => {
            assert_eq!((word(2), word(4)), (headers, 1460));
            assert!(payload > 1460);
            (frame, payload.div_ceil(1460))
        }
        other => panic!("kind {other}"),
    }
}

fn is_tcp(frame: &[u8]) -> bool {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    frame.ethertype() == EthernetProtocol::Ipv4
        && Ipv4Packet::new_checked(frame.payload()).unwrap().next_header() == IpProtocol::Tcp
}

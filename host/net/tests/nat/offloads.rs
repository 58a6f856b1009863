//! A network card that leaves work to the NAT and does the NAT's: what stands between a plain guest and a link with
//! offloads.

use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket,
};

const BEFORE: usize = 10;

/// What the card makes of a guest's frame: TCP's checksum is spoilt and left to the NAT.
pub fn leave(mut frame: Vec<u8>) -> Vec<u8> {
    let mut before = [0; BEFORE];
    if let Some(Tcp { at, .. }) = tcp(&frame) {
        before[..].copy_from_slice(&[1, 0, 0, 0, 0, 0, at as u8, 0, 16, 0]);
        frame[at + 16] ^= 0x55;
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
    let Some(Tcp { at, source, destination }) = tcp(&frame) else {
        assert_eq!(before, [0; BEFORE]);
        return (frame, 1);
    };
    assert_eq!((before[0], &before[6..]), (1, &[at as u8, 0, 16, 0][..]));
    let length = frame.len() - at;
    let (headers, payload, left) = {
        let packet = TcpPacket::new_checked(&frame[at..]).unwrap();
        let header = usize::from(packet.header_len());
        (at + header, length - header, packet.checksum())
    };
    // Going on from what was left comes to the same as a checksum made by one.
    frame[at + 16..at + 18].fill(0);
    let pairs =
        frame[at..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = u32::from(left) + pairs.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let mut packet = TcpPacket::new_unchecked(&mut frame[at..]);
    packet.fill_checksum(&source, &destination);
    assert_eq!(packet.checksum(), !(sum as u16));
    let word = |at: usize| usize::from(u16::from_le_bytes([before[at], before[at + 1]]));
    let largest = 1514 - at - 20;
    let kind = if at == 34 { 1 } else { 4 };
    if before[1] == 0 {
        assert!(payload <= largest && word(2) == 0 && word(4) == 0);
        return (frame, 1);
    }
    assert_eq!((before[1], word(2), word(4)), (kind, headers, largest));
    assert!(payload > largest);
    (frame, payload.div_ceil(largest))
}

/// Where the TCP segment of a frame begins, and its packet's ends.
struct Tcp {
    at: usize,
    source: IpAddress,
    destination: IpAddress,
}

fn tcp(frame: &[u8]) -> Option<Tcp> {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    let (at, protocol, source, destination) = match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
            assert!(packet.verify_checksum());
            (34, packet.next_header(), packet.src_addr().into(), packet.dst_addr().into())
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(frame.payload()).unwrap();
            (54, packet.next_header(), packet.src_addr().into(), packet.dst_addr().into())
        }
        _ => return None,
    };
    (protocol == IpProtocol::Tcp).then_some(Tcp { at, source, destination })
}

//! What the host's kernel has heard about datagrams that did not arrive, and how they are sent so that it may.
//!
//! Linux keeps the errors of a socket in a queue beside its data, with who said them (ip(7), `IP_RECVERR`). Elsewhere
//! only the plain errors of the socket are seen.

#[cfg(target_os = "linux")]
pub(super) use linux::{listen, listen_no_more, may_be_cut, read};
#[cfg(not(target_os = "linux"))]
pub(super) use others::{listen, listen_no_more, may_be_cut, read};

#[cfg(target_os = "linux")]
mod linux {
    use std::io::{self, IoSliceMut};
    use std::net::IpAddr;
    use std::os::fd::{AsFd, AsRawFd};

    use nix::libc::sock_extended_err;
    use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr};
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt};
    use rustix::io::Errno;
    use rustix::net::sockopt::{
        Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
    };

    use crate::icmp::{Reason, Trouble};

    /// Where an error comes from (`linux/errqueue.h`).
    const ORIGIN_LOCAL: u8 = 1;
    const ORIGIN_ICMP: u8 = 2;
    const ORIGIN_ICMP6: u8 = 3;

    /// Has the kernel keep what it hears about what the socket sends.
    pub(in crate::io) fn listen(socket: &impl AsFd, ipv6: bool) -> io::Result<()> {
        set(socket, ipv6, true)
    }

    /// Undoes [`listen`].
    pub(in crate::io) fn listen_no_more(socket: &impl AsFd, ipv6: bool) -> io::Result<()> {
        set(socket, ipv6, false)
    }

    fn set(socket: &impl AsFd, ipv6: bool, on: bool) -> io::Result<()> {
        let set =
            if ipv6 { setsockopt(socket, Ipv6RecvErr, &on) } else { setsockopt(socket, Ipv4RecvErr, &on) };
        Ok(set?)
    }

    /// Whether this host and those on the way may cut datagrams of the socket that are too large.
    pub(in crate::io) fn may_be_cut(socket: &impl AsFd, ipv6: bool, may: bool) -> io::Result<()> {
        let set = match (ipv6, may) {
            (false, true) => set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::WANT),
            (false, false) => set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::DO),
            (true, true) => set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::WANT),
            (true, false) => set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::DO),
        };
        Ok(set?)
    }

    /// Takes the next error from the socket's queue. `None` when there is no more; `Some(None)` for one that says
    /// nothing to a guest.
    pub(in crate::io) fn read(socket: &impl AsRawFd) -> io::Result<Option<Option<Trouble>>> {
        // The beginning of what it is about, and of an echo its header.
        let mut payload = [0; 64];
        let mut space = nix::cmsg_space!(sock_extended_err, SockaddrStorage);
        let mut pieces = [IoSliceMut::new(&mut payload)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut space), flags) {
            Ok(message) => message,
            Err(nix::Error::EAGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let told = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, from) => {
                Some((error, from.map(|from| IpAddr::V4(u32::from_be(from.sin_addr.s_addr).into()))))
            }
            ControlMessageOwned::Ipv6RecvErr(error, from) => {
                Some((error, from.map(|from| IpAddr::V6(from.sin6_addr.s6_addr.into()))))
            }
            _ => None,
        });
        let length = message.bytes;
        Ok(Some(told.and_then(|(error, from)| trouble(&error, from, &payload[..length.min(payload.len())]))))
    }

    fn trouble(error: &sock_extended_err, from: Option<IpAddr>, about: &[u8]) -> Option<Trouble> {
        let mtu = error.ee_info;
        let reason = match (error.ee_origin, error.ee_type, error.ee_code) {
            (ORIGIN_LOCAL, ..) if error.ee_errno == Errno::MSGSIZE.raw_os_error().cast_unsigned() => {
                return Some(Trouble { reason: Reason::TooLarge { mtu }, from: None, sequence: None });
            }
            (ORIGIN_ICMP, 3, 4) | (ORIGIN_ICMP6, 2, _) => Reason::TooLarge { mtu },
            (ORIGIN_ICMP, 3, 0 | 6 | 11) | (ORIGIN_ICMP6, 1, 0) => Reason::NetworkUnreachable,
            (ORIGIN_ICMP, 3, 2 | 3) | (ORIGIN_ICMP6, 1, 4) => Reason::PortUnreachable,
            (ORIGIN_ICMP, 3, 9 | 10 | 13..=15) | (ORIGIN_ICMP6, 1, 1 | 5 | 6) => Reason::Prohibited,
            (ORIGIN_ICMP, 3, _) | (ORIGIN_ICMP6, 1, _) => Reason::HostUnreachable,
            (ORIGIN_ICMP, 11, _) | (ORIGIN_ICMP6, 3, _) => Reason::HopsExceeded,
            _ => return None,
        };
        // Of an echo the queue has the request itself.
        let sequence = about.get(6..8).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
        Some(Trouble { reason, from: from.filter(|from| !from.is_unspecified()), sequence })
    }

    #[cfg(test)]
    mod tests {
        use std::net::UdpSocket;

        use super::*;

        #[test]
        fn a_closed_port_is_heard_of_with_who_said_so() {
            for (here, ipv6) in [("127.0.0.1:0", false), ("[::1]:0", true)] {
                // A host without IPv6 hears nothing of it.
                let Ok(gone) = UdpSocket::bind(here) else { continue };
                let to = gone.local_addr().unwrap();
                drop(gone);
                let socket = UdpSocket::bind(here).unwrap();
                listen(&socket, ipv6).unwrap();
                socket.connect(to).unwrap();
                assert_eq!(read(&socket).unwrap(), None);
                socket.send(b"anybody?").unwrap();
                let heard = std::iter::repeat_with(|| read(&socket).unwrap()).find_map(|heard| heard);
                let trouble = heard.unwrap().unwrap();
                assert_eq!((trouble.reason, trouble.from), (Reason::PortUnreachable, Some(to.ip())));
                assert_eq!(read(&socket).unwrap(), None);
            }
        }

        #[test]
        fn a_datagram_that_may_not_be_cut_is_refused_with_what_passes() {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(socket.local_addr().unwrap()).unwrap();
            listen(&socket, false).unwrap();
            may_be_cut(&socket, false, false).unwrap();
            let large = vec![0; 65_507];
            let mtu =
                std::fs::read_to_string("/sys/class/net/lo/mtu").unwrap().trim().parse::<u32>().unwrap();
            if mtu as usize >= large.len() + 28 {
                // Nothing is too large for this loopback.
                socket.send(&large).unwrap();
                return;
            }
            socket.send(&large).unwrap_err();
            let trouble = read(&socket).unwrap().unwrap().unwrap();
            assert_eq!(trouble.reason, Reason::TooLarge { mtu });
        }

        #[test]
        fn what_routers_say_is_passed_on() {
            let check = |origin, kind, code, expected| {
                let error = sock_extended_err {
                    ee_errno: 1,
                    ee_origin: origin,
                    ee_type: kind,
                    ee_code: code,
                    ee_pad: 0,
                    ee_info: 1400,
                    ee_data: 0,
                };
                let from = Some([10, 0, 0, 1].into());
                let heard = trouble(&error, from, &[8, 0, 0, 0, 0, 0, 1, 2]);
                assert_eq!(heard.map(|heard| heard.reason), expected, "{origin} {kind} {code}");
                assert!(heard.is_none_or(|heard| (heard.from, heard.sequence) == (from, Some(0x102))));
            };
            check(ORIGIN_ICMP, 11, 0, Some(Reason::HopsExceeded));
            check(ORIGIN_ICMP, 3, 4, Some(Reason::TooLarge { mtu: 1400 }));
            check(ORIGIN_ICMP, 3, 1, Some(Reason::HostUnreachable));
            check(ORIGIN_ICMP, 3, 13, Some(Reason::Prohibited));
            check(ORIGIN_ICMP6, 1, 0, Some(Reason::NetworkUnreachable));
            check(ORIGIN_ICMP6, 2, 0, Some(Reason::TooLarge { mtu: 1400 }));
            check(ORIGIN_ICMP6, 3, 0, Some(Reason::HopsExceeded));
            check(ORIGIN_ICMP, 12, 0, None);
            check(ORIGIN_LOCAL, 0, 0, None);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod others {
    use std::io;

    use crate::icmp::Trouble;

    pub(in crate::io) fn listen<S>(_socket: &S, _ipv6: bool) -> io::Result<()> {
        Ok(())
    }

    pub(in crate::io) fn listen_no_more<S>(_socket: &S, _ipv6: bool) -> io::Result<()> {
        Ok(())
    }

    pub(in crate::io) fn may_be_cut<S>(_socket: &S, _ipv6: bool, _may: bool) -> io::Result<()> {
        Ok(())
    }

    pub(in crate::io) fn read<S>(_socket: &S) -> io::Result<Option<Option<Trouble>>> {
        Ok(None)
    }
}

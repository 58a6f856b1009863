//! Binding what a request asks for: one port, at all its addresses or at none.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use guest_protocol::{PortRequest, Transport};
use socket2::{Domain, Protocol, Socket, Type};

use crate::holder::Holder;

/// The kernel's backlog of a listener: connections that came before the daemon looked.
const BACKLOG: i32 = 4096;
/// How often another free port is tried when the first is taken at a second address.
const TRIES_MAX: u32 = 32;

/// Why ports cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else listens there.
    #[error("failed to bind host port for {address}/{transport}: address already in use{}", by(.holder.as_ref()))]
    InUse {
        /// The address and port.
        address: SocketAddr,
        /// The protocol.
        transport: Transport,
        /// Who, if it can be seen.
        holder: Option<Holder>,
    },
    /// No port of a range is free.
    #[error("none of the host's ports {first}-{last}/{transport} is free at {address}")]
    RangeTaken {
        /// The first address asked for.
        address: IpAddr,
        /// The range.
        first: u16,
        /// Its end.
        last: u16,
        /// The protocol.
        transport: Transport,
    },
    /// The system reserves low ports for root.
    #[error(
        "this system lets only root listen at port {} of the host: publish a port from 1024 up, or allow it with \
         `sudo sysctl net.ipv4.ip_unprivileged_port_start={}`", .address.port(), .address.port()
    )]
    Privileged {
        /// The address and port.
        address: SocketAddr,
    },
    /// The host has no such address.
    #[error(
        "failed to bind host port at {0}: cannot assign requested address (the host has no such address)"
    )]
    NoSuchAddress(IpAddr),
    /// SCTP is not carried into the machine.
    #[error("sctp ports cannot be published through the machine (port {0}): only tcp and udp can")]
    Sctp(u16),
    /// Nothing to listen at, or an upside-down range.
    #[error(
        "the request for container port {0} names no address, or a port range that ends before it begins"
    )]
    Senseless(u16),
    /// Another failure.
    #[error("cannot listen at {address}/{transport} on the host")]
    Io {
        /// The address and port.
        address: SocketAddr,
        /// The protocol.
        transport: Transport,
        /// What the system says.
        #[source]
        error: io::Error,
    },
}

fn by(holder: Option<&Holder>) -> String {
    holder.map_or_else(|| " (by another user's process)".into(), |holder| format!(" (held by {holder})"))
}

/// Binds one request: sockets that listen (TCP) or are bound (UDP), one for each address, all at the same port.
pub(crate) fn bind(request: &PortRequest) -> Result<Vec<Socket>, BindError> {
    let &PortRequest { transport, first, last, container_port, .. } = request;
    if transport == Transport::Sctp {
        return Err(BindError::Sctp(container_port));
    }
    let Some(&address) = request.addresses.first() else { return Err(BindError::Senseless(container_port)) };
    if first > last {
        return Err(BindError::Senseless(container_port));
    }
    if first == 0 {
        return bind_any(request, address);
    }
    for port in first..=last {
        match bind_all(request, port, Vec::new()) {
            Err(BindError::InUse { .. }) if first < last => {}
            outcome => return outcome,
        }
    }
    Err(BindError::RangeTaken { address, first, last, transport })
}

/// Lets the system choose a port at the first address and takes the same at the others.
fn bind_any(request: &PortRequest, address: IpAddr) -> Result<Vec<Socket>, BindError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let first = bind_one(request.transport, SocketAddr::new(address, 0))?;
        let port =
            first.local_addr().ok().and_then(|local| local.as_socket()).map_or(0, |local| local.port());
        match bind_all(request, port, vec![first]) {
            Err(BindError::InUse { .. }) if tries < TRIES_MAX => {}
            outcome => return outcome,
        }
    }
}

/// Binds the addresses for which there is no socket in `bound` yet.
fn bind_all(request: &PortRequest, port: u16, mut bound: Vec<Socket>) -> Result<Vec<Socket>, BindError> {
    for &address in &request.addresses[bound.len()..] {
        match bind_one(request.transport, SocketAddr::new(address, port)) {
            Ok(socket) => bound.push(socket),
            // "All addresses", or all of this computer's own, on a host without IPv6 are the others.
            Err(BindError::NoSuchAddress(IpAddr::V6(Ipv6Addr::UNSPECIFIED | Ipv6Addr::LOCALHOST)))
                if request.addresses.len() > 1 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bound)
}

fn bind_one(transport: Transport, address: SocketAddr) -> Result<Socket, BindError> {
    use rustix::io::Errno;
    try_bind(transport, address).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::ADDRINUSE) => {
            BindError::InUse { address, transport, holder: Holder::of(transport, address) }
        }
        Some(Errno::ACCESS) if address.port() < 1024 => BindError::Privileged { address },
        Some(Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT) => BindError::NoSuchAddress(address.ip()),
        _ => BindError::Io { address, transport, error },
    })
}

fn try_bind(transport: Transport, address: SocketAddr) -> io::Result<Socket> {
    let (kind, protocol) = match transport {
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
        Transport::Tcp | Transport::Sctp => (Type::STREAM, Protocol::TCP),
    };
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if transport == Transport::Tcp {
        // Connections of a listener before, in TIME_WAIT, are no reason to refuse. A listener still is.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if transport == Transport::Tcp {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn request(transport: Transport, addresses: &[IpAddr], first: u16, last: u16) -> PortRequest {
        PortRequest { transport, addresses: addresses.to_vec(), first, last, container_port: 80 }
    }

    fn port(socket: &Socket) -> u16 {
        socket.local_addr().unwrap().as_socket().unwrap().port()
    }

    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

    #[test]
    fn all_addresses_get_one_port() {
        for transport in [Transport::Tcp, Transport::Udp] {
            let sockets = bind(&request(transport, &[LOCAL, OTHER], 0, 0)).unwrap();
            assert_eq!(sockets.len(), 2);
            assert_eq!(port(&sockets[0]), port(&sockets[1]));
        }
    }

    #[test]
    fn a_taken_port_names_its_holder_and_nothing_stays_bound() {
        let taken = std::net::TcpListener::bind("127.0.0.2:0").unwrap();
        let number = taken.local_addr().unwrap().port();
        let error = bind(&request(Transport::Tcp, &[LOCAL, OTHER], number, number)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("127.0.0.2:{number}/tcp")), "{text}");
        assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
        std::net::TcpListener::bind((LOCAL, number)).unwrap();
    }

    #[test]
    fn a_range_gives_its_first_free_port() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = taken.local_addr().unwrap().port();
        if number == u16::MAX {
            return;
        }
        match bind(&request(Transport::Tcp, &[LOCAL], number, number + 1)) {
            Ok(sockets) => assert_eq!(port(&sockets[0]), number + 1),
            // The next one may be somebody else's.
            Err(error) => assert!(matches!(error, BindError::RangeTaken { .. }), "{error}"),
        }
    }

    #[test]
    fn senseless_requests_are_refused() {
        let foreign = "203.0.113.77".parse().unwrap();
        let refused = |request: &PortRequest| bind(request).unwrap_err();
        assert!(matches!(refused(&request(Transport::Tcp, &[], 1, 1)), BindError::Senseless(80)));
        assert!(matches!(refused(&request(Transport::Tcp, &[LOCAL], 9, 8)), BindError::Senseless(80)));
        assert!(matches!(refused(&request(Transport::Sctp, &[LOCAL], 9, 9)), BindError::Sctp(80)));
        assert!(matches!(
            refused(&request(Transport::Tcp, &[foreign], 0, 0)),
            BindError::NoSuchAddress(address) if address == foreign
        ));
    }
}

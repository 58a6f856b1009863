//! A guest for the tests: smoltcp's interface and sockets on an in-memory Ethernet port.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{AnySocket, tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint};

pub const GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 254);
/// The guest in IPv6.
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfdc7, 0x9a1e, 0x5d28, 0, 0, 0, 0, 2);
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfdc7, 0x9a1e, 0x5d28, 0, 0, 0, 0, 1);
pub const HOST6: Ipv6Addr = Ipv6Addr::new(0xfdc7, 0x9a1e, 0x5d28, 0, 0, 0, 0, 0xfe);
/// The router on the link.
pub const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x65, 0x6eff, 0xfe67, 1);
pub const GUEST_MAC: EthernetAddress = EthernetAddress([0x02, 0, 0, 0, 0, 0x02]);

/// The port: frames that have come for the guest, and frames it has sent.
pub struct Port {
    pub to_guest: VecDeque<Vec<u8>>,
    pub from_guest: VecDeque<Vec<u8>>,
    mtu: usize,
}

pub struct Received(Vec<u8>);
pub struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl Device for Port {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Received(frame), Sending(&mut self.from_guest)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

/// The guest.
pub struct Guest {
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    pub port: Port,
    next_port: u16,
}

impl Guest {
    /// With its address and default route.
    pub fn new(mtu: usize) -> Self {
        let mut guest = Self::without_address(mtu);
        guest.interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::Ipv4(GUEST), 24)).unwrap();
            addresses.push(IpCidr::new(IpAddress::Ipv6(GUEST6), 64)).unwrap();
        });
        guest.interface.routes_mut().add_default_ipv6_route(ROUTER).unwrap();
        guest.interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        guest
    }

    pub fn without_address(mtu: usize) -> Self {
        let mut port = Port { to_guest: VecDeque::new(), from_guest: VecDeque::new(), mtu };
        let mut config = Config::new(HardwareAddress::Ethernet(GUEST_MAC));
        config.random_seed = 7;
        let interface = Interface::new(config, &mut port, Instant::ZERO);
        Self { interface, sockets: SocketSet::new(Vec::new()), port, next_port: 40_000 }
    }

    pub fn poll(&mut self, now: Duration) {
        self.interface.poll(instant(now), &mut self.port, &mut self.sockets);
    }

    pub fn poll_at(&mut self, now: Duration) -> Option<Duration> {
        let at = self.interface.poll_at(instant(now), &self.sockets)?;
        Some(Duration::from_micros(at.total_micros().try_into().unwrap_or_default()))
    }

    pub fn connect(&mut self, to: SocketAddr, buffer: usize) -> SocketHandle {
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; buffer]),
            tcp::SocketBuffer::new(vec![0; buffer]),
        );
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        self.next_port = self.next_port.checked_add(1).unwrap_or(40_000);
        let remote = IpEndpoint::from(to);
        socket.connect(self.interface.context(), remote, self.next_port).unwrap();
        self.sockets.add(socket)
    }

    pub fn listen(&mut self, port: u16, buffer: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn bind_udp(&mut self) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 65_536]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        self.next_port = self.next_port.checked_add(1).unwrap_or(40_000);
        socket.bind(self.next_port).unwrap();
        self.sockets.add(socket)
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn get<T: AnySocket<'static>>(&mut self, handle: SocketHandle) -> &mut T {
        self.sockets.get_mut(handle)
    }
}

pub fn instant(now: Duration) -> Instant {
    Instant::from_micros(now.as_micros() as i64)
}

/// A byte stream that shows any byte lost, doubled or moved.
pub fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

pub fn send_pattern(socket: &mut tcp::Socket<'_>, sent: &mut usize, total: usize) {
    while *sent < total && socket.can_send() {
        let start = *sent;
        let count = socket
            .send(|buffer| {
                let count = buffer.len().min(total - start);
                for (i, byte) in buffer[..count].iter_mut().enumerate() {
                    *byte = pattern(start + i);
                }
                (count, count)
            })
            .unwrap();
        *sent += count;
    }
}

pub fn receive_pattern(socket: &mut tcp::Socket<'_>, received: &mut usize) {
    while socket.can_recv() {
        let start = *received;
        *received += socket
            .recv(|buffer| {
                for (i, byte) in buffer.iter().enumerate() {
                    assert_eq!(*byte, pattern(start + i), "byte {}", start + i);
                }
                (buffer.len(), buffer.len())
            })
            .unwrap();
    }
}

/// An A question.
pub fn dns_query(id: u16, name: &str) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

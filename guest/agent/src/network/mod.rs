//! The machine's own interfaces: loopback, and `eth0` with an address from DHCP, and in IPv6 one that the kernel makes
//! of what the router advertises.
//!
//! Bridges, forwarding and firewall are the engine's. One task drives all of this for as long as the machine runs.

pub mod dhcp;

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context, Result};
use rtnetlink::packet_core::ErrorMessage;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use dhcp::{Change, Client, Lease};

const INTERFACE: &str = "eth0";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How long the interface may take to appear after its driver was loaded.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);

/// How the kernel deals with the router's advertisements, below `/proc/sys/net/ipv6/conf/eth0`: it believes them
/// although the machine routes for its containers, and uses its address at once, as the link has no other guest.
const IPV6_SETTINGS: [(&str, &str); 3] =
    [("accept_ra", "2"), ("accept_dad", "0"), ("router_solicitation_delay", "0")];

/// Brings the interfaces up and keeps the address. `ready` becomes true with the first address.
///
/// Returns only on failure; the machine then has no network but is otherwise well.
pub async fn run(ready: watch::Sender<bool>) -> Result<()> {
    let (connection, netlink, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    tokio::spawn(connection);
    bring_up(&netlink, "lo", None).await?;
    let index = appear().await?;
    prepare_ipv6();
    bring_up(&netlink, INTERFACE, None).await?;
    let socket = open_socket().await?;
    let began = Instant::now();
    let mut client = Client::new(hardware_address()?, transaction(), began.elapsed());
    let mut current: Option<Lease> = None;
    let mut buffer = [0; 2048];
    loop {
        let (message, change) = client.poll(began.elapsed());
        if let Some(message) = message {
            let to = SocketAddrV4::new(message.to, dhcp::SERVER_PORT);
            // A link that is down, or a server that is not there: the client asks again by itself.
            if let Err(error) = socket.send_to(&message.payload, to).await {
                warn!(%error, %to, "cannot send a DHCP message");
            }
        }
        let change = match change {
            Some(change) => Some(change),
            None => tokio::select! {
                () = tokio::time::sleep_until(began + client.next_deadline()) => None,
                received = socket.recv_from(&mut buffer) => {
                    let (length, _) = received.context("cannot receive DHCP messages")?;
                    client.receive(&buffer[..length], began.elapsed())
                }
            },
        };
        match change {
            Some(Change::Configured(lease)) if current.as_ref() == Some(&lease) => {}
            Some(Change::Configured(lease)) => {
                if let Some(old) = current.take_if(|old| old.address != lease.address) {
                    remove_address(&netlink, index, old.address).await?;
                }
                configure(&netlink, index, &lease).await?;
                info!(
                    address = %lease.address, prefix = lease.prefix_length, router = ?lease.router,
                    dns = ?lease.dns_servers, mtu = ?lease.mtu, "network up"
                );
                current = Some(lease);
                ready.send_replace(true);
            }
            Some(Change::Lost) => {
                warn!("the network's address was lost");
                if let Some(old) = current.take() {
                    remove_address(&netlink, index, old.address).await?;
                }
            }
            None => {}
        }
    }
}

/// Waits for the interface and returns its index.
async fn appear() -> Result<u32> {
    let path = format!("/sys/class/net/{INTERFACE}/ifindex");
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    loop {
        match fs::read_to_string(&path) {
            Ok(index) => return Ok(index.trim().parse()?),
            Err(_) if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(error) => return Err(error).with_context(|| format!("there is no interface {INTERFACE}")),
        }
    }
}

/// Without, the machine has IPv4 only, and is otherwise well.
fn prepare_ipv6() {
    for (name, value) in IPV6_SETTINGS {
        let path = format!("/proc/sys/net/ipv6/conf/{INTERFACE}/{name}");
        if let Err(error) = fs::write(&path, value) {
            warn!(%error, path, value, "cannot prepare the interface for IPv6");
        }
    }
}

/// The socket that DHCP is spoken on: bound to the interface, so that it works before there is an address or a route.
async fn open_socket() -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, dhcp::CLIENT_PORT))
        .await
        .context("cannot bind the DHCP client's port")?;
    socket.bind_device(Some(INTERFACE.as_bytes())).with_context(|| format!("cannot bind to {INTERFACE}"))?;
    socket.set_broadcast(true)?;
    Ok(socket)
}

fn hardware_address() -> Result<[u8; 6]> {
    let path = format!("/sys/class/net/{INTERFACE}/address");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse_hardware_address(text.trim()).with_context(|| format!("{text:?} is no Ethernet address"))
}

fn parse_hardware_address(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// A transaction number that differs from boot to boot.
fn transaction() -> u32 {
    let boot_id = crate::machine::boot_id();
    boot_id.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(1)
}

async fn bring_up(netlink: &Handle, name: &str, mtu: Option<u16>) -> Result<()> {
    let mut link = LinkUnspec::new_with_name(name).up();
    if let Some(mtu) = mtu {
        link = link.mtu(mtu.into());
    }
    netlink.link().set(link.build()).execute().await.with_context(|| format!("cannot bring {name} up"))
}

async fn configure(netlink: &Handle, index: u32, lease: &Lease) -> Result<()> {
    if lease.mtu.is_some() {
        bring_up(netlink, INTERFACE, lease.mtu).await?;
    }
    let (address, prefix) = (lease.address, lease.prefix_length);
    netlink
        .address()
        .add(index, address.into(), prefix)
        .replace()
        .execute()
        .await
        .with_context(|| format!("cannot set the address {address}/{prefix}"))?;
    if let Some(router) = lease.router {
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().gateway(router).output_interface(index).onlink().build();
        netlink
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .with_context(|| format!("cannot set the route by {router}"))?;
    }
    write_resolv_conf(&lease.dns_servers).with_context(|| format!("cannot write {RESOLV_CONF}"))
}

async fn remove_address(netlink: &Handle, index: u32, address: Ipv4Addr) -> Result<()> {
    use netlink_packet_route::address::{AddressAttribute, AddressMessage};
    let mut message = AddressMessage::default();
    message.header.family = netlink_packet_route::AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address.into()));
    match netlink.address().del(message).execute().await {
        // Somebody, a privileged container, was faster.
        Err(rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }))
            if code.get() == -rustix::io::Errno::ADDRNOTAVAIL.raw_os_error() =>
        {
            Ok(())
        }
        result => result.with_context(|| format!("cannot remove the address {address}")),
    }
}

/// Replaces the file in one step: the engine reads it whenever a container starts.
fn write_resolv_conf(servers: &[Ipv4Addr]) -> io::Result<()> {
    let aside = format!("{RESOLV_CONF}.new");
    fs::write(&aside, resolv_conf(servers))?;
    fs::rename(&aside, RESOLV_CONF)
}

fn resolv_conf(servers: &[Ipv4Addr]) -> String {
    servers.iter().map(|server| format!("nameserver {server}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethernet_addresses_are_six_bytes() {
        assert_eq!(parse_hardware_address("52:54:00:12:34:ff"), Some([0x52, 0x54, 0, 0x12, 0x34, 0xFF]));
        for text in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:xx"] {
            assert_eq!(parse_hardware_address(text), None, "{text}");
        }
    }

    #[test]
    fn name_servers_are_listed_in_order() {
        let servers = [Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(9, 9, 9, 9)];
        assert_eq!(resolv_conf(&servers), "nameserver 198.18.0.1\nnameserver 9.9.9.9\n");
    }
}

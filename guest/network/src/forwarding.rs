//! The kernel's switches for routing packets between interfaces.

use std::io;

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
const IPV6_FORWARD: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// Routing could not be switched on.
#[derive(Debug, thiserror::Error)]
#[error("cannot switch on packet forwarding in {path}")]
pub struct ForwardingError {
    path: String,
    #[source]
    source: io::Error,
}

/// Switches IPv4 routing on in the caller's network namespace. Already on is fine, also where the file is read-only.
///
/// # Errors
/// When the kernel refuses.
pub fn enable() -> Result<(), ForwardingError> {
    switch_on(IP_FORWARD)
}

/// The same for IPv6.
///
/// # Errors
/// When the kernel refuses.
pub fn enable_ipv6() -> Result<(), ForwardingError> {
    switch_on(IPV6_FORWARD)
}

/// Lets packets between the host's own loopback addresses and what is behind `interface` pass: without it the kernel
/// takes them for forged. The firewall keeps everybody else's loopback packets off.
///
/// # Errors
/// When the kernel refuses.
pub fn enable_loopback(interface: &str) -> Result<(), ForwardingError> {
    switch_on(&format!("/proc/sys/net/ipv4/conf/{interface}/route_localnet"))
}

/// Has a bridge answer for the containers behind it when they look for each other: ports that are isolated do not hear
/// each other, and so they talk through the firewall, or not at all. For a bridge that nobody else uses: it answers for
/// whoever has an address of its network (`proxy_arp_pvlan`, RFC 3069).
///
/// # Errors
/// When the kernel refuses.
pub fn answer_for_neighbours(bridge: &str) -> Result<(), ForwardingError> {
    // Answers would wait for up to 0.8 s, for somebody better to answer; nobody can.
    write(&format!("/proc/sys/net/ipv4/neigh/{bridge}/proxy_delay"), "0")?;
    switch_on(&format!("/proc/sys/net/ipv4/conf/{bridge}/proxy_arp_pvlan"))
}

fn switch_on(path: &str) -> Result<(), ForwardingError> {
    if std::fs::read(path).is_ok_and(|value| value.trim_ascii() == b"1") {
        return Ok(());
    }
    write(path, "1")
}

fn write(path: &str, value: &str) -> Result<(), ForwardingError> {
    std::fs::write(path, value).map_err(|source| ForwardingError { path: path.to_owned(), source })
}

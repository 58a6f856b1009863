//! The kernel's switch for routing packets between interfaces.

use std::io;

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// Routing could not be switched on.
#[derive(Debug, thiserror::Error)]
#[error("cannot switch on packet forwarding in {IP_FORWARD}")]
pub struct ForwardingError(#[source] io::Error);

/// Switches IPv4 routing on in the caller's network namespace. Already on is fine, also where the file is read-only.
///
/// # Errors
/// When the kernel refuses.
pub fn enable() -> Result<(), ForwardingError> {
    if std::fs::read(IP_FORWARD).is_ok_and(|value| value.trim_ascii() == b"1") {
        return Ok(());
    }
    std::fs::write(IP_FORWARD, "1").map_err(ForwardingError)
}

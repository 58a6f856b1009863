//! A hardware address, and the one Docker derives from an IPv4 address.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address. Prints and parses as `02:42:ac:11:00:02`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// The text is not six hexadecimal bytes joined by colons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a hardware address like 02:42:ac:11:00:02")]
pub struct ParseMacError(String);

impl Mac {
    /// Docker's address for a container: `02:42` and the four bytes of `address`. Unique within a network by
    /// construction, so neighbour tables stay right when an address is given to the next container.
    pub fn from_address(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0x42, a, b, c, d])
    }

    /// The same for any address: an IPv6 address gives its last four bytes.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::from_address(address),
            IpAddr::V6(address) => {
                let [.., a, b, c, d] = address.octets();
                Self([0x06, 0x42, a, b, c, d])
            }
        }
    }

    /// One for an interface without addresses, from its name.
    pub(crate) fn from_name(name: &str) -> Self {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [a, b, c, d, ..] = hash.to_be_bytes();
        Self([0x06, 0x42, a, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseMacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_address_becomes_dockers_mac() {
        let mac = Mac::from_address(Ipv4Addr::new(172, 17, 0, 2));
        assert_eq!(mac.to_string(), "02:42:ac:11:00:02");
        assert_eq!("02:42:ac:11:00:02".parse(), Ok(mac));
    }

    #[test]
    fn anything_but_six_bytes_is_refused() {
        for text in
            ["", "02:42", "02:42:ac:11:00:02:03", "02:42:ac:11:00:zz", "2:42:ac:11:0:2", "+2:42:ac:11:00:0"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }
}

//! Options of the local driver: a file system that is mounted while the volume is in use.

use std::collections::BTreeMap;
use std::net::{IpAddr, ToSocketAddrs};

use thiserror::Error;

/// The options there are.
const NAMES: [&str; 4] = ["device", "o", "size", "type"];

/// Why options make no sense, in dockerd's words.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OptionError {
    /// Not one of the driver's.
    #[error("invalid option: {0:?}")]
    Unknown(String),
    /// One that another one needs.
    #[error("missing required option: {0:?}")]
    Missing(&'static str),
    /// Not a size.
    #[error("invalid size: '{0}'")]
    Size(String),
    /// Limits of folders need project quotas, which the engine does not set up.
    #[error("quota size requested but no quota support")]
    Quota,
    /// A port in a CIFS device.
    #[error("port not allowed in CIFS device URL, include 'port' in 'o='")]
    CifsPort,
    /// The server's name has no address.
    #[error("error resolving passed in network volume address: {name}: {reason}")]
    Address {
        /// The server.
        name: String,
        /// Why.
        reason: String,
    },
}

/// What is mounted at a volume's data folder.
#[derive(Clone, PartialEq, Eq)]
pub struct DriverOptions {
    /// `nfs`, `tmpfs`, `none` for a bind, …
    pub kind: String,
    /// What to mount.
    pub device: String,
    /// Options, separated by commas. May hold a password.
    pub options: String,
}

/// Options may hold a password.
impl std::fmt::Debug for DriverOptions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, device, .. } = self;
        formatter
            .debug_struct("DriverOptions")
            .field("kind", kind)
            .field("device", device)
            .finish_non_exhaustive()
    }
}

impl DriverOptions {
    /// Checks the options of a new volume. `None` when there is nothing to mount.
    pub fn parse(given: &BTreeMap<String, String>) -> Result<Option<Self>, OptionError> {
        if let Some(unknown) = given.keys().find(|name| !NAMES.contains(&name.as_str())) {
            return Err(OptionError::Unknown(unknown.clone()));
        }
        let value = |name: &str| given.get(name).map_or("", String::as_str);
        if value("type") == "cifs" && cifs_host(value("device")).is_some_and(|host| host.port.is_some()) {
            return Err(OptionError::CifsPort);
        }
        if let Some(size) = given.get("size")
            && bytes(size).ok_or_else(|| OptionError::Size(size.clone()))? > 0
        {
            return Err(OptionError::Quota);
        }
        for (name, needed) in [("o", "device"), ("o", "type"), ("type", "device"), ("device", "type")] {
            if given.contains_key(name) && !given.contains_key(needed) {
                return Err(OptionError::Missing(needed));
            }
        }
        if value("device").is_empty() && value("type").is_empty() {
            return Ok(None);
        }
        let text = |name| value(name).to_owned();
        Ok(Some(Self { kind: text("type"), device: text("device"), options: text("o") }))
    }

    /// Device and options with the server's name replaced by its address, for the kernel resolves none.
    pub(crate) fn resolved(&self) -> Result<(String, String), OptionError> {
        if !matches!(self.kind.as_str(), "nfs" | "nfs4" | "cifs") {
            return Ok((self.device.clone(), self.options.clone()));
        }
        let named = self.options.split(',').find_map(|option| option.strip_prefix("addr="));
        if let Some(name) = named.filter(|name| !name.is_empty() && name.parse::<IpAddr>().is_err()) {
            let address = address(name)?;
            let options = self.options.replacen(&format!("addr={name}"), &format!("addr={address}"), 1);
            return Ok((self.device.clone(), options));
        }
        if self.kind == "cifs"
            && let Some(host) = cifs_host(&self.device)
            && host.name.parse::<IpAddr>().is_err()
        {
            let device = self.device.replacen(host.name, &address(host.name)?.to_string(), 1);
            return Ok((device, self.options.clone()));
        }
        Ok((self.device.clone(), self.options.clone()))
    }

    /// The text with the password of the options taken out.
    pub(crate) fn hide_password(&self, text: &str) -> String {
        match self.options.split(',').find_map(|option| option.strip_prefix("password=")) {
            Some(password) if !password.is_empty() => {
                text.replace(&format!("password={password}"), "password=********")
            }
            _ => text.to_owned(),
        }
    }
}

struct CifsHost<'a> {
    name: &'a str,
    port: Option<&'a str>,
}

/// The server in `//server/share` or `cifs://server/share`.
fn cifs_host(device: &str) -> Option<CifsHost<'_>> {
    let rest = device.split_once("//")?.1;
    let host = rest.split('/').next()?.rsplit('@').next()?;
    if host.is_empty() || host.starts_with('[') {
        return None;
    }
    let (name, port) = host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port)));
    Some(CifsHost { name, port: port.filter(|port| !port.is_empty()) })
}

fn address(name: &str) -> Result<IpAddr, OptionError> {
    let fail = |reason: String| OptionError::Address { name: name.to_owned(), reason };
    let mut found = (name, 0).to_socket_addrs().map_err(|error| fail(error.to_string()))?;
    found.next().map(|address| address.ip()).ok_or_else(|| fail("no such host".to_owned()))
}

/// `10m`, `1.5g`, `1GiB`, `500`: binary multiples.
fn bytes(text: &str) -> Option<u64> {
    let end = text.rfind(|letter: char| letter.is_ascii_digit())? + 1;
    let (number, unit) = (text[..end].trim(), text[end..].trim().to_ascii_lowercase());
    let factor = match unit.as_str() {
        "" | "b" => 1_u64,
        unit => {
            let (letter, rest) = unit.split_at_checked(1)?;
            if !matches!(rest, "" | "b" | "ib") {
                return None;
            }
            1 << (10 * ("kmgtp".find(letter)? + 1))
        }
    };
    let value: f64 = number.parse().ok()?;
    (value >= 0.0).then_some((value * factor as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Option<DriverOptions>, String> {
        let given = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        DriverOptions::parse(&given).map_err(|error| error.to_string())
    }

    #[test]
    fn options_are_checked_with_dockerds_sentences() {
        assert_eq!(parse(&[]), Ok(None));
        assert_eq!(parse(&[("device", ""), ("type", "")]), Ok(None));
        assert_eq!(parse(&[("foo", "bar")]).unwrap_err(), "invalid option: \"foo\"");
        assert_eq!(parse(&[("type", "tmpfs")]).unwrap_err(), "missing required option: \"device\"");
        assert_eq!(parse(&[("device", "x")]).unwrap_err(), "missing required option: \"type\"");
        assert_eq!(parse(&[("o", "x")]).unwrap_err(), "missing required option: \"device\"");
        assert_eq!(parse(&[("size", "10x")]).unwrap_err(), "invalid size: '10x'");
        assert_eq!(parse(&[("size", "10m")]).unwrap_err(), "quota size requested but no quota support");
        assert_eq!(parse(&[("size", "0")]), Ok(None));
        assert!(
            parse(&[("type", "cifs"), ("device", "//h:1/x")]).unwrap_err().starts_with("port not allowed")
        );
        let tmpfs = parse(&[("type", "tmpfs"), ("device", "tmpfs"), ("o", "size=1m")]).unwrap().unwrap();
        assert_eq!((tmpfs.kind.as_str(), tmpfs.options.as_str()), ("tmpfs", "size=1m"));
    }

    #[test]
    fn names_of_servers_become_addresses() {
        let nfs = |options: &str| DriverOptions {
            kind: "nfs".into(),
            device: ":/export".into(),
            options: options.into(),
        };
        assert_eq!(nfs("addr=10.0.0.1,rw").resolved().unwrap().1, "addr=10.0.0.1,rw");
        let local = nfs("rw,addr=localhost").resolved().unwrap().1;
        assert!(local == "rw,addr=127.0.0.1" || local == "rw,addr=::1", "{local}");
        let cifs =
            DriverOptions { kind: "cifs".into(), device: "//localhost/share".into(), options: String::new() };
        assert!(!cifs.resolved().unwrap().0.contains("localhost"));
    }

    #[test]
    fn a_password_is_shown_to_nobody() {
        let options = DriverOptions {
            kind: "cifs".into(),
            device: "//h/s".into(),
            options: "username=me,password=hunter2".into(),
        };
        assert!(!format!("{options:?}").contains("hunter2"));
        assert_eq!(options.hide_password("x password=hunter2 y"), "x password=******** y");
    }

    #[test]
    fn sizes_are_binary() {
        for (text, expected) in [
            ("500", Some(500)),
            ("1k", Some(1024)),
            ("1.5m", Some(3 << 19)),
            ("1GiB", Some(1 << 30)),
            ("x", None),
            ("1xb", None),
            ("-1", None),
        ] {
            assert_eq!(bytes(text), expected, "{text}");
        }
    }
}

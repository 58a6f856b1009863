//! What a container asks to be published. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use guest_api::{ContainerConfig, HostConfig};
use guest_network::Protocol;

use crate::failure::Failure;

/// One port to publish.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wanted {
    pub protocol: Protocol,
    pub container_port: u16,
    /// `None`: on every address of the host.
    pub host: Option<IpAddr>,
    /// One of these; `None`: any.
    pub host_ports: Option<(u16, u16)>,
}

/// Checks what can be checked before the container exists.
pub fn check(host: &HostConfig) -> Result<(), Failure> {
    for (port, bindings) in host.port_bindings.iter().flatten() {
        container_port(port).ok_or_else(|| invalid(port.split('/').next().unwrap_or_default()))?;
        for binding in bindings.iter().flatten() {
            host_ports(&binding.host_port)?;
            host_address(&binding.host_ip)?;
        }
    }
    Ok(())
}

/// Everything to publish, in order, each once.
pub fn wanted(config: &ContainerConfig, host: &HostConfig) -> Result<Vec<Wanted>, Failure> {
    let mut all = BTreeSet::new();
    for (port, bindings) in host.port_bindings.iter().flatten() {
        let (container_port, protocol) =
            container_port(port).ok_or_else(|| invalid(port.split('/').next().unwrap_or_default()))?;
        for binding in bindings.iter().flatten() {
            all.insert(Wanted {
                protocol,
                container_port,
                host: host_address(&binding.host_ip)?,
                host_ports: host_ports(&binding.host_port)?,
            });
        }
    }
    if host.publish_all_ports {
        for (container_port, protocol) in
            config.exposed_ports.iter().flatten().filter_map(|(port, _)| container_port(port))
        {
            let is_bound =
                all.iter().any(|it| it.container_port == container_port && it.protocol == protocol);
            if !is_bound {
                all.insert(Wanted { protocol, container_port, host: None, host_ports: None });
            }
        }
    }
    Ok(all.into_iter().collect())
}

/// A container's port as clients write it: `80/tcp`, `80`.
pub fn parse(text: &str) -> Result<(Protocol, u16), Failure> {
    let (port, protocol) = container_port(text).ok_or_else(|| invalid(text))?;
    Ok((protocol, port))
}

/// `80/tcp`, `80`.
fn container_port(text: &str) -> Option<(u16, Protocol)> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let number: u16 = number.parse().ok().filter(|number| *number > 0)?;
    Some((number, protocol.parse().ok()?))
}

/// Nothing or 0 is any port; `8080`, `8080-8090`.
fn host_ports(text: &str) -> Result<Option<(u16, u16)>, Failure> {
    let number = |text: &str| text.parse::<u16>().map_err(|_| invalid(text));
    let text = text.split('/').next().unwrap_or_default();
    let (first, last) = match text.split_once('-') {
        _ if text.is_empty() => return Ok(None),
        None => (number(text)?, number(text)?),
        Some((first, last)) => (number(first)?, number(last)?),
    };
    if first > last {
        return Err(invalid(text));
    }
    Ok(Some((first, last)).filter(|_| last > 0))
}

fn host_address(text: &str) -> Result<Option<IpAddr>, Failure> {
    if text.is_empty() {
        return Ok(None);
    }
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    bare.parse()
        .map(Some)
        .map_err(|_| Failure::invalid(format!("invalid host address \"{text}\" to publish on")))
}

fn invalid(text: &str) -> Failure {
    Failure::invalid(format!("invalid port specification: \"{text}\""))
}

impl Wanted {
    /// The host's ports to try, in order, when they are named.
    pub fn candidates(&self) -> Option<RangeInclusive<u16>> {
        self.host_ports.map(|(first, last)| first.max(1)..=last)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(host: serde_json::Value) -> Result<Vec<Wanted>, Failure> {
        let config: ContainerConfig =
            serde_json::from_value(json!({"ExposedPorts": {"80/tcp": {}, "53/udp": {}}})).unwrap();
        let host: HostConfig = guest_api::decode(host.to_string().as_bytes()).unwrap();
        check(&host)?;
        wanted(&config, &host)
    }

    #[test]
    fn bindings_are_read() {
        let bindings = json!({"PortBindings": {
            "80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}, {"HostIp": "", "HostPort": "8000-8010"}],
            "5000/sctp": [{"HostPort": ""}], "81": null,
        }});
        let found = read(bindings).unwrap();
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].host_ports, Some((8000, 8010)));
        assert_eq!(found[1].host, Some([127, 0, 0, 1].into()));
        assert_eq!((found[2].protocol, found[2].host_ports), (Protocol::Sctp, None));
        assert_eq!(found[0].candidates().unwrap().count(), 11);
    }

    #[test]
    fn everything_exposed_is_published_unless_bound() {
        let found =
            read(json!({"PublishAllPorts": true, "PortBindings": {"80/tcp": [{"HostPort": "80"}]}})).unwrap();
        let ports: Vec<_> = found.iter().map(|it| (it.container_port, it.host_ports)).collect();
        assert_eq!(ports, [(80, Some((80, 80))), (53, None)]);
    }

    #[test]
    fn nonsense_is_refused() {
        let refusal = |key: &str, binding: serde_json::Value| {
            read(json!({"PortBindings": {key: [binding]}})).unwrap_err().message
        };
        assert_eq!(refusal("x/tcp", json!({})), "invalid port specification: \"x\"");
        assert_eq!(refusal("0/tcp", json!({})), "invalid port specification: \"0\"");
        assert_eq!(refusal("80/icmp", json!({})), "invalid port specification: \"80\"");
        assert_eq!(refusal("80/tcp", json!({"HostPort": "70000"})), "invalid port specification: \"70000\"");
        assert_eq!(refusal("80/tcp", json!({"HostPort": "90-80"})), "invalid port specification: \"90-80\"");
        assert!(refusal("80/tcp", json!({"HostIp": "here"})).contains("\"here\""));
    }
}

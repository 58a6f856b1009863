//! `-p [ADDRESS:][HOST_PORT[-LAST]:]CONTAINER_PORT[-LAST][/PROTOCOL]`, as Docker reads it.

use anyhow::{Context, Result, ensure};
use guest_api::network::PortBinding;
use std::collections::BTreeMap;

/// Bindings by container port (`80/tcp`).
pub(crate) type Bindings = BTreeMap<String, Option<Vec<PortBinding>>>;

/// Reads all `-p` of a command line.
pub(crate) fn bindings(typed: &[String]) -> Result<Bindings> {
    let mut bindings = Bindings::new();
    for text in typed {
        for (port, binding) in parse(text)? {
            bindings.entry(port).or_default().get_or_insert_default().push(binding);
        }
    }
    Ok(bindings)
}

/// The container ports of `--expose PORT[-LAST][/PROTOCOL]`.
pub(crate) fn exposed(text: &str) -> Result<Vec<String>> {
    let (ports, protocol) = protocol_of(text)?;
    let (first, last) = range(ports).with_context(|| format!("invalid port `{text}`"))?;
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

fn parse(text: &str) -> Result<Vec<(String, PortBinding)>> {
    let (ports, protocol) = protocol_of(text)?;
    let invalid = || format!("invalid publish `{text}`: use [ADDRESS:][HOST_PORT:]CONTAINER_PORT[/PROTOCOL]");
    let (rest, container) = ports.rsplit_once(':').map_or((None, ports), |(rest, port)| (Some(rest), port));
    let (address, host) = match rest {
        None => ("", ""),
        Some(rest) => match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((address, host)) => (address, host.strip_prefix(':').unwrap_or(host)),
            None => rest.rsplit_once(':').unwrap_or(("", rest)),
        },
    };
    if !address.is_empty() {
        address.parse::<std::net::IpAddr>().ok().with_context(invalid)?;
    }
    let (first, last) = range(container).with_context(invalid)?;
    let host_ports: Vec<String> = match host {
        "" => (first..=last).map(|_| String::new()).collect(),
        // A range of host ports for one container port leaves the choice to the engine.
        host if first == last && host.contains('-') => {
            range(host).with_context(invalid)?;
            vec![host.to_owned()]
        }
        host => {
            let (host_first, host_last) = range(host).with_context(invalid)?;
            ensure!(
                host_last - host_first == last - first,
                "invalid publish `{text}`: the ranges of host and container ports differ in length"
            );
            (host_first..=host_last).map(|port| port.to_string()).collect()
        }
    };
    Ok((first..=last)
        .zip(host_ports)
        .map(|(port, host_port)| {
            (format!("{port}/{protocol}"), PortBinding { host_ip: address.to_owned(), host_port })
        })
        .collect())
}

fn protocol_of(text: &str) -> Result<(&str, String)> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    ensure!(
        ["tcp", "udp", "sctp"].contains(&protocol.as_str()),
        "invalid protocol `{protocol}` in `{text}`: use tcp, udp or sctp"
    );
    Ok((ports, protocol))
}

fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(text: &str, expected: &[(&str, &str, &str)]) {
        let found = parse(text).unwrap();
        let found: Vec<(&str, &str, &str)> = found
            .iter()
            .map(|(port, binding)| (port.as_str(), binding.host_ip.as_str(), binding.host_port.as_str()))
            .collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn all_forms() {
        check("80", &[("80/tcp", "", "")]);
        check("8080:80", &[("80/tcp", "", "8080")]);
        check("53:53/UDP", &[("53/udp", "", "53")]);
        check("127.0.0.1:8080:80", &[("80/tcp", "127.0.0.1", "8080")]);
        check("127.0.0.1::80", &[("80/tcp", "127.0.0.1", "")]);
        check("[::1]:8080:80", &[("80/tcp", "::1", "8080")]);
        check("8000-8001:80-81", &[("80/tcp", "", "8000"), ("81/tcp", "", "8001")]);
        check("8000-8010:80", &[("80/tcp", "", "8000-8010")]);
        assert_eq!(exposed("80-81/udp").unwrap(), ["80/udp", "81/udp"]);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "x", "80/icmp", "1-2:3-5", "9-8", "70000", "host:80:80", "80:80:80:80"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn anything_typed_does_no_harm(text in "[0-9a-z:.\\[\\]/-]{0,30}") {
            drop((parse(&text), exposed(&text)));
        }
    }
}

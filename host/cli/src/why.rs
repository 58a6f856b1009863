//! `engine net why`: the way to a container's port, link by link, and the cure of the first one that is broken.
//!
//! The engine knows the links from the container's name to its lease; the last one, the listener on this computer, is
//! tried from here.

use crate::docker::{ApiError, Docker, encode};
use crate::output::line;
use anyhow::Result;
use guest_api::network::WayLink;
use guest_api::{ContainerInspect, ContainerSummary};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// How long this computer may take to accept on its own address.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// What was asked about.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    /// A container, perhaps one of its ports (`80/tcp`).
    Container { name: String, port: Option<String> },
    /// A port of this computer, at an address or any.
    Host { address: Option<IpAddr>, port: u16 },
}

impl Target {
    /// `web`, `web:80`, `web:53/udp`, `8080`, `localhost:8080`, `[::1]:8080`, `http://localhost:8080/`.
    fn read(text: &str) -> Self {
        let bare = text.split_once("://").map_or(text, |(_, rest)| rest.split('/').next().unwrap_or(rest));
        if let Ok(address) = bare.parse::<SocketAddr>() {
            return Self::Host { address: Some(address.ip()), port: address.port() };
        }
        if let Ok(port) = bare.parse() {
            return Self::Host { address: None, port };
        }
        match bare.rsplit_once(':') {
            Some(("localhost", port)) if port.parse::<u16>().is_ok() => {
                Self::Host { address: None, port: port.parse().unwrap_or_default() }
            }
            Some((name, port)) => {
                let port = if port.contains('/') { port.to_owned() } else { format!("{port}/tcp") };
                Self::Container { name: name.to_owned(), port: Some(port) }
            }
            None => Self::Container { name: bare.to_owned(), port: None },
        }
    }
}

fn broken(link: &str, says: String, cure: String) -> WayLink {
    WayLink { link: link.to_owned(), holds: false, says, cure }
}

/// Prints the way to `target`; whether all of it holds.
pub(crate) async fn why(docker: &Docker, target: &str) -> Result<bool> {
    let links = walk(docker, Target::read(target)).await?;
    for link in &links {
        line(&format!("{:<8}{:<10}{}", if link.holds { "ok" } else { "broken" }, link.link, link.says))?;
    }
    let failed = links.iter().find(|link| !link.holds);
    if let Some(link) = failed {
        line(&format!("\ncure: {}", link.cure))?;
    }
    Ok(failed.is_none())
}

async fn walk(docker: &Docker, target: Target) -> Result<Vec<WayLink>> {
    let (name, port, host) = match target {
        Target::Container { name, port } => (name, port, None),
        Target::Host { address, port } => {
            let containers: Vec<ContainerSummary> = docker.get("/containers/json").await?;
            let found = containers.iter().find_map(|container| {
                let is_it = |bound: &&guest_api::container::PortSummary| {
                    bound.public_port == Some(port) && address.is_none_or(|address| hears(&bound.ip, address))
                };
                let bound = container.ports.iter().find(is_it)?;
                Some((container.id.clone(), format!("{}/{}", bound.private_port, bound.kind)))
            });
            let Some((id, inner)) = found else {
                let near = SocketAddr::new(address.unwrap_or(Ipv4Addr::LOCALHOST.into()), port);
                if let Some(links) = hosted(docker, &containers, near).await? {
                    return Ok(links);
                }
                let at = address.map_or_else(|| port.to_string(), |ip| SocketAddr::new(ip, port).to_string());
                return Ok(vec![broken(
                    "lease",
                    format!("no running container publishes {at}"),
                    format!(
                        "`engine ps -a` shows whose container has ended; publish one with `-p {port}:PORT`"
                    ),
                )]);
            };
            (id, Some(inner), Some(port))
        }
    };
    let mut links = match ask(docker, &name, port.as_deref()).await {
        Err(error) if error.downcast_ref::<ApiError>().is_some_and(|error| error.status.as_u16() == 404) => {
            return Ok(vec![broken(
                "name",
                format!("there is no container called {name}"),
                "`engine ps -a` shows all there are".to_owned(),
            )]);
        }
        links => links?,
    };
    if let Some(port) = port.filter(|_| links.iter().all(|link| link.holds)) {
        let inspect: ContainerInspect = docker.get(&format!("/containers/{}/json", encode(&name))).await?;
        let bindings = inspect.network_settings.ports.get(&port).cloned().flatten().unwrap_or_default();
        let addresses = bindings.iter().filter_map(|binding| {
            Some(SocketAddr::new(binding.host_ip.parse().ok()?, binding.host_port.parse().ok()?))
        });
        let asked = addresses.filter(|address| host.is_none_or(|host| address.port() == host));
        // Datagrams are not acknowledged: nothing could be learned.
        links.extend(asked.filter(|_| port.ends_with("/tcp")).map(reach));
        let first_broken = links.iter().position(|link| !link.holds);
        links.truncate(first_broken.map_or(links.len(), |at| at + 1));
    }
    Ok(links)
}

async fn ask(docker: &Docker, container: &str, port: Option<&str>) -> Result<Vec<WayLink>> {
    let query = port.map(|port| format!("?port={}", encode(port))).unwrap_or_default();
    docker.get(&format!("/containers/{}/why{query}", encode(container))).await
}

/// The way to what a container on the machine's own network listens at; such ports are published without being asked for.
async fn hosted(
    docker: &Docker,
    containers: &[ContainerSummary],
    address: SocketAddr,
) -> Result<Option<Vec<WayLink>>> {
    for container in containers.iter().filter(|one| one.host_config.network_mode == "host") {
        let mut links = ask(docker, &container.id, Some(&format!("{}/tcp", address.port()))).await?;
        if links.iter().all(|link| link.holds) {
            links.push(reach(address));
            return Ok(Some(links));
        }
    }
    Ok(None)
}

/// Whether a listener at `bound` hears what is sent to `address`.
fn hears(bound: &str, address: IpAddr) -> bool {
    bound
        .parse::<IpAddr>()
        .is_ok_and(|bound| bound == address || bound.is_unspecified() && bound.is_ipv4() == address.is_ipv4())
}

/// Tries the listener on this computer.
fn reach(address: SocketAddr) -> WayLink {
    let near = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    match TcpStream::connect_timeout(&SocketAddr::new(near, address.port()), CONNECT_TIME_MAX) {
        Ok(_) => WayLink {
            link: "host".to_owned(),
            holds: true,
            says: format!("{address} takes connections on this computer"),
            cure: String::new(),
        },
        Err(error) => broken(
            "host",
            format!("{address} takes no connections on this computer: {error}"),
            "a firewall of this computer may refuse it; `engine machine logs --daemon` tells of lost leases"
                .to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_people_write_them() {
        let container = |name: &str, port: Option<&str>| Target::Container {
            name: name.to_owned(),
            port: port.map(str::to_owned),
        };
        let host = |address: Option<&str>, port| Target::Host {
            address: address.map(|address| address.parse().unwrap()),
            port,
        };
        for (text, expected) in [
            ("web", container("web", None)),
            ("web:80", container("web", Some("80/tcp"))),
            ("dns:53/udp", container("dns", Some("53/udp"))),
            ("8080", host(None, 8080)),
            ("localhost:8080", host(None, 8080)),
            ("http://localhost:8080/index.html", host(None, 8080)),
            ("127.0.0.1:80", host(Some("127.0.0.1"), 80)),
            ("[::1]:80", host(Some("::1"), 80)),
        ] {
            assert_eq!(Target::read(text), expected, "{text}");
        }
    }

    #[test]
    fn a_listener_at_all_addresses_hears_each_of_its_family() {
        let address = IpAddr::from([127, 0, 0, 1]);
        assert!(hears("0.0.0.0", address) && hears("127.0.0.1", address));
        assert!(!hears("::", address) && !hears("192.0.2.1", address));
    }

    #[test]
    fn this_computers_listener_is_tried() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(reach(address).holds);
        drop(listener);
        let link = reach(address);
        assert!(!link.holds && link.says.contains("takes no connections"), "{link:?}");
    }
}

//! Links of the default network: what `--link other:alias` puts into /etc/hosts and the environment.

use std::collections::BTreeMap;

use guest_api::ErrorKind;

use super::super::index::Index;
use super::super::record::Record;
use super::super::run::Context;
use crate::failure::Failure;

/// A link that counts: the other container runs.
pub struct Link {
    pub alias: String,
    /// The other container's addresses on the default network.
    addresses: Vec<String>,
    record: Record,
}

/// Replaces names by ids, which stay when a container is renamed. All of them must be there.
pub fn resolve(index: &Index, links: &mut Option<Vec<String>>) -> Result<(), Failure> {
    for link in links.iter_mut().flatten() {
        let (name, alias) = parse(link)?;
        let view = index
            .find(name)
            // Not "not found": clients would look for the image.
            .map_err(|failure| Failure::invalid(format!("could not get container for {name}: {failure}")))?
            .view();
        if view.record.host.network_mode == "host" {
            return Err(Failure::invalid(
                "conflicting options: host type networking can't be used with links. This would result in undefined \
                 behavior",
            ));
        }
        *link = format!("{}:{alias}", view.record.id);
    }
    Ok(())
}

/// `name:alias`, or a name alone; as inspect shows it, `/name:/own/alias`.
fn parse(link: &str) -> Result<(&str, &str), Failure> {
    let invalid = || Failure::invalid(format!("bad format for links: {link}"));
    let (name, alias) = link.split_once(':').unwrap_or((link, link));
    let (name, alias) = (name.trim_start_matches('/'), alias.rsplit('/').next().unwrap_or_default());
    if name.is_empty() || alias.is_empty() || alias.contains(':') {
        Err(invalid())
    } else {
        Ok((name, alias))
    }
}

/// The containers that a container has links to, by id.
pub fn targets(record: &Record) -> impl Iterator<Item = &str> {
    record.host.links.iter().flatten().filter_map(|link| Some(parse(link).ok()?.0))
}

/// What inspect shows: names again.
pub fn shown(index: &Index, record: &Record) -> Option<Vec<String>> {
    let links = record.host.links.as_ref().filter(|links| !links.is_empty())?;
    let shown = links.iter().filter_map(|link| {
        let (id, alias) = parse(link).ok()?;
        let other = index.find(id).ok()?.view().record.name.clone();
        Some(format!("/{other}:/{}/{alias}", record.name))
    });
    Some(shown.collect())
}

/// The record without one of its links.
pub fn without(record: &Record, alias: &str) -> Result<Option<Vec<String>>, Failure> {
    let links: Vec<String> = record.host.links.clone().unwrap_or_default();
    let kept: Vec<String> =
        links.iter().filter(|link| parse(link).map_or(true, |(_, known)| known != alias)).cloned().collect();
    if kept.len() == links.len() {
        return Err(Failure::new(ErrorKind::Internal, "Could not get parent/child link"));
    }
    Ok(Some(kept).filter(|kept| !kept.is_empty()))
}

/// The links of a container that is about to start on the default network.
pub fn find(context: &Context, record: &Record) -> Result<Vec<Link>, Failure> {
    let mut found = Vec::new();
    for link in record.host.links.iter().flatten() {
        let (id, alias) = parse(link)?;
        let view = context.index.find(id)?.view();
        if view.live.is_none() {
            return Err(Failure::broken(format!(
                "Cannot link to a non running container: /{} AS /{}/{alias}",
                view.record.name, record.name
            )));
        }
        let places = context.networks.places(&view.record.id);
        let Some(place) = places.iter().find(|place| place.network == "bridge") else {
            return Err(Failure::broken(format!(
                "Cannot link to /{}, as it does not belong to the default network",
                view.record.name
            )));
        };
        found.push(Link {
            alias: alias.to_owned(),
            addresses: place.addresses.iter().map(|net| net.addr().to_string()).collect(),
            record: Record::clone(&view.record),
        });
    }
    Ok(found)
}

impl Link {
    /// Lines of /etc/hosts.
    pub fn hosts(&self) -> String {
        let record = &self.record;
        let mut names = format!("{} {}", self.alias, record.config.hostname);
        if self.alias != record.name {
            names = format!("{names} {}", record.name);
        }
        self.addresses.iter().map(|address| format!("{address}\t{names}\n")).collect()
    }

    /// Variables of the environment; `parent` is the name of the container that has the link.
    pub fn environment(&self, parent: &str) -> Vec<String> {
        let prefix = self.alias.to_uppercase().replace('-', "_");
        let address = self.addresses.first().map(String::as_str).unwrap_or_default();
        let mut ports: Vec<(u8, String, u16)> = self
            .record
            .config
            .exposed_ports
            .iter()
            .flatten()
            .filter_map(|(port, _)| {
                let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
                // TCP first.
                Some((u8::from(protocol != "tcp"), protocol.to_owned(), number.parse().ok()?))
            })
            .collect();
        ports.sort();
        let mut variables = Vec::new();
        if let Some((_, protocol, port)) = ports.first() {
            variables.push(format!("{prefix}_PORT={protocol}://{address}:{port}"));
        }
        for (_, protocol, port) in &ports {
            let name = format!("{prefix}_PORT_{port}_{}", protocol.to_uppercase());
            variables.push(format!("{name}={protocol}://{address}:{port}"));
            variables.push(format!("{name}_ADDR={address}"));
            variables.push(format!("{name}_PORT={port}"));
            variables.push(format!("{name}_PROTO={protocol}"));
        }
        for range in ranges(&ports) {
            let (protocol, first, last) = range;
            let name = format!("{prefix}_PORT_{first}_{}", protocol.to_uppercase());
            variables.push(format!("{name}_START={protocol}://{address}:{first}"));
            variables.push(format!("{name}_PORT_START={first}"));
            variables.push(format!("{name}_END={protocol}://{address}:{last}"));
            variables.push(format!("{name}_PORT_END={last}"));
        }
        variables.push(format!("{prefix}_NAME=/{parent}/{}", self.alias));
        for entry in self.record.config.env.iter().flatten() {
            if let Some((name, value)) = entry.split_once('=')
                && !matches!(name, "HOME" | "PATH")
            {
                variables.push(format!("{prefix}_ENV_{name}={value}"));
            }
        }
        variables
    }
}

/// Runs of consecutive ports.
fn ranges(ports: &[(u8, String, u16)]) -> Vec<(String, u16, u16)> {
    let mut runs: BTreeMap<(u8, String, u16), u16> = BTreeMap::new();
    let mut start: Option<&(u8, String, u16)> = None;
    for (at, port) in ports.iter().enumerate() {
        let follows =
            at > 0 && ports[at - 1].1 == port.1 && u32::from(ports[at - 1].2) + 1 == u32::from(port.2);
        if !follows {
            start = Some(port);
        }
        if let Some(start) = start.filter(|start| start.2 != port.2) {
            runs.insert(start.clone(), port.2);
        }
    }
    runs.into_iter().map(|((_, protocol, first), last)| (protocol, first, last)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::record::tests::record;
    use super::*;

    fn link(ports: &[&str]) -> Link {
        let mut record = record();
        record.name = "db".into();
        record.config.hostname = "abc".into();
        record.config.env = Some(vec!["FOO=1".into(), "PATH=/bin".into()]);
        record.config.exposed_ports =
            Some(ports.iter().map(|port| ((*port).to_owned(), guest_api::EmptyObject {})).collect());
        Link { alias: "my-db".into(), addresses: vec!["172.17.0.2".into()], record }
    }

    #[test]
    fn a_link_is_a_line_of_names() {
        assert_eq!(link(&[]).hosts(), "172.17.0.2\tmy-db abc db\n");
    }

    #[test]
    fn a_link_is_variables() {
        let variables = link(&["53/udp", "80/tcp"]).environment("web");
        assert_eq!(variables[0], "MY_DB_PORT=tcp://172.17.0.2:80");
        assert!(variables.contains(&"MY_DB_PORT_53_UDP_ADDR=172.17.0.2".to_owned()));
        assert_eq!(variables[variables.len() - 2..], ["MY_DB_NAME=/web/my-db", "MY_DB_ENV_FOO=1"]);
        let run = link(&["80/tcp", "81/tcp", "82/tcp", "90/tcp"]).environment("web");
        assert!(run.contains(&"MY_DB_PORT_80_TCP_PORT_END=82".to_owned()), "{run:?}");
        assert!(!run.iter().any(|variable| variable.contains("90_TCP_END")));
    }

    #[test]
    fn links_are_read_and_taken_away() {
        assert_eq!(parse("db:mine"), Ok(("db", "mine")));
        assert_eq!(parse("/db:/web/mine"), Ok(("db", "mine")));
        assert_eq!(parse("db"), Ok(("db", "db")));
        assert!(parse(":x").is_err() && parse("a:b:c").is_err());
        let mut record = record();
        record.host.links = Some(vec!["db:mine".into()]);
        assert_eq!(targets(&record).collect::<Vec<_>>(), ["db"]);
        assert_eq!(without(&record, "mine"), Ok(None));
        assert!(without(&record, "other").is_err());
    }
}

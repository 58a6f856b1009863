//! The three files every container gets over its image's: /etc/hosts, /etc/hostname and /etc/resolv.conf. Pure text.

use std::net::IpAddr;
use std::path::Path;

use guest_api::HostConfig;
use sha2::{Digest, Sha256};

use crate::config::ContainerDefaults;
use crate::failure::Failure;

/// /etc/hosts. `own` are the container's addresses, `host_gateways` what `host-gateway` stands for.
pub fn hosts(
    hostname: &str,
    domainname: &str,
    own: &[IpAddr],
    extra: &[String],
    host_gateways: &[IpAddr],
) -> Result<String, Failure> {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    for entry in extra {
        let (name, address) = extra_host(entry)?;
        for address in address.as_ref().map_or(host_gateways, std::slice::from_ref) {
            text.push_str(&format!("{address}\t{name}\n"));
        }
    }
    for own in own {
        text.push_str(&own_line(own, hostname, domainname));
    }
    Ok(text)
}

/// Splits `name:address` (or, as newer clients write, `name=address`); `None` is `host-gateway`.
pub fn extra_host(entry: &str) -> Result<(&str, Option<IpAddr>), Failure> {
    let bad = || Failure::invalid(format!("bad format for add-host: \"{entry}\""));
    let (name, address) = entry.split_once(['=', ':']).ok_or_else(bad)?;
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(bad());
    }
    if address == "host-gateway" {
        return Ok((name, None));
    }
    let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    let parsed = bare
        .parse()
        .map_err(|_| Failure::invalid(format!("invalid IP address in add-host: \"{address}\"")))?;
    Ok((name, Some(parsed)))
}

/// What is said about names: by the container itself, else by the engine's settings, each for itself.
#[derive(Debug, Default, Clone)]
pub struct NameSettings {
    servers: Vec<String>,
    search: Vec<String>,
    options: Vec<String>,
}

impl NameSettings {
    pub fn of(host: &HostConfig, defaults: &ContainerDefaults) -> Self {
        let own = |given: &Option<Vec<String>>| given.clone().filter(|list| !list.is_empty());
        let usual = || defaults.dns.iter().map(ToString::to_string).collect();
        Self {
            servers: own(&host.dns).unwrap_or_else(usual),
            search: own(&host.dns_search).unwrap_or_else(|| defaults.dns_search.clone()),
            options: own(&host.dns_options).unwrap_or_else(|| defaults.dns_options.clone()),
        }
    }
}

/// /etc/resolv.conf from the host's, with the container's own settings over it. Name servers on loopback addresses
/// cannot be reached from the container's network and are left out, unless it uses the host's network.
pub fn resolv_conf(host_file: &str, settings: &NameSettings, uses_host_network: bool) -> String {
    let words = |keyword: &str| -> Vec<String> {
        host_file
            .lines()
            .filter_map(|line| line.trim().strip_prefix(keyword))
            .filter(|rest| rest.starts_with(char::is_whitespace))
            .flat_map(|rest| rest.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .collect()
    };
    let reachable = |server: &String| {
        let address = server.split('%').next().unwrap_or_default();
        uses_host_network || address.parse::<IpAddr>().is_ok_and(|address| !address.is_loopback())
    };
    let or = |given: &[String], else_words: Vec<String>| {
        if given.is_empty() { else_words } else { given.to_vec() }
    };
    let servers = or(&settings.servers, words("nameserver").into_iter().filter(reachable).collect());
    let search = or(&settings.search, words("search"));
    let options = or(&settings.options, words("options"));

    let mut text = String::new();
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    // A search domain of `.` means none at all.
    if !search.is_empty() && search != ["."] {
        text.push_str(&format!("search {}\n", search.join(" ")));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}

/// /etc/resolv.conf of a container that has a name server of its own, which asks the others.
pub fn resolv_conf_of_server(host_file: &str, settings: &NameSettings) -> String {
    let inner = resolv_conf(host_file, settings, true);
    let mut text = String::from("nameserver 127.0.0.11\n");
    let mut options = Vec::new();
    for line in inner.lines() {
        match line.split_once(' ') {
            Some(("search", _)) => text.push_str(&format!("{line}\n")),
            Some(("options", rest)) => options.extend(rest.split_whitespace()),
            _ => {}
        }
    }
    let given = settings.options.iter().any(|option| option.starts_with("ndots:"));
    if !given {
        options.retain(|option| !option.starts_with("ndots:"));
        // Names without a dot are asked as they are: they are the other containers'.
        options.push("ndots:0");
    }
    text.push_str(&format!("options {}\n", options.join(" ")));
    text
}

/// Where the sum of what the engine wrote into /etc/resolv.conf is kept.
const SUM: &str = "resolv.conf.hash";

/// Writes /etc/resolv.conf, unless it holds something that the engine did not write.
pub fn write_unless_edited(folder: &Path, text: &str) -> std::io::Result<()> {
    let sum = |text: &[u8]| hex::encode(Sha256::digest(text));
    let (file, sum_file) = (folder.join("resolv.conf"), folder.join(SUM));
    let missing = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(Vec::new()),
        _ => Err(error),
    };
    let (present, written) =
        (std::fs::read(&file).or_else(missing)?, std::fs::read(&sum_file).or_else(missing)?);
    if !present.is_empty() && !written.is_empty() && sum(&present).as_bytes() != written {
        return Ok(());
    }
    if present != text.as_bytes() {
        // In place: a running container has this very file mounted.
        std::fs::write(&file, text)?;
    }
    std::fs::write(sum_file, sum(text.as_bytes()))
}

/// /etc/hosts without the lines the engine wrote for addresses that are gone, and with lines for new ones.
pub fn change_hosts(
    hosts: &str,
    hostname: &str,
    domainname: &str,
    gone: &[IpAddr],
    come: &[IpAddr],
) -> String {
    let line = |address: &IpAddr| own_line(address, hostname, domainname);
    let leaves: Vec<String> = gone.iter().map(line).collect();
    let mut text: String =
        hosts.split_inclusive('\n').filter(|kept| !leaves.iter().any(|line| line == kept)).collect();
    for line in come.iter().map(line).filter(|line| !text.contains(line.as_str())).collect::<Vec<_>>() {
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(&line);
    }
    text
}

fn own_line(address: &IpAddr, hostname: &str, domainname: &str) -> String {
    let full = if domainname.is_empty() { String::new() } else { format!("{hostname}.{domainname} ") };
    format!("{address}\t{full}{hostname}\n")
}

/// The host's resolver configuration; the one behind systemd's local stub where that is used.
pub fn host_resolv_conf() -> String {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    if text.lines().any(|line| line.trim() == "nameserver 127.0.0.53")
        && let Ok(behind) = std::fs::read_to_string("/run/systemd/resolve/resolv.conf")
    {
        return behind;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY: &[IpAddr] = &[IpAddr::V4(std::net::Ipv4Addr::new(172, 17, 0, 1))];

    #[test]
    fn hosts_has_the_own_address_last() {
        let own = [[172, 17, 0, 2].into()];
        let extra = ["db:10.0.0.9".to_owned(), "up:host-gateway".to_owned(), "six=[::1]".to_owned()];
        let text = hosts("web", "example.org", &own, &extra, GATEWAY).unwrap();
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(
            text.ends_with("10.0.0.9\tdb\n172.17.0.1\tup\n::1\tsix\n172.17.0.2\tweb.example.org web\n"),
            "{text}"
        );
        assert!(!hosts("web", "", &[], &[], GATEWAY).unwrap().contains("web"));
        let both = [GATEWAY[0], "fd00::1".parse().unwrap()];
        let text = hosts("web", "", &[], &extra[1..2], &both).unwrap();
        assert!(text.ends_with("172.17.0.1\tup\nfd00::1\tup\n"), "{text}");
    }

    #[test]
    fn bad_extra_hosts_are_named() {
        assert_eq!(extra_host("db").unwrap_err().message, "bad format for add-host: \"db\"");
        assert_eq!(
            extra_host("db:nowhere").unwrap_err().message,
            "invalid IP address in add-host: \"nowhere\""
        );
        assert!(extra_host("d b:1.2.3.4").is_err());
    }

    #[test]
    fn loopback_name_servers_are_left_out() {
        let file = "# by hand\nnameserver 127.0.0.53\nnameserver 9.9.9.9\nsearch a.example b.example\noptions ndots:2\n";
        let settings = NameSettings::default();
        assert_eq!(
            resolv_conf(file, &settings, false),
            "nameserver 9.9.9.9\nsearch a.example b.example\noptions ndots:2\n"
        );
        assert!(resolv_conf(file, &settings, true).contains("127.0.0.53"));
    }

    #[test]
    fn a_name_server_of_its_own_stands_before_the_hosts() {
        let file = "nameserver 9.9.9.9\nsearch a.example\noptions ndots:5 timeout:1\n";
        let text = resolv_conf_of_server(file, &NameSettings::default());
        assert_eq!(text, "nameserver 127.0.0.11\nsearch a.example\noptions timeout:1 ndots:0\n");
        let given = NameSettings { options: vec!["ndots:2".into()], ..NameSettings::default() };
        assert!(resolv_conf_of_server(file, &given).ends_with("options ndots:2\n"));
    }

    #[test]
    fn lines_come_and_go_and_the_users_stay() {
        let hosts = "127.0.0.1\tlocalhost\n172.17.0.2\tweb\n10.0.0.1\tmine";
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let text = change_hosts(hosts, "web", "", &[address("172.17.0.2")], &[address("172.18.0.2")]);
        assert_eq!(text, "127.0.0.1\tlocalhost\n10.0.0.1\tmine\n172.18.0.2\tweb\n");
        assert_eq!(change_hosts(&text, "web", "", &[], &[address("172.18.0.2")]), text);
    }

    #[test]
    fn what_the_user_wrote_is_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resolv.conf");
        write_unless_edited(folder.path(), "nameserver 1.1.1.1\n").unwrap();
        write_unless_edited(folder.path(), "nameserver 2.2.2.2\n").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "nameserver 2.2.2.2\n");
        std::fs::write(&file, "nameserver 3.3.3.3\n").unwrap();
        write_unless_edited(folder.path(), "nameserver 4.4.4.4\n").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "nameserver 3.3.3.3\n");
    }

    #[test]
    fn the_containers_settings_win() {
        let host = HostConfig {
            dns: Some(vec!["1.1.1.1".into()]),
            dns_search: Some(vec![".".into()]),
            ..HostConfig::default()
        };
        let defaults = ContainerDefaults {
            dns: vec!["2.2.2.2".parse().unwrap()],
            dns_options: vec!["use-vc".into()],
            ..ContainerDefaults::default()
        };
        let settings = NameSettings::of(&host, &defaults);
        assert_eq!(
            resolv_conf("nameserver 9.9.9.9\nsearch x\n", &settings, false),
            "nameserver 1.1.1.1\noptions use-vc\n"
        );
    }
}

//! The engine's own nftables table, written as a whole in one transaction.
//!
//! What the table should say follows from the networks and the published ports, so every change is "say it all again":
//! no drift, no half state, and a table that somebody flushed or that an engine left when it died is whole afterwards.
//! The rules never change; they look things up in sets and maps, which hold the networks. Starting a container without
//! published ports writes nothing. No other table is read or touched.
//!
//! ```text
//! raw          what comes from a container for a loopback address of the host: dropped
//! prerouting   for an address of the host and a published port: to the container, unless a relay is to carry it
//! output       the same, from the host itself, IPv4 loopback addresses included
//! forward      replies; between containers of a network, or what links of one open; published ports; trusted
//!              interfaces; out: accepted. Into or out of an internal network, between containers of a network whose
//!              containers are apart, and anything else that is for a container: dropped
//! postrouting  what leaves a network, and what a container sends to its own published port: from our address
//! ```

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Stdio;
use std::time::Duration;

use ipnet::IpNet;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::bridge::is_interface_name;

/// Longest a transaction may take; `nft` needs milliseconds, a hung one must not hold a container's start for ever.
const NFT_DEADLINE: Duration = Duration::from_secs(20);

/// The table of one engine. Engines on one computer use different names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firewall {
    table: String,
}

/// What the firewall knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// The networks.
    pub networks: Vec<FirewallNetwork>,
    /// The published ports.
    pub ports: Vec<FirewallPort>,
    /// What is open between containers of a network that are otherwise apart.
    pub links: Vec<FirewallLink>,
}

/// What the firewall knows of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallNetwork {
    /// The bridge's interface name.
    pub bridge: String,
    /// The network's addresses.
    pub subnets: Vec<IpNet>,
    /// Nothing goes in or out.
    pub internal: bool,
    /// Its containers reach each other.
    pub direct: bool,
    /// What its containers send to published ports is for a program of the host that carries it on.
    pub relayed: bool,
    /// Those of its addresses that hide behind the outgoing interface's.
    pub hidden: Vec<IpNet>,
    /// Its containers can be reached directly from everywhere.
    pub open: bool,
    /// Interfaces of the host from which its containers may be reached directly.
    pub trusted: Vec<String>,
}

/// One port of a container that is open to one other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FirewallLink {
    /// The network's bridge.
    pub bridge: String,
    /// Who asks.
    pub from: Ipv4Addr,
    /// Who answers.
    pub to: Ipv4Addr,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// One published port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FirewallPort {
    /// `tcp`, `udp` or `sctp`.
    pub protocol: Protocol,
    /// The host's address, or the unspecified one for all.
    pub host: IpAddr,
    /// The host's port.
    pub host_port: u16,
    /// The container's address, of the same family.
    pub container: IpAddr,
    /// The container's port.
    pub container_port: u16,
}

/// A transport with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// `tcp`, `udp` or `sctp`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

impl std::str::FromStr for Protocol {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Tcp, Self::Udp, Self::Sctp]
            .into_iter()
            .find(|protocol| text.eq_ignore_ascii_case(protocol.name()))
            .ok_or(())
    }
}

/// Why the rules could not be written.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// `nft` cannot be run.
    #[error("cannot run `nft` to write firewall table `{table}`")]
    Run {
        /// The table.
        table: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `nft` did not like the rules.
    #[error("cannot write firewall table `{table}`: {reason}")]
    Refused {
        /// The table.
        table: String,
        /// What `nft` printed.
        reason: String,
    },
    /// `nft` hangs.
    #[error("cannot write firewall table `{table}`: `nft` did not answer within {} s", NFT_DEADLINE.as_secs())]
    Deadline {
        /// The table.
        table: String,
    },
}

impl Firewall {
    /// The table called `table` in the family `inet`. Nothing is written yet.
    pub fn new(table: impl Into<String>) -> Self {
        Self { table: table.into() }
    }

    /// Makes the table say exactly these rules, in one transaction: before it the old ones count, after it the new.
    /// Connections that exist go on. Dropped halfway, either nothing or everything is done.
    ///
    /// # Errors
    /// When `nft` is missing, refuses or hangs; then nothing has changed.
    pub async fn apply(&self, rules: &Rules) -> Result<(), FirewallError> {
        let trusted = rules.networks.iter().flat_map(|network| &network.trusted);
        let bridges = rules.networks.iter().map(|network| &network.bridge);
        let refused = trusted
            .chain(bridges)
            .chain(rules.links.iter().map(|link| &link.bridge))
            .find(|name| !is_interface_name(name))
            .map(|name| format!("`{name}` cannot name an interface"));
        if let Some(reason) = refused {
            return Err(FirewallError::Refused { table: self.table.clone(), reason });
        }
        self.run(script(&self.table, rules)).await
    }

    /// Removes the table. One that is not there is fine.
    ///
    /// # Errors
    /// When `nft` is missing, refuses or hangs.
    pub async fn remove(&self) -> Result<(), FirewallError> {
        let table = &self.table;
        self.run(format!("add table inet {table}\ndelete table inet {table}\n")).await
    }

    /// Whether the table is there; what it says is not looked at.
    ///
    /// # Errors
    /// When `nft` is missing or hangs.
    pub async fn stands(&self) -> Result<bool, FirewallError> {
        match self.run(format!("list table inet {}\n", self.table)).await {
            Ok(()) => Ok(true),
            Err(FirewallError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn run(&self, script: String) -> Result<(), FirewallError> {
        let table = || self.table.clone();
        let failed = |source| FirewallError::Run { table: table(), source };
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let mut stdin = child.stdin.take().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        let conversation = async {
            // Should nft leave early, its exit status and message say more than the broken pipe.
            let written = stdin.write_all(script.as_bytes()).await;
            drop(stdin);
            let output = child.wait_with_output().await?;
            if output.status.success() { written.map(|()| output) } else { Ok(output) }
        };
        let output = timeout(NFT_DEADLINE, conversation)
            .await
            .map_err(|_| FirewallError::Deadline { table: table() })?
            .map_err(failed)?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let reason = match text.trim() {
            "" => output.status.to_string(),
            text => text.to_owned(),
        };
        Err(FirewallError::Refused { table: table(), reason })
    }
}

/// Sets and maps, by name and type. `direct` and `apart` hold each network's bridge twice; `own` holds each network's addresses with its bridge, `hidden` the addresses to
/// masquerade; `ports` is for published ports on every address of the host, `ports_at` for those on one.
const SETS: [(&str, &str); 14] = [
    ("set bridges", "type ifname"),
    ("set direct", "type ifname . ifname"),
    ("set apart", "type ifname . ifname"),
    ("set links", "type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service"),
    ("set relayed", "type ifname"),
    ("set sealed", "type ifname"),
    ("set open", "type ifname"),
    ("set trusted", "type ifname . ifname"),
    ("set own4", "type ipv4_addr . ifname; flags interval"),
    ("set own6", "type ipv6_addr . ifname; flags interval"),
    ("set hidden4", "type ipv4_addr; flags interval"),
    ("set hidden6", "type ipv6_addr; flags interval"),
    ("map ports4", "type inet_proto . inet_service : ipv4_addr . inet_service"),
    ("map ports6", "type inet_proto . inet_service : ipv6_addr . inet_service"),
];
const SETS_AT: [(&str, &str); 2] = [
    ("map ports4_at", "type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service"),
    ("map ports6_at", "type inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service"),
];

const CHAINS: [(&str, &str, &[&str]); 5] = [
    ("raw", "type filter hook prerouting priority raw", &["iifname @bridges ip daddr 127.0.0.0/8 drop"]),
    (
        "prerouting",
        "type nat hook prerouting priority dstnat",
        &[
            "ip daddr 127.0.0.0/8 return",
            // Where bridged packets are filtered too, a neighbour's would be led to it past us, by ports that are isolated.
            "iifname @relayed return",
            "fib daddr type local dnat ip to meta l4proto . ip daddr . th dport map @ports4_at",
            "fib daddr type local dnat ip to meta l4proto . th dport map @ports4",
            "fib daddr type local dnat ip6 to meta l4proto . ip6 daddr . th dport map @ports6_at",
            "fib daddr type local dnat ip6 to meta l4proto . th dport map @ports6",
        ],
    ),
    (
        "output",
        "type nat hook output priority -100",
        &[
            // Answers to it would have to come from elsewhere; a relay in the engine serves it instead.
            "ip6 daddr ::1 return",
            "fib daddr type local dnat ip to meta l4proto . ip daddr . th dport map @ports4_at",
            "fib daddr type local dnat ip to meta l4proto . th dport map @ports4",
            "fib daddr type local dnat ip6 to meta l4proto . ip6 daddr . th dport map @ports6_at",
            "fib daddr type local dnat ip6 to meta l4proto . th dport map @ports6",
        ],
    ),
    (
        "forward",
        "type filter hook forward priority filter",
        &[
            "ct state established,related accept",
            "iifname . oifname @direct accept",
            "iifname @sealed drop",
            "oifname @sealed drop",
            "ct status dnat oifname @bridges accept",
            "iifname . ip saddr . ip daddr . meta l4proto . th dport @links accept",
            "iifname . oifname @apart drop",
            "iifname . oifname @trusted accept",
            "oifname @open accept",
            "oifname @bridges drop",
            "iifname @bridges accept",
        ],
    ),
    (
        "postrouting",
        "type nat hook postrouting priority srcnat",
        &[
            // To itself, or to a neighbour, by way of the host's address: the answer has to come back this way.
            "ct status dnat ip saddr . oifname @own4 masquerade",
            "ct status dnat ip6 saddr . oifname @own6 masquerade",
            "ip saddr . oifname @own4 return",
            "ip6 saddr . oifname @own6 return",
            "ip saddr 127.0.0.0/8 oifname @bridges masquerade",
            "ip saddr @hidden4 masquerade",
            "ip6 saddr @hidden6 masquerade",
        ],
    ),
];

/// The transaction's text.
fn script(table: &str, rules: &Rules) -> String {
    let mut text = format!("add table inet {table}\n");
    let mut say = |line: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = text.write_fmt(line);
        text.push('\n');
    };
    for (name, kind) in SETS.iter().chain(&SETS_AT) {
        let (what, name) = name.split_once(' ').unwrap_or(("set", name));
        say(format_args!("add {what} inet {table} {name} {{ {kind}; }}"));
    }
    for (name, hook, _) in CHAINS {
        say(format_args!("add chain inet {table} {name} {{ {hook}; policy accept; }}"));
        say(format_args!("flush chain inet {table} {name}"));
    }
    for (name, _) in SETS.iter().chain(&SETS_AT) {
        say(format_args!("flush {name_with_table}", name_with_table = with_table(name, table)));
    }
    for (name, _, lines) in CHAINS {
        for line in lines {
            say(format_args!("add rule inet {table} {name} {line}"));
        }
    }
    for (name, elements) in elements(rules) {
        if !elements.is_empty() {
            say(format_args!("add element inet {table} {name} {{ {} }}", elements.join(", ")));
        }
    }
    text
}

fn with_table(name: &str, table: &str) -> String {
    let (what, name) = name.split_once(' ').unwrap_or(("set", name));
    format!("{what} inet {table} {name}")
}

fn elements(rules: &Rules) -> Vec<(&'static str, Vec<String>)> {
    let networks = &rules.networks;
    let named = |wanted: fn(&FirewallNetwork) -> bool| -> Vec<String> {
        networks.iter().filter(|network| wanted(network)).map(|network| quoted(&network.bridge)).collect()
    };
    let within = |wanted: fn(&FirewallNetwork) -> bool| -> Vec<String> {
        let wanted = networks.iter().filter(|network| wanted(network));
        wanted.map(|network| format!("{0} . {0}", quoted(&network.bridge))).collect()
    };
    let of_family = |subnet: &&IpNet, six: bool| matches!(subnet, IpNet::V6(_)) == six;
    let own = |six: bool| -> Vec<String> {
        let one = |network: &FirewallNetwork| {
            let subnets = network.subnets.iter().filter(|subnet| of_family(subnet, six));
            subnets.map(|subnet| format!("{subnet} . {}", quoted(&network.bridge))).collect::<Vec<_>>()
        };
        networks.iter().flat_map(one).collect()
    };
    let hidden = |six: bool| -> Vec<String> {
        let wanted = networks.iter().filter(|network| !network.internal);
        let subnets = wanted.flat_map(|network| &network.hidden).filter(|subnet| of_family(subnet, six));
        subnets.map(ToString::to_string).collect()
    };
    let ports = |six: bool, everywhere: bool| -> Vec<String> {
        let wanted = rules
            .ports
            .iter()
            .filter(|port| port.container.is_ipv6() == six && port.host.is_unspecified() == everywhere);
        let one = |port: &FirewallPort| {
            let at = if everywhere { String::new() } else { format!("{} . ", port.host) };
            format!(
                "{} . {at}{} : {} . {}",
                port.protocol, port.host_port, port.container, port.container_port
            )
        };
        wanted.map(one).collect()
    };
    vec![
        ("bridges", named(|_| true)),
        ("direct", within(|network| network.direct)),
        ("apart", within(|network| !network.direct)),
        (
            "links",
            rules
                .links
                .iter()
                .map(|FirewallLink { bridge, from, to, protocol, port }| {
                    format!("{} . {from} . {to} . {protocol} . {port}", quoted(bridge))
                })
                .collect(),
        ),
        ("relayed", named(|network| network.relayed)),
        ("sealed", named(|network| network.internal)),
        ("open", named(|network| network.open && !network.internal)),
        (
            "trusted",
            networks
                .iter()
                .filter(|network| !network.internal)
                .flat_map(|network| network.trusted.iter().map(|name| (name, &network.bridge)))
                .map(|(name, bridge)| format!("{} . {}", quoted(name), quoted(bridge)))
                .collect(),
        ),
        ("own4", own(false)),
        ("own6", own(true)),
        ("hidden4", hidden(false)),
        ("hidden6", hidden(true)),
        ("ports4", ports(false, true)),
        ("ports6", ports(true, true)),
        ("ports4_at", ports(false, false)),
        ("ports6_at", ports(true, false)),
    ]
}

fn quoted(name: &str) -> String {
    format!("\"{name}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(bridge: &str, subnet: &str) -> FirewallNetwork {
        FirewallNetwork {
            bridge: bridge.into(),
            subnets: vec![subnet.parse().unwrap()],
            internal: false,
            direct: true,
            relayed: false,
            hidden: vec![subnet.parse().unwrap()],
            open: false,
            trusted: vec!["wg0".into()],
        }
    }

    #[test]
    fn everything_is_said_about_our_own_table_only() {
        let rules = Rules {
            networks: vec![network("engine0", "172.17.0.0/16"), network("six0", "fd00::/64")],
            ..Rules::default()
        };
        for line in script("engine-test", &rules).lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(words[2..4], ["inet", "engine-test"], "{line}");
        }
    }

    #[test]
    fn networks_and_ports_are_elements() {
        let mut inner = network("in0", "10.0.1.0/24");
        (inner.internal, inner.direct, inner.relayed) = (true, false, true);
        let link = FirewallLink {
            bridge: "in0".into(),
            from: [10, 0, 1, 3].into(),
            to: [10, 0, 1, 2].into(),
            protocol: Protocol::Tcp,
            port: 5432,
        };
        let port = |host: &str, container: &str| FirewallPort {
            protocol: Protocol::Udp,
            host: host.parse().unwrap(),
            host_port: 8080,
            container: container.parse().unwrap(),
            container_port: 80,
        };
        let rules = Rules {
            networks: vec![network("a0", "10.0.0.0/24"), inner],
            ports: vec![port("0.0.0.0", "10.0.0.2"), port("127.0.0.1", "10.0.0.2"), port("::1", "fd00::2")],
            links: vec![link],
        };
        let text = script("engine", &rules);
        for line in [
            "add element inet engine bridges { \"a0\", \"in0\" }",
            "add element inet engine direct { \"a0\" . \"a0\" }",
            "add element inet engine apart { \"in0\" . \"in0\" }",
            "add element inet engine links { \"in0\" . 10.0.1.3 . 10.0.1.2 . tcp . 5432 }",
            "add element inet engine relayed { \"in0\" }",
            "add element inet engine sealed { \"in0\" }",
            "add element inet engine trusted { \"wg0\" . \"a0\" }",
            "add element inet engine own4 { 10.0.0.0/24 . \"a0\", 10.0.1.0/24 . \"in0\" }",
            "add element inet engine hidden4 { 10.0.0.0/24 }",
            "add element inet engine ports4 { udp . 8080 : 10.0.0.2 . 80 }",
            "add element inet engine ports4_at { udp . 127.0.0.1 . 8080 : 10.0.0.2 . 80 }",
            "add element inet engine ports6_at { udp . ::1 . 8080 : fd00::2 . 80 }",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("add element inet engine open"));
    }

    #[tokio::test]
    async fn names_that_would_be_rules_are_refused() {
        let firewall = Firewall::new("engine");
        let rules = Rules { networks: vec![network("a\" drop", "10.0.0.0/8")], ..Rules::default() };
        assert!(matches!(firewall.apply(&rules).await, Err(FirewallError::Refused { .. })));
    }
}

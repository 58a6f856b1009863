//! What `nft` is told: the table as a whole, or what is different.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use ipnet::IpNet;

use super::{FirewallLanding, FirewallLink, FirewallNetwork, FirewallPort, Rules};

/// What each set and map holds, as `nft` writes it.
pub type Elements = Vec<(&'static str, BTreeSet<String>)>;

/// Sets and maps, by name and type. `direct` and `apart` hold each network's bridge twice; `own` holds each network's
/// addresses with its bridge, `hidden` the addresses to masquerade; `landing` holds addresses nobody has, whose ports
/// `landings` leads to containers; `ports` is for published ports on every address of the host, `ports_at` for those on one.
const SETS: [(&str, &str); 18] = [
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
    ("set landing4", "type ipv4_addr"),
    ("set landing6", "type ipv6_addr"),
    ("map landings4", "type ipv4_addr . inet_service : ipv4_addr . inet_service"),
    ("map landings6", "type ipv6_addr . inet_service : ipv6_addr . inet_service"),
    ("map ports4", "type inet_proto . inet_service : ipv4_addr . inet_service"),
    ("map ports6", "type inet_proto . inet_service : ipv6_addr . inet_service"),
];
const SETS_AT: [(&str, &str); 2] = [
    ("map ports4_at", "type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service"),
    ("map ports6_at", "type inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service"),
];

const CHAINS: [(&str, &str, &[&str]); 6] = [
    ("raw", "type filter hook prerouting priority raw", &["iifname @bridges ip daddr 127.0.0.0/8 drop"]),
    (
        "prerouting",
        "type nat hook prerouting priority dstnat",
        &[
            "ip daddr 127.0.0.0/8 return",
            // From outside only: for containers these addresses are nobody's.
            "iifname != @bridges dnat ip to ip daddr . tcp dport map @landings4",
            "iifname != @bridges dnat ip6 to ip6 daddr . tcp dport map @landings6",
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
        "input",
        "type nat hook input priority 100",
        // What landed for a loopback address of the host comes from there, as it would have without us.
        &["ct original ip daddr @landing4 ip daddr 127.0.0.0/8 snat ip to 127.0.0.1"],
    ),
    (
        "forward",
        "type filter hook forward priority filter",
        &[
            "ct state established,related accept",
            "ip daddr @landing4 meta l4proto tcp reject with tcp reset",
            "ip6 daddr @landing6 meta l4proto tcp reject with tcp reset",
            "ip daddr @landing4 drop",
            "ip6 daddr @landing6 drop",
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
            // What landed comes from the bridge, so that the answer needs no way out.
            "ct original ip daddr @landing4 oifname @bridges masquerade",
            "ct original ip6 daddr @landing6 oifname @bridges masquerade",
            "ip saddr . oifname @own4 return",
            "ip6 saddr . oifname @own6 return",
            "ip saddr 127.0.0.0/8 oifname @bridges masquerade",
            "ip saddr @hidden4 masquerade",
            "ip6 saddr @hidden6 masquerade",
        ],
    ),
];

/// The transaction that makes a table say this and nothing else, whatever it said before.
pub fn whole(table: &str, elements: &Elements) -> String {
    let mut text = format!("add table inet {table}\n");
    let mut say = |line: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = text.write_fmt(line);
        text.push('\n');
    };
    for (name, kind) in SETS.iter().chain(&SETS_AT) {
        say(format_args!("add {} {{ {kind}; }}", with_table(name, table)));
    }
    for (name, hook, _) in CHAINS {
        say(format_args!("add chain inet {table} {name} {{ {hook}; policy accept; }}"));
        say(format_args!("flush chain inet {table} {name}"));
    }
    for (name, _) in SETS.iter().chain(&SETS_AT) {
        say(format_args!("flush {}", with_table(name, table)));
    }
    for (name, _, lines) in CHAINS {
        for line in lines {
            say(format_args!("add rule inet {table} {name} {line}"));
        }
    }
    for (name, elements) in elements {
        element(&mut text, "add", table, name, elements.iter());
    }
    text
}

/// The transaction that changes what a table says. Empty when nothing is different.
pub fn difference(table: &str, before: &Elements, after: &Elements) -> String {
    let mut text = String::new();
    // What goes first: a port that leads elsewhere has the key of the one before.
    for ((name, before), (_, after)) in before.iter().zip(after) {
        element(&mut text, "delete", table, name, before.difference(after));
    }
    for ((name, before), (_, after)) in before.iter().zip(after) {
        element(&mut text, "add", table, name, after.difference(before));
    }
    text
}

fn element<'a>(
    text: &mut String,
    what: &str,
    table: &str,
    name: &str,
    elements: impl Iterator<Item = &'a String>,
) {
    let mut elements = elements.map(String::as_str).peekable();
    if elements.peek().is_some() {
        let elements: Vec<&str> = elements.collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{what} element inet {table} {name} {{ {} }}", elements.join(", "));
    }
}

fn with_table(name: &str, table: &str) -> String {
    let (what, name) = name.split_once(' ').unwrap_or(("set", name));
    format!("{what} inet {table} {name}")
}

/// What the sets and maps hold for these rules, the same ones in the same order each time.
pub fn elements(rules: &Rules) -> Elements {
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
    let landing = |six: bool| -> Vec<String> {
        let wanted = rules.landing.iter().filter(|address| address.is_ipv6() == six);
        wanted.map(ToString::to_string).collect()
    };
    let landings = |six: bool| -> Vec<String> {
        let wanted = rules.landings.iter().filter(|landing| landing.container.is_ipv6() == six);
        let one = |FirewallLanding { at, container }: &FirewallLanding| {
            format!("{} . {} : {} . {}", at.ip(), at.port(), container.ip(), container.port())
        };
        wanted.map(one).collect()
    };
    let all: Vec<(&'static str, Vec<String>)> = vec![
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
        ("landing4", landing(false)),
        ("landing6", landing(true)),
        ("landings4", landings(false)),
        ("landings6", landings(true)),
        ("ports4", ports(false, true)),
        ("ports6", ports(true, true)),
        ("ports4_at", ports(false, false)),
        ("ports6_at", ports(true, false)),
    ];
    all.into_iter().map(|(name, elements)| (name, elements.into_iter().collect())).collect()
}

fn quoted(name: &str) -> String {
    format!("\"{name}\"")
}

#[cfg(test)]
mod tests {
    use super::super::Protocol;
    use super::*;

    fn network(bridge: &str, subnet: &str) -> FirewallNetwork {
        FirewallNetwork {
            bridge: bridge.into(),
            subnets: vec![subnet.parse().unwrap()],
            direct: true,
            hidden: vec![subnet.parse().unwrap()],
            trusted: vec!["wg0".into()],
            ..FirewallNetwork::default()
        }
    }

    #[test]
    fn everything_is_said_about_our_own_table_only() {
        let rules = Rules {
            networks: vec![network("engine0", "172.17.0.0/16"), network("six0", "fd00::/64")],
            ..Rules::default()
        };
        for line in whole("engine-test", &elements(&rules)).lines() {
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
            landing: vec![[198, 18, 0, 3].into(), "fd07::3".parse().unwrap()],
            landings: vec![
                FirewallLanding { at: ([198, 18, 0, 3], 1024).into(), container: ([10, 0, 0, 2], 80).into() },
                FirewallLanding {
                    at: "[fd07::3]:1025".parse().unwrap(),
                    container: "[fd00::2]:80".parse().unwrap(),
                },
            ],
        };
        let text = whole("engine", &elements(&rules));
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
            "add element inet engine landing4 { 198.18.0.3 }",
            "add element inet engine landing6 { fd07::3 }",
            "add element inet engine landings4 { 198.18.0.3 . 1024 : 10.0.0.2 . 80 }",
            "add element inet engine landings6 { fd07::3 . 1025 : fd00::2 . 80 }",
            "add element inet engine ports4 { udp . 8080 : 10.0.0.2 . 80 }",
            "add element inet engine ports4_at { udp . 127.0.0.1 . 8080 : 10.0.0.2 . 80 }",
            "add element inet engine ports6_at { udp . ::1 . 8080 : fd00::2 . 80 }",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("add element inet engine open"));
    }

    #[test]
    fn only_what_is_different_is_said() {
        let port = |container: &str| FirewallPort {
            protocol: Protocol::Tcp,
            host: [0, 0, 0, 0].into(),
            host_port: 8080,
            container: container.parse().unwrap(),
            container_port: 80,
        };
        let one = Rules {
            networks: vec![network("a0", "10.0.0.0/24"), network("b0", "10.0.1.0/24")],
            ports: vec![port("10.0.0.2")],
            ..Rules::default()
        };
        let other = Rules {
            networks: vec![network("c0", "10.0.2.0/24"), network("a0", "10.0.0.0/24")],
            ports: vec![port("10.0.0.3")],
            ..Rules::default()
        };
        let text = difference("engine", &elements(&one), &elements(&other));
        let expected = [
            "delete element inet engine bridges { \"b0\" }",
            "delete element inet engine direct { \"b0\" . \"b0\" }",
            "delete element inet engine trusted { \"wg0\" . \"b0\" }",
            "delete element inet engine own4 { 10.0.1.0/24 . \"b0\" }",
            "delete element inet engine hidden4 { 10.0.1.0/24 }",
            "delete element inet engine ports4 { tcp . 8080 : 10.0.0.2 . 80 }",
            "add element inet engine bridges { \"c0\" }",
            "add element inet engine direct { \"c0\" . \"c0\" }",
            "add element inet engine trusted { \"wg0\" . \"c0\" }",
            "add element inet engine own4 { 10.0.2.0/24 . \"c0\" }",
            "add element inet engine hidden4 { 10.0.2.0/24 }",
            "add element inet engine ports4 { tcp . 8080 : 10.0.0.3 . 80 }",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
        let order = Rules { networks: one.networks.iter().rev().cloned().collect(), ..one.clone() };
        assert_eq!(difference("engine", &elements(&one), &elements(&order)), "");
    }
}

//! Other programs' firewalls: whether one drops what the host is to pass on to a container.
//!
//! The rules of all nf_tables are followed for one packet: the first of a connection from outside, its destination
//! rewritten already, as it comes to the hook `forward`. What cannot be known of it, or is a word unknown here, is taken for
//! a maybe: only what is dropped whatever the unknown may be is told. Rules of the older iptables (`iptables-legacy`) are not
//! in these tables and cannot be seen.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::Protocol;

/// Jumps within jumps; the kernel has 16.
const DEPTH_MAX: usize = 16;

/// The first packet of a connection to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// The interface it comes from.
    pub from: String,
    /// The bridge it goes to.
    pub bridge: String,
    /// The container's address.
    pub address: IpAddr,
    /// Its transport.
    pub protocol: Protocol,
    /// The container's port.
    pub port: u16,
    /// It was sent to a published port.
    pub published: bool,
}

/// A chain of somebody else's that drops it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain at the hook.
    pub chain: String,
    /// The chain drops what no rule accepts.
    pub by_policy: bool,
    /// The names of the table's chains, by which programs are known.
    pub chains: Vec<String>,
}

/// Where a packet comes to on its way through a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Accept,
    Drop,
    /// Out at the end.
    Through,
    /// Perhaps accepted.
    Maybe,
}

/// The first chain of another table than `own` that drops the packet, in `nft --json list ruleset`. `None` where none does,
/// and for what is no such list.
pub fn dropped_by(ruleset: &[u8], own: &str, packet: &Incoming) -> Option<Foreign> {
    let ruleset: Value = serde_json::from_slice(ruleset).ok()?;
    let entries = ruleset["nftables"].as_array()?;
    let family = if packet.address.is_ipv6() { "ip6" } else { "ip" };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let place = |entry: &Value| (text(&entry["family"]), text(&entry["table"]));
    let mut rules: Rules<'_> = BTreeMap::new();
    for rule in entries.iter().map(|entry| &entry["rule"]).filter(|rule| rule.is_object()) {
        let (family, table) = place(rule);
        rules.entry((family, table, text(&rule["chain"]))).or_default().push(&rule["expr"]);
    }
    let chains: Vec<&Value> =
        entries.iter().map(|entry| &entry["chain"]).filter(|chain| chain.is_object()).collect();
    chains.iter().find_map(|chain| {
        let place = place(chain);
        let is_forward = chain["type"] == "filter" && chain["hook"] == "forward";
        if !is_forward || place.1 == own || !(place.0 == family || place.0 == "inet") {
            return None;
        }
        let name = text(&chain["name"]);
        let by_policy = match walk(&rules, &place, &name, packet, 0) {
            Way::Drop => false,
            Way::Through if chain["policy"] == "drop" => true,
            Way::Accept | Way::Through | Way::Maybe => return None,
        };
        let of_table = |other: &&&Value| (text(&other["family"]), text(&other["table"])) == place;
        let names = chains.iter().filter(of_table).map(|chain| text(&chain["name"])).collect();
        Some(Foreign { family: place.0, table: place.1, chain: name, by_policy, chains: names })
    })
}

type Rules<'a> = BTreeMap<(String, String, String), Vec<&'a Value>>;

fn walk(rules: &Rules<'_>, place: &(String, String), chain: &str, packet: &Incoming, depth: usize) -> Way {
    if depth > DEPTH_MAX {
        return Way::Maybe;
    }
    let found = rules.get(&(place.0.clone(), place.1.clone(), chain.to_owned()));
    'rules: for rule in found.into_iter().flatten() {
        let mut certain = true;
        for statement in rule.as_array().into_iter().flatten() {
            let Some((word, value)) = statement.as_object().and_then(|object| object.iter().next()) else {
                continue;
            };
            let way = match word.as_str() {
                "match" => match matches(value, packet) {
                    Some(true) => continue,
                    Some(false) => continue 'rules,
                    None => {
                        certain = false;
                        continue;
                    }
                },
                "xt" => match (value["type"].as_str(), value["name"].as_str()) {
                    (Some("match"), Some("comment")) => continue,
                    // Iptables' way to say that it is the answer to something.
                    (Some("match"), Some("conntrack" | "state")) => continue 'rules,
                    (Some("match"), _) => {
                        certain = false;
                        continue;
                    }
                    _ => Way::Maybe,
                },
                "counter" | "log" | "limit" | "comment" | "mangle" | "meter" => continue,
                "accept" => Way::Accept,
                "drop" | "reject" => Way::Drop,
                "return" if certain => return Way::Through,
                "return" => continue 'rules,
                "jump" | "goto" => {
                    let target = value["target"].as_str().unwrap_or_default();
                    match walk(rules, place, target, packet, depth + 1) {
                        Way::Through if certain && word == "goto" => return Way::Through,
                        Way::Through => continue 'rules,
                        way => way,
                    }
                }
                _ => Way::Maybe,
            };
            match (way, certain) {
                (way, true) => return way,
                (Way::Drop, false) => continue 'rules,
                (_, false) => return Way::Maybe,
            }
        }
    }
    Way::Through
}

/// Whether a comparison holds; `None` where it cannot be known.
fn matches(comparison: &Value, packet: &Incoming) -> Option<bool> {
    let (left, right) = (&comparison["left"], &comparison["right"]);
    let holds = if let Some(key) = left["meta"]["key"].as_str() {
        match key {
            "iifname" => one_of(right, &|value| Some(names(value.as_str()?, &packet.from))),
            "oifname" => one_of(right, &|value| Some(names(value.as_str()?, &packet.bridge))),
            "l4proto" => one_of(right, &|value| is_protocol(value, packet.protocol)),
            "nfproto" => {
                let family = if packet.address.is_ipv6() { "ipv6" } else { "ipv4" };
                one_of(right, &|value| Some(value.as_str()? == family))
            }
            _ => None,
        }
    } else if let Some(key) = left["ct"]["key"].as_str() {
        match key {
            "state" => one_of(right, &|value| Some(value.as_str()? == "new")),
            "status" => one_of(right, &|value| Some(value.as_str()? == "dnat" && packet.published)),
            _ => None,
        }
    } else if let Some(field) = left["payload"]["field"].as_str() {
        let protocol = left["payload"]["protocol"].as_str()?;
        let own = if packet.address.is_ipv6() { "ip6" } else { "ip" };
        match (protocol, field) {
            ("ip" | "ip6", _) if protocol != own => Some(false),
            ("ip" | "ip6", "daddr") => one_of(right, &|value| contains(value, packet.address)),
            ("ip", "protocol") | ("ip6", "nexthdr") => {
                one_of(right, &|value| is_protocol(value, packet.protocol))
            }
            ("tcp" | "udp" | "sctp" | "icmp" | "icmpv6", _) if protocol != packet.protocol.name() => {
                Some(false)
            }
            ("tcp" | "udp" | "sctp" | "th", "dport") => one_of(right, &|value| has_port(value, packet.port)),
            _ => None,
        }
    } else {
        None
    }?;
    match comparison["op"].as_str() {
        Some("==" | "in") => Some(holds),
        Some("!=") => Some(!holds),
        _ => None,
    }
}

/// A value, or one in a set of them. A set by name is not looked into.
fn one_of(right: &Value, is: &dyn Fn(&Value) -> Option<bool>) -> Option<bool> {
    let set = right["set"].as_array().or_else(|| right.as_array());
    let Some(set) = set else {
        return if right.as_str().is_some_and(|name| name.starts_with('@')) { None } else { is(right) };
    };
    let found: Vec<Option<bool>> = set.iter().map(is).collect();
    if found.contains(&Some(true)) { Some(true) } else { (!found.contains(&None)).then_some(false) }
}

/// By name, or by number where the computer has no list of names (`/etc/protocols`).
fn is_protocol(value: &Value, protocol: Protocol) -> Option<bool> {
    match value.as_u64() {
        Some(number) => Some(number == u64::from(protocol.number())),
        None => Some(value.as_str()? == protocol.name()),
    }
}

fn names(pattern: &str, interface: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => interface.starts_with(start),
        None => pattern == interface,
    }
}

fn contains(value: &Value, address: IpAddr) -> Option<bool> {
    if let Some(text) = value.as_str() {
        return Some(text.parse::<IpAddr>().ok()? == address);
    }
    let prefix = &value["prefix"];
    let length = u8::try_from(prefix["len"].as_u64()?).ok()?;
    let net = IpNet::new(prefix["addr"].as_str()?.parse().ok()?, length).ok()?;
    Some(net.contains(&address))
}

fn has_port(value: &Value, port: u16) -> Option<bool> {
    let port = u64::from(port);
    if let Some(number) = value.as_u64() {
        return Some(number == port);
    }
    let range = value["range"].as_array()?;
    Some((range.first()?.as_u64()?..=range.get(1)?.as_u64()?).contains(&port))
}

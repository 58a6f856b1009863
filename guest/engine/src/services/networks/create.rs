//! From what a client asked for to what a network is: everything checked that can be without the kernel. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use guest_api::network::{Ipam, IpamPool, NetworkCreate};
use guest_api::{ErrorKind, error};
use ipnet::IpNet;
use jiff::Timestamp;

use super::options::{self, Settings};
use super::record::{Driver, NetworkRecord, is_predefined};
use crate::failure::Failure;

/// A checked request. Its subnets are still to be had: `wanted` names them, or leaves the choice.
#[derive(Debug, PartialEq, Eq)]
pub struct Draft {
    /// Without pools.
    pub record: NetworkRecord,
    pub wanted: Vec<Wanted>,
}

/// A subnet asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub six: bool,
    pub given: Option<Given>,
    /// The engine needs an address in it, or the user named one.
    pub needs_gateway: bool,
}

/// A subnet as the user named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub subnet: IpNet,
    pub range: Option<IpNet>,
    pub gateway: Option<IpAddr>,
    pub auxiliary: BTreeMap<String, IpAddr>,
    /// The words themselves.
    pub words: IpamPool,
}

/// Reads a request. `id` is the new network's id.
pub fn read(create: NetworkCreate, id: &str, now: Timestamp) -> Result<Draft, Failure> {
    let forbidden = |text: String| Err(Failure::new(ErrorKind::Forbidden, text));
    let name = create.name;
    if is_predefined(&name) {
        return forbidden(format!("operation is not permitted on predefined {name} network "));
    }
    let driver = match create.driver.as_str() {
        "" | "bridge" | "default" => Driver::Bridge,
        "macvlan" => Driver::Macvlan,
        "ipvlan" => Driver::Ipvlan,
        name @ ("host" | "null") => {
            return forbidden(format!("only one instance of \"{name}\" network is allowed"));
        }
        "overlay" => {
            return forbidden(error::NOT_A_SWARM_MANAGER.to_owned());
        }
        other => {
            return Err(Failure::not_found(format!("plugin \"{other}\" not found")));
        }
    };
    let mut options = create.options;
    let ipv4 = options::family(create.enable_ipv4, &mut options, false)?;
    let ipv6 = options::family(create.enable_ipv6, &mut options, true)?;
    let ipam = create.ipam.unwrap_or_default();
    let given = read_ipam(&ipam, ipv6)?;
    if name.trim().is_empty() {
        return Err(Failure::invalid("invalid name: name is empty"));
    }
    if name.contains('\0') {
        return Err(Failure::invalid("invalid name: it holds a zero byte"));
    }
    match create.scope.as_str() {
        "" | "local" => {}
        "swarm" => {
            return forbidden("cannot create a swarm scoped network when swarm is not active".to_owned());
        }
        other => return Err(Failure::invalid(format!("invalid scope \"{other}\""))),
    }
    if create.ingress {
        return forbidden("Ingress network can only be global scope network".to_owned());
    }
    let config_from = create.config_from.unwrap_or_default().network;
    if create.config_only && (create.internal || create.attachable || !create.scope.is_empty()) {
        return forbidden(
            "configuration network can only contain network specific fields. Network operator fields like [ ingress \
             | internal | attachable | scope ] are not supported."
                .to_owned(),
        );
    }
    if create.config_only && !config_from.is_empty() {
        return forbidden(
            "a configuration network cannot depend on another configuration network".to_owned(),
        );
    }
    if !config_from.is_empty() {
        if ipv6 || !given.is_empty() || !create.labels.is_empty() {
            return forbidden(
                "user specified configurations are not supported if the network depends on a configuration network"
                    .to_owned(),
            );
        }
        if !options.is_empty() {
            return forbidden(
                "network driver options are not supported if the network depends on a configuration network"
                    .to_owned(),
            );
        }
    }
    if !matches!(ipam.driver.as_str(), "" | "default") {
        return Err(Failure::not_found(format!("plugin \"{}\" not found", ipam.driver)));
    }
    let record = NetworkRecord {
        id: id.to_owned(),
        name,
        created: now,
        driver: if create.config_only { Driver::Null } else { driver },
        ipv4,
        ipv6,
        pools: Vec::new(),
        ipam_driver: "default".to_owned(),
        // Both clients send an object; docker-py's is null.
        ipam_options: ipam.options,
        internal: create.internal,
        attachable: create.attachable,
        ingress: false,
        config_only: create.config_only,
        config_from,
        options,
        labels: create.labels,
        interface: String::new(),
        owns_interface: true,
    };
    finish(record, given)
}

/// Reads the driver's options and settles which subnets are wanted. Also for a network whose settings came from
/// another.
pub fn finish(mut record: NetworkRecord, given: Vec<Given>) -> Result<Draft, Failure> {
    let settings = Settings::read(record.driver, &record.options, record.internal)?;
    if record.driver == Driver::Null {
        let wanted = given
            .into_iter()
            .map(|given| Wanted {
                six: given.subnet.addr().is_ipv6(),
                given: Some(given),
                needs_gateway: false,
            })
            .collect();
        return Ok(Draft { record, wanted });
    }
    if record.config_from.is_empty() && !record.ipv4 && !record.ipv6 {
        return Err(Failure::invalid("IPv4 or IPv6 must be enabled"));
    }
    if record.driver != Driver::Bridge
        && matches!(
            &settings.kind,
            options::Kind::Macvlan { parent: None, .. } | options::Kind::Ipvlan { parent: None, .. }
        )
    {
        record.internal = true;
    }
    let mut wanted = Vec::new();
    for (six, on) in [(false, record.ipv4), (true, record.ipv6)] {
        if !on {
            continue;
        }
        let family: Vec<&Given> = given.iter().filter(|given| given.subnet.addr().is_ipv6() == six).collect();
        if family.len() > 1 && record.driver == Driver::Bridge {
            return Err(Failure::new(ErrorKind::Forbidden, "bridge driver doesn't support multiple subnets"));
        }
        if let Some(everything) = family.iter().find(|given| given.subnet.prefix_len() == 0) {
            let version = if everything.subnet.addr().is_ipv6() { "ipv6" } else { "ipv4" };
            return Err(Failure::invalid(format!("{version} pool is empty")));
        }
        let isolated = settings
            .bridge()
            .is_some_and(|bridge| bridge.gateway_mode(six) == options::GatewayMode::Isolated);
        let needs_gateway = match record.driver {
            Driver::Bridge => !isolated,
            _ => !record.internal,
        };
        if family.is_empty() {
            wanted.push(Wanted { six, given: None, needs_gateway });
        }
        for given in family {
            let needs_gateway = needs_gateway || given.gateway.is_some();
            wanted.push(Wanted { six, given: Some(given.clone()), needs_gateway });
        }
    }
    Ok(Draft { record, wanted })
}

/// Checks what the user says about addresses; all that is wrong is told at once, in dockerd's words.
fn read_ipam(ipam: &Ipam, ipv6: bool) -> Result<Vec<Given>, Failure> {
    let mut errors = Vec::new();
    let mut given = Vec::new();
    for pool in ipam.config.iter().flatten() {
        match read_pool(pool, ipv6, &mut errors) {
            Some(pool) if ipv6 || pool.subnet.addr().is_ipv4() => given.push(pool),
            _ => {}
        }
    }
    if errors.is_empty() {
        return Ok(given);
    }
    Err(Failure::invalid(format!("invalid network config:\n{}", join_errors(&errors))))
}

/// As Go's multi-error: one alone, several as a list.
pub fn join_errors(errors: &[String]) -> String {
    match errors {
        [one] => one.trim().to_owned(),
        many => {
            let items: Vec<String> =
                many.iter().map(|error| format!("* {}", error.replace('\n', "\n\t"))).collect();
            items.join("\n")
        }
    }
}

fn read_pool(pool: &IpamPool, ipv6: bool, errors: &mut Vec<String>) -> Option<Given> {
    let Ok(subnet) = pool.subnet.parse::<IpNet>() else {
        errors.push(format!("invalid subnet {}: invalid CIDR block notation", pool.subnet));
        return None;
    };
    if subnet.addr().is_ipv6() && !ipv6 {
        return None;
    }
    if subnet != subnet.trunc() {
        errors.push(format!("invalid subnet {subnet}: it should be {}", subnet.trunc()));
    }
    let range = read_range(&pool.ip_range, &subnet, errors);
    let mut address = |text: &str, what: &dyn Fn(&str) -> String| -> Option<IpAddr> {
        if text.is_empty() {
            return None;
        }
        let refusal = match text.parse::<IpAddr>() {
            Err(_) => "invalid address".to_owned(),
            Ok(address) if address.is_ipv6() != subnet.addr().is_ipv6() => {
                format!("parent subnet is an {} block", family(&subnet))
            }
            Ok(address) if !subnet.contains(&address) => {
                format!("parent subnet {subnet} doesn't contain this address")
            }
            Ok(address) => return Some(address),
        };
        errors.push(what(&refusal));
        None
    };
    let gateway = address(&pool.gateway, &|refusal| format!("invalid gateway {}: {refusal}", pool.gateway));
    let auxiliary = pool
        .auxiliary_addresses
        .iter()
        .filter_map(|(name, text)| {
            let found = address(text, &|refusal| format!("invalid auxiliary address {name}: {refusal}"))?;
            Some((name.clone(), found))
        })
        .collect();
    Some(Given { subnet: subnet.trunc(), range, gateway, auxiliary, words: pool.clone() })
}

fn read_range(text: &str, subnet: &IpNet, errors: &mut Vec<String>) -> Option<IpNet> {
    if text.is_empty() {
        return None;
    }
    let Ok(range) = text.parse::<IpNet>() else {
        errors.push(format!("invalid ip-range {text}: invalid CIDR block notation"));
        return None;
    };
    if range.addr().is_ipv6() != subnet.addr().is_ipv6() {
        errors.push(format!("invalid ip-range {text}: parent subnet is an {} block", family(subnet)));
        return None;
    }
    if range.prefix_len() < subnet.prefix_len() {
        errors.push(format!("invalid ip-range {text}: CIDR block is bigger than its parent subnet {subnet}"));
    }
    if range != range.trunc() {
        errors.push(format!("invalid ip-range {range}: it should be {}", range.trunc()));
    }
    if !super::pools::overlap(subnet, &range) {
        errors.push(format!("invalid ip-range {text}: parent subnet {subnet} doesn't contain ip-range"));
    }
    Some(range.trunc())
}

fn family(subnet: &IpNet) -> &'static str {
    if subnet.addr().is_ipv6() { "IPv6" } else { "IPv4" }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn try_read(body: serde_json::Value) -> Result<Draft, Failure> {
        let create = guest_api::decode(body.to_string().as_bytes()).unwrap();
        read(create, &"a".repeat(64), Timestamp::UNIX_EPOCH)
    }

    fn refusal(body: serde_json::Value) -> (ErrorKind, String) {
        let failure = try_read(body).unwrap_err();
        (failure.kind, failure.message)
    }

    #[test]
    fn a_plain_network_is_an_ipv4_bridge_of_our_choice() {
        let draft =
            try_read(json!({"Name": "n", "CheckDuplicate": true, "IPAM": {"Driver": "default"}})).unwrap();
        assert_eq!(
            (draft.record.driver, draft.record.ipv4, draft.record.ipv6),
            (Driver::Bridge, true, false)
        );
        assert_eq!(draft.wanted, [Wanted { six: false, given: None, needs_gateway: true }]);
    }

    #[test]
    fn subnets_of_both_families_are_taken_where_they_are_on() {
        let pools = json!([{"Subnet": "2001:db8::/64"}, {"Subnet": "10.1.0.0/16", "IPRange": "10.1.5.0/24",
            "Gateway": "10.1.5.254", "AuxiliaryAddresses": {"a": "10.1.1.5"}}]);
        let draft = try_read(json!({"Name": "n", "EnableIPv6": true, "IPAM": {"Config": pools}})).unwrap();
        let [four, six] = &draft.wanted[..] else { panic!("{draft:?}") };
        let given = four.given.as_ref().unwrap();
        assert_eq!(given.range.unwrap().to_string(), "10.1.5.0/24");
        assert_eq!(given.auxiliary["a"].to_string(), "10.1.1.5");
        assert!(six.six && six.given.is_some());
        let off = try_read(json!({"Name": "n", "IPAM": {"Config": pools}})).unwrap();
        assert_eq!(off.wanted.len(), 1, "IPv6 is off");
    }

    #[test]
    fn everything_wrong_with_addresses_is_told_at_once() {
        let pools = json!([{"Subnet": "10.1.0.1/16", "IPRange": "10.2.0.0/24", "Gateway": "10.9.0.1"}]);
        let (kind, text) = refusal(json!({"Name": "n", "IPAM": {"Config": pools}}));
        assert_eq!(kind, ErrorKind::Invalid);
        assert_eq!(
            text,
            "invalid network config:\n* invalid subnet 10.1.0.1/16: it should be 10.1.0.0/16\n* invalid ip-range \
             10.2.0.0/24: parent subnet 10.1.0.1/16 doesn't contain ip-range\n* invalid gateway 10.9.0.1: parent \
             subnet 10.1.0.1/16 doesn't contain this address"
        );
        let (_, text) = refusal(json!({"Name": "n", "IPAM": {"Config": [{"Subnet": "ten"}]}}));
        assert_eq!(text, "invalid network config:\ninvalid subnet ten: invalid CIDR block notation");
    }

    #[test]
    fn what_is_not_ours_to_make_is_refused_in_dockerds_words() {
        let check = |body, kind, text: &str| {
            let (found, message) = refusal(body);
            assert_eq!(found, kind, "{message}");
            assert!(message.contains(text), "{message}");
        };
        check(
            json!({"Name": "bridge"}),
            ErrorKind::Forbidden,
            "operation is not permitted on predefined bridge",
        );
        check(json!({"Name": "n", "Driver": "host"}), ErrorKind::Forbidden, "only one instance of \"host\"");
        check(json!({"Name": "n", "Driver": "weave"}), ErrorKind::NotFound, "plugin \"weave\" not found");
        check(json!({"Name": "n", "Driver": "overlay"}), ErrorKind::Forbidden, "not a swarm manager");
        check(json!({"Name": "n", "Scope": "swarm"}), ErrorKind::Forbidden, "swarm is not active");
        check(json!({"Name": "  "}), ErrorKind::Invalid, "name is empty");
        check(json!({"Name": "n", "EnableIPv4": false}), ErrorKind::Invalid, "IPv4 or IPv6 must be enabled");
        check(json!({"Name": "n", "IPAM": {"Driver": "x"}}), ErrorKind::NotFound, "plugin \"x\" not found");
        let two = json!([{"Subnet": "10.0.0.0/24"}, {"Subnet": "10.0.1.0/24"}]);
        check(json!({"Name": "n", "IPAM": {"Config": two}}), ErrorKind::Forbidden, "multiple subnets");
        check(
            json!({"Name": "n", "ConfigOnly": true, "Internal": true}),
            ErrorKind::Forbidden,
            "operator fields",
        );
    }

    #[test]
    fn networks_without_a_way_out_need_no_gateway() {
        let draft = try_read(json!({"Name": "n", "Driver": "macvlan"})).unwrap();
        assert!(draft.record.internal && !draft.wanted[0].needs_gateway);
        let draft = try_read(json!({"Name": "n", "Internal": true})).unwrap();
        assert!(draft.wanted[0].needs_gateway, "a bridge has an address");
        let draft = try_read(json!({"Name": "n", "ConfigOnly": true})).unwrap();
        assert_eq!((draft.record.driver, draft.wanted.len()), (Driver::Null, 0));
    }
}

//! Driver options: the ones that mean something, read. Others are kept and shown, as dockerd does.

use std::collections::BTreeMap;
use std::net::IpAddr;

use guest_network::{Ipvlan, Macvlan, is_interface_name};

use super::record::{Driver, NetworkRecord};
use crate::failure::Failure;

pub const BRIDGE_NAME: &str = "com.docker.network.bridge.name";
pub const ICC: &str = "com.docker.network.bridge.enable_icc";
pub const MASQUERADE: &str = "com.docker.network.bridge.enable_ip_masquerade";
pub const HOST_BINDING: &str = "com.docker.network.bridge.host_binding_ipv4";
pub const DEFAULT_BRIDGE: &str = "com.docker.network.bridge.default_bridge";
pub const MTU: &str = "com.docker.network.driver.mtu";
const INHIBIT_IPV4: &str = "com.docker.network.bridge.inhibit_ipv4";
const TRUSTED: &str = "com.docker.network.bridge.trusted_host_interfaces";
const GATEWAY_MODE_IPV4: &str = "com.docker.network.bridge.gateway_mode_ipv4";
const GATEWAY_MODE_IPV6: &str = "com.docker.network.bridge.gateway_mode_ipv6";
const IFACE_PREFIX: &str = "com.docker.network.container_iface_prefix";
const ENABLE_IPV4: &str = "com.docker.network.enable_ipv4";
const ENABLE_IPV6: &str = "com.docker.network.enable_ipv6";
const PARENT: &str = "parent";

/// What a network's options mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub mtu: Option<u32>,
    /// Inside, interfaces are called this and a number.
    pub interface_prefix: String,
    pub kind: Kind,
}

/// The driver's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Bridge(BridgeSettings),
    Macvlan {
        parent: Option<String>,
        mode: Macvlan,
    },
    Ipvlan {
        parent: Option<String>,
        mode: Ipvlan,
    },
    /// It has no interfaces of its own.
    None,
}

/// A bridge's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeSettings {
    /// The bridge's name, where the user chose it.
    pub name: Option<String>,
    /// Containers reach each other.
    pub direct: bool,
    pub masquerade: bool,
    /// The bridge itself has no IPv4 address.
    pub inhibit_ipv4: bool,
    /// Host address of ports published without one.
    pub host_binding: Option<IpAddr>,
    /// Interfaces of the host from which containers may be reached.
    pub trusted: Vec<String>,
    pub gateway_v4: GatewayMode,
    pub gateway_v6: GatewayMode,
}

/// How a network meets the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GatewayMode {
    #[default]
    Nat,
    /// Without the rule that keeps strangers out.
    NatUnprotected,
    /// Without translation.
    Routed,
    /// The host has no address in it.
    Isolated,
}

impl Settings {
    /// Reads the options of a driver.
    pub fn read(driver: Driver, options: &BTreeMap<String, String>, internal: bool) -> Result<Self, Failure> {
        let mtu = option(options, MTU, |text| {
            let bad = "it has to be a number from 0 to 65535".to_owned();
            text.parse::<u32>().ok().filter(|mtu| *mtu <= 65535).ok_or(bad)
        })?;
        let interface_prefix = match options.get(IFACE_PREFIX).map(String::as_str) {
            None | Some("") => "eth".to_owned(),
            Some(prefix) if is_interface_name(&format!("{prefix}99")) => prefix.to_owned(),
            Some(prefix) => return Err(parse_failure(IFACE_PREFIX, prefix, "it cannot name an interface")),
        };
        let kind = match driver {
            Driver::Bridge => Kind::Bridge(BridgeSettings::read(options, internal)?),
            Driver::Macvlan => {
                let mode = match options.get("macvlan_mode").map_or("", String::as_str) {
                    "" | "bridge" => Macvlan::Bridge,
                    "private" => Macvlan::Private,
                    "vepa" => Macvlan::Vepa,
                    "passthru" => Macvlan::Passthru,
                    other => {
                        return Err(Failure::invalid(format!(
                            "requested macvlan mode '{other}' is not valid, 'bridge' mode is the macvlan driver \
                             default"
                        )));
                    }
                };
                Kind::Macvlan { parent: parent(options, "macvlan")?, mode }
            }
            Driver::Ipvlan => {
                let mode = match options.get("ipvlan_mode").map_or("", String::as_str) {
                    "" | "l2" => Ipvlan::L2,
                    "l3" => Ipvlan::L3,
                    "l3s" => Ipvlan::L3s,
                    other => {
                        return Err(Failure::invalid(format!(
                            "requested ipvlan mode '{other}' is not valid, 'l2' mode is the ipvlan driver default"
                        )));
                    }
                };
                Kind::Ipvlan { parent: parent(options, "ipvlan")?, mode }
            }
            Driver::Host | Driver::Null => Kind::None,
        };
        Ok(Self { mtu: mtu.filter(|mtu| *mtu > 0), interface_prefix, kind })
    }

    /// Those of a stored network, whose options were read before.
    pub fn of(record: &NetworkRecord) -> Self {
        Self::read(record.driver, &record.options, record.internal).unwrap_or(Self {
            mtu: None,
            interface_prefix: "eth".to_owned(),
            kind: Kind::None,
        })
    }

    pub fn bridge(&self) -> Option<&BridgeSettings> {
        match &self.kind {
            Kind::Bridge(bridge) => Some(bridge),
            _ => None,
        }
    }
}

impl BridgeSettings {
    fn read(options: &BTreeMap<String, String>, internal: bool) -> Result<Self, Failure> {
        let flag = |name: &str, default: bool| -> Result<bool, Failure> {
            Ok(option(options, name, go_bool)?.unwrap_or(default))
        };
        let name = options.get(BRIDGE_NAME).filter(|name| !name.is_empty()).cloned();
        if let Some(name) = &name
            && !is_interface_name(name)
        {
            return Err(parse_failure(BRIDGE_NAME, name, "it cannot name an interface"));
        }
        let mode = |name: &str| -> Result<GatewayMode, Failure> {
            let read = |text: &str| match text {
                "nat" => Ok(GatewayMode::Nat),
                "nat-unprotected" => Ok(GatewayMode::NatUnprotected),
                "routed" => Ok(GatewayMode::Routed),
                "isolated" => Ok(GatewayMode::Isolated),
                other => Err(format!("unknown gateway mode {other}")),
            };
            Ok(option(options, name, read)?.unwrap_or_default())
        };
        let trusted: Vec<String> = options
            .get(TRUSTED)
            .map(|names| names.split(':').filter(|name| !name.is_empty()).map(str::to_owned).collect())
            .unwrap_or_default();
        if let Some(bad) = trusted.iter().find(|name| !is_interface_name(name)) {
            return Err(parse_failure(TRUSTED, bad, "it cannot name an interface"));
        }
        let settings = Self {
            name,
            direct: flag(ICC, true)?,
            masquerade: flag(MASQUERADE, true)?,
            inhibit_ipv4: flag(INHIBIT_IPV4, false)?,
            host_binding: option(options, HOST_BINDING, |text| {
                text.parse::<IpAddr>().map_err(|_| "nil ip".to_owned())
            })?,
            trusted,
            gateway_v4: mode(GATEWAY_MODE_IPV4)?,
            gateway_v6: mode(GATEWAY_MODE_IPV6)?,
        };
        flag(DEFAULT_BRIDGE, false)?;
        let isolated = [settings.gateway_v4, settings.gateway_v6].contains(&GatewayMode::Isolated);
        if isolated && !internal {
            return Err(Failure::invalid("gateway mode 'isolated' can only be used for an internal network"));
        }
        Ok(settings)
    }

    pub fn gateway_mode(&self, six: bool) -> GatewayMode {
        if six { self.gateway_v6 } else { self.gateway_v4 }
    }
}

/// Whether an address family is on: the request's own word, or an option's.
pub fn family(
    asked: Option<bool>,
    options: &mut BTreeMap<String, String>,
    six: bool,
) -> Result<bool, Failure> {
    let name = if six { ENABLE_IPV6 } else { ENABLE_IPV4 };
    if let Some(asked) = asked {
        options.remove(name);
        return Ok(asked);
    }
    match options.get(name) {
        None => Ok(!six),
        Some(text) => {
            go_bool(text).map_err(|_| Failure::invalid(format!("driver-opt \"{name}\" is not a valid bool")))
        }
    }
}

fn parent(options: &BTreeMap<String, String>, driver: &str) -> Result<Option<String>, Failure> {
    match options.get(PARENT).map(String::as_str) {
        None | Some("") => Ok(None),
        Some("lo") => {
            Err(Failure::invalid(format!("loopback interface is not a valid {driver} parent link")))
        }
        Some(name) if is_interface_name(name) => Ok(Some(name.to_owned())),
        Some(name) => Err(parse_failure(PARENT, name, "it cannot name an interface")),
    }
}

fn option<T>(
    options: &BTreeMap<String, String>,
    name: &str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, Failure> {
    options
        .get(name)
        .map(|value| read(value).map_err(|reason| parse_failure(name, value, &reason)))
        .transpose()
}

fn parse_failure(name: &str, value: &str, reason: &str) -> Failure {
    Failure::invalid(format!("failed to parse {name} value: {value} ({reason})"))
}

/// What Go's `ParseBool` takes.
fn go_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => Err(format!("strconv.ParseBool: parsing \"{other}\": invalid syntax")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(driver: Driver, pairs: &[(&str, &str)]) -> Result<Settings, Failure> {
        let options = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Settings::read(driver, &options, false)
    }

    fn refusal(driver: Driver, name: &str, value: &str) -> String {
        read(driver, &[(name, value)]).unwrap_err().message
    }

    #[test]
    fn defaults_are_dockers() {
        let settings = read(Driver::Bridge, &[]).unwrap();
        let bridge = settings.bridge().unwrap();
        assert!(bridge.direct && bridge.masquerade && !bridge.inhibit_ipv4);
        assert_eq!((settings.mtu, settings.interface_prefix.as_str()), (None, "eth"));
        assert_eq!(bridge.gateway_mode(true), GatewayMode::Nat);
    }

    #[test]
    fn options_are_read_and_unknown_ones_kept_out_of_the_way() {
        let options = [
            (MTU, "1400"),
            (ICC, "false"),
            (HOST_BINDING, "127.0.0.1"),
            (TRUSTED, "wg0:tun1"),
            (IFACE_PREFIX, "net"),
            ("com.example.anything", "goes"),
        ];
        let settings = read(Driver::Bridge, &options).unwrap();
        let bridge = settings.bridge().unwrap();
        assert!(!bridge.direct);
        assert_eq!(bridge.host_binding, Some([127, 0, 0, 1].into()));
        assert_eq!(bridge.trusted, ["wg0", "tun1"]);
        assert_eq!((settings.mtu, settings.interface_prefix.as_str()), (Some(1400), "net"));
        let macvlan = read(Driver::Macvlan, &[(PARENT, "eth0"), ("macvlan_mode", "vepa")]).unwrap();
        assert_eq!(macvlan.kind, Kind::Macvlan { parent: Some("eth0".into()), mode: Macvlan::Vepa });
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        assert_eq!(
            refusal(Driver::Bridge, ICC, "perhaps"),
            "failed to parse com.docker.network.bridge.enable_icc value: perhaps (strconv.ParseBool: parsing \
             \"perhaps\": invalid syntax)"
        );
        assert!(refusal(Driver::Bridge, MTU, "-1").contains(MTU));
        assert!(refusal(Driver::Bridge, HOST_BINDING, "here").contains("nil ip"));
        assert!(refusal(Driver::Bridge, BRIDGE_NAME, "a name").contains("cannot name an interface"));
        assert!(refusal(Driver::Bridge, GATEWAY_MODE_IPV4, "isolated").contains("internal network"));
        assert!(refusal(Driver::Macvlan, "macvlan_mode", "x").contains("requested macvlan mode 'x'"));
        assert!(refusal(Driver::Ipvlan, PARENT, "lo").contains("loopback"));
    }

    #[test]
    fn families_may_be_options_too() {
        let mut options: BTreeMap<String, String> = [(ENABLE_IPV6.to_owned(), "true".to_owned())].into();
        assert_eq!(family(None, &mut options, true), Ok(true));
        assert_eq!(family(Some(false), &mut options, true), Ok(false));
        assert!(options.is_empty(), "the request's own word wins");
        assert_eq!(
            (family(None, &mut options, true), family(None, &mut options, false)),
            (Ok(false), Ok(true))
        );
    }
}

//! The settings file: `engine.toml`, or a `daemon.json` as dockerd reads it. The keys are the same in both.
//!
//! Three sorts of keys. What we honour is a field of [`File`]. What dockerd knows and we do not offer is refused by
//! name with a reason ([`NOT_OFFERED`]), unless its value asks for what we do anyway. Anything else is unknown, and
//! refused in dockerd's words. Nothing here knows the rest of the engine, so that it is fuzzed on its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// What the file says; a key that is not in it is `None` or empty.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct File {
    pub hosts: Vec<String>,
    pub data_root: Option<PathBuf>,
    pub exec_root: Option<PathBuf>,
    pub log_level: Option<String>,
    pub debug: Option<bool>,
    pub labels: Vec<String>,
    pub experimental: bool,
    pub live_restore: Option<bool>,
    pub shutdown_timeout: Option<i64>,

    pub insecure_registries: Vec<String>,
    pub registry_mirrors: Vec<String>,
    pub proxies: Proxies,
    pub max_concurrent_downloads: Option<i64>,
    pub max_concurrent_uploads: Option<i64>,
    pub max_download_attempts: Option<i64>,

    pub bridge: Option<String>,
    pub bip: Option<Ipv4Net>,
    pub fixed_cidr: Option<Ipv4Net>,
    pub default_gateway: Option<Ipv4Addr>,
    pub mtu: Option<u32>,
    pub icc: Option<bool>,
    pub ip_masq: Option<bool>,
    pub ip: Option<IpAddr>,
    pub default_address_pools: Vec<AddressPool>,
    pub default_network_opts: BTreeMap<String, BTreeMap<String, String>>,

    pub dns: Vec<IpAddr>,
    pub dns_opts: Vec<String>,
    pub dns_search: Vec<String>,
    pub host_gateway_ips: Vec<IpAddr>,
    pub log_driver: Option<String>,
    pub log_opts: BTreeMap<String, String>,
    pub default_ulimits: BTreeMap<String, Ulimit>,
    pub default_shm_size: Option<i64>,
    pub default_ipc_mode: Option<String>,
    pub default_cgroupns_mode: Option<String>,
    pub cgroup_parent: Option<String>,
    pub init: Option<bool>,
    pub no_new_privileges: Option<bool>,
    pub seccomp_profile: Option<String>,
    pub default_stop_timeout: Option<i64>,
    pub runtimes: BTreeMap<String, Runtime>,
    pub default_runtime: Option<String>,

    /// Every key that was given, with its value as text: a flag may not name it as well.
    pub given: BTreeMap<String, String>,
    /// What was accepted but changes nothing, as sentences.
    pub without_effect: Vec<String>,
}

/// Proxies for what the engine itself fetches.
#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Proxies {
    pub http_proxy: String,
    pub https_proxy: String,
    pub no_proxy: String,
}

/// A range that networks without a subnet of their own take one from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressPool {
    /// The range.
    #[serde(alias = "Base")]
    pub base: IpNet,
    /// Prefix length of each subnet taken from it.
    #[serde(alias = "Size")]
    pub size: u8,
}

/// A limit that containers start with.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ulimit {
    #[serde(rename = "Name", alias = "name", default)]
    pub name: String,
    #[serde(rename = "Soft", alias = "soft", default)]
    pub soft: i64,
    #[serde(rename = "Hard", alias = "hard", default)]
    pub hard: i64,
}

/// A program that runs containers instead of ours.
#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    pub path: String,
    #[serde(rename = "runtimeArgs")]
    pub arguments: Vec<String>,
}

/// Why a file is refused.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("it is not text")]
    NotText,
    #[error("it is not JSON: {0}")]
    Json(serde_json::Error),
    #[error("it is not TOML: {0}")]
    Toml(Box<toml::de::Error>),
    /// dockerd's words.
    #[error("the following directives don't match any configuration option: {}", .0.join(", "))]
    Unknown(Vec<String>),
    #[error("`{key}`: {reason}")]
    NotOffered { key: String, reason: &'static str },
    #[error("`{key}`: {message}")]
    Value { key: &'static str, message: String },
}

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Json,
    Toml,
}

impl Format {
    /// By the file's name; by its first letter when the name does not tell.
    pub fn of(extension: Option<&str>, bytes: &[u8]) -> Self {
        match extension {
            Some("json") => Self::Json,
            Some("toml") => Self::Toml,
            _ if without_mark(bytes).trim_ascii_start().starts_with(b"{") => Self::Json,
            _ => Self::Toml,
        }
    }
}

/// Values that a key of [`NOT_OFFERED`] may have, because they ask for nothing.
enum Harmless {
    /// Only those that switch off: `false`, 0 and everything empty.
    Off,
    /// Those, and this text.
    Text(&'static str),
    /// Only `true`.
    On,
    /// All of them. The reason is shown as a warning.
    All,
}

/// What dockerd offers and we do not, with the reason.
const NOT_OFFERED: &[(&str, Harmless, &str)] = &[
    ("allow-direct-routing", Harmless::Off, "addresses of containers are reached from this computer only"),
    ("allow-nondistributable-artifacts", Harmless::All, "layers are pushed wherever they came from"),
    ("authorization-plugins", Harmless::Off, "there are no plugins; guard the socket instead"),
    ("bip6", Harmless::Off, "the default network has IPv4 only"),
    ("bridge-accept-fwmark", Harmless::Off, "marked packets get no exception from the firewall's rules"),
    ("builder", Harmless::All, "the build cache is not kept by rules yet"),
    ("cdi-spec-dirs", Harmless::Off, "devices by interface (CDI) are not offered"),
    ("containerd", Harmless::Off, "the engine keeps images and runs containers itself, without containerd"),
    ("containerd-namespace", Harmless::Off, "the engine works without containerd"),
    ("containerd-plugin-namespace", Harmless::Off, "the engine works without containerd"),
    ("cpu-rt-period", Harmless::Off, "real-time scheduling is not offered"),
    ("cpu-rt-runtime", Harmless::Off, "real-time scheduling is not offered"),
    ("cri-containerd", Harmless::Off, "the engine works without containerd"),
    ("default-gateway-v6", Harmless::Off, "the default network has IPv4 only"),
    ("default-init", Harmless::Off, "`--init` uses the engine's own program"),
    ("deprecated-key-path", Harmless::All, "the engine's id is kept with its data"),
    ("exec-opts", Harmless::Off, "the only choice is `native.cgroupdriver=cgroupfs`, which is what happens"),
    ("firewall-backend", Harmless::Text("nftables"), "rules are made with nftables"),
    ("fixed-cidr-v6", Harmless::Off, "the default network has IPv4 only"),
    ("graph", Harmless::Off, "use `data-root`"),
    ("group", Harmless::Off, "the socket is for the user who runs the engine only"),
    ("host-gateway-ip", Harmless::Off, "use `host-gateway-ips`"),
    ("init-path", Harmless::Off, "`--init` uses the engine's own program"),
    ("ip-forward", Harmless::On, "networks of containers need forwarding"),
    ("ip-forward-no-drop", Harmless::All, "the policy for forwarding is left alone"),
    ("ip6tables", Harmless::On, "the engine's own table is always used"),
    (
        "iptables",
        Harmless::On,
        "networks of containers need rules; the engine keeps its own in a table of their own",
    ),
    ("ipv6", Harmless::Off, "the default network has IPv4 only"),
    ("log-format", Harmless::Text("text"), "the engine's own messages are text"),
    ("metrics-addr", Harmless::Off, "numbers are not served"),
    ("min-api-version", Harmless::Text("1.24"), "versions from 1.24 on are always served"),
    ("network-control-plane-mtu", Harmless::All, "it concerns swarm only"),
    ("network-diagnostic-port", Harmless::Off, "it concerns swarm only"),
    ("node-generic-resources", Harmless::Off, "it concerns swarm only"),
    ("nri-opts", Harmless::Off, "node resource plugins are not offered"),
    ("oom-score-adjust", Harmless::Off, "whoever starts the engine sets it"),
    ("pidfile", Harmless::Off, "no file tells whether the engine runs: its socket does"),
    ("raw-logs", Harmless::All, "the engine's own messages have no colours"),
    ("resolv-conf", Harmless::Off, "name servers are set with `dns`"),
    ("rootless", Harmless::Off, "run the machine instead: nothing on the host needs root"),
    ("selinux-enabled", Harmless::Off, "SELinux labels are not set"),
    ("storage-driver", Harmless::Text("overlay2"), "layers are kept with overlayfs"),
    ("storage-opts", Harmless::Off, "overlayfs is used without options"),
    ("swarm-default-advertise-addr", Harmless::Off, "there is no swarm"),
    ("swarm-raft-election-tick", Harmless::Off, "there is no swarm"),
    ("swarm-raft-heartbeat-tick", Harmless::Off, "there is no swarm"),
    ("tls", Harmless::Off, "the engine listens on a unix socket only"),
    ("tlscacert", Harmless::Off, "the engine listens on a unix socket only"),
    ("tlscert", Harmless::Off, "the engine listens on a unix socket only"),
    ("tlskey", Harmless::Off, "the engine listens on a unix socket only"),
    ("tlsverify", Harmless::Off, "the engine listens on a unix socket only"),
    ("userland-proxy", Harmless::All, "published ports need no process of their own"),
    ("userland-proxy-path", Harmless::Off, "published ports need no process of their own"),
    ("userns-remap", Harmless::Off, "users of containers are not mapped to others"),
];

/// The names dockerd has in `features`.
const FEATURES: &[&str] = &["buildkit", "cdi", "containerd-snapshotter"];

/// Reads a file's bytes. Fuzzed.
pub fn parse(bytes: &[u8], format: Format) -> Result<File, FileError> {
    let text = std::str::from_utf8(without_mark(bytes)).map_err(|_| FileError::NotText)?;
    let map: Map<String, Value> = match format {
        Format::Json if text.trim().is_empty() => Map::new(),
        Format::Json => serde_json::from_str(text).map_err(FileError::Json)?,
        Format::Toml => toml::from_str(text).map_err(|error| FileError::Toml(Box::new(error)))?,
    };
    from_keys(Keys(map))
}

/// Editors on Windows put a byte order mark first; dockerd takes it too.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// The keys nobody has read yet.
struct Keys(Map<String, Value>);

impl Keys {
    /// Takes a key out; the default when it is not there.
    fn take<T: DeserializeOwned + Default>(&mut self, key: &'static str) -> Result<T, FileError> {
        match self.0.remove(key) {
            None | Some(Value::Null) => Ok(T::default()),
            Some(value) => serde_json::from_value(value)
                .map_err(|error| FileError::Value { key, message: error.to_string() }),
        }
    }
}

fn from_keys(mut keys: Keys) -> Result<File, FileError> {
    let given = keys.0.iter().map(|(key, value)| (key.clone(), shown(value))).collect();
    let mut file = File {
        hosts: keys.take("hosts")?,
        data_root: keys.take("data-root")?,
        exec_root: keys.take("exec-root")?,
        log_level: keys.take("log-level")?,
        debug: keys.take("debug")?,
        labels: keys.take("labels")?,
        experimental: keys.take("experimental")?,
        live_restore: keys.take("live-restore")?,
        shutdown_timeout: keys.take("shutdown-timeout")?,
        insecure_registries: keys.take("insecure-registries")?,
        registry_mirrors: keys.take("registry-mirrors")?,
        proxies: keys.take("proxies")?,
        max_concurrent_downloads: keys.take("max-concurrent-downloads")?,
        max_concurrent_uploads: keys.take("max-concurrent-uploads")?,
        max_download_attempts: keys.take("max-download-attempts")?,
        bridge: keys.take("bridge")?,
        bip: keys.take("bip")?,
        fixed_cidr: keys.take("fixed-cidr")?,
        default_gateway: keys.take("default-gateway")?,
        mtu: keys.take("mtu")?,
        icc: keys.take("icc")?,
        ip_masq: keys.take("ip-masq")?,
        ip: keys.take("ip")?,
        default_address_pools: keys.take("default-address-pools")?,
        default_network_opts: keys.take("default-network-opts")?,
        dns: keys.take("dns")?,
        dns_opts: keys.take("dns-opts")?,
        dns_search: keys.take("dns-search")?,
        host_gateway_ips: keys.take("host-gateway-ips")?,
        log_driver: keys.take("log-driver")?,
        log_opts: keys.take("log-opts")?,
        default_ulimits: keys.take("default-ulimits")?,
        default_shm_size: keys.take::<Option<Size>>("default-shm-size")?.map(Size::bytes).transpose()?,
        default_ipc_mode: keys.take("default-ipc-mode")?,
        default_cgroupns_mode: keys.take("default-cgroupns-mode")?,
        cgroup_parent: keys.take("cgroup-parent")?,
        init: keys.take("init")?,
        no_new_privileges: keys.take("no-new-privileges")?,
        seccomp_profile: keys.take("seccomp-profile")?,
        default_stop_timeout: keys.take("default-stop-timeout")?,
        runtimes: keys.take("runtimes")?,
        default_runtime: keys.take("default-runtime")?,
        given,
        without_effect: Vec::new(),
    };
    // Proxies may also be written like the flags, at the top.
    for (key, proxy) in [
        ("http-proxy", &mut file.proxies.http_proxy),
        ("https-proxy", &mut file.proxies.https_proxy),
        ("no-proxy", &mut file.proxies.no_proxy),
    ] {
        if let Some(value) = keys.take::<Option<String>>(key)? {
            *proxy = value;
        }
    }
    features(&keys.take("features")?)?;
    if let Some(Value::Array(options)) = keys.0.get_mut("exec-opts") {
        options.retain(|option| option != "native.cgroupdriver=cgroupfs");
    }
    for (key, harmless, reason) in NOT_OFFERED {
        let Some(value) = keys.0.remove(*key) else { continue };
        let accepted = match harmless {
            Harmless::Off => is_off(&value),
            Harmless::Text(text) => is_off(&value) || value.as_str() == Some(text),
            Harmless::On => value == Value::Bool(true),
            Harmless::All => {
                if !is_off(&value) {
                    file.without_effect.push(format!("the setting `{key}` has no effect: {reason}"));
                }
                true
            }
        };
        if !accepted {
            return Err(FileError::NotOffered { key: (*key).to_owned(), reason });
        }
    }
    let unknown: Vec<String> = keys.0.keys().cloned().collect();
    if unknown.is_empty() { Ok(file) } else { Err(FileError::Unknown(unknown)) }
}

fn features(features: &BTreeMap<String, bool>) -> Result<(), FileError> {
    for (name, on) in features {
        match (FEATURES.contains(&name.as_str()), name.as_str(), on) {
            // The builder speaks BuildKit's protocol or it does not; nobody need choose.
            (true, "buildkit", _) | (_, _, false) => {}
            (true, ..) => {
                return Err(FileError::NotOffered {
                    key: format!("features.{name}"),
                    reason: "the engine has one image store and no device interfaces",
                });
            }
            (false, ..) => {
                return Err(FileError::NotOffered {
                    key: format!("features.{name}"),
                    reason: "there is no such feature",
                });
            }
        }
    }
    Ok(())
}

/// Whether a value asks for nothing.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// A value as dockerd prints it beside a flag's.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => format!("[{}]", list.iter().map(shown).collect::<Vec<_>>().join(" ")),
        other => other.to_string(),
    }
}

/// Bytes, as a number or as text with a unit: `64M`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Number(i64),
    Text(String),
}

impl Size {
    fn bytes(self) -> Result<i64, FileError> {
        let refuse = |text: &str| FileError::Value {
            key: "default-shm-size",
            message: format!("`{text}` is not a size; write bytes, or a number with a unit such as `64M`"),
        };
        let text = match self {
            Self::Number(bytes) if bytes >= 0 => return Ok(bytes),
            Self::Number(bytes) => return Err(refuse(&bytes.to_string())),
            Self::Text(text) => text,
        };
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.trim_end_matches(|letter: char| !letter.is_ascii_digit());
        let unit = match lower[digits.len()..].trim() {
            "" | "b" => 1,
            "k" | "kb" | "kib" => 1 << 10,
            "m" | "mb" | "mib" => 1 << 20,
            "g" | "gb" | "gib" => 1i64 << 30,
            "t" | "tb" | "tib" => 1i64 << 40,
            _ => return Err(refuse(&text)),
        };
        digits.parse::<i64>().ok().and_then(|number| number.checked_mul(unit)).ok_or_else(|| refuse(&text))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn json(text: &str) -> Result<File, String> {
        parse(text.as_bytes(), Format::Json).map_err(|error| error.to_string())
    }

    #[test]
    fn a_common_daemon_json_is_read() {
        let file = json(
            r#"{"registry-mirrors": ["https://m.example"], "insecure-registries": ["10.0.0.0/8"],
                "log-driver": "json-file", "log-opts": {"max-size": "10m", "max-file": "3"},
                "default-ulimits": {"nofile": {"Name": "nofile", "Hard": 64000, "Soft": 32000}},
                "bip": "172.26.0.1/16", "default-address-pools": [{"base": "172.30.0.0/16", "size": 24}],
                "dns": ["1.1.1.1"], "live-restore": true, "storage-driver": "overlay2", "iptables": true,
                "exec-opts": ["native.cgroupdriver=cgroupfs"], "features": {"buildkit": true},
                "default-shm-size": "128M", "hosts": ["unix:///run/x.sock"], "userland-proxy": false,
                "runtimes": {"crun": {"path": "/usr/bin/crun", "runtimeArgs": ["--debug"]}}}"#,
        )
        .unwrap();
        assert_eq!(file.registry_mirrors, ["https://m.example"]);
        assert_eq!(file.log_opts["max-size"], "10m");
        assert_eq!(file.default_ulimits["nofile"].hard, 64000);
        assert_eq!(file.default_address_pools[0].size, 24);
        assert_eq!(file.default_shm_size, Some(128 << 20));
        assert_eq!(file.live_restore, Some(true));
        assert_eq!(file.runtimes["crun"].arguments, ["--debug"]);
        assert_eq!(file.given["bip"], "172.26.0.1/16");
        assert!(file.without_effect.is_empty(), "{:?}", file.without_effect);
    }

    #[test]
    fn toml_has_the_same_keys() {
        let text = "registry-mirrors = [\"https://m\"]\n[log-opts]\nmax-size = \"1m\"\n[proxies]\nno-proxy = \"x\"\n";
        let file = parse(text.as_bytes(), Format::Toml).unwrap();
        assert_eq!((file.log_opts["max-size"].as_str(), file.proxies.no_proxy.as_str()), ("1m", "x"));
        assert!(parse(b"a = ", Format::Toml).unwrap_err().to_string().starts_with("it is not TOML"));
    }

    #[test]
    fn unknown_keys_are_all_named_in_dockerds_words() {
        assert_eq!(
            json(r#"{"zebra": 1, "apple": {}, "bip": "10.0.0.1/24"}"#).unwrap_err(),
            "the following directives don't match any configuration option: apple, zebra"
        );
    }

    #[test]
    fn what_is_not_offered_is_refused_by_name_unless_it_asks_for_nothing() {
        assert!(json(r#"{"tls": true}"#).unwrap_err().starts_with("`tls`: "));
        assert!(json(r#"{"storage-driver": "btrfs"}"#).unwrap_err().contains("overlayfs"));
        assert!(json(r#"{"iptables": false}"#).unwrap_err().contains("`iptables`"));
        assert!(
            json(r#"{"exec-opts": ["native.cgroupdriver=systemd"]}"#).unwrap_err().contains("`exec-opts`")
        );
        assert!(json(r#"{"features": {"containerd-snapshotter": true}}"#).unwrap_err().contains("features."));
        assert!(json(r#"{"tls": false, "userns-remap": "", "authorization-plugins": []}"#).is_ok());
        let file = json(r#"{"builder": {"gc": {"enabled": true}}}"#).unwrap();
        assert!(file.without_effect[0].contains("`builder`"));
    }

    #[test]
    fn wrong_types_name_their_key() {
        assert!(json(r#"{"mtu": "large"}"#).unwrap_err().starts_with("`mtu`: invalid type"));
        assert!(json(r#"{"log-opts": {"max-file": 3}}"#).unwrap_err().starts_with("`log-opts`"));
        assert!(json(r#"{"bip": "10.0.0.300/8"}"#).unwrap_err().starts_with("`bip`"));
        assert!(json(r#"{"default-shm-size": "big"}"#).unwrap_err().contains("`64M`"));
        assert!(json("[]").unwrap_err().starts_with("it is not JSON"));
        assert!(parse(b"\xff", Format::Json).is_err());
        assert_eq!(json("\u{feff}{}"), Ok(File::default()));
    }

    #[test]
    fn the_format_is_told_by_name_and_else_by_the_first_letter() {
        assert_eq!(Format::of(Some("json"), b""), Format::Json);
        assert_eq!(Format::of(None, b"\xef\xbb\xbf {}"), Format::Json);
        assert_eq!(Format::of(Some("conf"), b"bip = 1"), Format::Toml);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,200}") {
            let _ = parse(text.as_bytes(), Format::Json);
            let _ = parse(text.as_bytes(), Format::Toml);
        }

        #[test]
        fn any_value_of_any_key_is_read_or_refused(at in 0..NOT_OFFERED.len(), number: i64, text in "[a-z0-9/.]{0,12}") {
            let key = NOT_OFFERED[at].0;
            for value in [serde_json::json!(number), serde_json::json!(text), serde_json::json!({"a": [text]})] {
                let _ = json(&serde_json::json!({key: value, "default-shm-size": text, "bip": text}).to_string());
            }
        }
    }
}

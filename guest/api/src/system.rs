//! `/version` and `/info`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Answer of `GET /version`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Version {
    /// The product.
    pub platform: Platform,
    /// Parts with versions of their own.
    pub components: Vec<Component>,
    /// The engine's version.
    pub version: String,
    /// Newest API spoken.
    pub api_version: String,
    /// Oldest API spoken.
    #[serde(rename = "MinAPIVersion")]
    pub min_api_version: String,
    /// Commit.
    pub git_commit: String,
    /// Version of the language, by an old name.
    pub go_version: String,
    /// `linux`.
    pub os: String,
    /// `amd64`, …
    pub arch: String,
    /// `uname -r`.
    pub kernel_version: String,
    /// Whether experimental features are on.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub experimental: bool,
    /// RFC 3339.
    pub build_time: String,
}

/// The product.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Platform {
    /// Its name.
    pub name: String,
}

/// A part with a version of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Component {
    /// `Engine`, …
    pub name: String,
    /// Its version.
    pub version: String,
    /// More, as text.
    pub details: BTreeMap<String, String>,
}

/// Answer of `GET /info`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Info {
    /// Stable id of this engine.
    #[serde(rename = "ID")]
    pub id: String,
    /// All containers.
    pub containers: i64,
    /// Running ones.
    pub containers_running: i64,
    /// Paused ones.
    pub containers_paused: i64,
    /// Stopped ones.
    pub containers_stopped: i64,
    /// Images.
    pub images: i64,
    /// `overlay2`.
    pub driver: String,
    /// Pairs of name and value.
    pub driver_status: Vec<[String; 2]>,
    /// What can be plugged.
    pub plugins: Plugins,
    /// cgroup memory limits work.
    pub memory_limit: bool,
    /// cgroup swap limits work.
    pub swap_limit: bool,
    /// cgroup limits of the kernel's memory for TCP work.
    #[serde(rename = "KernelMemoryTCP", skip_serializing_if = "crate::is_false")]
    pub kernel_memory_tcp: bool,
    /// cgroup CPU quotas work.
    pub cpu_cfs_period: bool,
    /// cgroup CPU quotas work.
    pub cpu_cfs_quota: bool,
    /// cgroup CPU shares work.
    #[serde(rename = "CPUShares")]
    pub cpu_shares: bool,
    /// cgroup CPU sets work.
    #[serde(rename = "CPUSet")]
    pub cpu_set: bool,
    /// cgroup process limits work.
    pub pids_limit: bool,
    /// Packets are forwarded.
    #[serde(rename = "IPv4Forwarding")]
    pub ipv4_forwarding: bool,
    /// Debug logging is on.
    pub debug: bool,
    /// Open files of the engine.
    #[serde(rename = "NFd")]
    pub n_fd: i64,
    /// cgroup OOM killer can be turned off.
    pub oom_kill_disable: bool,
    /// Tasks of the engine.
    pub n_goroutines: i64,
    /// RFC 3339.
    pub system_time: String,
    /// `json-file`.
    pub logging_driver: String,
    /// `cgroupfs`.
    pub cgroup_driver: String,
    /// `1` or `2`.
    pub cgroup_version: String,
    /// Clients listening for events.
    pub n_events_listener: i64,
    /// `uname -r`.
    pub kernel_version: String,
    /// `Debian GNU/Linux 12 (bookworm)`, …
    pub operating_system: String,
    /// `12`, …
    #[serde(rename = "OSVersion")]
    pub os_version: String,
    /// `linux`.
    #[serde(rename = "OSType")]
    pub os_type: String,
    /// `x86_64`, …
    pub architecture: String,
    /// The public index.
    pub index_server_address: String,
    /// Registries.
    pub registry_config: RegistryConfig,
    /// Processors.
    #[serde(rename = "NCPU")]
    pub ncpu: i64,
    /// Bytes.
    pub mem_total: i64,
    /// Always empty here.
    pub generic_resources: Option<Vec<serde_json::Value>>,
    /// Where everything is kept.
    pub docker_root_dir: String,
    /// Proxy.
    pub http_proxy: String,
    /// Proxy.
    pub https_proxy: String,
    /// Proxy exceptions.
    pub no_proxy: String,
    /// Host name.
    pub name: String,
    /// Labels of the engine.
    pub labels: Vec<String>,
    /// Experimental features are on.
    pub experimental_build: bool,
    /// The engine's version.
    pub server_version: String,
    /// Runtimes by name.
    pub runtimes: BTreeMap<String, Runtime>,
    /// Name of the one used.
    pub default_runtime: String,
    /// Swarm.
    pub swarm: Swarm,
    /// Containers survive a restart of the engine.
    pub live_restore_enabled: bool,
    /// Empty on Linux.
    pub isolation: String,
    /// Program used for `--init`.
    pub init_binary: String,
    /// Commit of a part.
    pub containerd_commit: Commit,
    /// Commit of a part.
    pub runc_commit: Commit,
    /// Commit of a part.
    pub init_commit: Commit,
    /// `name=seccomp,profile=builtin`, …
    pub security_options: Vec<String>,
    /// Device interface folders.
    #[serde(rename = "CDISpecDirs")]
    pub cdi_spec_dirs: Vec<String>,
    /// What makes the rules of networks.
    pub firewall_backend: FirewallBackend,
    /// Devices found by their interface; none here.
    pub discovered_devices: Vec<serde_json::Value>,
    /// Where networks take their subnets from, if the settings say so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub default_address_pools: Vec<AddressPool>,
    /// Things a user should know (JSON null when none).
    pub warnings: Option<Vec<String>>,
}

/// What makes the rules of networks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct FirewallBackend {
    /// `nftables`.
    pub driver: String,
}

/// A range that networks take subnets from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AddressPool {
    /// The range.
    pub base: String,
    /// Prefix length of each subnet.
    pub size: i64,
}

/// What can be plugged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Plugins {
    /// Volume drivers.
    pub volume: Vec<String>,
    /// Network drivers.
    pub network: Vec<String>,
    /// Authorisation plugins.
    pub authorization: Option<Vec<String>>,
    /// Log drivers.
    pub log: Vec<String>,
}

/// How registries are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegistryConfig {
    /// Subnets reached without TLS.
    #[serde(rename = "InsecureRegistryCIDRs")]
    pub insecure_registry_cidrs: Vec<String>,
    /// By name.
    pub index_configs: BTreeMap<String, IndexConfig>,
    /// Mirrors of the public index.
    pub mirrors: Vec<String>,
}

/// How one registry is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct IndexConfig {
    /// Its name.
    pub name: String,
    /// Its mirrors.
    pub mirrors: Vec<String>,
    /// With TLS.
    pub secure: bool,
    /// The public index.
    pub official: bool,
}

/// A runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Runtime {
    /// The program.
    pub path: String,
    /// Its first arguments.
    #[serde(rename = "runtimeArgs", skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
}

/// Swarm is never active here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Swarm {
    /// Empty.
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// Empty.
    pub node_addr: String,
    /// `inactive`.
    pub local_node_state: String,
    /// False.
    pub control_available: bool,
    /// Empty.
    pub error: String,
    /// Null.
    pub remote_managers: Option<Vec<serde_json::Value>>,
}

/// A part's commit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Commit {
    /// The commit's id.
    #[serde(rename = "ID")]
    pub id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_uses_dockers_spellings() {
        let json = serde_json::to_value(Info::default()).unwrap();
        for name in
            ["ID", "NCPU", "OSType", "CPUShares", "NFd", "IPv4Forwarding", "CpuCfsQuota", "NGoroutines"]
        {
            assert!(json.get(name).is_some(), "{name}");
        }
        assert_eq!(json["ContainerdCommit"], serde_json::json!({"ID": ""}));
        assert!(json["Warnings"].is_null());
    }

    #[test]
    fn version_hides_experimental_unless_on() {
        let json = serde_json::to_value(Version::default()).unwrap();
        assert!(json.get("Experimental").is_none());
        assert!(json.get("MinAPIVersion").is_some() && json.get("ApiVersion").is_some());
    }
}

//! Containers: what a client asks for, and what it is shown.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::KeySet;
use crate::network::{EndpointSettings, NetworkSettings, NetworkingConfig, PortBinding};

/// Body of `POST /containers/create`: a [`ContainerConfig`] with two more members.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ContainerCreate {
    /// The portable part.
    #[serde(flatten)]
    pub config: ContainerConfig,
    /// The part that depends on this engine.
    pub host_config: HostConfig,
    /// Endpoints by network name.
    pub networking_config: NetworkingConfig,
}

/// The portable part of a container's settings; also the defaults an image carries.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ContainerConfig {
    /// Host name; empty means the short id.
    pub hostname: String,
    /// Domain name.
    pub domainname: String,
    /// `user[:group]`, names or numbers.
    pub user: String,
    /// The client wants standard input.
    pub attach_stdin: bool,
    /// The client wants standard output.
    pub attach_stdout: bool,
    /// The client wants standard error.
    pub attach_stderr: bool,
    /// `80/tcp`, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exposed_ports: Option<KeySet>,
    /// Allocate a terminal.
    pub tty: bool,
    /// Keep standard input open.
    pub open_stdin: bool,
    /// Close standard input when the first client that attached it goes.
    pub stdin_once: bool,
    /// `NAME=value`.
    pub env: Option<Vec<String>>,
    /// Arguments, or program and arguments when there is no entry point.
    #[serde(deserialize_with = "crate::words")]
    pub cmd: Option<Vec<String>>,
    /// How to find out whether it works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
    /// Windows only.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub args_escaped: bool,
    /// The image as the user named it.
    pub image: String,
    /// Anonymous volumes.
    pub volumes: Option<KeySet>,
    /// Working directory.
    pub working_dir: String,
    /// Program and first arguments.
    #[serde(deserialize_with = "crate::words")]
    pub entrypoint: Option<Vec<String>>,
    /// No network at all.
    #[serde(skip_serializing_if = "crate::is_false")]
    pub network_disabled: bool,
    /// Hardware address, before API 1.44.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac_address: String,
    /// Instructions for images built on this one.
    pub on_build: Option<Vec<String>>,
    /// The user's labels.
    pub labels: BTreeMap<String, String>,
    /// Signal that asks it to stop.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
    /// Seconds to wait after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<i64>,
    /// Shell of `RUN`, `CMD` and `ENTRYPOINT` in shell form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shell: Option<Vec<String>>,
}

/// Environment and command lines hold secrets: only names are shown.
impl std::fmt::Debug for ContainerConfig {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ContainerConfig")
            .field("image", &self.image)
            .field("tty", &self.tty)
            .field("open_stdin", &self.open_stdin)
            .finish_non_exhaustive()
    }
}

/// A health check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Healthcheck {
    /// `[]`, `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", …]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<Vec<String>>,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "crate::is_zero")]
    pub interval: i64,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "crate::is_zero")]
    pub timeout: i64,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "crate::is_zero")]
    pub start_period: i64,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "crate::is_zero")]
    pub start_interval: i64,
    /// Failures in a row that make it unhealthy.
    #[serde(skip_serializing_if = "crate::is_zero")]
    pub retries: i64,
}

/// The part of a container's settings that depends on this engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HostConfig {
    /// `/host:/container[:options]`.
    pub binds: Option<Vec<String>>,
    /// Where to write the id, on the client.
    #[serde(rename = "ContainerIDFile")]
    pub container_id_file: String,
    /// Logging.
    pub log_config: LogConfig,
    /// `default`, `bridge`, `host`, `none`, …
    pub network_mode: String,
    /// Published ports by `80/tcp`.
    pub port_bindings: Option<BTreeMap<String, Option<Vec<PortBinding>>>>,
    /// What to do when it ends.
    pub restart_policy: RestartPolicy,
    /// Remove it when it ends.
    pub auto_remove: bool,
    /// Volume driver.
    pub volume_driver: String,
    /// Containers whose volumes it gets too.
    pub volumes_from: Option<Vec<String>>,
    /// Terminal size, height then width.
    pub console_size: [u16; 2],
    /// Annotations passed to the runtime.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Capabilities to add.
    pub cap_add: Option<Vec<String>>,
    /// Capabilities to drop.
    pub cap_drop: Option<Vec<String>>,
    /// `private` or `host`.
    pub cgroupns_mode: String,
    /// Name servers.
    pub dns: Option<Vec<String>>,
    /// Resolver options.
    pub dns_options: Option<Vec<String>>,
    /// Search domains.
    pub dns_search: Option<Vec<String>>,
    /// `name:address` for /etc/hosts.
    pub extra_hosts: Option<Vec<String>>,
    /// Supplementary groups.
    pub group_add: Option<Vec<String>>,
    /// `private`, `shareable`, `host`, `none`, …
    pub ipc_mode: String,
    /// Parent cgroup, by an old name.
    pub cgroup: String,
    /// Legacy links.
    pub links: Option<Vec<String>>,
    /// Preference of the OOM killer.
    pub oom_score_adj: i64,
    /// `host`, `container:…` or empty.
    pub pid_mode: String,
    /// Every capability and device.
    pub privileged: bool,
    /// Publish everything exposed.
    pub publish_all_ports: bool,
    /// Root file system is read-only.
    pub readonly_rootfs: bool,
    /// `seccomp=unconfined`, `no-new-privileges`, …
    pub security_opt: Option<Vec<String>>,
    /// Storage driver options.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_opt: Option<BTreeMap<String, String>>,
    /// tmpfs mounts by path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tmpfs: Option<BTreeMap<String, String>>,
    /// `host` or empty.
    #[serde(rename = "UTSMode")]
    pub uts_mode: String,
    /// `host` or empty.
    pub userns_mode: String,
    /// Bytes of /dev/shm.
    pub shm_size: i64,
    /// Kernel settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sysctls: Option<BTreeMap<String, String>>,
    /// Name of the runtime.
    pub runtime: String,
    /// Windows only.
    pub isolation: String,
    /// CPU weight.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory: i64,
    /// Billionths of a CPU.
    pub nano_cpus: i64,
    /// Parent cgroup.
    pub cgroup_parent: String,
    /// Block weight.
    pub blkio_weight: u16,
    /// Per device.
    pub blkio_weight_device: Option<Vec<WeightDevice>>,
    /// Per device.
    pub blkio_device_read_bps: Option<Vec<ThrottleDevice>>,
    /// Per device.
    pub blkio_device_write_bps: Option<Vec<ThrottleDevice>>,
    /// Per device.
    #[serde(rename = "BlkioDeviceReadIOps")]
    pub blkio_device_read_iops: Option<Vec<ThrottleDevice>>,
    /// Per device.
    #[serde(rename = "BlkioDeviceWriteIOps")]
    pub blkio_device_write_iops: Option<Vec<ThrottleDevice>>,
    /// Microseconds.
    pub cpu_period: i64,
    /// Microseconds.
    pub cpu_quota: i64,
    /// Microseconds.
    pub cpu_realtime_period: i64,
    /// Microseconds.
    pub cpu_realtime_runtime: i64,
    /// `0-2,7`.
    pub cpuset_cpus: String,
    /// `0-1`.
    pub cpuset_mems: String,
    /// Devices.
    pub devices: Option<Vec<DeviceMapping>>,
    /// Device rules.
    pub device_cgroup_rules: Option<Vec<String>>,
    /// Devices through drivers.
    pub device_requests: Option<Vec<DeviceRequest>>,
    /// Bytes; removed in API 1.42.
    #[serde(skip_serializing_if = "crate::is_zero")]
    pub kernel_memory: i64,
    /// Bytes.
    #[serde(rename = "KernelMemoryTCP", skip_serializing_if = "crate::is_zero")]
    pub kernel_memory_tcp: i64,
    /// Bytes.
    pub memory_reservation: i64,
    /// Bytes of memory and swap; -1 is unlimited.
    pub memory_swap: i64,
    /// 0 to 100; -1 and absent mean unset.
    pub memory_swappiness: Option<i64>,
    /// Turn the OOM killer off.
    pub oom_kill_disable: Option<bool>,
    /// Processes; 0, -1 and absent mean unlimited.
    pub pids_limit: Option<i64>,
    /// Resource limits.
    pub ulimits: Option<Vec<Ulimit>>,
    /// Windows only.
    pub cpu_count: i64,
    /// Windows only.
    pub cpu_percent: i64,
    /// Windows only.
    #[serde(rename = "IOMaximumIOps")]
    pub io_maximum_iops: i64,
    /// Windows only.
    #[serde(rename = "IOMaximumBandwidth")]
    pub io_maximum_bandwidth: i64,
    /// Mounts, the long form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mounts: Option<Vec<crate::mount::Mount>>,
    /// Paths hidden; absent means the default list.
    pub masked_paths: Option<Vec<String>>,
    /// Paths made read-only; absent means the default list.
    pub readonly_paths: Option<Vec<String>>,
    /// Run a small init as PID 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<bool>,
}

/// Logging of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogConfig {
    /// `json-file` or `none`; empty means the default.
    #[serde(rename = "Type")]
    pub kind: String,
    /// Driver options.
    #[serde(rename = "Config")]
    pub config: BTreeMap<String, String>,
}

/// What to do when a container ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RestartPolicy {
    /// `no` (or empty), `always`, `unless-stopped`, `on-failure`.
    pub name: String,
    /// For `on-failure`; 0 is unlimited.
    pub maximum_retry_count: i64,
}

/// One resource limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Ulimit {
    /// `nofile`, …
    pub name: String,
    /// Upper limit; -1 is unlimited.
    pub hard: i64,
    /// Limit in force; -1 is unlimited.
    pub soft: i64,
}

/// A device of the host in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DeviceMapping {
    /// A node, or a folder of nodes, on the host.
    pub path_on_host: String,
    /// Where it is in the container.
    pub path_in_container: String,
    /// Letters of `rwm`.
    pub cgroup_permissions: String,
}

/// A wish for devices that a driver knows how to give.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DeviceRequest {
    /// Name of the driver; empty means whichever has the capabilities.
    pub driver: String,
    /// How many; -1 is all.
    pub count: i64,
    /// Or these.
    #[serde(rename = "DeviceIDs")]
    pub device_ids: Option<Vec<String>>,
    /// One list of these is to be had as a whole.
    pub capabilities: Option<Vec<Vec<String>>>,
    /// Options of the driver.
    pub options: Option<BTreeMap<String, String>>,
}

/// The weight of one block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct WeightDevice {
    /// The node.
    pub path: String,
    /// 10 to 1000.
    pub weight: u16,
}

/// The limit of one block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ThrottleDevice {
    /// The node.
    pub path: String,
    /// Bytes or operations in a second.
    pub rate: u64,
}

/// Answer of `POST /containers/{id}/update`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerUpdated {
    /// Things the user should know (JSON null when there are none).
    #[serde(default)]
    pub warnings: Option<Vec<String>>,
}

/// Answer of `POST /containers/create`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerCreated {
    /// The new container's id.
    pub id: String,
    /// Things the user should know.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// One line of `GET /containers/json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ContainerSummary {
    /// Id.
    pub id: String,
    /// Names, with a leading slash.
    pub names: Vec<String>,
    /// The image as the user named it.
    pub image: String,
    /// The image's id.
    #[serde(rename = "ImageID")]
    pub image_id: String,
    /// Program and arguments, joined.
    pub command: String,
    /// Unix seconds.
    pub created: i64,
    /// Ports.
    pub ports: Vec<PortSummary>,
    /// Bytes written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_rw: Option<i64>,
    /// Bytes written, and the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_root_fs: Option<i64>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// `created`, `running`, `exited`, …
    pub state: String,
    /// `Up 2 minutes`, `Exited (0) 3 hours ago`, …
    pub status: String,
    /// A part of the host configuration.
    pub host_config: HostConfigSummary,
    /// Networks.
    pub network_settings: NetworkSettingsSummary,
    /// Mounts.
    pub mounts: Vec<MountPoint>,
}

/// A port in a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PortSummary {
    /// Host address.
    #[serde(rename = "IP", skip_serializing_if = "String::is_empty")]
    pub ip: String,
    /// Port in the container.
    pub private_port: u16,
    /// Port on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_port: Option<u16>,
    /// `tcp`, `udp` or `sctp`.
    #[serde(rename = "Type")]
    pub kind: String,
}

/// The part of the host configuration a listing shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HostConfigSummary {
    /// Network mode.
    pub network_mode: String,
}

/// The networks a listing shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NetworkSettingsSummary {
    /// Attachments by network name.
    pub networks: BTreeMap<String, EndpointSettings>,
}

/// Something mounted into a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct MountPoint {
    /// `bind`, `volume`, `tmpfs`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// Name of a volume.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Where it comes from.
    pub source: String,
    /// Where it is in the container.
    pub destination: String,
    /// Volume driver.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub driver: String,
    /// Options as given.
    pub mode: String,
    /// Writable.
    #[serde(rename = "RW")]
    pub rw: bool,
    /// Propagation.
    pub propagation: String,
}

/// Where layers are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct GraphDriver {
    /// Folders by purpose (JSON null when not mounted).
    pub data: Option<BTreeMap<String, String>>,
    /// `overlay2`.
    pub name: String,
}

/// Answer of `GET /containers/{id}/json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ContainerInspect {
    /// Id.
    pub id: String,
    /// RFC 3339.
    pub created: String,
    /// The program.
    pub path: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// What it does now.
    pub state: State,
    /// The image's id.
    pub image: String,
    /// Its /etc/resolv.conf.
    pub resolv_conf_path: String,
    /// Its /etc/hostname.
    pub hostname_path: String,
    /// Its /etc/hosts.
    pub hosts_path: String,
    /// Its json-file log; empty when there is none.
    pub log_path: String,
    /// Name, with a leading slash.
    pub name: String,
    /// Restarts by policy.
    pub restart_count: i64,
    /// `overlay2`.
    pub driver: String,
    /// `linux`.
    pub platform: String,
    /// Unused.
    pub mount_label: String,
    /// Unused.
    pub process_label: String,
    /// Unused.
    pub app_armor_profile: String,
    /// Running execs (JSON null when none).
    #[serde(rename = "ExecIDs")]
    pub exec_ids: Option<Vec<String>>,
    /// The part that depends on this engine.
    pub host_config: HostConfig,
    /// Where its layers are.
    pub graph_driver: GraphDriver,
    /// Bytes written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_rw: Option<i64>,
    /// Bytes written, and the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_root_fs: Option<i64>,
    /// Mounts.
    pub mounts: Vec<MountPoint>,
    /// The portable part.
    pub config: ContainerConfig,
    /// Networks.
    pub network_settings: NetworkSettings,
}

/// What a container does now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct State {
    /// `created`, `running`, `paused`, `restarting`, `removing`, `exited`, `dead`.
    pub status: String,
    /// Running, also when paused or restarting.
    pub running: bool,
    /// Paused.
    pub paused: bool,
    /// Waiting to be started again.
    pub restarting: bool,
    /// The kernel killed a process for memory.
    #[serde(rename = "OOMKilled")]
    pub oom_killed: bool,
    /// Could not be removed.
    pub dead: bool,
    /// Process id; 0 when not running.
    pub pid: i64,
    /// Last exit code.
    pub exit_code: i64,
    /// Why the last start failed.
    pub error: String,
    /// RFC 3339; year 1 when never.
    pub started_at: String,
    /// RFC 3339; year 1 when never.
    pub finished_at: String,
    /// How its health check goes; absent without one, and before the first start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<crate::health::Health>,
}

/// Body of `POST /containers/{id}/wait`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct WaitResult {
    /// Why waiting failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<WaitError>,
    /// Exit code.
    pub status_code: i64,
}

/// Why waiting failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct WaitError {
    /// The sentence.
    pub message: String,
}

/// Answer of `GET /containers/{id}/top`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Top {
    /// One list of columns per process.
    pub processes: Vec<Vec<String>>,
    /// Column names.
    pub titles: Vec<String>,
}

/// Answer of `POST /containers/prune`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ContainersPruned {
    /// Their ids; JSON null when there were none.
    pub containers_deleted: Option<Vec<String>>,
    /// Bytes of their writable layers.
    pub space_reclaimed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_stock_client_create_body_is_read_and_echoed() {
        let body = br#"{"Hostname":"","Domainname":"","User":"","AttachStdin":false,"AttachStdout":true,"AttachStderr":true,
            "Tty":false,"OpenStdin":false,"StdinOnce":false,"Env":null,"Cmd":["true"],"Image":"busybox","Volumes":{},
            "WorkingDir":"","Entrypoint":null,"OnBuild":null,"Labels":{},"HostConfig":{"Binds":null,"ContainerIDFile":"",
            "LogConfig":{"Type":"","Config":{}},"NetworkMode":"default","PortBindings":{},"RestartPolicy":{"Name":"no",
            "MaximumRetryCount":0},"AutoRemove":true,"ConsoleSize":[24,80],"CapAdd":null,"Memory":0,"MemorySwappiness":-1,
            "OomKillDisable":false,"PidsLimit":0,"Ulimits":[],"MaskedPaths":null},
            "NetworkingConfig":{"EndpointsConfig":{"default":{"IPAMConfig":null,"MacAddress":""}}}}"#;
        let create: ContainerCreate = crate::decode(body).unwrap();
        assert_eq!(create.config.cmd, Some(vec!["true".to_owned()]));
        assert!(create.host_config.auto_remove);
        assert_eq!(create.host_config.console_size, [24, 80]);
        assert_eq!(create.host_config.memory_swappiness, Some(-1));
        assert!(create.networking_config.endpoints_config.contains_key("default"));
        let again: ContainerCreate = crate::decode(&serde_json::to_vec(&create).unwrap()).unwrap();
        assert_eq!(again, create);
    }

    #[test]
    fn empty_members_are_present_or_absent_as_in_dockerd() {
        let config = serde_json::to_value(ContainerConfig::default()).unwrap();
        for present in ["Hostname", "User", "Env", "Cmd", "Volumes", "Entrypoint", "OnBuild", "Labels"] {
            assert!(config.get(present).is_some(), "{present}");
        }
        for absent in ["ExposedPorts", "Healthcheck", "StopSignal", "StopTimeout", "Shell", "NetworkDisabled"]
        {
            assert!(config.get(absent).is_none(), "{absent}");
        }
        assert!(config["Env"].is_null());
        let host = serde_json::to_value(HostConfig::default()).unwrap();
        assert!(host["Binds"].is_null());
        assert_eq!(host["ConsoleSize"], json!([0, 0]));
        assert!(host["PortBindings"].is_null());
        for absent in ["Init", "Mounts", "Tmpfs", "Sysctls", "StorageOpt", "Annotations", "KernelMemory"] {
            assert!(host.get(absent).is_none(), "{absent}");
        }
    }

    #[test]
    fn inspect_uses_dockers_spellings() {
        let json = serde_json::to_value(ContainerInspect::default()).unwrap();
        assert!(json["ExecIDs"].is_null());
        assert!(json.get("SizeRw").is_none());
        assert_eq!(json["State"]["OOMKilled"], false);
        assert!(json.get("AppArmorProfile").is_some());
        assert!(json["GraphDriver"]["Data"].is_null());
    }

    #[test]
    fn a_wait_result_has_an_error_only_when_it_failed() {
        assert_eq!(
            serde_json::to_string(&WaitResult { status_code: 7, error: None }).unwrap(),
            r#"{"StatusCode":7}"#
        );
    }

    #[test]
    fn debug_output_shows_no_environment() {
        let config = ContainerConfig { env: Some(vec!["TOKEN=hunter2".into()]), ..Default::default() };
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}

//! From what a client asked for to what a container is: the image's settings merged under the user's, everything
//! checked. Pure but for one question, whether a bind's source exists, which the caller answers.
//!
//! A setting that would change what the container does and that this engine cannot honour is refused with a sentence
//! naming it; one that changes nothing is kept and shown again by inspect.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use guest_api::network::EndpointSettings;
use guest_api::{ContainerConfig, ContainerCreate, HostConfig};

use super::files::extra_host;
use super::record::Bind;
use super::spec;
use crate::failure::Failure;

/// Least memory a container can be limited to, as in Docker.
const MEMORY_MIN_BYTES: i64 = 6 << 20;
/// Size of /dev/shm unless asked otherwise.
const SHM_SIZE_DEFAULT_BYTES: i64 = 64 << 20;

/// A checked request.
#[derive(Debug)]
pub struct Resolved {
    pub config: ContainerConfig,
    pub host: HostConfig,
    pub binds: Vec<Bind>,
    pub warnings: Vec<String>,
}

/// Merges and checks. `image` is the image's own settings, `id` the new container's id.
pub fn resolve(create: ContainerCreate, image: &ContainerConfig, id: &str) -> Result<Resolved, Failure> {
    let ContainerCreate { mut config, mut host_config, networking_config } = create;
    if config.volumes.as_ref().is_some_and(|volumes| !volumes.is_empty()) {
        return Err(unsupported("anonymous volumes (Volumes)"));
    }
    if config
        .healthcheck
        .as_ref()
        .is_some_and(|check| check.test.as_deref().is_some_and(|test| test != ["NONE"]))
    {
        return Err(unsupported("health checks (Healthcheck)"));
    }
    merge(&mut config, image);
    if config.entrypoint.as_deref() == Some(&[String::new()]) {
        config.entrypoint = None;
    }
    if config.entrypoint.as_ref().is_none_or(Vec::is_empty) && config.cmd.as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure::invalid("no command specified"));
    }
    check_config(&config)?;
    network(&mut config, &mut host_config, &networking_config.endpoints_config)?;
    if config.hostname.is_empty() && host_config.network_mode != "host" && host_config.uts_mode != "host" {
        config.hostname = id[..12].to_owned();
    }
    refuse_unsupported(&host_config)?;
    check_host(&host_config)?;
    let mut binds = Vec::new();
    for text in host_config.binds.iter().flatten() {
        binds.push(parse_bind(text)?);
    }
    let destinations: Vec<&Path> = binds
        .iter()
        .map(|bind| bind.destination.as_path())
        .chain(host_config.tmpfs.iter().flat_map(|mounts| mounts.keys().map(Path::new)))
        .collect();
    for (index, destination) in destinations.iter().enumerate() {
        if destinations[..index].contains(destination) {
            return Err(Failure::invalid(format!("Duplicate mount point: {}", destination.display())));
        }
    }
    fill_defaults(&mut host_config);
    Ok(Resolved { config, host: host_config, binds, warnings: Vec::new() })
}

/// Puts the image's settings under the user's, by Docker's rules.
fn merge(config: &mut ContainerConfig, image: &ContainerConfig) {
    if config.user.is_empty() {
        config.user.clone_from(&image.user);
    }
    if let Some(ports) = &image.exposed_ports
        && !ports.is_empty()
    {
        let all = config.exposed_ports.get_or_insert_default();
        ports.iter().for_each(|(port, value)| _ = all.entry(port.clone()).or_insert(*value));
    }
    let given = config.env.get_or_insert_default();
    let names: BTreeSet<String> = given.iter().map(|entry| env_name(entry).to_owned()).collect();
    given.extend(image.env.iter().flatten().filter(|entry| !names.contains(env_name(entry))).cloned());
    for (key, value) in &image.labels {
        config.labels.entry(key.clone()).or_insert_with(|| value.clone());
    }
    // An empty list counts as nothing for the command, but as "none at all" for the entry point.
    if config.entrypoint.as_ref().is_none_or(Vec::is_empty) {
        if config.cmd.as_ref().is_none_or(Vec::is_empty) && config.entrypoint.is_none() {
            config.cmd.clone_from(&image.cmd);
        }
        if config.entrypoint.is_none() {
            config.entrypoint.clone_from(&image.entrypoint);
        }
    }
    if config.working_dir.is_empty() {
        config.working_dir.clone_from(&image.working_dir);
    }
    if config.stop_signal.is_empty() {
        config.stop_signal.clone_from(&image.stop_signal);
    }
    config.stop_timeout = config.stop_timeout.or(image.stop_timeout);
    config.volumes.clone_from(&image.volumes);
    if config.shell.is_none() {
        config.shell.clone_from(&image.shell);
    }
    if config.healthcheck.is_none() {
        config.healthcheck.clone_from(&image.healthcheck);
    }
}

fn env_name(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(name, _)| name)
}

fn check_config(config: &ContainerConfig) -> Result<(), Failure> {
    if !config.working_dir.is_empty() && !Path::new(&config.working_dir).is_absolute() {
        return Err(Failure::invalid(format!(
            "the working directory '{}' is invalid, it needs to be an absolute path",
            config.working_dir
        )));
    }
    for entry in config.env.iter().flatten() {
        if env_name(entry).is_empty() {
            return Err(Failure::invalid(format!("invalid environment variable: {entry}")));
        }
    }
    if !config.stop_signal.is_empty() {
        super::signal::parse(&config.stop_signal)?;
    }
    let words = config.entrypoint.iter().chain(&config.cmd).chain(&config.env).flatten();
    let texts = words.chain([&config.hostname, &config.domainname, &config.user, &config.working_dir]);
    if texts.into_iter().any(|text| text.contains('\0')) {
        return Err(Failure::invalid("a command, variable or name holds a zero byte"));
    }
    Ok(())
}

/// Which network, and refusing what its endpoint settings ask beyond it.
fn network(
    config: &mut ContainerConfig,
    host: &mut HostConfig,
    endpoints: &std::collections::BTreeMap<String, EndpointSettings>,
) -> Result<(), Failure> {
    if host.network_mode.is_empty() {
        host.network_mode = "default".to_owned();
    }
    if config.network_disabled {
        host.network_mode = "none".to_owned();
    }
    if host.network_mode == "default" {
        // What the stock client sends, and what dockerd stores, is "bridge" since API 1.44.
        host.network_mode = "bridge".to_owned();
    }
    match host.network_mode.as_str() {
        "bridge" | "none" | "host" => {}
        mode if mode.starts_with("container:") => {
            return Err(unsupported(&format!("sharing a container's network (NetworkMode {mode})")));
        }
        mode => return Err(Failure::not_found(guest_api::error::no_such_network(mode))),
    }
    for (name, endpoint) in endpoints {
        if name != "default" && *name != host.network_mode {
            return Err(match name.as_str() {
                "bridge" | "host" | "none" => unsupported("more than one network (NetworkingConfig)"),
                _ => Failure::not_found(guest_api::error::no_such_network(name)),
            });
        }
        let addresses = endpoint.ipam_config.as_ref();
        if addresses.is_some_and(|ipam| !ipam.ipv4_address.is_empty() || !ipam.ipv6_address.is_empty()) {
            return Err(Failure::invalid(
                "user specified IP address is supported on user defined networks only",
            ));
        }
        if endpoint.links.as_ref().is_some_and(|links| !links.is_empty()) {
            return Err(unsupported("links"));
        }
        if !endpoint.mac_address.is_empty() {
            config.mac_address.clone_from(&endpoint.mac_address);
        }
    }
    if !config.mac_address.is_empty() {
        config
            .mac_address
            .parse::<guest_network::Mac>()
            .map_err(|_| Failure::invalid(format!("invalid MAC address: {}", config.mac_address)))?;
    }
    Ok(())
}

fn refuse_unsupported(host: &HostConfig) -> Result<(), Failure> {
    let some = |list: &Option<Vec<serde_json::Value>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let named = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let checks = [
        (
            host.port_bindings.values().flatten().any(|list| !list.is_empty()),
            "published ports (PortBindings)",
        ),
        (host.publish_all_ports, "published ports (PublishAllPorts)"),
        (named(&host.volumes_from), "volumes of other containers (VolumesFrom)"),
        (some(&host.mounts), "mounts in the long form (Mounts)"),
        (named(&host.links), "links (Links)"),
        (some(&host.devices), "devices (Devices)"),
        (named(&host.device_cgroup_rules), "device rules (DeviceCgroupRules)"),
        (some(&host.device_requests), "devices of drivers (DeviceRequests)"),
        (host.blkio_weight != 0, "block I/O weights (BlkioWeight)"),
        (some(&host.blkio_weight_device), "block I/O weights (BlkioWeightDevice)"),
        (some(&host.blkio_device_read_bps), "block I/O limits (BlkioDeviceReadBps)"),
        (some(&host.blkio_device_write_bps), "block I/O limits (BlkioDeviceWriteBps)"),
        (some(&host.blkio_device_read_iops), "block I/O limits (BlkioDeviceReadIOps)"),
        (some(&host.blkio_device_write_iops), "block I/O limits (BlkioDeviceWriteIOps)"),
        (host.cpu_realtime_period != 0, "real-time scheduling (CpuRealtimePeriod)"),
        (host.cpu_realtime_runtime != 0, "real-time scheduling (CpuRealtimeRuntime)"),
        (
            host.storage_opt.as_ref().is_some_and(|options| !options.is_empty()),
            "storage options (StorageOpt)",
        ),
        (!host.cgroup_parent.is_empty(), "parent cgroups (CgroupParent)"),
        (host.init == Some(true), "an init process (Init)"),
        (!matches!(host.runtime.as_str(), "" | "runc" | "shim"), "other runtimes (Runtime)"),
        (!matches!(host.userns_mode.as_str(), "" | "host"), "user namespaces (UsernsMode)"),
        (!matches!(host.uts_mode.as_str(), "" | "host"), "this UTSMode"),
        (!matches!(host.pid_mode.as_str(), "" | "private" | "host"), "this PidMode"),
        (!matches!(host.ipc_mode.as_str(), "" | "private" | "shareable" | "host" | "none"), "this IpcMode"),
        (!matches!(host.cgroupns_mode.as_str(), "" | "private" | "host"), "this CgroupnsMode"),
        (!matches!(host.isolation.as_str(), "" | "default"), "this Isolation"),
        (!matches!(host.log_config.kind.as_str(), "" | "json-file" | "none"), "this log driver (LogConfig)"),
    ];
    match checks.iter().find(|(asked, _)| *asked) {
        Some((_, what)) => Err(unsupported(what)),
        None => Ok(()),
    }
}

fn unsupported(what: &str) -> Failure {
    Failure::invalid(format!("{what}: not supported by this version of the engine"))
}

fn check_host(host: &HostConfig) -> Result<(), Failure> {
    let invalid = |text: String| Err(Failure::invalid(text));
    if host.memory != 0 && host.memory < MEMORY_MIN_BYTES {
        return invalid("Minimum memory limit allowed is 6MB".to_owned());
    }
    if host.memory_swap > 0 && host.memory == 0 {
        return invalid(
            "You should always set the Memory limit when using Memoryswap limit, see usage".to_owned(),
        );
    }
    if host.memory_swap > 0 && host.memory_swap < host.memory {
        return invalid("Minimum memoryswap limit should be larger than memory limit, see usage".to_owned());
    }
    if host.nano_cpus < 0 || (host.nano_cpus > 0 && (host.cpu_period != 0 || host.cpu_quota != 0)) {
        return invalid(
            "Conflicting options: Nano CPUs and CPU Period or Quota cannot both be set".to_owned(),
        );
    }
    if host.shm_size < 0 {
        return invalid("SHM size can not be less than 0".to_owned());
    }
    if !(-1000..=1000).contains(&host.oom_score_adj) {
        return invalid(format!(
            "Invalid value {}, range for oom score adj is [-1000, 1000]",
            host.oom_score_adj
        ));
    }
    let policy = &host.restart_policy;
    match policy.name.as_str() {
        "" | "no" | "always" | "unless-stopped" if policy.maximum_retry_count != 0 => {
            return invalid(
                "invalid restart policy: maximum retry count can only be used with 'on-failure'".to_owned(),
            );
        }
        "" | "no" | "always" | "unless-stopped" | "on-failure" if policy.maximum_retry_count >= 0 => {}
        "on-failure" => {
            return invalid("invalid restart policy: maximum retry count cannot be negative".to_owned());
        }
        other => {
            return invalid(format!(
                "invalid restart policy: unknown policy '{other}'; use one of 'no', 'always', 'on-failure', or \
                 'unless-stopped'"
            ));
        }
    }
    if host.auto_remove && !matches!(policy.name.as_str(), "" | "no") {
        return invalid("can't create 'AutoRemove' container with restart policy".to_owned());
    }
    for entry in host.extra_hosts.iter().flatten() {
        extra_host(entry)?;
    }
    for server in host.dns.iter().flatten() {
        if server.parse::<std::net::IpAddr>().is_err() {
            return invalid(format!("invalid DNS server: bad IP address: '{server}'"));
        }
    }
    for destination in host.tmpfs.iter().flat_map(|mounts| mounts.keys()) {
        destination_path(destination)?;
    }
    log_options(host)?;
    // The names and numbers in these are understood by the builder of the spec; ask it now rather than at start.
    spec::capabilities(host)?;
    spec::security(host)?;
    spec::rlimits(host)?;
    Ok(())
}

/// `max-size` and `max-file`.
pub fn log_options(host: &HostConfig) -> Result<(Option<u64>, Option<u32>), Failure> {
    let (mut size, mut files) = (None, None);
    for (name, value) in &host.log_config.config {
        let bad = || Failure::invalid(format!("invalid value '{value}' for log option '{name}'"));
        match name.as_str() {
            "max-size" if value == "-1" => {}
            "max-size" => size = Some(bytes(value).ok_or_else(bad)?),
            "max-file" => files = Some(value.parse().ok().filter(|count| *count > 0).ok_or_else(bad)?),
            "mode" if value == "blocking" => {}
            _ => return Err(Failure::invalid(format!("unknown log opt '{name}' for json-file log driver"))),
        }
    }
    if files.is_some_and(|files| files > 1) && size.is_none() {
        return Err(Failure::invalid("invalid log options: max-file cannot be set without max-size"));
    }
    Ok((size, files))
}

/// `10m`, `1g`, `500`: binary multiples, as Docker reads them.
fn bytes(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let bare = lower.trim_end_matches('b').trim_end_matches('i');
    let (number, unit) = match bare.char_indices().last()? {
        (at, 'k') => (&bare[..at], 1 << 10),
        (at, 'm') => (&bare[..at], 1 << 20),
        (at, 'g') => (&bare[..at], 1 << 30),
        _ => (bare, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

/// `/source:/destination[:options]`.
fn parse_bind(text: &str) -> Result<Bind, Failure> {
    let invalid = || Failure::invalid(format!("invalid volume specification: '{text}'"));
    let mut parts = text.split(':');
    let (source, destination, mode) = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(_), None, ..) => return Err(unsupported("anonymous volumes (Binds)")),
        (Some(source), Some(destination), mode, None) => (source, destination, mode.unwrap_or_default()),
        _ => return Err(invalid()),
    };
    if source.is_empty() {
        return Err(invalid());
    }
    if !source.starts_with('/') {
        return Err(unsupported(&format!("named volumes (Binds: `{source}`)")));
    }
    let (mut read_only, mut propagation) = (false, "rprivate".to_owned());
    for option in mode.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => read_only = true,
            // SELinux labels and volume copying have nothing to act on here.
            "rw" | "z" | "Z" | "nocopy" | "cached" | "delegated" | "consistent" => {}
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" => {
                option.clone_into(&mut propagation)
            }
            _ => return Err(Failure::invalid(format!("invalid mode: {mode}"))),
        }
    }
    Ok(Bind {
        source: absolute(source)?,
        destination: destination_path(destination)?,
        read_only,
        mode: mode.to_owned(),
        propagation,
    })
}

/// The path without `.`, `..` and doubled slashes.
fn absolute(text: &str) -> Result<PathBuf, Failure> {
    let mut path = PathBuf::from("/");
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => _ = path.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if !text.starts_with('/') {
        return Err(Failure::invalid(format!(
            "invalid mount config: invalid mount path: '{text}' mount path must be absolute"
        )));
    }
    Ok(path)
}

/// The same for a place in the container, which must not be its root.
fn destination_path(text: &str) -> Result<PathBuf, Failure> {
    let path = absolute(text)?;
    if path == Path::new("/") {
        return Err(Failure::invalid(format!(
            "invalid volume specification: '{text}': destination can't be '/'"
        )));
    }
    Ok(path)
}

/// What dockerd shows for settings nobody gave.
fn fill_defaults(host: &mut HostConfig) {
    let set = |field: &mut String, value: &str| {
        if field.is_empty() {
            value.clone_into(field);
        }
    };
    set(&mut host.log_config.kind, "json-file");
    set(&mut host.restart_policy.name, "no");
    set(&mut host.ipc_mode, "private");
    set(&mut host.runtime, "runc");
    if host.privileged {
        set(&mut host.cgroupns_mode, "host");
    } else {
        set(&mut host.cgroupns_mode, "private");
    }
    if host.shm_size == 0 {
        host.shm_size = SHM_SIZE_DEFAULT_BYTES;
    }
    if host.memory > 0 && host.memory_swap == 0 {
        host.memory_swap = host.memory * 2;
    }
    host.memory_swappiness = host.memory_swappiness.filter(|value| *value >= 0);
    host.pids_limit = host.pids_limit.filter(|limit| *limit > 0);
    let defaults = (guest_runtime::defaults::masked_paths(), guest_runtime::defaults::readonly_paths());
    if host.privileged {
        (host.masked_paths, host.readonly_paths) = (None, None);
    } else {
        host.masked_paths.get_or_insert(defaults.0);
        host.readonly_paths.get_or_insert(defaults.1);
    }
}

#[cfg(test)]
mod tests {
    use guest_api::ErrorKind;
    use serde_json::json;

    use super::*;

    const ID: &str = "3f2a9c1d77e04b5c3f2a9c1d77e04b5c3f2a9c1d77e04b5c3f2a9c1d77e04b5c";

    fn image() -> ContainerConfig {
        serde_json::from_value(json!({
            "Env": ["PATH=/bin", "A=image"], "Entrypoint": ["/entry"], "Cmd": ["serve"], "WorkingDir": "/srv",
            "Labels": {"from": "image", "kept": "yes"}, "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGQUIT",
        }))
        .unwrap()
    }

    fn try_resolve(body: serde_json::Value) -> Result<Resolved, Failure> {
        resolve(guest_api::decode(body.to_string().as_bytes()).unwrap(), &image(), ID)
    }

    fn ok(body: serde_json::Value) -> Resolved {
        try_resolve(body).unwrap()
    }

    fn refusal(body: serde_json::Value) -> String {
        try_resolve(body).unwrap_err().message
    }

    #[test]
    fn the_images_settings_lie_under_the_users() {
        let config = ok(json!({"Env": ["A=mine"], "Labels": {"from": "me"}})).config;
        assert_eq!(config.env.unwrap(), ["A=mine", "PATH=/bin"]);
        assert_eq!(config.labels["from"], "me");
        assert_eq!(config.labels["kept"], "yes");
        assert_eq!(config.working_dir, "/srv");
        assert_eq!(config.stop_signal, "SIGQUIT");
        assert!(config.exposed_ports.unwrap().contains_key("80/tcp"));
        assert_eq!(config.hostname, "3f2a9c1d77e0");
    }

    #[test]
    fn entry_point_and_command_combine_as_dockers() {
        let command = |body| {
            let config = ok(body).config;
            (config.entrypoint.unwrap_or_default(), config.cmd.unwrap_or_default())
        };
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(command(json!({})), (words(&["/entry"]), words(&["serve"])));
        assert_eq!(command(json!({"Cmd": ["x"]})), (words(&["/entry"]), words(&["x"])));
        assert_eq!(command(json!({"Entrypoint": ["/other"]})), (words(&["/other"]), words(&[])));
        assert_eq!(command(json!({"Entrypoint": [""], "Cmd": ["sh"]})), (words(&[]), words(&["sh"])));
        assert_eq!(refusal(json!({"Entrypoint": [""]})), "no command specified");
    }

    #[test]
    fn binds_are_read() {
        let binds = ok(json!({"HostConfig": {"Binds": ["/a:/b", "/c/../d/:/e/./f:ro,rslave"]}})).binds;
        assert_eq!(binds[0].source, Path::new("/a"));
        assert!(!binds[0].read_only && binds[0].propagation == "rprivate");
        assert_eq!(
            (binds[1].source.as_path(), binds[1].destination.as_path()),
            (Path::new("/d"), Path::new("/e/f"))
        );
        assert!(binds[1].read_only && binds[1].propagation == "rslave" && binds[1].mode == "ro,rslave");
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let cases = [
            (json!({"HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": "8080"}]}}}), "PortBindings"),
            (json!({"HostConfig": {"Binds": ["data:/data"]}}), "named volumes (Binds: `data`)"),
            (json!({"HostConfig": {"Binds": ["/data"]}}), "anonymous volumes"),
            (json!({"Volumes": {"/data": {}}}), "anonymous volumes"),
            (json!({"HostConfig": {"VolumesFrom": ["x"]}}), "VolumesFrom"),
            (json!({"HostConfig": {"Devices": [{"PathOnHost": "/dev/x"}]}}), "Devices"),
            (json!({"HostConfig": {"Init": true}}), "Init"),
            (json!({"HostConfig": {"NetworkMode": "container:x"}}), "NetworkMode"),
            (json!({"HostConfig": {"LogConfig": {"Type": "syslog"}}}), "LogConfig"),
            (json!({"HostConfig": {"SecurityOpt": ["apparmor=x"]}}), "apparmor=x"),
            (json!({"Healthcheck": {"Test": ["CMD", "true"]}}), "Healthcheck"),
        ];
        for (body, expected) in cases {
            let failure = try_resolve(body).unwrap_err();
            assert!(failure.message.contains(expected), "{} / {expected}", failure.message);
            assert_eq!(failure.kind, ErrorKind::Invalid);
        }
    }

    #[test]
    fn harmless_settings_are_kept() {
        let host = ok(json!({"HostConfig": {
            "PortBindings": {}, "Init": false, "OomKillDisable": false, "MemorySwappiness": -1, "PidsLimit": 0,
            "Devices": [], "VolumeDriver": "local", "ConsoleSize": [24, 80], "Annotations": {"a": "b"}
        }}))
        .host;
        assert_eq!(host.console_size, [24, 80]);
        assert_eq!(host.annotations["a"], "b");
        assert_eq!((host.memory_swappiness, host.pids_limit), (None, None));
        assert_eq!((host.network_mode.as_str(), host.ipc_mode.as_str()), ("bridge", "private"));
        assert_eq!(host.shm_size, 64 << 20);
        assert!(!host.masked_paths.unwrap().is_empty());
    }

    #[test]
    fn networks_beyond_ours_are_not_found() {
        let failure = try_resolve(json!({"HostConfig": {"NetworkMode": "front"}})).unwrap_err();
        assert_eq!(
            (failure.kind, failure.message.as_str()),
            (ErrorKind::NotFound, "network front not found")
        );
        assert!(
            refusal(json!({"NetworkingConfig": {"EndpointsConfig": {"bridge": {"IPAMConfig": {"IPv4Address": "1.2.3.4"}}}}}))
                .contains("user defined networks only")
        );
        assert_eq!(ok(json!({"HostConfig": {"NetworkMode": "host"}})).config.hostname, "");
        assert_eq!(ok(json!({"NetworkDisabled": true})).host.network_mode, "none");
    }

    #[test]
    fn senseless_values_have_dockers_sentences() {
        let host = |value: serde_json::Value| refusal(json!({ "HostConfig": value }));
        assert_eq!(host(json!({"Memory": 1024})), "Minimum memory limit allowed is 6MB");
        assert!(host(json!({"NanoCpus": 5, "CpuQuota": 7})).starts_with("Conflicting options"));
        assert!(host(json!({"RestartPolicy": {"Name": "maybe"}})).contains("unknown policy 'maybe'"));
        assert!(
            host(json!({"RestartPolicy": {"Name": "always", "MaximumRetryCount": 3}})).contains("on-failure")
        );
        assert!(
            host(json!({"AutoRemove": true, "RestartPolicy": {"Name": "always"}})).contains("AutoRemove")
        );
        assert!(host(json!({"CapAdd": ["FLY"]})).contains("FLY"));
        assert!(host(json!({"Ulimits": [{"Name": "nothing"}]})).contains("nothing"));
        assert!(host(json!({"ExtraHosts": ["x"]})).contains("add-host"));
        assert!(host(json!({"Binds": ["/a:b"]})).contains("must be absolute"));
        assert!(host(json!({"Binds": ["/a:/b:wrong"]})).contains("invalid mode: wrong"));
        assert!(host(json!({"Binds": ["/a:/b", "/c:/b"]})).starts_with("Duplicate mount point: /b"));
        assert!(host(json!({"LogConfig": {"Config": {"max-size": "ten"}}})).contains("'ten'"));
        assert!(refusal(json!({"WorkingDir": "srv"})).contains("absolute path"));
        assert!(refusal(json!({"Env": ["=x"]})).contains("invalid environment variable"));
        assert!(refusal(json!({"StopSignal": "SIGNOPE"})).contains("SIGNOPE"));
    }

    #[test]
    fn log_sizes_are_binary() {
        assert_eq!(bytes("10m"), Some(10 << 20));
        assert_eq!(bytes("1GB"), Some(1 << 30));
        assert_eq!(bytes("500"), Some(500));
        assert_eq!(bytes("0"), None);
        assert_eq!(bytes(""), None);
        assert_eq!(bytes("99999999999999999999g"), None);
    }
}

//! The settings that depend on this engine, beside networks, mounts, limits and logging: checked, and their defaults.

use guest_api::{ContainerConfig, HostConfig};

use super::super::capacity::Capacity;
use super::super::spec;
use super::limits;
use crate::failure::Failure;

/// Size of /dev/shm unless asked otherwise.
const SHM_SIZE_DEFAULT_BYTES: i64 = 64 << 20;
/// The kernel's longest host name.
const HOST_NAME_LEN_MAX: usize = 64;

/// Judges the settings, takes out what cannot be enforced, and returns the words for the user.
pub fn check(
    config: &ContainerConfig,
    host: &mut HostConfig,
    capacity: &Capacity,
) -> Result<Vec<String>, Failure> {
    let refuse = |text: String| Err(Failure::invalid(text));
    if host.uts_mode == "host" && !config.hostname.is_empty() {
        return refuse("conflicting options: hostname and the UTS mode".to_owned());
    }
    if !matches!(host.isolation.to_ascii_lowercase().as_str(), "" | "default") {
        return refuse(format!("invalid isolation ({}): linux only supports 'default'", host.isolation));
    }
    if host.io_maximum_bandwidth != 0 {
        return refuse(
            "invalid option: QoS maximum bandwidth configuration is not supported on linux".to_owned(),
        );
    }
    if host.io_maximum_iops != 0 {
        return refuse("invalid option: QoS maximum IOPs configuration is not supported on linux".to_owned());
    }
    spec::capabilities(host, &capacity.grantable)?;
    if host.annotations.contains_key("") {
        return refuse(
            "invalid Annotations: the empty string is not permitted as an annotation key".to_owned(),
        );
    }
    if config.hostname.len() > HOST_NAME_LEN_MAX {
        return refuse(format!(
            "hostname \"{}\" is too long (maximum {HOST_NAME_LEN_MAX} bytes)",
            config.hostname
        ));
    }
    let mut warnings = limits::check(host, capacity, limits::Purpose::Create)?;
    modes(host)?;
    if !(-1000..=1000).contains(&host.oom_score_adj) {
        return refuse(format!(
            "Invalid value {}, range for oom score adj is [-1000, 1000]",
            host.oom_score_adj
        ));
    }
    warnings.extend(limits::process_limits(host, capacity)?);
    if host.storage_opt.as_ref().is_some_and(|options| !options.is_empty()) {
        return Err(Failure::broken(
            "--storage-opt is supported only for overlay over xfs with 'pquota' mount option",
        ));
    }
    if host.cgroupns_mode == "private" && !capacity.support.namespaces {
        warnings.push(
            "Your kernel does not support cgroup namespaces.  Cgroup namespace setting discarded.".to_owned(),
        );
    }
    if host.network_mode == "host" && host.port_bindings.as_ref().is_some_and(|ports| !ports.is_empty()) {
        warnings.push("Published ports are discarded when using host network mode".to_owned());
    }
    spec::security(host)?;
    spec::device_rules(host)?;
    Ok(warnings)
}

/// Which namespaces are shared, and with whom.
fn modes(host: &HostConfig) -> Result<(), Failure> {
    let refuse = |text: String| Err(Failure::invalid(text));
    let peer = |mode: &str| mode.strip_prefix("container:").map(str::to_owned);
    if !matches!(host.ipc_mode.as_str(), "" | "none" | "private" | "host" | "shareable")
        && peer(&host.ipc_mode).is_none()
    {
        return refuse(format!("invalid IPC mode: {}", host.ipc_mode));
    }
    if !matches!(host.pid_mode.as_str(), "" | "private" | "host")
        && peer(&host.pid_mode).is_none_or(|name| name.is_empty())
    {
        return refuse(format!("invalid PID mode: {}", host.pid_mode));
    }
    if host.shm_size < 0 {
        return refuse("SHM size can not be less than 0".to_owned());
    }
    if !matches!(host.uts_mode.as_str(), "" | "host") {
        return refuse(format!("invalid UTS mode: {}", host.uts_mode));
    }
    // There are no remapped users here: private and the host's are the same.
    if !matches!(host.userns_mode.as_str(), "" | "host" | "private") {
        return refuse(format!("invalid user namespace mode: {}", host.userns_mode));
    }
    if !matches!(host.cgroupns_mode.as_str(), "" | "private" | "host") {
        return refuse(format!("invalid cgroup namespace mode: {}", host.cgroupns_mode));
    }
    Ok(())
}

/// What dockerd shows for settings nobody gave.
pub fn fill_defaults(host: &mut HostConfig, capacity: &Capacity) {
    let set = |field: &mut String, value: &str| {
        if field.is_empty() {
            value.clone_into(field);
        }
    };
    set(&mut host.log_config.kind, "json-file");
    set(&mut host.restart_policy.name, "no");
    set(&mut host.ipc_mode, "private");
    set(&mut host.runtime, "runc");
    let namespaces = if capacity.support.unified || !host.privileged { "private" } else { "host" };
    set(&mut host.cgroupns_mode, namespaces);
    if host.shm_size == 0 {
        host.shm_size = SHM_SIZE_DEFAULT_BYTES;
    }
    if host.memory > 0 && host.memory_swap == 0 {
        host.memory_swap = host.memory.saturating_mul(2);
    }
    host.oom_kill_disable.get_or_insert(false);
    host.pids_limit = host.pids_limit.filter(|limit| *limit > 0);
    // Labels are SELinux's; dockerd says so whether or not there is one.
    let options = host.security_opt.get_or_insert_default();
    let shares_host = host.privileged || host.ipc_mode == "host" || host.pid_mode == "host";
    if shares_host && !options.iter().any(|option| option.starts_with("label=")) {
        options.push("label=disable".to_owned());
    }
    if options.is_empty() {
        host.security_opt = None;
    }
    let empty = |map: &Option<std::collections::BTreeMap<String, String>>| {
        map.as_ref().is_some_and(|map| map.is_empty())
    };
    for map in [&mut host.storage_opt, &mut host.tmpfs, &mut host.sysctls] {
        if empty(map) {
            *map = None;
        }
    }
    let defaults = (guest_runtime::defaults::masked_paths(), guest_runtime::defaults::readonly_paths());
    if !host.privileged {
        host.masked_paths.get_or_insert(defaults.0);
        host.readonly_paths.get_or_insert(defaults.1);
    }
}

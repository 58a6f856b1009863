//! The settings that depend on this engine, beside networks, mounts and logging: checked, and their defaults.

use guest_api::HostConfig;

use super::super::spec;
use super::unsupported;
use crate::failure::Failure;

/// Least memory a container can be limited to, as in Docker.
const MEMORY_MIN_BYTES: i64 = 6 << 20;
/// Size of /dev/shm unless asked otherwise.
const SHM_SIZE_DEFAULT_BYTES: i64 = 64 << 20;

pub fn refuse_unsupported(host: &HostConfig) -> Result<(), Failure> {
    let some = |list: &Option<Vec<serde_json::Value>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let named = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let checks = [
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
    ];
    match checks.iter().find(|(asked, _)| *asked) {
        Some((_, what)) => Err(unsupported(what)),
        None => Ok(()),
    }
}

pub fn check(host: &HostConfig) -> Result<(), Failure> {
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
    // The names and numbers in these are understood by the builder of the spec; ask it now rather than at start.
    spec::capabilities(host)?;
    spec::security(host)?;
    spec::rlimits(host)?;
    Ok(())
}

/// What dockerd shows for settings nobody gave.
pub fn fill_defaults(host: &mut HostConfig) {
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

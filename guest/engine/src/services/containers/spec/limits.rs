//! What a container may use: resources of its cgroup, and resource limits of its processes.

use guest_api::HostConfig;
use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources, PosixRlimit, PosixRlimitBuilder,
    PosixRlimitType,
};

use super::devices::Devices;
use crate::failure::Failure;

/// Length of a scheduling period, in microseconds, when only a share of CPUs is given.
const CPU_PERIOD_MICROSECONDS: i64 = 100_000;

/// `Ulimits` in the kernel's terms.
pub fn rlimits(host: &HostConfig) -> Result<Vec<PosixRlimit>, Failure> {
    let unlimited = |value: i64| u64::try_from(value).unwrap_or(u64::MAX);
    host.ulimits
        .iter()
        .flatten()
        .map(|limit| {
            let kind: PosixRlimitType = format!("RLIMIT_{}", limit.name.to_ascii_uppercase())
                .parse()
                .map_err(|_| Failure::invalid(format!("invalid ulimit type: {}", limit.name)))?;
            if limit.hard != -1 && (limit.soft == -1 || limit.soft > limit.hard) {
                return Err(Failure::invalid(format!(
                    "ulimit soft limit must be less than or equal to hard limit: {} > {}",
                    limit.soft, limit.hard
                )));
            }
            let built = PosixRlimitBuilder::default()
                .typ(kind)
                .soft(unlimited(limit.soft))
                .hard(unlimited(limit.hard))
                .build();
            built.map_err(|error| Failure::internal("cannot describe a limit", &error))
        })
        .collect()
}

/// The limits of the container's cgroup.
pub fn resources(host: &HostConfig, devices: &Devices) -> Result<LinuxResources, Failure> {
    let mut resources = LinuxResources::default();
    resources
        .set_devices(Some(devices.all_rules(host.privileged)))
        .set_memory(memory(host))
        .set_cpu(cpu(host))
        .set_pids(pids(host))
        .set_block_io(block_io(host, devices)?);
    Ok(resources)
}

/// The limits that an update asks for, with those that the kernel judges together taken from `merged`: what the
/// container then has.
pub fn changes(asked: &HostConfig, merged: &HostConfig) -> Result<LinuxResources, Failure> {
    let mut host = HostConfig { pids_limit: asked.pids_limit, ..HostConfig::default() };
    if asked.memory != 0 || asked.memory_swap != 0 {
        (host.memory, host.memory_swap) = (merged.memory, merged.memory_swap);
    }
    host.memory_reservation = asked.memory_reservation;
    if asked.nano_cpus != 0 || asked.cpu_quota != 0 || asked.cpu_period != 0 {
        (host.nano_cpus, host.cpu_quota, host.cpu_period) =
            (merged.nano_cpus, merged.cpu_quota, merged.cpu_period);
    }
    host.cpu_shares = asked.cpu_shares;
    host.cpu_realtime_period = asked.cpu_realtime_period;
    host.cpu_realtime_runtime = asked.cpu_realtime_runtime;
    host.cpuset_cpus.clone_from(&asked.cpuset_cpus);
    host.cpuset_mems.clone_from(&asked.cpuset_mems);
    host.blkio_weight = asked.blkio_weight;
    let mut resources = LinuxResources::default();
    resources
        .set_memory(memory(&host))
        .set_cpu(cpu(&host))
        .set_pids(pids(&host))
        .set_block_io(block_io(&host, &Devices::default())?);
    Ok(resources)
}

fn memory(host: &HostConfig) -> Option<LinuxMemory> {
    let some = |value: i64| Some(value).filter(|value| *value != 0);
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(some(host.memory))
        .set_reservation(some(host.memory_reservation))
        .set_swap(some(host.memory_swap).filter(|_| host.memory != 0))
        .set_swappiness(host.memory_swappiness.and_then(|value| u64::try_from(value).ok()))
        .set_kernel(some(host.kernel_memory))
        .set_kernel_tcp(some(host.kernel_memory_tcp))
        // Every group begins with the killer on.
        .set_disable_oom_killer(host.oom_kill_disable.filter(|disabled| *disabled));
    Some(memory).filter(|memory| *memory != LinuxMemory::default())
}

fn cpu(host: &HostConfig) -> Option<LinuxCpu> {
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let text = |value: &str| Some(value.to_owned()).filter(|value| !value.is_empty());
    let (period, quota) = if host.nano_cpus > 0 {
        (
            positive(CPU_PERIOD_MICROSECONDS),
            Some(host.nano_cpus.saturating_mul(CPU_PERIOD_MICROSECONDS) / 1_000_000_000),
        )
    } else {
        (positive(host.cpu_period), Some(host.cpu_quota).filter(|quota| *quota != 0))
    };
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive(host.cpu_shares))
        .set_period(period)
        .set_quota(quota)
        .set_realtime_period(positive(host.cpu_realtime_period))
        .set_realtime_runtime(Some(host.cpu_realtime_runtime).filter(|runtime| *runtime != 0))
        .set_cpus(text(&host.cpuset_cpus))
        .set_mems(text(&host.cpuset_mems));
    Some(cpu).filter(|cpu| *cpu != LinuxCpu::default())
}

fn pids(host: &HostConfig) -> Option<LinuxPids> {
    let limit = host.pids_limit?;
    let mut pids = LinuxPids::default();
    // Unlimited, to every runtime.
    pids.set_limit(if limit > 0 { limit } else { -1 });
    Some(pids)
}

fn block_io(host: &HostConfig, devices: &Devices) -> Result<Option<LinuxBlockIo>, Failure> {
    let mut io = LinuxBlockIo::default();
    io.set_weight(Some(host.blkio_weight).filter(|weight| *weight != 0))
        .set_weight_device(devices.weights(host.blkio_weight_device.as_deref())?)
        .set_throttle_read_bps_device(devices.limits(host.blkio_device_read_bps.as_deref())?)
        .set_throttle_write_bps_device(devices.limits(host.blkio_device_write_bps.as_deref())?)
        .set_throttle_read_iops_device(devices.limits(host.blkio_device_read_iops.as_deref())?)
        .set_throttle_write_iops_device(devices.limits(host.blkio_device_write_iops.as_deref())?);
    Ok(Some(io).filter(|io| *io != LinuxBlockIo::default()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_update_takes_along_what_belongs_together() {
        let asked = HostConfig { memory: 64 << 20, cpu_shares: 5, ..HostConfig::default() };
        let merged =
            HostConfig { memory_swap: 128 << 20, cpu_quota: 7000, pids_limit: Some(9), ..asked.clone() };
        let json = serde_json::to_value(changes(&asked, &merged).unwrap()).unwrap();
        assert_eq!(json["memory"], json!({"limit": 64 << 20, "swap": 128 << 20}));
        assert_eq!(json["cpu"], json!({"shares": 5}));
        assert!(json.get("pids").is_none() && json.get("blockIO").is_none() && json.get("devices").is_none());
        let unlimited = HostConfig { pids_limit: Some(0), ..HostConfig::default() };
        let json = serde_json::to_value(changes(&unlimited, &merged).unwrap()).unwrap();
        assert_eq!(json, json!({"pids": {"limit": -1}}));
    }
}

//! What a container may use: resources of its cgroup, and resource limits of its processes.

use guest_api::HostConfig;
use guest_runtime::defaults;
use oci_spec::runtime::{
    LinuxCpu, LinuxMemory, LinuxPids, LinuxResources, PosixRlimit, PosixRlimitBuilder, PosixRlimitType,
};

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
pub fn resources(host: &HostConfig) -> LinuxResources {
    let mut resources = LinuxResources::default();
    resources.set_devices(Some(if host.privileged {
        defaults::privileged_device_rules()
    } else {
        defaults::device_rules()
    }));
    if host.memory != 0 || host.memory_reservation != 0 || host.memory_swap != 0 {
        let some = |value: i64| Some(value).filter(|value| *value != 0);
        let mut memory = LinuxMemory::default();
        memory
            .set_limit(some(host.memory))
            .set_reservation(some(host.memory_reservation))
            .set_swap(some(host.memory_swap));
        resources.set_memory(Some(memory));
    }
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
        .set_cpus(text(&host.cpuset_cpus))
        .set_mems(text(&host.cpuset_mems));
    if cpu != LinuxCpu::default() {
        resources.set_cpu(Some(cpu));
    }
    if let Some(limit) = host.pids_limit.filter(|limit| *limit > 0) {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    resources
}

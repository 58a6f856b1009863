//! Changing a container's limits and restart policy: what it has after that, by Docker's rules.

use guest_api::HostConfig;

use crate::failure::Failure;

/// The settings after an update. What is zero or empty in `asked` stays.
pub fn merge(current: &HostConfig, asked: &HostConfig) -> Result<HostConfig, Failure> {
    let conflict = |text: &str| Err(Failure::conflict(format!("Conflicting options: {text}")));
    if asked.nano_cpus > 0 && current.cpu_period > 0 {
        return conflict("Nano CPUs cannot be updated as CPU Period has already been set");
    }
    if asked.nano_cpus > 0 && current.cpu_quota > 0 {
        return conflict("Nano CPUs cannot be updated as CPU Quota has already been set");
    }
    if asked.cpu_period > 0 && current.nano_cpus > 0 {
        return conflict("CPU Period cannot be updated as NanoCPUs has already been set");
    }
    if asked.cpu_quota > 0 && current.nano_cpus > 0 {
        return conflict("CPU Quota cannot be updated as NanoCPUs has already been set");
    }
    if asked.memory > current.memory_swap && asked.memory_swap == 0 && current.memory_swap != -1 {
        return Err(Failure::conflict(
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time",
        ));
    }
    let policy = &asked.restart_policy;
    if current.auto_remove && !matches!(policy.name.as_str(), "" | "no") {
        return Err(Failure::conflict(
            "Restart policy cannot be updated because AutoRemove is enabled for the container",
        ));
    }
    let mut merged = current.clone();
    let set = |field: &mut i64, value: i64| {
        if value != 0 {
            *field = value;
        }
    };
    set(&mut merged.cpu_shares, asked.cpu_shares);
    set(&mut merged.nano_cpus, asked.nano_cpus);
    set(&mut merged.cpu_period, asked.cpu_period);
    set(&mut merged.cpu_quota, asked.cpu_quota);
    set(&mut merged.cpu_realtime_period, asked.cpu_realtime_period);
    set(&mut merged.cpu_realtime_runtime, asked.cpu_realtime_runtime);
    set(&mut merged.memory, asked.memory);
    set(&mut merged.memory_swap, asked.memory_swap);
    set(&mut merged.memory_reservation, asked.memory_reservation);
    set(&mut merged.kernel_memory, asked.kernel_memory);
    if asked.blkio_weight != 0 {
        merged.blkio_weight = asked.blkio_weight;
    }
    for (field, value) in
        [(&mut merged.cpuset_cpus, &asked.cpuset_cpus), (&mut merged.cpuset_mems, &asked.cpuset_mems)]
    {
        if !value.is_empty() {
            field.clone_from(value);
        }
    }
    if asked.pids_limit.is_some() {
        merged.pids_limit = asked.pids_limit;
    }
    if !policy.name.is_empty() {
        merged.restart_policy = policy.clone();
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use guest_api::container::RestartPolicy;

    use super::*;

    fn policy(name: &str) -> RestartPolicy {
        RestartPolicy { name: name.into(), maximum_retry_count: 0 }
    }

    #[test]
    fn what_is_not_named_stays() {
        let current = HostConfig {
            memory: 64 << 20,
            memory_swap: 128 << 20,
            cpuset_cpus: "0".into(),
            restart_policy: policy("no"),
            pids_limit: Some(5),
            ..HostConfig::default()
        };
        assert_eq!(merge(&current, &HostConfig::default()).unwrap(), current);
        let asked = HostConfig {
            memory: 100 << 20,
            cpu_shares: 7,
            pids_limit: Some(0),
            restart_policy: policy("always"),
            privileged: true,
            ..HostConfig::default()
        };
        let merged = merge(&current, &asked).unwrap();
        assert_eq!((merged.memory, merged.memory_swap, merged.cpu_shares), (100 << 20, 128 << 20, 7));
        assert_eq!((merged.pids_limit, merged.cpuset_cpus.as_str()), (Some(0), "0"));
        assert_eq!(merged.restart_policy.name, "always");
        assert!(!merged.privileged, "only limits can be updated");
    }

    #[test]
    fn contradictions_have_dockers_sentences() {
        let refusal = |current: HostConfig, asked: HostConfig| merge(&current, &asked).unwrap_err().message;
        let nano = || HostConfig { nano_cpus: 5, ..HostConfig::default() };
        let quota = || HostConfig { cpu_quota: 5000, ..HostConfig::default() };
        let period = || HostConfig { cpu_period: 5000, ..HostConfig::default() };
        assert!(refusal(nano(), quota()).contains("CPU Quota cannot be updated as NanoCPUs"));
        assert!(refusal(nano(), period()).contains("CPU Period cannot be updated as NanoCPUs"));
        assert!(refusal(quota(), nano()).contains("as CPU Quota has already been set"));
        assert!(refusal(period(), nano()).contains("as CPU Period has already been set"));
        let memory = |memory, memory_swap| HostConfig { memory, memory_swap, ..HostConfig::default() };
        assert!(
            refusal(memory(8 << 20, 16 << 20), memory(32 << 20, 0))
                .starts_with("Memory limit should be smaller")
        );
        assert!(merge(&memory(8 << 20, -1), &memory(32 << 20, 0)).is_ok());
        let removed = HostConfig { auto_remove: true, ..HostConfig::default() };
        let always = HostConfig { restart_policy: policy("always"), ..HostConfig::default() };
        assert!(refusal(removed, always).contains("AutoRemove"));
    }
}

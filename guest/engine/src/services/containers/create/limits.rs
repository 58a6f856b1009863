//! Limits, as dockerd judges them: senseless ones are refused, those the kernel cannot enforce are dropped with a word.

use std::collections::BTreeSet;

use guest_api::HostConfig;
use guest_runtime::cgroup::Support;
use guest_runtime::defaults;

use super::super::capacity::Capacity;
use super::super::spec;
use crate::failure::Failure;

/// Least memory a container can be limited to, as in Docker.
const MEMORY_MIN_BYTES: i64 = 6 << 20;
/// Billionths in one processor.
const NANO: i64 = 1_000_000_000;
/// Greatest number of a processor in a list, unless there are more: a list is held in memory.
const CPUS_MAX: u32 = 8192;

/// What the limits are judged for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Create,
    /// Of a container that has limits already.
    Update,
}

/// Judges all limits. What cannot be enforced is taken out of `host`; the words for the user come back.
pub fn check(host: &mut HostConfig, capacity: &Capacity, purpose: Purpose) -> Result<Vec<String>, Failure> {
    let support = &capacity.support;
    let mut warnings = Vec::new();
    realtime(host, support)?;
    memory(host, support, purpose, &mut warnings)?;
    processors(host, capacity, &mut warnings)?;
    cpuset(host, support, &mut warnings)?;
    block_io(host, support, &mut warnings)?;
    Ok(warnings)
}

fn refuse<T>(text: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::invalid(text))
}

fn realtime(host: &HostConfig, support: &Support) -> Result<(), Failure> {
    let (period, runtime) = (host.cpu_realtime_period, host.cpu_realtime_runtime);
    if (period != 0 || runtime != 0) && !support.cpu_realtime {
        return refuse("kernel does not support CPU real-time scheduler");
    }
    if period != 0 && runtime != 0 && runtime > period {
        return refuse("cpu real-time runtime cannot be higher than cpu real-time period");
    }
    if host.cpu_shares < 0 && support.cpu_shares {
        return refuse(format!("invalid CPU shares ({}): value must be a positive integer", host.cpu_shares));
    }
    Ok(())
}

fn memory(
    host: &mut HostConfig,
    support: &Support,
    purpose: Purpose,
    warnings: &mut Vec<String>,
) -> Result<(), Failure> {
    let mut warn = |text: &str| warnings.push(text.to_owned());
    host.memory_swappiness = host.memory_swappiness.filter(|value| *value != -1);
    if host.memory != 0 && host.memory < MEMORY_MIN_BYTES {
        return refuse("Minimum memory limit allowed is 6MB");
    }
    if host.memory > 0 && !support.memory {
        warn(
            "Your kernel does not support memory limit capabilities or the cgroup is not mounted. Limitation discarded.",
        );
        (host.memory, host.memory_swap) = (0, -1);
    }
    if host.memory > 0 && host.memory_swap != -1 && !support.swap {
        warn(
            "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap.",
        );
        host.memory_swap = -1;
    }
    if host.memory > 0 && host.memory_swap > 0 && host.memory_swap < host.memory {
        return refuse("Minimum memoryswap limit should be larger than memory limit, see usage");
    }
    if host.memory == 0 && host.memory_swap > 0 && purpose == Purpose::Create {
        return refuse("You should always set the Memory limit when using Memoryswap limit, see usage");
    }
    if host.memory_swappiness.is_some() && !support.swappiness {
        warn(
            "Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.",
        );
        host.memory_swappiness = None;
    }
    if let Some(value) = host.memory_swappiness
        && !(0..=100).contains(&value)
    {
        return refuse(format!("Invalid value: {value}, valid memory swappiness range is 0-100"));
    }
    if host.memory_reservation > 0 && !support.memory_reservation {
        warn(
            "Your kernel does not support memory soft limit capabilities or the cgroup is not mounted. Limitation discarded.",
        );
        host.memory_reservation = 0;
    }
    if host.memory_reservation > 0 && host.memory_reservation < MEMORY_MIN_BYTES {
        return refuse("Minimum memory reservation allowed is 6MB");
    }
    if host.memory > 0 && host.memory_reservation > 0 && host.memory < host.memory_reservation {
        return refuse("Minimum memory limit can not be less than memory reservation limit, see usage");
    }
    if host.oom_kill_disable.is_some() && !support.oom_kill_disable {
        if host.oom_kill_disable == Some(true) {
            warn("Your kernel does not support OomKillDisable. OomKillDisable discarded.");
        }
        host.oom_kill_disable = None;
    }
    if host.oom_kill_disable == Some(true) && host.memory == 0 {
        warn(
            "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.",
        );
    }
    if let Some(limit) = host.pids_limit
        && !support.pids
    {
        if limit > 0 {
            warn(
                "Your kernel does not support PIDs limit capabilities or the cgroup is not mounted. PIDs limit discarded.",
            );
        }
        host.pids_limit = None;
    }
    Ok(())
}

fn processors(host: &mut HostConfig, capacity: &Capacity, warnings: &mut Vec<String>) -> Result<(), Failure> {
    let support = &capacity.support;
    if host.nano_cpus > 0 && host.cpu_period > 0 {
        return refuse("Conflicting options: Nano CPUs and CPU Period cannot both be set");
    }
    if host.nano_cpus > 0 && host.cpu_quota > 0 {
        return refuse("Conflicting options: Nano CPUs and CPU Quota cannot both be set");
    }
    if host.nano_cpus > 0 && !support.cpu_quota {
        return refuse(
            "NanoCPUs can not be set, as your kernel does not support CPU CFS scheduler or the cgroup is not mounted",
        );
    }
    let count = (capacity.processors)();
    if host.nano_cpus != 0 && !(0..=i64::from(count) * NANO).contains(&host.nano_cpus) {
        return refuse(format!(
            "range of CPUs is from 0.01 to {count}.00, as there are only {count} CPUs available"
        ));
    }
    if host.cpu_shares > 0 && !support.cpu_shares {
        warnings.push(
            "Your kernel does not support CPU shares or the cgroup is not mounted. Shares discarded."
                .to_owned(),
        );
        host.cpu_shares = 0;
    }
    if (host.cpu_period != 0 || host.cpu_quota != 0) && !support.cpu_quota {
        warnings
            .push("Your kernel does not support CPU CFS scheduler. CPU period/quota discarded.".to_owned());
        (host.cpu_period, host.cpu_quota) = (0, 0);
    }
    if host.cpu_period != 0 && !(1000..=1_000_000).contains(&host.cpu_period) {
        return refuse(
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)",
        );
    }
    if host.cpu_quota > 0 && host.cpu_quota < 1000 {
        return refuse("CPU cfs quota can not be less than 1ms (i.e. 1000)");
    }
    if host.cpu_percent > 0 {
        warnings.push("linux does not support CPU percent. Percent discarded.".to_owned());
        host.cpu_percent = 0;
    }
    Ok(())
}

fn cpuset(host: &mut HostConfig, support: &Support, warnings: &mut Vec<String>) -> Result<(), Failure> {
    if (!host.cpuset_cpus.is_empty() || !host.cpuset_mems.is_empty()) && !support.cpuset {
        warnings.push(
            "Your kernel does not support cpuset or the cgroup is not mounted. Cpuset discarded.".to_owned(),
        );
        host.cpuset_cpus.clear();
        host.cpuset_mems.clear();
    }
    let available = |what: &str, nodes: &str, wanted: &str, there: &str| {
        let all = numbers(there, u32::MAX).unwrap_or_default();
        let most = all.last().copied().unwrap_or(0).max(CPUS_MAX);
        let invalid =
            |reason| Failure::invalid(format!("Invalid value {wanted} for cpuset {what}: {reason}"));
        let wanted_numbers = numbers(wanted, most).map_err(invalid)?;
        if wanted_numbers.is_subset(&all) {
            return Ok(());
        }
        refuse(format!("Requested {nodes} are not available - requested {wanted}, available: {there}"))
    };
    available("cpus", "CPUs", &host.cpuset_cpus, &support.cpus)?;
    available("mems", "memory nodes", &host.cpuset_mems, &support.memory_nodes)
}

/// `0-2,7` as a set.
fn numbers(list: &str, most: u32) -> Result<BTreeSet<u32>, String> {
    let mut set = BTreeSet::new();
    if list.is_empty() {
        return Ok(set);
    }
    let malformed = || format!("invalid format: {list}");
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<u32>().map_err(|_| malformed());
        let (first, last) = (number(first)?, number(last)?);
        if last < first {
            return Err(malformed());
        }
        if last > most {
            return Err(format!("value of out range, maximum is {most}"));
        }
        set.extend(first..=last);
    }
    Ok(set)
}

fn block_io(host: &mut HostConfig, support: &Support, warnings: &mut Vec<String>) -> Result<(), Failure> {
    if host.blkio_weight > 0 && !support.blkio_weight {
        warnings.push(
            "Your kernel does not support Block I/O weight or the cgroup is not mounted. Weight discarded."
                .to_owned(),
        );
        host.blkio_weight = 0;
    }
    if host.blkio_weight > 0 && !(10..=1000).contains(&host.blkio_weight) {
        return refuse("Range of blkio weight is from 10 to 1000");
    }
    if host.io_maximum_bandwidth != 0 || host.io_maximum_iops != 0 {
        return refuse(
            "Invalid QoS settings: linux does not support Maximum IO Bandwidth or Maximum IO IOps",
        );
    }
    let mut drop = |asked: bool, supported: bool, text: &str| {
        let discard = asked && !supported;
        if discard {
            warnings.push(format!("Your kernel does not support {text} discarded."));
        }
        discard
    };
    let asked = |list: &Option<Vec<guest_api::container::ThrottleDevice>>| {
        list.as_ref().is_some_and(|list| !list.is_empty())
    };
    let weights = host.blkio_weight_device.as_ref().is_some_and(|list| !list.is_empty());
    if drop(
        weights,
        support.blkio_weight_device,
        "Block I/O weight_device or the cgroup is not mounted. Weight-device",
    ) {
        host.blkio_weight_device = Some(Vec::new());
    }
    for (list, supported, text) in [
        (
            &mut host.blkio_device_read_bps,
            support.blkio_read_bps,
            "BPS Block I/O read limit or the cgroup is not mounted. Block I/O BPS read limit",
        ),
        (
            &mut host.blkio_device_write_bps,
            support.blkio_write_bps,
            "BPS Block I/O write limit or the cgroup is not mounted. Block I/O BPS write limit",
        ),
        (
            &mut host.blkio_device_read_iops,
            support.blkio_read_iops,
            "IOPS Block read limit or the cgroup is not mounted. Block I/O IOPS read limit",
        ),
        (
            &mut host.blkio_device_write_iops,
            support.blkio_write_iops,
            "IOPS Block write limit or the cgroup is not mounted. Block I/O IOPS write limit",
        ),
    ] {
        if drop(asked(list), supported, text) {
            *list = Some(Vec::new());
        }
    }
    Ok(())
}

/// Checks resource limits and the out-of-memory score, and says which will be lower than asked: without the right to,
/// this engine cannot give more than it has.
pub fn process_limits(host: &HostConfig, capacity: &Capacity) -> Result<Vec<String>, Failure> {
    let wanted = spec::rlimits(host)?;
    let mut warnings = Vec::new();
    let mut given = wanted.clone();
    defaults::clamp_rlimits(&mut given, &capacity.grantable);
    for ((wanted, given), limit) in wanted.iter().zip(&given).zip(host.ulimits.iter().flatten()) {
        if wanted != given {
            warnings.push(format!(
                "Ulimit {}: this engine may not go above its own limit. Limited to {}:{}.",
                limit.name,
                given.soft(),
                given.hard()
            ));
        }
    }
    let score = i32::try_from(host.oom_score_adj).unwrap_or(0);
    if host.oom_score_adj < 0 && !capacity.raises_limits() {
        warnings.push(format!(
            "OOM score {score}: this engine may not lower it. The container gets the engine's own score."
        ));
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use guest_api::container::{ThrottleDevice, Ulimit, WeightDevice};
    use proptest::prelude::*;

    use super::super::super::capacity::tests::capable;
    use super::*;

    fn judge(change: impl FnOnce(&mut HostConfig)) -> Result<Vec<String>, String> {
        let mut host = HostConfig::default();
        change(&mut host);
        check(&mut host, &capable(), Purpose::Create).map_err(|failure| failure.message)
    }

    #[test]
    fn senseless_limits_have_dockers_sentences() {
        let refusal = |change: fn(&mut HostConfig)| judge(change).unwrap_err();
        assert_eq!(refusal(|host| host.memory = 1024), "Minimum memory limit allowed is 6MB");
        assert!(refusal(|host| host.memory_swap = 7 << 20).starts_with("You should always set the Memory"));
        assert!(
            refusal(|host| (host.memory, host.memory_swap) = (8 << 20, 7 << 20))
                .starts_with("Minimum memoryswap limit should be larger")
        );
        assert!(refusal(|host| host.memory_swappiness = Some(101)).starts_with("Invalid value: 101"));
        assert!(refusal(|host| host.memory_reservation = 1).starts_with("Minimum memory reservation"));
        assert!(
            refusal(|host| (host.memory, host.memory_reservation) = (8 << 20, 9 << 20))
                .contains("can not be less than memory reservation")
        );
        assert!(refusal(|host| (host.nano_cpus, host.cpu_quota) = (5, 7)).contains("CPU Quota"));
        assert!(refusal(|host| (host.nano_cpus, host.cpu_period) = (5, 7)).contains("CPU Period"));
        assert_eq!(
            refusal(|host| host.nano_cpus = 3_000_000_000),
            "range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available"
        );
        assert!(refusal(|host| host.cpu_period = 10).contains("larger than 1s"));
        assert!(refusal(|host| host.cpu_quota = 10).contains("(i.e. 1000)"));
        assert!(refusal(|host| host.cpu_shares = -1).contains("(-1)"));
        assert!(
            refusal(|host| (host.cpu_realtime_period, host.cpu_realtime_runtime) = (5, 6)).contains("higher")
        );
        assert_eq!(
            refusal(|host| host.cpuset_cpus = "0-7".into()),
            "Requested CPUs are not available - requested 0-7, available: 0-1"
        );
        assert_eq!(
            refusal(|host| host.cpuset_mems = "x".into()),
            "Invalid value x for cpuset mems: invalid format: x"
        );
        assert!(refusal(|host| host.cpuset_cpus = "1-9999999".into()).contains("maximum is 8192"));
        assert!(refusal(|host| host.blkio_weight = 5).contains("10 to 1000"));
        assert!(refusal(|host| host.io_maximum_iops = 5).contains("QoS"));
    }

    #[test]
    fn what_the_kernel_cannot_do_is_dropped_with_a_word() {
        let none = Capacity { support: Support::default(), ..capable() };
        let mut host = HostConfig {
            memory: 64 << 20,
            memory_swap: 128 << 20,
            memory_reservation: 32 << 20,
            memory_swappiness: Some(10),
            oom_kill_disable: Some(true),
            pids_limit: Some(10),
            cpu_shares: 5,
            cpu_quota: 5000,
            cpuset_cpus: "0".into(),
            blkio_weight: 100,
            blkio_weight_device: Some(vec![WeightDevice::default()]),
            blkio_device_read_bps: Some(vec![ThrottleDevice::default()]),
            blkio_device_write_iops: Some(vec![ThrottleDevice::default()]),
            ..HostConfig::default()
        };
        let warnings = check(&mut host, &none, Purpose::Create).unwrap();
        assert_eq!(warnings.len(), 12, "{warnings:#?}");
        let nothing = HostConfig {
            memory_swap: -1,
            blkio_weight_device: Some(Vec::new()),
            blkio_device_read_bps: Some(Vec::new()),
            blkio_device_write_iops: Some(Vec::new()),
            ..HostConfig::default()
        };
        assert_eq!(host, nothing);
    }

    #[test]
    fn plain_limits_pass_without_a_word() {
        let words = judge(|host| {
            host.memory = 64 << 20;
            host.nano_cpus = 1_500_000_000;
            host.cpuset_cpus = "0-1".into();
            host.blkio_weight = 500;
            host.pids_limit = Some(10);
            host.memory_swappiness = Some(-1);
        });
        assert_eq!(words, Ok(vec![]));
        assert_eq!(judge(|host| host.oom_kill_disable = Some(true)).unwrap().len(), 1);
    }

    #[test]
    fn limits_above_the_engines_own_are_told() {
        let mut weak = capable();
        weak.grantable.remove(&oci_spec::runtime::Capability::SysResource);
        let ulimit = |hard| Some(vec![Ulimit { name: "nofile".into(), hard, soft: 10 }]);
        let high = HostConfig { ulimits: ulimit(-1), oom_score_adj: -5, ..HostConfig::default() };
        let told = process_limits(&high, &weak).unwrap();
        assert!(told.iter().any(|text| text.contains("OOM score -5")), "{told:?}");
        assert_eq!(process_limits(&high, &capable()).unwrap(), [] as [String; 0]);
        let low = HostConfig { ulimits: ulimit(20), ..HostConfig::default() };
        assert_eq!(process_limits(&low, &weak).unwrap(), [] as [String; 0]);
    }

    proptest! {
        #[test]
        fn any_text_is_a_list_or_refused(text in "[0-9,\\-x ]{0,20}") {
            if let Ok(set) = numbers(&text, 100) {
                prop_assert!(set.iter().all(|number| *number <= 100));
            }
        }
    }
}

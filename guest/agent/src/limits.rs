//! Resource limits and kernel settings of the machine, all in one place with their reasons.

use std::fs;

use rustix::process::{Resource, Rlimit};

/// The name of the machine, as seen in prompts of privileged containers and in kernel logs.
const HOSTNAME: &str = "engine";

/// Limits of each process, inherited by the engine, its shims and containers: what Docker's service file sets. The
/// kernel's own numbers of processes and signals follow the machine's memory and are meant for users who share it.
const LIMITS: &[(Resource, Option<u64>)] =
    &[(Resource::Nofile, Some(1 << 20)), (Resource::Nproc, None), (Resource::Sigpending, None)];

/// Settings as paths below `/proc/sys`. What concerns forwarding and bridges is the engine's network's.
const SETTINGS: &[(&str, &str)] = &[
    // A broken kernel ends the machine at once instead of limping: its parent starts a new one.
    ("kernel/panic", "-1"),
    ("kernel/panic_on_oops", "1"),
    // Databases fork to write snapshots; with strict accounting that fails although the copy is never touched.
    ("vm/overcommit_memory", "1"),
    // Each processor may keep an eighth of all memory as single free pages, which an idle processor never hands back: they
    // are not reported to the host, and blocks they belong to are not either. A thousandth serves as well.
    ("vm/percpu_pagelist_high_fraction", "1000"),
    // Swap is memory, made smaller: taking a page back from it costs about what reading one of a file does.
    ("vm/swappiness", "100"),
    // It has no head to move: reading ahead is in vain.
    ("vm/page-cluster", "0"),
    // What is far apart is moved together when the machine is idle, by us; the kernel would look twice a second whether to.
    ("vm/compaction_proactiveness", "0"),
    // Counts of memory that only the kernel's own statistics are made of: gathered each second, by every processor.
    ("vm/stat_interval", "60"),
    // Every four seconds on every processor, to find one that hangs; the host finds a machine that does.
    ("kernel/watchdog", "0"),
    // Neighbours that somebody has the kernel keep fresh (`ip neigh … managed`): looked for every five seconds.
    ("net/ipv4/neigh/default/interval_probe_time_ms", "3600000"),
    ("net/ipv6/neigh/default/interval_probe_time_ms", "3600000"),
    // Elasticsearch and others refuse to start below this.
    ("vm/max_map_count", "262144"),
    // File watchers of many containers share the root user's budget.
    ("fs/inotify/max_user_watches", "1048576"),
    ("fs/inotify/max_user_instances", "8192"),
    // Thousands of containers with threads.
    ("kernel/pid_max", "4194304"),
    ("kernel/threads-max", "1048576"),
    // Each container may have a session keyring of its own.
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Applies everything; what could not be applied comes back as sentences. None of it is worth not starting for.
pub fn apply() -> Vec<String> {
    let mut problems = Vec::new();
    for (resource, limit) in LIMITS {
        let both = Rlimit { current: *limit, maximum: *limit };
        if let Err(error) = rustix::process::setrlimit(*resource, both) {
            problems.push(format!("cannot set the limit {resource:?} to {limit:?}: {error}"));
        }
    }
    if let Err(error) = rustix::system::sethostname(HOSTNAME.as_bytes()) {
        problems.push(format!("cannot set the host name: {error}"));
    }
    for (name, value) in SETTINGS {
        if let Err(error) = fs::write(format!("/proc/sys/{name}"), value) {
            problems.push(format!("cannot set {name} to {value}: {error}"));
        }
    }
    problems
}

//! Which limits the kernel's control groups can set here, on v1 and v2.

use std::path::Path;

/// The limits that can be set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Version 2 only.
    pub unified: bool,
    pub memory: bool,
    pub swap: bool,
    pub kernel_memory_tcp: bool,
    pub oom_kill_disable: bool,
    pub cpu_quota: bool,
    pub cpu_shares: bool,
    pub cpu_set: bool,
    pub pids: bool,
}

impl Cgroups {
    /// Looks below `root`, which is `/sys/fs/cgroup`.
    pub fn probe(root: &Path) -> Self {
        if let Ok(controllers) = std::fs::read_to_string(root.join("cgroup.controllers")) {
            let has = |name: &str| controllers.split_whitespace().any(|controller| controller == name);
            return Self {
                unified: true,
                memory: has("memory"),
                // The file is in every group but the root; without swap in the kernel it is not.
                swap: has("memory") && Path::new("/proc/swaps").exists(),
                cpu_quota: has("cpu"),
                cpu_shares: has("cpu"),
                cpu_set: has("cpuset"),
                pids: has("pids"),
                ..Self::default()
            };
        }
        let has = |file: &str| root.join(file).exists();
        Self {
            unified: false,
            memory: has("memory/memory.limit_in_bytes"),
            swap: has("memory/memory.memsw.limit_in_bytes"),
            kernel_memory_tcp: has("memory/memory.kmem.tcp.limit_in_bytes"),
            oom_kill_disable: has("memory/memory.oom_control"),
            cpu_quota: has("cpu/cpu.cfs_quota_us"),
            cpu_shares: has("cpu/cpu.shares"),
            cpu_set: has("cpuset/cpuset.cpus"),
            pids: has("pids/cgroup.procs"),
        }
    }

    /// What cannot be limited, in dockerd's words.
    pub fn warnings(&self) -> Vec<String> {
        let lacking = [
            (self.memory, "memory limit"),
            (self.swap || !self.memory, "swap limit"),
            (self.cpu_shares, "cpu shares"),
            (self.cpu_quota, "cpu cfs quota"),
            (self.cpu_quota, "cpu cfs period"),
            (self.cpu_set, "cpuset"),
            (self.pids, "pids limit"),
        ];
        let lacking = lacking.into_iter().filter(|(there, _)| !there);
        lacking.map(|(_, what)| format!("WARNING: No {what} support")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::folder;

    #[test]
    fn both_versions_are_told_apart_and_what_lacks_is_warned_of() {
        let root = folder();
        std::fs::create_dir_all(root.join("cpu")).unwrap();
        std::fs::write(root.join("cpu/cpu.shares"), "1024").unwrap();
        let one = Cgroups::probe(&root);
        assert!(!one.unified && one.cpu_shares && !one.memory && !one.cpu_quota);
        assert!(one.warnings().contains(&"WARNING: No memory limit support".to_owned()));
        std::fs::write(root.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        let two = Cgroups::probe(&root);
        assert!(two.unified && two.memory && two.pids && !two.oom_kill_disable);
        assert_eq!(two.warnings(), [""; 0]);
        std::fs::remove_dir_all(root).unwrap();
    }
}

//! Changing the limits of a group that has processes in it.
//!
//! The order of writes matters: the kernel refuses a limit of memory above that of memory and swap, and a quota that
//! does not fit its period, even for a moment.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::{Cgroup, CgroupError, failed};

/// Weights of version 1 and those of version 2 that stand for the same.
const SHARES: (u64, u64) = (2, 262_144);

impl Cgroup {
    /// Sets every limit that `resources` names and leaves the others. Devices cannot be changed.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        if let Some(memory) = resources.memory() {
            self.update_memory(memory)?;
        }
        if let Some(cpu) = resources.cpu() {
            self.update_cpu(cpu)?;
        }
        if let Some(pids) = resources.pids() {
            let limit = if pids.limit() > 0 { pids.limit().to_string() } else { "max".to_owned() };
            self.write("pids.max", &limit)?;
        }
        if let Some(io) = resources.block_io() {
            self.update_io(io)?;
        }
        Ok(())
    }

    /// Lets processes wait for memory instead of being killed for it. Only version 1 can.
    pub fn disable_oom_killer(&self) -> Result<(), CgroupError> {
        if self.holding("memory.oom_control").is_some() {
            self.write("memory.oom_control", "1")
        } else {
            Ok(())
        }
    }

    /// Keeps all of the group's memory out of swap, where version 2 counts that by itself.
    pub fn forbid_swap(&self) -> Result<(), CgroupError> {
        match self.holding("memory.swap.max") {
            Some(_) => self.write("memory.swap.max", "0"),
            None => Ok(()),
        }
    }

    fn update_memory(&self, memory: &LinuxMemory) -> Result<(), CgroupError> {
        let (limit, swap) = (nonzero(memory.limit()), nonzero(memory.swap()));
        if let Some(folder) = self.holding("memory.limit_in_bytes") {
            let current = read_number(&folder.join("memory.limit_in_bytes"));
            let swap_file = folder.join("memory.memsw.limit_in_bytes");
            let set_swap = || match swap.filter(|_| swap_file.exists()) {
                Some(swap) => write_file(&swap_file, &swap.to_string()),
                None => Ok(()),
            };
            // Growing: the limit of both first.
            let grows = swap.is_some_and(|swap| swap < 0)
                || limit.is_some_and(|limit| limit < 0 || current.is_some_and(|current| limit > current));
            if grows {
                set_swap()?;
            }
            if let Some(limit) = limit {
                write_file(&folder.join("memory.limit_in_bytes"), &limit.to_string())?;
            }
            if !grows {
                set_swap()?;
            }
            if let Some(reservation) = nonzero(memory.reservation()) {
                write_file(&folder.join("memory.soft_limit_in_bytes"), &reservation.to_string())?;
            }
            return Ok(());
        }
        let word = |bytes: i64| if bytes < 0 { "max".to_owned() } else { bytes.to_string() };
        if let Some(limit) = limit {
            self.write("memory.max", &word(limit))?;
        }
        if let Some(swap) = swap {
            // Version 2 counts swap alone.
            let alone = if swap < 0 { -1 } else { swap.saturating_sub(limit.unwrap_or(0).max(0)) };
            self.write("memory.swap.max", &word(alone))?;
        }
        if let Some(reservation) = nonzero(memory.reservation()) {
            self.write("memory.low", &word(reservation))?;
        }
        Ok(())
    }

    fn update_cpu(&self, cpu: &LinuxCpu) -> Result<(), CgroupError> {
        let v1 = self.holding("cpu.shares").is_some();
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            if v1 {
                self.write("cpu.shares", &shares.to_string())?;
            } else {
                self.write("cpu.weight", &weight(shares).to_string())?;
            }
        }
        let period = cpu.period().filter(|period| *period != 0);
        let quota = cpu.quota().filter(|quota| *quota != 0);
        match (v1, quota, period) {
            (_, None, None) => {}
            (true, ..) => {
                let period_file = |period: u64| self.write("cpu.cfs_period_us", &period.to_string());
                // Refused while the old quota does not fit it: then after the quota.
                let early = period.map_or(Ok(()), period_file);
                if let Some(quota) = quota {
                    self.write("cpu.cfs_quota_us", &quota.to_string())?;
                    if let (Err(_), Some(period)) = (&early, period) {
                        period_file(period)?;
                    }
                } else {
                    early?;
                }
            }
            (false, quota, period) => {
                let word = match quota {
                    Some(quota) if quota > 0 => quota.to_string(),
                    Some(_) => "max".to_owned(),
                    None => self.read("cpu.max")?.split(' ').next().unwrap_or("max").to_owned(),
                };
                let text = period.map_or_else(|| word.clone(), |period| format!("{word} {period}"));
                self.write("cpu.max", &text)?;
            }
        }
        if let Some(period) = cpu.realtime_period().filter(|period| *period != 0) {
            self.write("cpu.rt_period_us", &period.to_string())?;
        }
        if let Some(runtime) = cpu.realtime_runtime().filter(|runtime| *runtime != 0) {
            self.write("cpu.rt_runtime_us", &runtime.to_string())?;
        }
        if let Some(cpus) = cpu.cpus().as_deref().filter(|cpus| !cpus.is_empty()) {
            self.write("cpuset.cpus", cpus)?;
        }
        if let Some(nodes) = cpu.mems().as_deref().filter(|nodes| !nodes.is_empty()) {
            self.write("cpuset.mems", nodes)?;
        }
        Ok(())
    }

    fn update_io(&self, io: &LinuxBlockIo) -> Result<(), CgroupError> {
        let Some(weight) = io.weight().filter(|weight| *weight != 0) else { return Ok(()) };
        for file in ["blkio.weight", "blkio.bfq.weight", "io.bfq.weight"] {
            if self.holding(file).is_some() {
                return self.write(file, &weight.to_string());
            }
        }
        let linear = 1 + u32::from(weight).saturating_sub(10) * 9999 / 990;
        self.write("io.weight", &format!("default {linear}"))
    }

    /// The folder that has this file.
    fn holding(&self, file: &str) -> Option<PathBuf> {
        let folders = self.existing().map(|folder| &folder.root);
        folders.into_iter().find(|folder| folder.join(file).exists()).cloned()
    }

    fn place(&self, file: &str) -> PathBuf {
        self.holding(file).unwrap_or_else(|| self.path.clone()).join(file)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), CgroupError> {
        write_file(&self.place(file), text)
    }

    fn read(&self, file: &str) -> Result<String, CgroupError> {
        let path = self.place(file);
        fs::read_to_string(&path).map_err(failed("read", &path))
    }
}

fn nonzero(value: Option<i64>) -> Option<i64> {
    value.filter(|value| *value != 0)
}

/// A file of a limit is there already; none is ever made.
fn write_file(path: &Path, text: &str) -> Result<(), CgroupError> {
    use std::io::Write;
    let written =
        fs::File::options().write(true).open(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(failed("write", path))
}

fn read_number(path: &Path) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Version 1's shares as version 2's weight: the curve runc uses, through both ends and both defaults.
fn weight(shares: u64) -> u64 {
    if shares <= SHARES.0 {
        return 1;
    }
    if shares >= SHARES.1 {
        return 10_000;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    10f64.powf(exponent).ceil() as u64
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxPids;

    use super::super::Hierarchy;
    use super::*;

    /// A group of one folder with these files in it.
    fn group(name: &str, files: &[(&str, &str)]) -> (Cgroup, PathBuf) {
        let folder = std::env::temp_dir().join(format!("cgroup-update-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for (file, text) in files {
            fs::write(folder.join(file), text).unwrap();
        }
        let hierarchy = Hierarchy { root: folder.clone(), unified: false };
        (Cgroup { path: "/x".into(), folders: vec![hierarchy] }, folder)
    }

    fn resources(json: serde_json::Value) -> LinuxResources {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_first_version_takes_bytes_and_shares() {
        let files = [
            ("memory.limit_in_bytes", "0"),
            ("memory.memsw.limit_in_bytes", "0"),
            ("memory.soft_limit_in_bytes", "0"),
            ("cpu.shares", "1024"),
            ("cpu.cfs_quota_us", "-1"),
            ("cpu.cfs_period_us", "100000"),
            ("cpuset.cpus", ""),
            ("pids.max", "max"),
        ];
        let (group, folder) = group("v1", &files);
        let wanted = serde_json::json!({
            "memory": {"limit": 100, "swap": 300, "reservation": 50},
            "cpu": {"shares": 7, "quota": 9, "period": 8, "cpus": "0-1"},
        });
        let mut wanted = resources(wanted);
        let mut pids = LinuxPids::default();
        pids.set_limit(0);
        wanted.set_pids(Some(pids));
        group.update(&wanted).unwrap();
        // Plain files keep what is longer; all of these were shorter.
        let text = |file: &str| fs::read_to_string(folder.join(file)).unwrap();
        assert_eq!(
            (text("memory.limit_in_bytes"), text("memory.memsw.limit_in_bytes")),
            ("100".into(), "300".into())
        );
        assert_eq!(text("memory.soft_limit_in_bytes"), "50");
        assert!(text("cpu.shares").starts_with('7') && text("cpu.cfs_quota_us").starts_with('9'));
        assert!(text("cpu.cfs_period_us").starts_with('8'));
        assert_eq!((text("cpuset.cpus").as_str(), text("pids.max").as_str()), ("0-1", "max"));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_second_version_takes_swap_alone_weights_and_pairs() {
        let files = [
            ("memory.max", ""),
            ("memory.swap.max", ""),
            ("cpu.weight", ""),
            ("cpu.max", "5 9"),
            ("io.weight", ""),
        ];
        let (group, folder) = group("v2", &files);
        let text = |file: &str| fs::read_to_string(folder.join(file)).unwrap();
        let wanted = serde_json::json!({
            "memory": {"limit": 100, "swap": 300}, "cpu": {"shares": 1024, "quota": 70000}, "blockIO": {"weight": 1000},
        });
        group.update(&resources(wanted)).unwrap();
        assert_eq!((text("memory.max"), text("memory.swap.max")), ("100".into(), "200".into()));
        assert_eq!((text("cpu.weight"), text("cpu.max")), ("100".into(), "70000".into()));
        assert_eq!(text("io.weight"), "default 10000");
        fs::write(folder.join("memory.swap.max"), "").unwrap();
        group.forbid_swap().unwrap();
        assert_eq!(text("memory.swap.max"), "0");
        let failure =
            group.update(&resources(serde_json::json!({"cpu": {"realtimePeriod": 5}}))).unwrap_err();
        assert!(failure.to_string().contains("cpu.rt_period_us"), "{failure}");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn shares_map_to_weights_at_both_ends_and_the_default() {
        assert_eq!([0, 2, 1024, 262_144, u64::MAX].map(weight), [1, 1, 100, 10_000, 10_000]);
    }
}

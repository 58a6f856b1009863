//! Which limits this kernel can enforce, as its control groups show it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use guest_mountinfo::Mount;

/// What can be limited. A limit that cannot is left out with a word to the user, as dockerd does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Support {
    /// Version 2 is the only one.
    pub unified: bool,
    /// Hard limit of memory.
    pub memory: bool,
    /// Limit of memory and swap.
    pub swap: bool,
    /// Soft limit of memory.
    pub memory_reservation: bool,
    /// The out-of-memory killer can be turned off.
    pub oom_kill_disable: bool,
    /// How readily memory is swapped out.
    pub swappiness: bool,
    /// Limit of the kernel's memory.
    pub kernel_memory: bool,
    /// Limit of the memory of TCP buffers.
    pub kernel_memory_tcp: bool,
    /// Weights.
    pub cpu_shares: bool,
    /// Quota and period.
    pub cpu_quota: bool,
    /// Real-time quota and period.
    pub cpu_realtime: bool,
    /// Choice of processors and memory nodes.
    pub cpuset: bool,
    /// The processors there are, as the kernel writes them.
    pub cpus: String,
    /// The memory nodes there are.
    pub memory_nodes: String,
    /// Number of processes.
    pub pids: bool,
    /// Weight of block I/O.
    pub blkio_weight: bool,
    /// The same by device.
    pub blkio_weight_device: bool,
    /// Bytes read in a second, by device.
    pub blkio_read_bps: bool,
    /// Bytes written in a second, by device.
    pub blkio_write_bps: bool,
    /// Reads in a second, by device.
    pub blkio_read_iops: bool,
    /// Writes in a second, by device.
    pub blkio_write_iops: bool,
    /// Which device nodes may be opened.
    pub devices: bool,
    /// Namespaces of control groups.
    pub namespaces: bool,
}

impl Support {
    /// Looks at what is mounted.
    pub fn detect() -> io::Result<Self> {
        let mounts = controllers(guest_mountinfo::read()?);
        let mut support =
            if mounts.v1.is_empty() { Self::of_v2(mounts.v2.as_deref()) } else { Self::of_v1(&mounts.v1) };
        support.namespaces = Path::new("/proc/self/ns/cgroup").exists();
        Ok(support)
    }

    fn of_v1(mounts: &BTreeMap<String, PathBuf>) -> Self {
        let has = |controller: &str, file: &str| {
            mounts.get(controller).is_some_and(|folder| folder.join(file).exists())
        };
        let text = |file: &str| {
            let folder = mounts.get("cpuset")?;
            Some(fs::read_to_string(folder.join(file)).ok()?.trim().to_owned())
        };
        Self {
            unified: false,
            memory: mounts.contains_key("memory"),
            swap: has("memory", "memory.memsw.limit_in_bytes"),
            memory_reservation: has("memory", "memory.soft_limit_in_bytes"),
            oom_kill_disable: has("memory", "memory.oom_control"),
            swappiness: has("memory", "memory.swappiness"),
            kernel_memory: has("memory", "memory.kmem.limit_in_bytes"),
            kernel_memory_tcp: has("memory", "memory.kmem.tcp.limit_in_bytes"),
            cpu_shares: has("cpu", "cpu.shares"),
            cpu_quota: has("cpu", "cpu.cfs_quota_us"),
            cpu_realtime: has("cpu", "cpu.rt_period_us"),
            cpuset: mounts.contains_key("cpuset"),
            cpus: text("cpuset.cpus").unwrap_or_default(),
            memory_nodes: text("cpuset.mems").unwrap_or_default(),
            pids: mounts.contains_key("pids"),
            blkio_weight: has("blkio", "blkio.weight"),
            blkio_weight_device: has("blkio", "blkio.weight_device"),
            blkio_read_bps: has("blkio", "blkio.throttle.read_bps_device"),
            blkio_write_bps: has("blkio", "blkio.throttle.write_bps_device"),
            blkio_read_iops: has("blkio", "blkio.throttle.read_iops_device"),
            blkio_write_iops: has("blkio", "blkio.throttle.write_iops_device"),
            devices: mounts.contains_key("devices"),
            namespaces: false,
        }
    }

    fn of_v2(root: Option<&Path>) -> Self {
        let Some(root) = root else { return Self::default() };
        let listed = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        let has = |controller: &str| listed.split_whitespace().any(|known| known == controller);
        let text = |file: &str| fs::read_to_string(root.join(file)).unwrap_or_default().trim().to_owned();
        let io = has("io");
        Self {
            unified: true,
            memory: has("memory"),
            // The root group has no limits of its own; a kernel that swaps at all can limit it.
            swap: has("memory") && Path::new("/proc/swaps").exists(),
            memory_reservation: has("memory"),
            cpu_shares: has("cpu"),
            cpu_quota: has("cpu"),
            cpuset: has("cpuset"),
            cpus: text("cpuset.cpus.effective"),
            memory_nodes: text("cpuset.mems.effective"),
            pids: has("pids"),
            blkio_weight: io,
            blkio_weight_device: io,
            blkio_read_bps: io,
            blkio_write_bps: io,
            blkio_read_iops: io,
            blkio_write_iops: io,
            devices: true,
            ..Self::default()
        }
    }
}

/// Where controllers are mounted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mounts {
    v1: BTreeMap<String, PathBuf>,
    v2: Option<PathBuf>,
}

fn controllers(table: Vec<Mount>) -> Mounts {
    let mut mounts = Mounts::default();
    for mount in table {
        match mount.kind.as_str() {
            "cgroup2" => _ = mounts.v2.get_or_insert(mount.point),
            "cgroup" => {
                let known = mount.options.split(',').filter(|option| {
                    !matches!(*option, "rw" | "ro" | "xattr" | "clone_children")
                        && !option.starts_with("name=")
                        && !option.starts_with("release_agent=")
                });
                for controller in known {
                    mounts.v1.entry(controller.to_owned()).or_insert_with(|| mount.point.clone());
                }
            }
            _ => {}
        }
    }
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_found_where_they_are_mounted() {
        let hybrid = "30 22 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            31 22 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            32 22 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\nbroken\n";
        let mounts = controllers(guest_mountinfo::parse(hybrid.as_bytes()));
        assert_eq!(mounts.v1.keys().collect::<Vec<_>>(), ["cpu", "cpuacct"]);
        assert_eq!(mounts.v1["cpu"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(mounts.v2, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(controllers(Vec::new()), Mounts::default());
    }

    #[test]
    fn a_folder_of_files_is_what_counts() {
        let folder = std::env::temp_dir().join(format!("cgroup-support-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for file in ["memory.memsw.limit_in_bytes", "cpuset.mems"] {
            fs::write(folder.join(file), "0\n").unwrap();
        }
        fs::write(folder.join("cpuset.cpus"), "0-3\n").unwrap();
        fs::write(folder.join("cgroup.controllers"), "cpuset memory\n").unwrap();
        let mounts = ["memory", "cpuset"].map(|name| (name.to_owned(), folder.clone()));
        let one = Support::of_v1(&mounts.into());
        assert!(one.memory && one.swap && one.cpuset && !one.swappiness && !one.cpu_shares && !one.pids);
        assert_eq!((one.cpus.as_str(), one.memory_nodes.as_str()), ("0-3", "0"));
        let two = Support::of_v2(Some(&folder));
        assert!(two.unified && two.memory && two.cpuset && !two.pids && !two.blkio_weight);
        assert!(!two.oom_kill_disable && !two.swappiness && !two.cpu_realtime);
        assert_eq!(Support::of_v2(None), Support::default());
        fs::remove_dir_all(folder).unwrap();
    }
}

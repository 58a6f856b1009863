//! What this engine can grant a container: limits the kernel enforces, processors, capabilities, resource limits.

use std::io;

use guest_runtime::cgroup::Support;
use guest_runtime::defaults;
use oci_spec::runtime::{Capabilities, Capability};

/// Looked up once, but for the processors: nothing else changes while the engine runs.
#[derive(Clone, Debug)]
pub struct Capacity {
    pub support: Support,
    /// Tells how many there are now: a machine has some of its own turned off and on.
    pub processors: fn() -> u32,
    /// Capabilities this process can give away.
    pub grantable: Capabilities,
    /// Name of this host, for containers that share its network.
    pub host_name: String,
}

impl Capacity {
    pub fn detect() -> io::Result<Self> {
        Ok(Self {
            support: Support::detect()?,
            processors: || {
                let count = std::thread::available_parallelism().map_or(1, usize::from);
                u32::try_from(count).unwrap_or(u32::MAX)
            },
            grantable: defaults::grantable()?,
            host_name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        })
    }

    /// Whether limits can be set above this process's own.
    pub fn raises_limits(&self) -> bool {
        self.grantable.contains(&Capability::SysResource)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A machine that can do everything, with two processors.
    pub fn capable() -> Capacity {
        let support = Support {
            memory: true,
            swap: true,
            memory_reservation: true,
            oom_kill_disable: true,
            swappiness: true,
            kernel_memory: true,
            kernel_memory_tcp: true,
            cpu_shares: true,
            cpu_quota: true,
            cpu_realtime: true,
            cpuset: true,
            cpus: "0-1".to_owned(),
            memory_nodes: "0".to_owned(),
            pids: true,
            blkio_weight: true,
            blkio_weight_device: true,
            blkio_read_bps: true,
            blkio_write_bps: true,
            blkio_read_iops: true,
            blkio_write_iops: true,
            devices: true,
            namespaces: true,
            unified: false,
        };
        Capacity {
            support,
            processors: || 2,
            grantable: defaults::all_capabilities(),
            host_name: "machine".to_owned(),
        }
    }
}

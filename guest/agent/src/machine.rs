//! What the agent knows about the machine it runs in.

use std::fs;
use std::time::Duration;

use guest_protocol::{EngineState, GuestInfo};
use rustix::time::ClockId;

use crate::disk;

/// The kernel's number for this boot; empty if it has none.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// How long the kernel has been running.
fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or_default())
}

/// The same in milliseconds, for logs and messages.
pub fn uptime_ms() -> u64 {
    u64::try_from(uptime().as_millis()).unwrap_or(u64::MAX)
}

/// Memory that the kernel manages; zero if it does not tell.
pub fn memory_bytes() -> u64 {
    meminfo_bytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal")
}

/// Everything the host may ask.
pub fn gather(engine: EngineState) -> GuestInfo {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let (disk_total_bytes, disk_used_bytes) = disk::usage().unwrap_or_default();
    GuestInfo {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        uptime_ms: uptime_ms(),
        memory_total_bytes: meminfo_bytes(&meminfo, "MemTotal"),
        memory_available_bytes: meminfo_bytes(&meminfo, "MemAvailable"),
        memory_cached_bytes: cached_bytes(&meminfo),
        disk_total_bytes,
        disk_used_bytes,
        engine,
    }
}

/// What the kernel keeps although nobody asks it to. Shared memory is counted as cached, but its contents are nowhere else.
fn cached_bytes(meminfo: &str) -> u64 {
    let bytes = |name| meminfo_bytes(meminfo, name);
    (bytes("Cached") + bytes("Buffers") + bytes("SReclaimable")).saturating_sub(bytes("Shmem"))
}

fn meminfo_bytes(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
    kibibytes.map_or(0, |kibibytes: u64| kibibytes.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_by_whole_names() {
        let meminfo = "MemTotal:        1000 kB\nMemAvailable:     500 kB\nHugePages_Total:   3\n";
        assert_eq!(meminfo_bytes(meminfo, "MemTotal"), 1_024_000);
        assert_eq!(meminfo_bytes(meminfo, "MemAvailable"), 512_000);
        assert_eq!(meminfo_bytes(meminfo, "Mem"), 0);
        assert_eq!(meminfo_bytes(meminfo, "HugePages_Total"), 0);
    }

    #[test]
    fn shared_memory_is_no_cache() {
        let meminfo = "Buffers: 1 kB\nCached: 100 kB\nSwapCached: 50 kB\nShmem: 30 kB\nSReclaimable: 9 kB\n";
        assert_eq!(cached_bytes(meminfo), 80 * 1024);
        assert_eq!(cached_bytes("Shmem: 5 kB\n"), 0);
    }

    #[test]
    fn this_machine_can_be_described() {
        let info = gather(EngineState::Ready);
        assert!(info.memory_total_bytes >= info.memory_available_bytes && info.memory_available_bytes > 0);
        assert!(!info.kernel.is_empty() && info.uptime_ms > 0);
        assert_eq!(boot_id().len(), 36);
    }
}

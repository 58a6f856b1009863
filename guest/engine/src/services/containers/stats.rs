//! What a container uses: samples of its control group (v1 and v2) and its network interfaces.
//!
//! Reading is synchronous; the stream of samples, one a second, is [`Sampler`]'s caller's.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use guest_api::stats::{
    BlkioEntry, BlkioStats, CpuStats, CpuUsage, MemoryStats, NetworkStats, PidsStats, Stats, ThrottlingData,
};
use guest_runtime::cgroup::Cgroup;
use jiff::Timestamp;

use super::inspect::NEVER;

/// Nanoseconds of a clock tick.
const TICK_NANOS: u64 = 10_000_000;

/// The counters of `memory.stat` that dockerd shows, of version 1.
const MEMORY_V1: [&str; 32] = [
    "cache",
    "rss",
    "rss_huge",
    "mapped_file",
    "dirty",
    "writeback",
    "pgpgin",
    "pgpgout",
    "pgfault",
    "pgmajfault",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
    "hierarchical_memory_limit",
    "hierarchical_memsw_limit",
    "total_cache",
    "total_rss",
    "total_rss_huge",
    "total_mapped_file",
    "total_dirty",
    "total_writeback",
    "total_pgpgin",
    "total_pgpgout",
    "total_pgfault",
    "total_pgmajfault",
    "total_inactive_anon",
    "total_active_anon",
    "total_inactive_file",
    "total_active_file",
    "total_unevictable",
];

/// The same of version 2: the name shown, and the kernel's.
const MEMORY_V2: [(&str, &str); 31] = [
    ("anon", "anon"),
    ("file", "file"),
    ("kernel_stack", "kernel_stack"),
    ("slab", "slab"),
    ("sock", "sock"),
    ("shmem", "shmem"),
    ("file_mapped", "file_mapped"),
    ("file_dirty", "file_dirty"),
    ("file_writeback", "file_writeback"),
    ("anon_thp", "anon_thp"),
    ("inactive_anon", "inactive_anon"),
    ("active_anon", "active_anon"),
    ("inactive_file", "inactive_file"),
    ("active_file", "active_file"),
    ("unevictable", "unevictable"),
    ("slab_reclaimable", "slab_reclaimable"),
    ("slab_unreclaimable", "slab_unreclaimable"),
    ("pgfault", "pgfault"),
    ("pgmajfault", "pgmajfault"),
    ("workingset_refault", "workingset_refault_file"),
    ("workingset_activate", "workingset_activate_file"),
    ("workingset_nodereclaim", "workingset_nodereclaim"),
    ("pgrefill", "pgrefill"),
    ("pgscan", "pgscan"),
    ("pgsteal", "pgsteal"),
    ("pgactivate", "pgactivate"),
    ("pgdeactivate", "pgdeactivate"),
    ("pglazyfree", "pglazyfree"),
    ("pglazyfreed", "pglazyfreed"),
    ("thp_fault_alloc", "thp_fault_alloc"),
    ("thp_collapse_alloc", "thp_collapse_alloc"),
];

/// A sample of a container that does not run.
pub fn empty(id: &str, name: &str) -> Stats {
    Stats {
        id: id.to_owned(),
        name: format!("/{name}"),
        os_type: "linux".to_owned(),
        read: NEVER.to_owned(),
        preread: NEVER.to_owned(),
        ..Stats::default()
    }
}

/// Where the numbers of one container are.
#[derive(Clone, Debug)]
pub struct Sampler {
    pub id: String,
    pub name: String,
    pub cgroup: Cgroup,
    /// Its init, when it has a network of its own.
    pub network_of: Option<i32>,
}

impl Sampler {
    /// One sample. A counter that this kernel does not keep is 0. Reads files.
    pub fn sample(&self) -> Stats {
        let (system_cpu_usage, online_cpus) = system_cpu(&text(Path::new("/proc/stat")));
        let mut stats = empty(&self.id, &self.name);
        stats.cpu_stats = CpuStats { system_cpu_usage, online_cpus, ..self.cpu() };
        stats.memory_stats = self.memory();
        stats.pids_stats = PidsStats { current: self.number("pids.current"), limit: self.number("pids.max") };
        stats.blkio_stats = self.blkio();
        stats.networks = self
            .network_of
            .map(|pid| interfaces(&text(Path::new(&format!("/proc/{pid}/net/dev")))))
            .filter(|interfaces| !interfaces.is_empty());
        stats.read = format!("{:.9}", Timestamp::now());
        stats
    }

    fn read(&self, name: &str) -> Option<String> {
        self.cgroup.file(name).map(|path| text(&path))
    }

    fn number(&self, name: &str) -> u64 {
        self.read(name).and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    fn cpu(&self) -> CpuStats {
        let throttling = |stat: &Counters| ThrottlingData {
            periods: stat.get("nr_periods"),
            throttled_periods: stat.get("nr_throttled"),
            throttled_time: match stat.get("throttled_usec") {
                0 => stat.get("throttled_time"),
                micros => micros * 1000,
            },
        };
        let Some(total) = self.read("cpuacct.usage") else {
            let stat = Counters::of(&self.read("cpu.stat").unwrap_or_default());
            return CpuStats {
                cpu_usage: CpuUsage {
                    total_usage: stat.get("usage_usec") * 1000,
                    percpu_usage: Vec::new(),
                    usage_in_kernelmode: stat.get("system_usec") * 1000,
                    usage_in_usermode: stat.get("user_usec") * 1000,
                },
                throttling_data: throttling(&stat),
                ..CpuStats::default()
            };
        };
        let modes = Counters::of(&self.read("cpuacct.stat").unwrap_or_default());
        let per_cpu = self.read("cpuacct.usage_percpu").unwrap_or_default();
        // The hybrid layout has a `cpu.stat` of version 2 as well: take the one with the limits beside it.
        let limits = self.cgroup.file("cpu.cfs_period_us").map(|path| text(&path.with_file_name("cpu.stat")));
        CpuStats {
            cpu_usage: CpuUsage {
                total_usage: total.trim().parse().unwrap_or(0),
                percpu_usage: per_cpu.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect(),
                usage_in_kernelmode: modes.get("system") * TICK_NANOS,
                usage_in_usermode: modes.get("user") * TICK_NANOS,
            },
            throttling_data: throttling(&Counters::of(&limits.unwrap_or_default())),
            ..CpuStats::default()
        }
    }

    fn memory(&self) -> MemoryStats {
        let machine = machine_memory(&text(Path::new("/proc/meminfo")));
        let capped = |limit: u64| if limit == 0 { machine } else { limit.min(machine) };
        if let Some(path) = self.cgroup.file("memory.usage_in_bytes") {
            let beside = |name: &str| text(&path.with_file_name(name)).trim().parse().unwrap_or(0);
            let stat = Counters::of(&text(&path.with_file_name("memory.stat")));
            return MemoryStats {
                usage: beside("memory.usage_in_bytes"),
                max_usage: beside("memory.max_usage_in_bytes"),
                stats: MEMORY_V1.iter().map(|name| ((*name).to_owned(), stat.get(name))).collect(),
                failcnt: beside("memory.failcnt"),
                limit: capped(beside("memory.limit_in_bytes")),
            };
        }
        let Some(path) = self.cgroup.file("memory.current") else { return MemoryStats::default() };
        let beside = |name: &str| text(&path.with_file_name(name));
        let stat = Counters::of(&beside("memory.stat"));
        MemoryStats {
            usage: beside("memory.current").trim().parse().unwrap_or(0),
            max_usage: 0,
            stats: MEMORY_V2.iter().map(|(shown, name)| ((*shown).to_owned(), stat.get(name))).collect(),
            failcnt: Counters::of(&beside("memory.events")).get("oom"),
            // `max` is no number.
            limit: capped(beside("memory.max").trim().parse().unwrap_or(0)),
        }
    }

    fn blkio(&self) -> BlkioStats {
        let own = |name: &str| self.read(name);
        let entries = |name: &str| Some(blkio_v1(&own(&format!("blkio.{name}")).unwrap_or_default()));
        if let Some(bytes) = own("blkio.throttle.io_service_bytes_recursive") {
            let operations = own("blkio.throttle.io_serviced_recursive").unwrap_or_default();
            return BlkioStats {
                io_service_bytes_recursive: Some(blkio_v1(&bytes)),
                io_serviced_recursive: Some(blkio_v1(&operations)),
                io_queue_recursive: entries("io_queued_recursive"),
                io_service_time_recursive: entries("io_service_time_recursive"),
                io_wait_time_recursive: entries("io_wait_time_recursive"),
                io_merged_recursive: entries("io_merged_recursive"),
                io_time_recursive: entries("time_recursive"),
                sectors_recursive: entries("sectors_recursive"),
            };
        }
        let bytes = own("io.stat").map(|text| blkio_v2(&text)).filter(|entries| !entries.is_empty());
        BlkioStats { io_service_bytes_recursive: bytes, ..BlkioStats::default() }
    }
}

/// A file's text; empty when the container has gone meanwhile.
fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Lines of `name value`.
struct Counters(BTreeMap<String, u64>);

impl Counters {
    fn of(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        });
        Self(pairs.collect())
    }

    fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// Nanoseconds all processors have worked, and how many there are.
fn system_cpu(stat: &str) -> (u64, u32) {
    let (mut ticks, mut processors) = (0, 0);
    for line in stat.lines().take_while(|line| line.starts_with("cpu")) {
        let mut words = line.split_ascii_whitespace();
        if words.next() == Some("cpu") {
            ticks = words.take(7).filter_map(|word| word.parse::<u64>().ok()).sum();
        } else {
            processors += 1;
        }
    }
    (ticks * TICK_NANOS, processors)
}

fn machine_memory(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    total.and_then(|words| words.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The table of `/proc/net/dev`, without the loopback.
fn interfaces(table: &str) -> BTreeMap<String, NetworkStats> {
    let rows = table.lines().skip(2).filter_map(|line| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> =
            counters.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            _,
            _,
            _,
            _,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..,
        ] = counters[..]
        else {
            return None;
        };
        let stats = NetworkStats {
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        };
        Some((name.trim().to_owned(), stats))
    });
    rows.filter(|(name, _)| name != "lo").collect()
}

/// Lines of `8:0 Read 4096`; the last line is a total.
fn blkio_v1(text: &str) -> Vec<BlkioEntry> {
    let entries = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let (op, value) = match (words.next()?, words.next()) {
            (op, Some(value)) => (op.to_ascii_lowercase(), value),
            (value, None) => (String::new(), value),
        };
        Some(BlkioEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            op,
            value: value.parse().ok()?,
        })
    });
    entries.collect()
}

/// Lines of `8:0 rbytes=4096 wbytes=0 …`.
fn blkio_v2(text: &str) -> Vec<BlkioEntry> {
    let lines = text.lines().filter_map(|line| {
        let (device, counters) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
        let counter = |name: &str| {
            let mut words = counters.split_ascii_whitespace();
            words.find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok()).unwrap_or(0)
        };
        let entry = |op: &str, value| BlkioEntry { major, minor, op: op.to_owned(), value };
        Some([entry("read", counter("rbytes")), entry("write", counter("wbytes"))])
    });
    lines.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_and_their_time_are_counted() {
        let stat = "cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 2\ncpu1 1 2\nintr 5\ncpu2 nonsense\n";
        assert_eq!(system_cpu(stat), (28 * TICK_NANOS, 2));
        assert_eq!(system_cpu(""), (0, 0));
    }

    #[test]
    fn interfaces_are_read_without_the_loopback() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets errs\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: \
                     796 10 1 2 0 0 0 0 306 5 3 4 0 0 0 0\n broken: 1\n";
        let found = interfaces(table);
        assert_eq!(found.len(), 1);
        let eth0 = &found["eth0"];
        assert_eq!((eth0.rx_bytes, eth0.rx_dropped, eth0.tx_bytes, eth0.tx_errors), (796, 2, 306, 3));
    }

    #[test]
    fn block_devices_are_read_in_both_versions() {
        let one = blkio_v1("8:0 Read 4096\n8:0 Write 1\n8:0 Total 4097\n8:16 12\nTotal 4097\n");
        assert_eq!(one.len(), 4);
        assert_eq!((one[0].op.as_str(), one[0].value, one[3].minor), ("read", 4096, 16));
        let two = blkio_v2("8:0 rbytes=90 wbytes=7 rios=1\nnonsense\n");
        assert_eq!((two[0].value, two[1].op.as_str(), two[1].value), (90, "write", 7));
    }

    #[test]
    fn the_machines_memory_is_the_limit_of_those_without_one() {
        assert_eq!(machine_memory("MemTotal:       16 kB\nMemFree: 1 kB\n"), 16_384);
    }
}

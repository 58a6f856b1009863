//! `engine stats`: what containers use, once or again and again.

use crate::arguments::StatsArgs;
use crate::docker::{Docker, encode};
use crate::output::{binary_size, note, short_id, size, table, text};
use crate::template::Template;
use anyhow::Result;
use futures_util::future::join_all;
use guest_api::ContainerSummary;
use guest_api::stats::{BlkioEntry, Stats};
use serde_json::{Value, json};
use std::io::IsTerminal;

/// Cursor to the corner, and nothing left below what is written.
const CLEAR: &str = "\x1b[H\x1b[2J";
const HEADINGS: [&str; 8] =
    ["CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "NET I/O", "BLOCK I/O", "PIDS"];

/// Shows a row for each container named, or for all that run.
pub(crate) async fn stats(docker: &Docker, args: &StatsArgs) -> Result<bool> {
    let template = args.format.as_deref().map(Template::parse).transpose()?;
    let in_place = !args.no_stream && std::io::stdout().is_terminal();
    loop {
        let (rows, all) = sample(docker, args).await?;
        let shown = match &template {
            Some(template) => {
                let records: Vec<Value> = rows.iter().map(|row| row.record(args.no_trunc)).collect();
                template.render_all(&records)?
            }
            None => {
                let cells: Vec<Vec<String>> =
                    rows.iter().map(|row| row.cells(args.no_trunc).into()).collect();
                table(&HEADINGS, &cells)
            }
        };
        text(&format!("{}{shown}", if in_place { CLEAR } else { "" }))?;
        let named = !args.containers.is_empty();
        if args.no_stream || (named && rows.is_empty()) {
            return Ok(all);
        }
        if rows.is_empty() {
            // A sample takes a second by itself; no container takes none.
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    }
}

/// One sample of each; false when one could not be had. Each takes the engine a second, all of them together too.
async fn sample(docker: &Docker, args: &StatsArgs) -> Result<(Vec<Row>, bool)> {
    let names = match args.containers.as_slice() {
        [] => {
            let path = format!("/containers/json?all={}", u8::from(args.all));
            let containers: Vec<ContainerSummary> = docker.get(&path).await?;
            containers.into_iter().map(|container| container.id).collect()
        }
        names => names.to_vec(),
    };
    let samples = join_all(names.iter().map(|name| async move {
        docker.get::<Stats>(&format!("/containers/{}/stats?stream=false", encode(name))).await
    }));
    let mut rows = Vec::new();
    let mut all = true;
    for sample in samples.await {
        match sample {
            Ok(stats) => rows.push(Row { stats }),
            // Of all that run, one may have ended meanwhile.
            Err(_) if args.containers.is_empty() => {}
            Err(error) => {
                note(&format!("{error:#}"));
                all = false;
            }
        }
    }
    Ok((rows, all))
}

struct Row {
    stats: Stats,
}

impl Row {
    fn record(&self, no_trunc: bool) -> Value {
        let [id, name, cpu, memory, memory_share, network, block, pids] = self.cells(no_trunc);
        json!({
            "ID": id, "Container": id, "Name": name, "CPUPerc": cpu, "MemUsage": memory, "MemPerc": memory_share,
            "NetIO": network, "BlockIO": block, "PIDs": pids,
        })
    }

    fn cells(&self, no_trunc: bool) -> [String; 8] {
        let stats = &self.stats;
        let id = if no_trunc { &stats.id } else { short_id(&stats.id) };
        let (used, limit) = (self.memory_used(), stats.memory_stats.limit);
        let interfaces = || stats.networks.iter().flatten().map(|(_, interface)| interface);
        let received: u64 = interfaces().map(|interface| interface.rx_bytes).sum();
        let sent: u64 = interfaces().map(|interface| interface.tx_bytes).sum();
        [
            id.to_owned(),
            stats.name.trim_start_matches('/').to_owned(),
            format!("{:.2}%", self.cpu_percent()),
            format!("{} / {}", binary_size(used), binary_size(limit)),
            format!("{:.2}%", percent(used, limit)),
            pair(received, sent),
            pair(self.block_bytes("read"), self.block_bytes("write")),
            stats.pids_stats.current.to_string(),
        ]
    }

    /// Of one processor: two busy ones are 200.
    fn cpu_percent(&self) -> f64 {
        let (now, before) = (&self.stats.cpu_stats, &self.stats.precpu_stats);
        let used = now.cpu_usage.total_usage.saturating_sub(before.cpu_usage.total_usage);
        let passed = now.system_cpu_usage.saturating_sub(before.system_cpu_usage);
        percent(used, passed) * f64::from(now.online_cpus.max(1))
    }

    /// Without the page cache that the kernel would give back first.
    fn memory_used(&self) -> u64 {
        let memory = &self.stats.memory_stats;
        let idle =
            ["total_inactive_file", "inactive_file"].into_iter().find_map(|name| memory.stats.get(name));
        memory.usage.saturating_sub(idle.copied().unwrap_or(0))
    }

    fn block_bytes(&self, operation: &str) -> u64 {
        let entries = self.stats.blkio_stats.io_service_bytes_recursive.iter().flatten();
        let of = |entry: &&BlkioEntry| entry.op.eq_ignore_ascii_case(operation);
        entries.filter(of).map(|entry| entry.value).sum()
    }
}

fn pair(one: u64, other: u64) -> String {
    let told = |bytes: u64| size(i64::try_from(bytes).unwrap_or(i64::MAX));
    format!("{} / {}", told(one), told(other))
}

#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 * 100.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_api::stats::NetworkStats;

    #[test]
    fn a_row_reads_like_dockers() {
        let mut stats = Stats { id: "0123456789abcdef".into(), name: "/web".into(), ..Stats::default() };
        stats.cpu_stats.cpu_usage.total_usage = 3_000;
        stats.cpu_stats.system_cpu_usage = 20_000;
        stats.cpu_stats.online_cpus = 2;
        stats.precpu_stats.cpu_usage.total_usage = 1_000;
        stats.precpu_stats.system_cpu_usage = 10_000;
        stats.memory_stats.usage = 3 << 20;
        stats.memory_stats.limit = 4 << 20;
        stats.memory_stats.stats.insert("inactive_file".into(), 1 << 20);
        let interface = NetworkStats { rx_bytes: 1_500, tx_bytes: 2, ..NetworkStats::default() };
        stats.networks = Some([("eth0".to_owned(), interface)].into());
        stats.pids_stats.current = 7;
        let read = BlkioEntry { op: "Read".into(), value: 4_096, ..BlkioEntry::default() };
        stats.blkio_stats.io_service_bytes_recursive = Some(vec![read]);
        let cells = Row { stats }.cells(false);
        assert_eq!(
            cells,
            ["0123456789ab", "web", "40.00%", "2MiB / 4MiB", "50.00%", "1.5kB / 2B", "4.1kB / 0B", "7"]
        );
        assert_eq!(Row { stats: Stats::default() }.cells(false)[2..5], ["0.00%", "0B / 0B", "0.00%"]);
    }
}

//! `Usage`: what an engine holds at a moment, to compare with another moment.

use crate::command::wait_until;
use crate::engine::{Engine, Stage};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::time::Duration;

/// Idle threads of tokio's blocking pool end after ten seconds, and every question keeps one of them from it.
const POOL_LINGERS: Duration = Duration::from_secs(11);
const TASKS: &str = "the engine's tasks";

/// Descriptors, threads, tasks and streams by name, in every process between a client and the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage(BTreeMap<String, u64>);

impl Usage {
    /// What `engine` holds right now.
    pub fn of(engine: &Engine) -> Result<Self> {
        let mut counts = BTreeMap::new();
        let processes: &[&str] = match engine.stage {
            Stage::Native => &["guest-engine"],
            Stage::Qemu | Stage::Kvm => &["engined", "engine-vmm"],
        };
        for process in processes {
            let pid = engine.processes().find(process)?.pid;
            for (folder, what) in [("fd", "descriptors"), ("task", "threads")] {
                let entries = std::fs::read_dir(format!("/proc/{pid}/{folder}"))?.count();
                counts.insert(format!("{what} of {process}"), entries as u64);
            }
        }
        let inside = engine.engine(["info", "--format", "{{.NFd}} {{.NGoroutines}}"])?.ok()?;
        let (descriptors, tasks) = inside.split_once(' ').with_context(|| format!("info: {inside}"))?;
        counts.insert("the engine's own count of its descriptors".into(), descriptors.parse()?);
        counts.insert(TASKS.into(), tasks.parse()?);
        if engine.stage != Stage::Native {
            let open = engine.engine(["machine", "info", "--format", "{{.open_streams}}"])?.ok()?;
            counts.insert("vsock streams".into(), open.parse().with_context(|| open.clone())?);
        }
        Ok(Self(counts))
    }

    /// The descriptors and streams alone: they are back at once, where threads and tasks linger.
    pub fn without_threads(mut self) -> Self {
        self.0.retain(|name, _| !name.starts_with("threads") && name != TASKS);
        self
    }

    /// What `engine` holds once nothing has changed for a while.
    pub fn settled(engine: &Engine) -> Result<Self> {
        let mut last = Self::of(engine)?;
        wait_until("the engine's counts stand still", || {
            std::thread::sleep(Duration::from_secs(3));
            let now = Self::of(engine)?;
            let settled = now == last;
            last = now;
            Ok(settled.then(|| last.clone()))
        })
    }

    /// Waits until `engine` holds no more of anything than this.
    pub fn comes_back(&self, engine: &Engine) -> Result<()> {
        let mut more = String::new();
        let with_threads = self.0.contains_key(TASKS);
        let lingers = if with_threads { POOL_LINGERS } else { Duration::ZERO };
        wait_until("the engine holds no more than before", || {
            let now = Self::of(engine)?;
            more = self.exceeded_by(&if with_threads { now } else { now.without_threads() });
            if !more.is_empty() {
                std::thread::sleep(lingers);
            }
            Ok(more.is_empty().then_some(()))
        })
        .with_context(|| more)
    }

    fn exceeded_by(&self, now: &Self) -> String {
        now.0
            .iter()
            .map(|(name, count)| (name, count, self.0.get(name).copied().unwrap_or(0)))
            .filter(|(_, count, before)| *count > before)
            .map(|(name, count, before)| format!("{name}: {count}, before {before}; "))
            .collect()
    }
}

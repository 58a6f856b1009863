//! What the machine and its daemon take of a processor when nobody wants anything of them, beside plain QEMU with the same guest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tests_harness::Engine;

use crate::figure;
use crate::memory::Plain;

/// The guest lets go of its caches after a minute without work, and looks through its disk once.
const REST: Duration = Duration::from_secs(180);
const SPAN: Duration = Duration::from_secs(60);
/// What the peer is called.
const PLAIN: &str = "plain QEMU";
/// Percent of a core, all processes together.
const PROMISED: f64 = 0.5;

/// What threads have done since they began, of one process.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Work {
    /// Nanoseconds on a processor.
    pub ran: u64,
    /// How often one went to sleep by itself, and so was woken: a timer that fires shows here.
    pub slept: u64,
}

pub(crate) fn idle(engine: &Engine) -> Result<()> {
    // As fresh as its peer.
    engine.engine(["machine", "restart"])?.ok()?;
    let mut processes: BTreeMap<&str, i32> = BTreeMap::new();
    for name in ["engined", "engine-vmm"].into_iter().chain(engine.stage.machine_process()) {
        processes.insert(name, engine.processes().find(name)?.pid);
    }
    // Its processor is QEMU's own one.
    let plain = match processes.contains_key("qemu-system-x86_64") {
        true => Some(Plain::start(engine)?),
        false => None,
    };
    processes.extend(plain.as_ref().map(|plain| (PLAIN, plain.pid())));
    std::thread::sleep(REST);
    let look =
        || processes.iter().map(|(name, pid)| Ok((*name, work(*pid)?))).collect::<Result<BTreeMap<_, _>>>();
    let (before, begun) = (look()?, Instant::now());
    std::thread::sleep(SPAN);
    let (after, seconds) = (look()?, begun.elapsed().as_secs_f64());
    let (mut ours, mut theirs) = (0.0, None);
    for (name, now) in after {
        let then = before.get(name).copied().unwrap_or_default();
        let share = Duration::from_nanos(now.ran.saturating_sub(then.ran)).as_secs_f64() / seconds * 100.0;
        figure(&format!("{name}, idle"), share, "% of a core");
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let wakes = now.slept.saturating_sub(then.slept) as f64 / seconds;
        figure(&format!("{name}, woken"), wakes, "times a second");
        match name {
            PLAIN => theirs = Some(share),
            _ => ours += share,
        }
    }
    let kept = if ours < PROMISED { "kept" } else { "MISSED" };
    figure("ours, idle", ours, &format!("% of a core, promised < {PROMISED}: {kept}"));
    if let Some(theirs) = theirs {
        figure("ours to plain QEMU", ours / theirs, "x");
    }
    Ok(())
}

/// Of all threads that live (`Documentation/scheduler/sched-stats.rst`, the first number of `schedstat`).
pub(crate) fn work(pid: i32) -> Result<Work> {
    let mut work = Work::default();
    let folder = format!("/proc/{pid}/task");
    for task in std::fs::read_dir(&folder).with_context(|| format!("cannot read `{folder}`"))? {
        let task = task?.path();
        // A thread may end while it is looked at.
        let read = |name: &str| std::fs::read_to_string(task.join(name)).ok();
        let (Some(times), Some(status)) = (read("schedstat"), read("status")) else { continue };
        work.ran +=
            times.split(' ').next().and_then(|ran| ran.parse::<u64>().ok()).with_context(|| times.clone())?;
        let slept = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        work.slept +=
            slept.and_then(|slept| slept.trim().parse::<u64>().ok()).with_context(|| status.clone())?;
    }
    Ok(work)
}

//! What an idle machine does: it lets go of its [`caches`], and the balloon gives the freed pages to the host. Once after each
//! start it also has the disk give back what is free ([`trim`]).
//!
//! ```text
//!           somebody waited for a disk
//!   Resting ──────────────────────────▶ Stirred ◀─┐ again, or the processors were busy
//!      ▲                                   │ └────┘
//!      └────── caches are let go ──────────┘ nobody did for a while, and who works was looked at half way
//! ```
//!
//! While a container works without waiting for a disk it keeps its caches, and we look again after a while.
//!
//! Caches grow by reading and writing, and whoever reads or writes waits for a disk sooner or later. The kernel watches for
//! that and wakes us (Linux `Documentation/accounting/psi.rst`, "Monitoring for pressure thresholds"); while nobody waits for
//! a disk no timer runs here.

mod caches;
mod trim;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::{debug, info};

use self::caches::Caches;
use self::trim::Trim;
use crate::disk::DATA;
use crate::sys;

/// A machine is idle when it was left alone for so long. Longer than the kernel takes to write what is dirty by itself (half a
/// minute), which is only then a cache.
pub const QUIET: Duration = Duration::from_mins(1);

/// A machine that was busier than this part of one processor's time was not left alone.
const BUSY_PART: u64 = 5;

const PRESSURE: &str = "/proc/pressure/io";
/// Who has waited for a disk for so long all together, within a window, has stirred the machine.
const STALL: Duration = Duration::from_millis(1);
/// The longest the kernel has (Linux `kernel/sched/psi.c`). It wakes us once in each at most, and for what comes soon after
/// that at its end, which therefore has to be well before the machine counts as idle.
const WINDOW_MAX: Duration = Duration::from_secs(10);
/// The shortest.
const WINDOW_MIN: Duration = Duration::from_millis(500);

/// Lets go of caches whenever the machine is idle, for ever. `quiet` is [`QUIET`] but for tests.
pub async fn keep(quiet: Duration) -> Result<()> {
    let half = quiet / 2;
    let pressure = Pressure::watch(Path::new(PRESSURE), (half / 2).clamp(WINDOW_MIN, WINDOW_MAX))?;
    let (mut caches, mut trim) = (Caches::default(), Trim::default());
    // The boot was the first to stir.
    loop {
        wait_for_quiet(&pressure, half).await?;
        caches = spawn_blocking(|| {
            caches.look();
            caches
        })
        .await
        .context("looking at caches was cut off")?;
        if let Ok(rises) = timeout(half, pressure.rises()).await {
            rises?;
            continue;
        }
        let stirred = Arc::new(AtomicBool::new(false));
        let mut work = spawn_blocking({
            let stirred = Arc::clone(&stirred);
            move || {
                let outcome = caches.let_go(&|| stirred.load(Ordering::Relaxed));
                (caches, outcome)
            }
        });
        let (done, stirred) = tokio::select! {
            done = &mut work => (done, false),
            rises = pressure.rises() => {
                rises?;
                stirred.store(true, Ordering::Relaxed);
                (work.await, true)
            }
        };
        let outcome;
        (caches, outcome) = done.context("letting go of caches was cut off")?;
        match outcome.freed {
            0 => debug!(outcome.at_work, "the machine is idle; there are no caches to let go of"),
            bytes => info!(bytes, "the machine is idle: caches let go"),
        }
        if stirred || outcome.at_work {
            continue;
        }
        let more;
        (trim, more) = spawn_blocking(move || {
            let more = trim.part(Path::new(DATA));
            (trim, more)
        })
        .await
        .context("giving back free space was cut off")?;
        if !more {
            pressure.rises().await?;
        }
    }
}

/// Returns when nobody has waited for a disk for that long, and no processor has had much to do.
async fn wait_for_quiet(pressure: &Pressure, quiet: Duration) -> Result<()> {
    loop {
        let before = Load::now();
        match timeout(quiet, pressure.rises()).await {
            Ok(rises) => rises?,
            Err(_elapsed) if Load::now().is_idle_since(before) => return Ok(()),
            Err(_elapsed) => {}
        }
    }
}

/// Is told when somebody waits for a disk.
struct Pressure(AsyncFd<File>);

impl Pressure {
    fn watch(path: &Path, window: Duration) -> Result<Self> {
        let watch = || -> io::Result<Self> {
            let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
            let mut file = File::options().read(true).write(true).custom_flags(flags).open(path)?;
            file.write_all(format!("some {} {}\0", STALL.as_micros(), window.as_micros()).as_bytes())?;
            Ok(Self(sys::register_file(file, Interest::PRIORITY)?))
        };
        watch().with_context(|| {
            format!("cannot watch `{}`, so an idle machine keeps its caches", path.display())
        })
    }

    /// Returns when somebody has waited since the last call returned. May be dropped.
    async fn rises(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

/// Processors' time since boot, in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Load {
    busy: u64,
    /// Of all of them.
    all: u64,
    processors: u64,
}

impl Load {
    fn now() -> Self {
        Self::parse(&fs::read_to_string("/proc/stat").unwrap_or_default()).unwrap_or_default()
    }

    /// From `/proc/stat` (proc_stat(5)). Its first line is of all processors: user, nice, system, idle, waiting, interrupts
    /// (twice), stolen; what guests use is part of the first two.
    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let times: Vec<u64> =
            line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        let resting = times.get(3)?.saturating_add(*times.get(4)?);
        let all = times.iter().fold(0, |sum: u64, time| sum.saturating_add(*time));
        let processors = stat.lines().skip(1).take_while(|line| line.starts_with("cpu")).count() as u64;
        Some(Self { busy: all.saturating_sub(resting), all, processors })
    }

    fn is_idle_since(self, before: Self) -> bool {
        let of_one = self.all.saturating_sub(before.all) / self.processors.max(1);
        self.busy.saturating_sub(before.busy) <= of_one / BUSY_PART
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_is_all_processors() {
        let stat = "cpu  100 20 30 4000 50 6 7 8 90 0\ncpu0 1 1 1 1 1 1 1 1 0 0\ncpu1 1 1\nintr 5\n";
        assert_eq!(Load::parse(stat), Some(Load { busy: 171, all: 4221, processors: 2 }));
        for wrong in ["", "cpu0 1 2 3 4 5", "cpu  1 2 3", "cpu  a b c d e"] {
            assert_eq!(Load::parse(wrong), None, "{wrong}");
        }
        assert!(Load::now().processors > 0);
    }

    #[test]
    fn idle_is_little_work_for_one_processor() {
        let load = |busy, all| Load { busy, all, processors: 4 };
        let before = load(500, 10_000);
        assert!(load(500, 34_000).is_idle_since(before));
        assert!(load(500 + 1200, 34_000).is_idle_since(before), "a fifth of 6000");
        assert!(!load(500 + 1201, 34_000).is_idle_since(before));
        // Processors that were turned off take their time with them.
        assert!(load(400, 9_000).is_idle_since(before));
    }

    #[tokio::test]
    async fn a_kernel_without_the_watch_is_named() {
        let error = Pressure::watch(Path::new("/nonexistent/io"), WINDOW_MAX).err().unwrap().to_string();
        assert!(error.contains("/nonexistent/io") && error.contains("keeps its caches"), "{error}");
    }
}

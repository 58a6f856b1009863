//! From `engine run` on a stopped machine to the container's output, by stage; and the size of the VM image.

use crate::figure;
use anyhow::{Context, Result};
use std::time::{Instant, SystemTime};
use tests_harness::{Engine, IMAGE};

const ROUNDS: usize = 5;

/// What the daemon logs when a stage is reached, in order.
const MARKS: [(&str, &str); 4] = [
    ("VM process started", "state=\"starting\""),
    ("processors run", "the machine's processors run"),
    ("agent connected", "control session established"),
    ("API answers", "state=\"running\""),
];

pub(crate) fn image(engine: &Engine) -> Result<()> {
    let folder = engine.program("vm-image");
    for file in ["kernel", "initramfs"] {
        let bytes = std::fs::metadata(folder.join(file))
            .with_context(|| format!("no `{file}` in the VM image"))?
            .len();
        figure(&format!("{file}, compressed"), mib(bytes), "MiB");
    }
    Ok(())
}

pub(crate) fn boot(engine: &Engine) -> Result<()> {
    let mut rounds: Vec<Vec<f64>> = Vec::new();
    for _ in 0..ROUNDS {
        engine.engine(["machine", "stop"])?.ok()?;
        let log = engine.path("run/engined.log");
        let before = std::fs::metadata(&log)?.len();
        let wall = SystemTime::now();
        let start = Instant::now();
        engine.engine(["run", "--rm", IMAGE, "true"])?.ok()?;
        let whole = start.elapsed().as_secs_f64();
        let text = std::fs::read_to_string(&log)?;
        let lines: Vec<&str> = text.get(usize::try_from(before)?..).unwrap_or_default().lines().collect();
        let mut times = Vec::new();
        for (name, mark) in MARKS {
            let line = lines
                .iter()
                .find(|line| line.contains(mark))
                .with_context(|| format!("`{name}` is not in the log"))?;
            times.push(seconds_since(wall, line)?);
        }
        times.push(whole);
        rounds.push(times);
    }
    for (stage, name) in
        MARKS.iter().map(|(name, _)| *name).chain(["container's output and exit"]).enumerate()
    {
        figure(
            &format!("{name} after (median of {ROUNDS})"),
            median(rounds.iter().map(|round| round[stage])),
            "s",
        );
    }
    let run = (0..ROUNDS).map(|_| {
        let start = Instant::now();
        engine.engine(["run", "--rm", IMAGE, "true"])?.ok()?;
        Ok(start.elapsed().as_secs_f64())
    });
    let run = run.collect::<Result<Vec<_>>>()?;
    figure(&format!("run --rm on a running machine (median of {ROUNDS})"), median(run.into_iter()), "s");
    Ok(())
}

/// The moment at the beginning of a log line, `2026-01-02T03:04:05.123456Z`, as seconds after `start`. Both are of the
/// same day or of two that follow each other.
fn seconds_since(start: SystemTime, line: &str) -> Result<f64> {
    let moment = line
        .split(' ')
        .next()
        .and_then(|stamp| stamp.split_once('T'))
        .map(|(_, time)| time.trim_end_matches('Z'));
    let parts = moment
        .context("the line has no moment")?
        .split(':')
        .map(str::parse::<f64>)
        .collect::<Result<Vec<_>, _>>()?;
    let [hours, minutes, seconds] = parts[..] else { anyhow::bail!("`{line}` has no moment") };
    let day = 86_400.0;
    let of_day = start.duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64() % day;
    Ok((hours * 3600.0 + minutes * 60.0 + seconds - of_day).rem_euclid(day))
}

pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

pub(crate) fn mib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let mib = bytes as f64 / f64::from(1u32 << 20);
    mib
}

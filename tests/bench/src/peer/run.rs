//! Containers: run, exec, many at once, and lists of them.

use super::side::Side;
use crate::boot::median;
use anyhow::{Context, Result};
use std::process::{Command, Stdio};
use std::time::Instant;
use tests_harness::{IMAGE, Layer, Timed};

/// Containers at once.
pub(super) const MANY: usize = 50;
/// Containers in the list.
const LISTED: usize = 1000;
const FLOOR_ROUNDS: usize = 15;

fn milliseconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

pub(super) fn run(side: &Side) -> Result<f64> {
    milliseconds(|| side.run(["run", "--rm", IMAGE, "true"])?.ok().map(drop))
}

pub(super) fn api(side: &Side) -> Result<f64> {
    let mut api = side.api()?;
    milliseconds(|| api.cycle())
}

pub(super) fn sleeper(side: &Side) -> Result<()> {
    side.run(["run", "-d", "--name", "sleeper", IMAGE, "sleep", "1000"])?.ok().map(drop)
}

pub(super) fn exec(side: &Side) -> Result<f64> {
    milliseconds(|| side.run(["exec", "sleeper", "true"])?.ok().map(drop))
}

/// Starts many at once, by as many clients.
pub(super) fn start_many(side: &Side) -> Result<()> {
    let clients = (0..MANY).map(|_| Timed::new(side.docker(["run", "-d", IMAGE, "sleep", "1000"])).spawn());
    let clients = clients.collect::<Result<Vec<_>>>()?;
    clients.into_iter().try_for_each(|client| client.finish()?.ok().map(drop))
}

pub(super) fn parallel(side: &Side) -> Result<f64> {
    let seconds = milliseconds(|| start_many(side))? / 1e3;
    clear(side)?;
    Ok(seconds)
}

pub(super) fn remove(side: &Side) -> Result<f64> {
    start_many(side)?;
    let ids = side.run(["ps", "-q"])?.ok()?;
    Ok(milliseconds(|| side.run(["rm", "-f"].into_iter().chain(ids.lines()))?.ok().map(drop))? / 1e3)
}

pub(super) fn thousand(side: &Side) -> Result<()> {
    let mut api = side.api()?;
    (0..LISTED).try_for_each(|_| api.create("true").map(drop))
}

pub(super) fn list(side: &Side) -> Result<f64> {
    milliseconds(|| side.run(["ps", "-a"])?.ok().map(drop))
}

/// Removes all containers.
pub(super) fn clear(side: &Side) -> Result<()> {
    let ids = side.run(["ps", "-aq"])?.ok()?;
    let ids: Vec<&str> = ids.lines().collect();
    ids.chunks(100)
        .try_for_each(|some| side.run(["rm", "-f"].into_iter().chain(some.iter().copied()))?.ok().map(drop))
}

/// The same container by crun alone: what of our figure is the engine's.
pub(super) fn report_floor(_side: &Side, ours: f64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let root = folder.path().join("rootfs");
    std::fs::create_dir(&root)?;
    let archive = folder.path().join("layer.tar");
    std::fs::write(&archive, Layer::busybox()?.tar)?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&root).arg("-xf").arg(&archive);
    tests_harness::run(tar)?.ok()?;
    let crun = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("crun");
        command.args(arguments).current_dir(folder.path()).stdin(Stdio::null());
        Timed::new(command).run().context("crun is the floor: install Debian's crun")?.ok().map(drop)
    };
    if let Err(error) = crun(&["spec"]) {
        println!("{:<12} not measured: {error:#}", "floor");
        return Ok(());
    }
    let path = folder.path().join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    spec["process"]["args"] = serde_json::json!(["/bin/true"]);
    spec["process"]["terminal"] = false.into();
    std::fs::write(&path, spec.to_string())?;
    let name = format!("bench-{}", std::process::id());
    let mut rounds = Vec::new();
    for _ in 0..FLOOR_ROUNDS {
        rounds.push(milliseconds(|| crun(&["run", &name]))?);
    }
    let floor = median(rounds.into_iter());
    let kept = if ours <= 2.0 * floor { "kept" } else { "MISSED" };
    println!(
        "{:<12} {ours:>10.2} {floor:>10.2}  {:<10} {:>7.3}  promised <= 2 x crun alone: {kept}",
        "floor",
        "ms",
        ours / floor
    );
    Ok(())
}

//! Containers: run, exec, many at once, and lists of them.

use super::side::Side;
use crate::boot::median;
use anyhow::Result;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;
use tests_harness::{IMAGE, Layer, Timed};

/// Containers at once.
pub(super) const MANY: usize = 50;
/// Containers in the list.
pub(super) const LISTED: usize = 1000;
const FLOOR_ROUNDS: usize = 15;

pub(super) fn milliseconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

pub(super) fn run(side: &Side) -> Result<f64> {
    milliseconds(|| side.run(["run", "--rm", IMAGE, "true"])?.ok().map(drop))
}

/// The least that the client can be asked for.
pub(super) fn version(side: &Side) -> Result<f64> {
    milliseconds(|| side.run(["version", "--format", "x"])?.ok().map(drop))
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

/// The same without the client.
pub(super) fn exec_only(side: &Side) -> Result<f64> {
    let (mut api, other) = (side.api()?, side.api()?);
    milliseconds(|| api.exec(other, "sleeper"))
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

/// The same list, asked for and read but not shown.
pub(super) fn list_only(side: &Side) -> Result<f64> {
    let mut api = side.api()?;
    milliseconds(|| api.call("GET", "/containers/json?all=1", "").map(drop))
}

/// Removes all containers.
pub(super) fn clear(side: &Side) -> Result<()> {
    let ids = side.run(["ps", "-aq"])?.ok()?;
    let ids: Vec<&str> = ids.lines().collect();
    ids.chunks(100)
        .try_for_each(|some| side.run(["rm", "-f"].into_iter().chain(some.iter().copied()))?.ok().map(drop))
}

/// The same container by a runtime alone: what of our figure is the engine's. crun refuses to run on some mixtures of cgroup
/// versions; then runc is the floor.
pub(super) fn report_floor(ours: f64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let root = folder.path().join("rootfs");
    std::fs::create_dir(&root)?;
    let archive = folder.path().join("layer.tar");
    std::fs::write(&archive, Layer::busybox()?.tar)?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&root).arg("-xf").arg(&archive);
    tests_harness::run(tar)?.ok()?;
    for runtime in ["crun", "runc"] {
        match floor(runtime, folder.path()) {
            Ok(floor) => {
                let kept = if ours <= 2.0 * floor { "kept" } else { "MISSED" };
                println!(
                    "{:<12} {ours:>10.2} {floor:>10.2}  {:<10} {:>7.3}  promised <= 2 x {runtime} alone: {kept}",
                    "floor",
                    "ms",
                    ours / floor
                );
                return Ok(());
            }
            Err(error) => {
                let why = error.to_string();
                println!(
                    "{:<12} not by {runtime}: {}",
                    "floor",
                    why.trim_end().lines().last().unwrap_or_default()
                );
            }
        }
    }
    Ok(())
}

/// Milliseconds of one container by `runtime`, whose bundle lies in `folder`.
fn floor(runtime: &str, folder: &Path) -> Result<f64> {
    let call = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new(runtime);
        command.args(arguments).current_dir(folder).stdin(Stdio::null());
        Timed::new(command).run()?.ok().map(drop)
    };
    let path = folder.join("config.json");
    if path.exists() {
        std::fs::remove_file(&path)?;
    }
    call(&["spec"])?;
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    spec["process"]["args"] = serde_json::json!(["/bin/true"]);
    spec["process"]["terminal"] = false.into();
    std::fs::write(&path, spec.to_string())?;
    let name = format!("bench-{}", std::process::id());
    let rounds = (0..FLOOR_ROUNDS).map(|_| milliseconds(|| call(&["run", &name])));
    Ok(median(rounds.collect::<Result<Vec<_>>>()?.into_iter()))
}

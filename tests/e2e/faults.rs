//! The engine killed at each step of create, start, stop and remove: a restarted one has no orphan, and goes on.

use crate::Scenario;
use crate::docker::docker;
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use std::time::Duration;
use tests_harness::{Engine, IMAGE, wait_until};

const NAME: &str = "fault";

/// A fault point, and what leads to it. `true`: the container is to be running before.
const POINTS: [(&str, &[&str], bool); 14] = [
    ("create.after-snapshot", &["create", "--name", NAME, IMAGE, "sleep", "1000"], false),
    ("create.after-record", &["create", "--name", NAME, IMAGE, "sleep", "1000"], false),
    ("start.after-mount", &["run", "-d", "--name", NAME, IMAGE, "sleep", "1000"], false),
    ("start.after-files", &["run", "-d", "--name", NAME, IMAGE, "sleep", "1000"], false),
    ("start.after-shim", &["run", "-d", "--name", NAME, IMAGE, "sleep", "1000"], false),
    ("start.after-create", &["run", "-d", "--name", NAME, IMAGE, "sleep", "1000"], false),
    ("start.after-record", &["run", "-d", "--name", NAME, IMAGE, "sleep", "1000"], false),
    ("start.after-start", &["run", "-d", "--name", NAME, IMAGE, "sleep", "1000"], false),
    ("stop.after-signal", &["stop", "-t", "1", NAME], true),
    ("stop.after-shim", &["stop", "-t", "1", NAME], true),
    ("stop.after-teardown", &["stop", "-t", "1", NAME], true),
    ("remove.after-run", &["rm", "-f", NAME], true),
    ("remove.after-record", &["rm", "-f", NAME], true),
    ("remove.after-snapshot", &["rm", "-f", NAME], true),
];

/// Programs without debug assertions have no fault points: there is nothing to run then.
pub(crate) fn native_scenarios() -> Vec<Scenario> {
    if !cfg!(debug_assertions) {
        return Vec::new();
    }
    vec![Scenario { name: "faults::killed_at_any_step_nothing_is_orphaned", body: killed_at_any_step }]
}

fn killed_at_any_step(engine: &Engine) -> Result<()> {
    engine.remove_containers()?;
    for (point, command, running) in POINTS {
        at_point(engine, point, command, running).with_context(|| format!("killed at {point}"))?;
    }
    Ok(())
}

fn at_point(engine: &Engine, point: &str, command: &[&str], running: bool) -> Result<()> {
    if running {
        docker(engine, &["run", "-d", "--name", NAME, IMAGE, "sleep", "1000"])?.ok()?;
    }
    engine.end_native(true)?;
    engine.boot_with_fault(point)?;
    let outcome = docker(engine, command)?;
    engine.await_end().with_context(|| format!("{outcome:?}"))?;
    ensure!(outcome.code != 0, "`{}` succeeded although the engine was killed", command.join(" "));
    engine.boot()?;
    // Whatever became of it, it can be had and removed, and its name is free again.
    let names = docker(engine, &["ps", "-a", "--format", "{{.Names}}"])?.ok()?;
    if names.lines().any(|name| name == NAME) {
        docker(engine, &["start", NAME])?.ok()?;
        let state = docker(engine, &["inspect", "-f", "{{.State.Status}}", NAME])?.ok()?;
        ensure!(state == "running", "{state}");
        docker(engine, &["rm", "-f", NAME])?.ok()?;
    }
    expect_nothing(engine)?;
    docker(engine, &["run", "--rm", "--name", NAME, IMAGE, "true"])?.ok()?;
    expect_nothing(engine)
}

/// No process, mount, namespace or layer of any container is left.
fn expect_nothing(engine: &Engine) -> Result<()> {
    wait_until("nothing of the container is left", Duration::from_secs(10), || {
        Ok(match leavings(engine)?.as_slice() {
            [] => Some(()),
            _ => None,
        })
    })
    .with_context(|| format!("left: {:?}", leavings(engine)))
}

fn leavings(engine: &Engine) -> Result<Vec<String>> {
    let data = engine.path("data");
    let mut left = Vec::new();
    let shims = engine.processes().list().into_iter().filter(|process| process.name == "shim");
    left.extend(shims.map(|process| format!("shim {}", process.pid)));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let below = data.join("run/containers").display().to_string();
    left.extend(mounts.lines().filter(|line| line.contains(&below)).map(|line| format!("mount {line}")));
    for folder in ["run/containers", "run/netns", "containers"] {
        left.extend(names(&data.join(folder))?.into_iter().map(|name| format!("{folder}/{name}")));
    }
    Ok(left)
}

fn names(folder: &Path) -> Result<Vec<String>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => bail!("{}: {error}", folder.display()),
    }
}

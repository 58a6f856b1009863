//! Health checks, and what can be seen of a running container: top, stats, logs of every driver.

use crate::docker::docker;
use anyhow::{Result, ensure};
use tests_harness::{Engine, IMAGE, wait_until};

crate::scenarios![
    a_check_makes_a_container_healthy_and_unhealthy_again,
    a_check_can_be_switched_off,
    restarts_by_policy_are_counted,
    a_killed_container_has_ended_when_kill_returns,
    processes_are_listed_as_ps_does,
    usage_is_counted,
    logs_are_read_back_from_every_driver_that_keeps_them,
    stopped_containers_are_pruned_by_label,
];

fn inspect(engine: &Engine, format: &str, container: &str) -> Result<String> {
    docker(engine, &["inspect", "-f", format, container])?.ok()
}

fn until(engine: &Engine, format: &str, container: &str, wanted: &str) -> Result<()> {
    wait_until(&format!("{format} of {container} is {wanted}"), || {
        Ok((inspect(engine, format, container)? == wanted).then_some(()))
    })
}

fn a_check_makes_a_container_healthy_and_unhealthy_again(engine: &Engine) -> Result<()> {
    let check = ["--health-cmd", "cat /healthy", "--health-interval", "300ms", "--health-retries", "2"];
    let run = [&["run", "-d", "--name", "checked"][..], &check, &[IMAGE, "sleep", "1000"]].concat();
    docker(engine, &run)?.ok()?;
    until(engine, "{{.State.Health.Status}}", "checked", "unhealthy")?;
    docker(engine, &["exec", "checked", "sh", "-c", "echo fine > /healthy"])?.ok()?;
    until(engine, "{{.State.Health.Status}}", "checked", "healthy")?;
    let output = inspect(engine, "{{(index .State.Health.Log 0).Output}}", "checked")?;
    ensure!(output.contains("fine") || output.contains("can't open"), "{output}");
    let shown =
        docker(engine, &["ps", "--filter", "health=healthy", "--format", "{{.Names}} {{.Status}}"])?.ok()?;
    ensure!(shown.starts_with("checked Up") && shown.ends_with("(healthy)"), "{shown}");
    docker(engine, &["rm", "-f", "checked"])?.ok().map(drop)
}

fn a_check_can_be_switched_off(engine: &Engine) -> Result<()> {
    docker(engine, &["run", "-d", "--name", "unchecked", "--no-healthcheck", IMAGE, "sleep", "1000"])?
        .ok()?;
    let health = inspect(engine, "{{json .State.Health}}", "unchecked")?;
    ensure!(health == "null", "{health}");
    docker(engine, &["rm", "-f", "unchecked"])?.ok().map(drop)
}

fn restarts_by_policy_are_counted(engine: &Engine) -> Result<()> {
    docker(
        engine,
        &["run", "-d", "--name", "stubborn", "--restart", "on-failure:2", IMAGE, "sh", "-c", "exit 3"],
    )?
    .ok()?;
    until(engine, "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}", "stubborn", "2 exited 3")?;
    docker(engine, &["rm", "stubborn"])?.ok().map(drop)
}

fn a_killed_container_has_ended_when_kill_returns(engine: &Engine) -> Result<()> {
    docker(engine, &["run", "-d", "--name", "victim", "--restart", "always", IMAGE, "sleep", "1000"])?
        .ok()?;
    docker(engine, &["kill", "victim"])?.ok()?;
    let state = inspect(engine, "{{.State.Status}} {{.State.ExitCode}}", "victim")?;
    ensure!(state == "exited 137", "{state}");
    docker(engine, &["rm", "victim"])?.ok().map(drop)
}

fn processes_are_listed_as_ps_does(engine: &Engine) -> Result<()> {
    docker(engine, &["run", "-d", "--name", "busy", IMAGE, "sleep", "1000"])?.ok()?;
    let shown = docker(engine, &["top", "busy"])?.ok()?;
    let titles: Vec<&str> = shown.lines().next().unwrap_or_default().split_whitespace().collect();
    ensure!(titles == ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"], "{shown}");
    ensure!(shown.ends_with("sleep 1000"), "{shown}");
    let own = docker(engine, &["top", "busy", "-o", "pid,comm"])?.ok()?;
    ensure!(own.lines().count() == 2 && own.ends_with("sleep"), "{own}");
    docker(engine, &["top", "busy", "-o", "comm"])?.fails_with(1, "PID field")?;
    docker(engine, &["rm", "-f", "busy"])?.ok().map(drop)
}

fn usage_is_counted(engine: &Engine) -> Result<()> {
    docker(engine, &["run", "-d", "--name", "hungry", IMAGE, "sh", "-c", "while :; do :; done"])?.ok()?;
    let shown =
        docker(engine, &["stats", "--no-stream", "--format", "{{.Name}} {{.CPUPerc}} {{.PIDs}}", "hungry"])?
            .ok()?;
    let words: Vec<&str> = shown.split_whitespace().collect();
    let percent: f64 = words.get(1).unwrap_or(&"").trim_end_matches('%').parse()?;
    ensure!(words[0] == "hungry" && percent > 1.0 && words[2] != "0", "{shown}");
    docker(engine, &["rm", "-f", "hungry"])?.ok().map(drop)
}

fn logs_are_read_back_from_every_driver_that_keeps_them(engine: &Engine) -> Result<()> {
    let script = "for i in 1 2 3 4 5 6 7 8 9; do echo line $i; done";
    for (driver, options) in [
        (
            "json-file",
            &["--log-opt", "max-size=300", "--log-opt", "max-file=9", "--log-opt", "compress=true"][..],
        ),
        ("local", &[]),
    ] {
        let run =
            [&["run", "--name", "talks", "--log-driver", driver][..], options, &[IMAGE, "sh", "-c", script]];
        docker(engine, &run.concat())?.ok()?;
        let all = docker(engine, &["logs", "talks"])?.ok()?;
        ensure!(all.lines().count() == 9 && all.starts_with("line 1"), "{driver}: {all}");
        let last = docker(engine, &["logs", "--tail", "4", "talks"])?.ok()?;
        ensure!(last == "line 6\nline 7\nline 8\nline 9", "{driver}: {last}");
        docker(engine, &["rm", "talks"])?.ok()?;
    }
    docker(engine, &["run", "--name", "mute", "--log-driver", "none", IMAGE, "true"])?.ok()?;
    docker(engine, &["logs", "mute"])?.fails_with(1, "configured logging driver does not support reading")?;
    docker(engine, &["rm", "mute"])?.ok().map(drop)
}

fn stopped_containers_are_pruned_by_label(engine: &Engine) -> Result<()> {
    docker(engine, &["run", "--name", "old", "--label", "keep=no", IMAGE, "true"])?.ok()?;
    let spared = docker(engine, &["container", "prune", "-f", "--filter", "label=keep=yes"])?.ok()?;
    ensure!(!spared.contains("Deleted"), "{spared}");
    let pruned = docker(engine, &["container", "prune", "-f", "--filter", "label=keep=no"])?.ok()?;
    ensure!(pruned.contains("Deleted Containers"), "{pruned}");
    docker(engine, &["inspect", "old"])?.fails_with(1, "old").map(drop)
}

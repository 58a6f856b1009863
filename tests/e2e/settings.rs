//! What a container can be given, by the stock docker CLI: limits, devices, namespaces, confinement, an init.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tests_harness::{Engine, Finished, IMAGE, Stage, Timed, wait_until};

crate::scenarios![
    limits_hold_and_can_be_changed_while_it_runs,
    memory_beyond_a_limit_is_swapped_as_far_as_allowed,
    senseless_settings_are_refused_and_leave_nothing,
    devices_of_the_host_are_made_and_guarded,
    namespaces_of_another_container_are_joined,
    a_container_is_confined_as_asked,
    an_init_collects_orphans_and_passes_signals_on,
    an_init_that_shares_resources_out_is_entered,
    kernel_settings_are_the_containers_own,
    memory_file_systems_are_as_large_as_asked,
    inspect_shows_what_nobody_asked_for,
    a_kill_for_want_of_memory_is_an_event_while_it_runs,
];

fn docker(engine: &Engine, arguments: &[&str]) -> Result<Finished> {
    match engine.docker(arguments) {
        Some(command) => tests_harness::run(command),
        None => bail!(
            "there is no docker CLI on this computer: install one (`apt-get install docker.io` or newer) to run this check"
        ),
    }
}

/// What a shell in a container with these options says.
fn inside(engine: &Engine, options: &[&str], script: &str) -> Result<String> {
    let words = [&["run", "--rm"], options, &[IMAGE, "sh", "-c", script]].concat();
    docker(engine, &words)?.ok()
}

/// `docker run` with these words is refused, by the client or the engine, and says why.
fn refused(engine: &Engine, options: &[&str], code: i32, part: &str) -> Result<()> {
    let words = [&["run", "--rm"], options, &[IMAGE, "true"]].concat();
    docker(engine, &words)?.fails_with(code, part)
}

fn inspect(engine: &Engine, container: &str) -> Result<Value> {
    let text = docker(engine, &["inspect", container])?.ok()?;
    let list: Vec<Value> = serde_json::from_str(&text)?;
    list.into_iter().next().context("inspect shows nothing")
}

/// The first of these files of a container's cgroup that is there: the versions have names of their own.
fn limit(first: &str, second: &str) -> String {
    format!("cat /sys/fs/cgroup/{first} 2>/dev/null || cat /sys/fs/cgroup/{second}")
}

fn limits_hold_and_can_be_changed_while_it_runs(engine: &Engine) -> Result<()> {
    let memory = limit("memory/memory.limit_in_bytes", "memory.max");
    let pids = limit("pids/pids.max", "pids.max");
    let quota = limit("cpu/cpu.cfs_quota_us", "cpu.max");
    let all = format!("{memory}; {pids}; {quota}");
    let said =
        inside(engine, &["-m", "64m", "--pids-limit", "50", "--cpus", "0.5", "--cpuset-cpus", "0"], &all)?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines[..2] == ["67108864", "50"] && lines[2].starts_with("50000"), "{said}");

    docker(engine, &["run", "-d", "--name", "limited", "-m", "64m", IMAGE, "sleep", "1000"])?.ok()?;
    docker(engine, &["update", "-m", "96m", "--memory-swap", "128m", "--pids-limit", "40", "limited"])?
        .ok()?;
    let said = docker(engine, &["exec", "limited", "sh", "-c", &format!("{memory}; {pids}")])?.ok()?;
    ensure!(said == "100663296\n40", "{said}");
    docker(engine, &["update", "--restart", "unless-stopped", "limited"])?.ok()?;
    docker(engine, &["update", "-m", "512m", "limited"])?
        .fails_with(1, "update the memoryswap at the same time")?;
    docker(engine, &["update", "-m", "1m", "limited"])?
        .fails_with(1, "Minimum memory limit allowed is 6MB")?;
    docker(engine, &["update", "--cpuset-cpus", "4000", "limited"])?.fails_with(1, "not available")?;
    let shown = inspect(engine, "limited")?;
    let host = &shown["HostConfig"];
    ensure!(
        host["Memory"] == 96 << 20 && host["MemorySwap"] == 128 << 20 && host["PidsLimit"] == 40,
        "{host}"
    );
    ensure!(host["RestartPolicy"]["Name"] == "unless-stopped", "{host}");
    docker(engine, &["rm", "-f", "limited"])?.ok().map(drop)
}

fn memory_beyond_a_limit_is_swapped_as_far_as_allowed(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        // It would be this computer's swap, of which tests know nothing.
        return Ok(());
    }
    let said = docker(engine, &["info", "--format", "{{.SwapLimit}}"])?.ok()?;
    ensure!(said == "true", "SwapLimit: {said}");
    let swap = |options: &[&str]| inside(engine, options, "cat /sys/fs/cgroup/memory.swap.max");
    for (options, expected) in [
        (&["-m", "64m"][..], "67108864"),
        (&["-m", "64m", "--memory-swap", "64m"], "0"),
        (&["-m", "64m", "--memory-swap", "-1"], "max"),
    ] {
        let said = swap(options)?;
        ensure!(said == expected, "{options:?}: {said}");
    }
    // One buffer, filled once and emptied once.
    let held = "dd if=/dev/zero bs=64M count=1 2>/dev/null | wc -c";
    let said = inside(engine, &["-m", "32m", "--memory-swap", "256m"], held)?;
    ensure!(said == "67108864", "{said}");
    Ok(())
}

fn senseless_settings_are_refused_and_leave_nothing(engine: &Engine) -> Result<()> {
    let before = docker(engine, &["ps", "-aq"])?.ok()?;
    for (options, code, part) in [
        (&["-m", "1m"][..], 125, "Minimum memory limit allowed is 6MB"),
        (&["--cpus", "4000"], 125, "range of CPUs is from 0.01 to"),
        (&["--cpu-period", "5"], 125, "CPU cfs period can not be less than 1ms"),
        (&["--oom-score-adj", "5000"], 125, "range for oom score adj is [-1000, 1000]"),
        (&["--ipc", "container:nobody"], 125, "No such container: nobody"),
        (&["--runtime", "nothing"], 125, "unknown or invalid runtime name: nothing"),
        (&["--security-opt", "fly=high"], 125, "invalid --security-opt 2: \"fly=high\""),
        (&["--cap-add", "FLY"], 125, "unknown capability: \"CAP_FLY\""),
        (&["--storage-opt", "size=1g"], 125, "'pquota' mount option"),
        (&["--device", "/dev/nothing"], 127, "error gathering device information while adding custom device"),
        (&["--tmpfs", "/x:fly"], 125, "invalid tmpfs option [\"fly\"]"),
        (&["--platform", "linux/s390x", "--pull", "never"], 125, "does not match the specified platform"),
    ] {
        refused(engine, options, code, part).with_context(|| options.join(" "))?;
    }
    let after = docker(engine, &["ps", "-aq"])?.ok()?;
    ensure!(before == after, "a refused container is left: {after}");
    Ok(())
}

fn devices_of_the_host_are_made_and_guarded(engine: &Engine) -> Result<()> {
    let said = inside(
        engine,
        &["--device", "/dev/zero:/dev/nought:r", "--device", "/dev/null:/srv/nothing"],
        "head -c 3 /dev/nought | wc -c; echo x > /srv/nothing && echo written",
    )?;
    ensure!(said == "3\nwritten", "{said}");
    // 1:1 is /dev/mem: making the node is allowed, opening it is not, unless a rule says so.
    let open = "mknod /dev/m c 1 1 && { head -c 0 < /dev/m && echo opened || echo refused; }";
    let said = inside(engine, &[], open)?;
    ensure!(said == "refused", "{said}");
    let said = inside(
        engine,
        &["--device-cgroup-rule", "c 1:11 rwm"],
        "mknod /dev/k c 1 11 && head -c 0 < /dev/k; true",
    )?;
    ensure!(said.is_empty(), "{said}");
    Ok(())
}

fn namespaces_of_another_container_are_joined(engine: &Engine) -> Result<()> {
    let script = "echo shared > /dev/shm/note; exec sleep 1000";
    docker(engine, &["run", "-d", "--name", "donor", "--ipc", "shareable", IMAGE, "sh", "-c", script])?
        .ok()?;
    wait_until("the donor has written", || {
        Ok(docker(engine, &["exec", "donor", "cat", "/dev/shm/note"])?
            .stdout
            .contains("shared")
            .then_some(()))
    })?;
    let joined = &["--pid", "container:donor", "--ipc", "container:donor"];
    let said = inside(engine, joined, "cat /dev/shm/note; cat /proc/1/comm")?;
    ensure!(said == "shared\nsleep", "{said}");
    docker(engine, &["run", "-d", "--name", "alone", IMAGE, "sleep", "1000"])?.ok()?;
    refused(engine, &["--ipc", "container:alone"], 125, "non-shareable IPC")?;
    docker(engine, &["stop", "-t", "0", "alone"])?.ok()?;
    refused(engine, &["--pid", "container:alone"], 125, "is not running")?;
    docker(engine, &["rm", "-f", "donor", "alone"])?.ok()?;
    let said = inside(
        engine,
        &["--hostname", "web", "--domainname", "example.org"],
        "hostname; cat /proc/sys/kernel/domainname",
    )?;
    ensure!(said == "web\nexample.org", "{said}");
    Ok(())
}

fn a_container_is_confined_as_asked(engine: &Engine) -> Result<()> {
    let profile = engine.path("profile.json");
    let rule = r#"{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13, "args": null}"#;
    std::fs::write(&profile, format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{rule}]}}"#))?;
    let option = format!("seccomp={}", profile.display());
    let said =
        inside(engine, &["--security-opt", &option], "mkdir /x 2>/dev/null && echo made || echo refused")?;
    ensure!(said == "refused", "{said}");
    let said = inside(engine, &["--security-opt", "seccomp=unconfined"], "grep Seccomp: /proc/self/status")?;
    ensure!(said.ends_with('0'), "{said}");
    let said = inside(engine, &["--security-opt", "no-new-privileges"], "grep NoNewPrivs /proc/self/status")?;
    ensure!(said.ends_with('1'), "{said}");
    let said =
        inside(engine, &["--security-opt", "systempaths=unconfined"], "mount | grep -c ' /proc/' || true")?;
    ensure!(said == "0", "{said}");
    let said =
        inside(engine, &["--cap-drop", "ALL", "--cap-add", "CAP_NET_RAW"], "grep CapEff /proc/self/status")?;
    ensure!(said.ends_with("0000000000002000"), "{said}");
    let said = inside(engine, &["-u", "12:13", "--group-add", "99"], "id -u; id -g; id -G")?;
    ensure!(said == "12\n13\n13 99", "{said}");
    let said = inside(engine, &["--ulimit", "nofile=500:600"], "ulimit -n; ulimit -Hn")?;
    ensure!(said == "500\n600", "{said}");
    let said = inside(engine, &["--oom-score-adj", "500"], "cat /proc/self/oom_score_adj")?;
    ensure!(said == "500", "{said}");
    Ok(())
}

fn an_init_collects_orphans_and_passes_signals_on(engine: &Engine) -> Result<()> {
    docker(engine, &["run", "--rm", "--init", IMAGE, "sh", "-c", "exit 7"])?.exits(7)?;
    let Some(command) = engine.docker(["run", "-i", "--rm", "--init", IMAGE, "cat"]) else {
        bail!("no docker CLI")
    };
    let said = Timed::new(command).input("hi\n").run()?.ok()?;
    ensure!(said == "hi", "{said}");
    // The inner shell's child outlives it and ends as an orphan of the first process.
    let script = "sh -c 'sleep 0.2 &'; sleep 1; cat /proc/1/comm; grep -l '^State.*zombie' /proc/[0-9]*/status | wc -l";
    let said = inside(engine, &["--init"], script)?;
    ensure!(said == "docker-init\n0", "{said}");
    let script = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    docker(engine, &["run", "-d", "--name", "waiting", "--init", IMAGE, "sh", "-c", script])?.ok()?;
    wait_until("the program has set its trap", || {
        Ok(docker(engine, &["logs", "waiting"])?.stdout.contains("ready").then_some(()))
    })?;
    docker(engine, &["stop", "-t", "60", "waiting"])?.ok()?;
    let said = docker(engine, &["logs", "waiting"])?.ok()?;
    ensure!(said.contains("told"), "{said}");
    let shown = inspect(engine, "waiting")?;
    ensure!(shown["State"]["ExitCode"] == 3 && shown["HostConfig"]["Init"] == true, "{shown}");
    docker(engine, &["rm", "waiting"])?.ok().map(drop)
}

/// systemd leaves the container's group and hands its resources on to groups of its services; with version 2 no process may
/// be in the group itself from then on.
fn an_init_that_shares_resources_out_is_entered(engine: &Engine) -> Result<()> {
    let script = "cd /sys/fs/cgroup; [ -e cgroup.controllers ] || cd memory; mkdir init.scope a.service; \
                  echo 1 > init.scope/cgroup.procs; \
                  [ ! -e cgroup.controllers ] || echo '+memory +pids' > cgroup.subtree_control; echo ready; exec sleep 1000";
    docker(engine, &["run", "-d", "--name", "system", "--privileged", IMAGE, "sh", "-c", script])?.ok()?;
    wait_until("the init has shared out", || {
        Ok(docker(engine, &["logs", "system"])?.stdout.contains("ready").then_some(()))
    })?;
    let script = "grep -c '^0::/init.scope$' /proc/self/cgroup; [ -e /sys/fs/cgroup/cgroup.controllers ] && echo 2 || echo 1";
    let said = docker(engine, &["exec", "system", "sh", "-c", script])?.stdout;
    ensure!(["1\n2", "0\n1"].contains(&said.trim()), "{said}");
    docker(engine, &["update", "--memory", "64m", "--memory-swap", "64m", "system"])?.ok()?;
    let used =
        docker(engine, &["stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}}", "system"])?.ok()?;
    ensure!(used.ends_with("/ 64MiB 1"), "{used}");
    docker(engine, &["rm", "-f", "system"])?.ok().map(drop)
}

fn kernel_settings_are_the_containers_own(engine: &Engine) -> Result<()> {
    let said = inside(
        engine,
        &["--sysctl", "net.core.somaxconn=77", "--sysctl", "kernel.msgmax=9999"],
        "cat /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_unprivileged_port_start",
    )?;
    ensure!(said == "77\n9999\n0", "{said}");
    Ok(())
}

fn memory_file_systems_are_as_large_as_asked(engine: &Engine) -> Result<()> {
    let said = inside(
        engine,
        &["--tmpfs", "/srv:size=1m,exec", "--shm-size", "2m"],
        "mount | grep -E ' (/srv|/dev/shm) ' | sort",
    )?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines.len() == 2 && lines[0].contains("size=2048k") && lines[1].contains("size=1024k"), "{said}");
    ensure!(!lines[1].contains("noexec") && lines[1].contains("nosuid"), "{said}");
    let said = inside(engine, &["--read-only"], "touch /x 2>/dev/null && echo written || echo refused")?;
    ensure!(said == "refused", "{said}");
    Ok(())
}

fn inspect_shows_what_nobody_asked_for(engine: &Engine) -> Result<()> {
    let id = docker(engine, &["create", IMAGE])?.ok()?;
    let shown = inspect(engine, &id)?;
    let host = &shown["HostConfig"];
    for (name, expected) in [
        ("IpcMode", Value::from("private")),
        ("Runtime", "runc".into()),
        ("ShmSize", (64 << 20).into()),
        ("MemorySwappiness", Value::Null),
        ("OomKillDisable", false.into()),
        ("PidsLimit", Value::Null),
        ("Isolation", "".into()),
        ("SecurityOpt", Value::Null),
        ("ConsoleSize", vec![0, 0].into()),
    ] {
        ensure!(host[name] == expected, "{name}: {}", host[name]);
    }
    ensure!(host["MaskedPaths"].as_array().is_some_and(|paths| paths.len() > 5), "{host}");
    for absent in ["Init", "Sysctls", "Tmpfs", "StorageOpt"] {
        ensure!(host.get(absent).is_none(), "{absent} is there");
    }
    docker(engine, &["rm", &id])?.ok()?;
    let id = docker(engine, &["create", "--privileged", IMAGE])?.ok()?;
    let shown = inspect(engine, &id)?;
    ensure!(shown["HostConfig"]["SecurityOpt"] == Value::from(vec!["label=disable"]), "{shown}");
    ensure!(shown["HostConfig"]["MaskedPaths"].is_null(), "{shown}");
    docker(engine, &["rm", &id])?.ok().map(drop)
}

fn a_kill_for_want_of_memory_is_an_event_while_it_runs(engine: &Engine) -> Result<()> {
    let since = docker(engine, &["info", "-f", "{{.SystemTime}}"])?.ok()?;
    let limits = ["-m", "24m", "--memory-swap", "24m"];
    let script = "tail /dev/zero; exec sleep 1000";
    docker(
        engine,
        &[&["run", "-d", "--name", "hungry"], &limits[..], &[IMAGE, "sh", "-c", script]].concat(),
    )?
    .ok()?;
    wait_until("the kernel has killed", || {
        let comm = docker(engine, &["exec", "hungry", "cat", "/proc/1/comm"])?;
        Ok(comm.stdout.contains("sleep").then_some(()))
    })?;
    let until = docker(engine, &["info", "-f", "{{.SystemTime}}"])?.ok()?;
    let words = [
        "events",
        "--since",
        &since,
        "--until",
        &until,
        "--filter",
        "event=oom",
        "--filter",
        "container=hungry",
        "--format",
        "{{.Action}}",
    ];
    let said = docker(engine, &words)?.ok()?;
    ensure!(said.lines().next() == Some("oom"), "{said:?}");
    let shown = inspect(engine, "hungry")?;
    ensure!(shown["State"]["Running"] == true, "{shown}");
    docker(engine, &["rm", "-f", "hungry"])?.ok().map(drop)
}

//! `engine run` and the life of one container.

use anyhow::{Result, bail, ensure};
use tests_harness::{Engine, IMAGE, Timed, wait_until};

crate::scenarios![
    the_bundled_image_greets,
    the_exit_code_is_the_containers,
    a_missing_program_is_127_and_a_directory_126,
    environment_user_and_directory_are_as_asked,
    a_terminal_session_knows_its_size_and_follows_it,
    a_detached_container_logs_and_stops,
    logs_can_be_cut_and_stamped,
    a_name_is_unique_and_free_after_rm,
    rm_on_exit_leaves_nothing,
    kill_and_restart,
    signals_reach_the_container,
    capabilities_and_filters_are_dockers,
    a_read_only_root_and_a_memory_limit_hold,
];

fn the_bundled_image_greets(engine: &Engine) -> Result<()> {
    let said = engine.engine(["run", "--rm", "hello"])?.ok()?;
    ensure!(said.to_lowercase().contains("hello"), "{said}");
    Ok(())
}

fn the_exit_code_is_the_containers(engine: &Engine) -> Result<()> {
    engine.engine(["run", "--rm", IMAGE, "sh", "-c", "exit 7"])?.exits(7)?;
    let out = engine.engine(["run", "--rm", IMAGE, "sh", "-c", "echo out; echo err >&2"])?;
    ensure!((out.stdout.as_str(), out.stderr.as_str()) == ("out\n", "err\n"), "{out:?}");
    Ok(())
}

fn a_missing_program_is_127_and_a_directory_126(engine: &Engine) -> Result<()> {
    let before = engine.engine(["ps", "-aq"])?.ok()?;
    engine
        .engine(["run", "--rm", IMAGE, "nowhere"])?
        .fails_with(127, "executable file not found in $PATH")?;
    engine.engine(["run", "--rm", IMAGE, "/etc"])?.fails_with(126, "")?;
    engine.engine(["run", "--rm", IMAGE, "/etc/passwd"])?.fails_with(126, "permission denied")?;
    let after = engine.engine(["ps", "-aq"])?.ok()?;
    ensure!(after == before, "a container that could not start is left: {after}");
    Ok(())
}

fn environment_user_and_directory_are_as_asked(engine: &Engine) -> Result<()> {
    let mut command =
        engine.command(["run", "--rm", "-e", "A=1", "-e", "FROM_HERE", "-u", "app", "-w", "/tmp"]);
    command.env("FROM_HERE", "yes").args([
        IMAGE,
        "sh",
        "-c",
        "echo $A $FROM_HERE $(id -u):$(id -g) $(id -G) $PWD $HOME",
    ]);
    let said = Timed::new(command).run()?.ok()?;
    ensure!(said == "1 yes 1000:1000 1000 2000 /tmp /home", "{said}");
    let said = engine
        .engine(["run", "--rm", "--hostname", "web", IMAGE, "sh", "-c", "hostname; cat /etc/hostname"])?
        .ok()?;
    ensure!(said == "web\nweb", "{said}");
    // A folder that is not there is made.
    let said = engine.engine(["run", "--rm", "-w", "/srv/new", IMAGE, "pwd"])?.ok()?;
    ensure!(said == "/srv/new", "{said}");
    Ok(())
}

/// `script` (util-linux) plays the terminal; `stty` on the same terminal changes its size.
fn a_terminal_session_knows_its_size_and_follows_it(engine: &Engine) -> Result<()> {
    let inside = "stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.1; done";
    let terminal = engine.path("terminal");
    let run = format!(
        "tty > {}; stty rows 40 cols 100; exec {} run --rm -it {IMAGE} sh -c \"{}\"",
        terminal.display(),
        engine.program("engine").display(),
        inside.replace('$', "\\$"),
    );
    let mut command = std::process::Command::new("script");
    engine.environment(&mut command);
    command.args(["-q", "-e", "-c", &run]);
    let log = engine.path("typescript");
    let _ = std::fs::remove_file(&log);
    command.args(["--flush", "--log-out"]).arg(&log);
    // `script` wants an input that stays open.
    let (input, _keep) = std::io::pipe()?;
    let mut child = command
        .stdin(input)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let said = |part: &str| -> Result<Option<()>> {
        Ok(std::fs::read_to_string(&log).unwrap_or_default().contains(part).then_some(()))
    };
    let result = wait_until("the container has the terminal's size", || said("40 100"))
        .and_then(|()| wait_until("the container is ready", || said("ready\r")))
        .and_then(|()| {
            let device = std::fs::read_to_string(&terminal)?;
            let mut resize = std::process::Command::new("stty");
            // One number only: stty sets rows and columns one after the other, and the container leaves at the first change.
            resize.args(["-F", device.trim(), "cols", "111"]);
            tests_harness::run(resize)?.ok()?;
            wait_until("the container follows the new size", || said("40 111"))
        })
        .and_then(|()| wait_until("the session ends", || Ok(child.try_wait()?)));
    let _ = child.kill();
    let status = child.wait()?;
    result.map_err(|error| error.context(std::fs::read_to_string(&log).unwrap_or_default()))?;
    ensure!(status.code() == Some(3), "the session ended with {status}");
    Ok(())
}

fn a_detached_container_logs_and_stops(engine: &Engine) -> Result<()> {
    let script = "trap 'echo bye; exit 0' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.1; done";
    let id = engine.engine(["run", "-d", "--name", "talker", IMAGE, "sh", "-c", script])?.ok()?;
    ensure!(id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "`{id}` is no id");
    let following = engine.spawn(["logs", "-f", "talker"])?;
    wait_until("the log grows", || {
        Ok(engine.engine(["logs", "talker"])?.ok()?.contains("line 5").then_some(()))
    })?;
    let listed = engine.engine(["ps", "--format", "{{.Names}} {{.State}}"])?.ok()?;
    ensure!(listed.contains("talker running"), "{listed}");
    engine.engine(["stop", "talker"])?.ok()?;
    let followed = following.finish()?.ok()?;
    ensure!(followed.starts_with("line 1\n") && followed.ends_with("bye"), "{followed}");
    let state = engine.engine(["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "talker"])?.ok()?;
    ensure!(state == "exited 0", "{state}");
    engine.engine(["rm", "talker"])?.ok().map(drop)
}

fn logs_can_be_cut_and_stamped(engine: &Engine) -> Result<()> {
    engine.engine(["run", "--name", "counted", IMAGE, "seq", "1", "100"])?.ok()?;
    let tail = engine.engine(["logs", "--tail", "2", "counted"])?.ok()?;
    ensure!(tail == "99\n100", "{tail}");
    let stamped = engine.engine(["logs", "-t", "-n", "1", "counted"])?.ok()?;
    let (moment, text) = stamped.split_once(' ').unwrap_or_default();
    ensure!(
        text == "100" && moment.len() == "2026-01-02T03:04:05.123456789Z".len() && moment.ends_with('Z'),
        "{stamped}"
    );
    let all = engine.engine(["logs", "--since", "1h", "counted"])?.ok()?;
    ensure!(all.lines().count() == 100, "{all}");
    let none = engine.engine(["logs", "--until", "1h", "counted"])?.ok()?;
    ensure!(none.is_empty(), "{none}");
    engine.engine(["rm", "counted"])?.ok().map(drop)
}

fn a_name_is_unique_and_free_after_rm(engine: &Engine) -> Result<()> {
    engine.engine(["run", "--name", "one", IMAGE, "true"])?.ok()?;
    let again = engine.engine(["run", "--name", "one", IMAGE, "true"])?;
    again.fails_with(125, "Conflict. The container name \"/one\" is already in use by container")?;
    engine.engine(["rm", "one"])?.ok()?;
    engine.engine(["run", "--rm", "--name", "one", IMAGE, "true"])?.ok()?;
    let named = engine.engine(["run", "-d", IMAGE, "true"])?.ok()?;
    let name = engine.engine(["inspect", "-f", "{{.Name}}", &named])?.ok()?;
    ensure!(name.starts_with('/') && name.contains('_'), "{name}");
    engine.engine(["rm", "-f", &named])?.ok().map(drop)
}

fn rm_on_exit_leaves_nothing(engine: &Engine) -> Result<()> {
    let id = engine.engine(["run", "-d", "--rm", IMAGE, "sleep", "0.3"])?.ok()?;
    wait_until("the container is gone", || {
        Ok((!engine.engine(["ps", "-aq", "--no-trunc"])?.ok()?.contains(&id)).then_some(()))
    })?;
    engine.engine(["inspect", &id])?.fails_with(1, "No such object")
}

fn kill_and_restart(engine: &Engine) -> Result<()> {
    engine.engine(["run", "-d", "--name", "sleeper", IMAGE, "sleep", "1000"])?.ok()?;
    engine.engine(["rm", "sleeper"])?.fails_with(1, "container is running")?;
    engine.engine(["kill", "sleeper"])?.ok()?;
    let code = engine.engine(["wait", "sleeper"])?.ok()?;
    ensure!(code == "137", "{code}");
    engine.engine(["kill", "sleeper"])?.fails_with(1, "is not running")?;
    engine.engine(["start", "sleeper"])?.ok()?;
    let state = engine.engine(["inspect", "-f", "{{.State.Running}}", "sleeper"])?.ok()?;
    ensure!(state == "true", "{state}");
    engine.engine(["restart", "-t", "1", "sleeper"])?.ok()?;
    engine.engine(["stop", "-t", "1", "sleeper"])?.ok()?;
    let state = engine.engine(["inspect", "-f", "{{.State.ExitCode}}", "sleeper"])?.ok()?;
    ensure!(state == "137", "PID 1 ignores SIGTERM: {state}");
    engine.engine(["rm", "-f", "sleeper"])?.ok().map(drop)
}

fn signals_reach_the_container(engine: &Engine) -> Result<()> {
    let script = "trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let running = engine.spawn(["run", "--rm", "--name", "trapper", IMAGE, "sh", "-c", script])?;
    wait_until("the container is ready", || {
        let logs = engine.engine(["logs", "trapper"])?;
        Ok((logs.code == 0 && logs.stdout.contains("ready")).then_some(()))
    })?;
    let Some(pid) = rustix::process::Pid::from_raw(running.id().cast_signed()) else { bail!("no process") };
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    let said = running.finish()?.exits(5)?;
    ensure!(said.ends_with("got it"), "{said}");
    Ok(())
}

fn capabilities_and_filters_are_dockers(engine: &Engine) -> Result<()> {
    let status = engine
        .engine(["run", "--rm", IMAGE, "grep", "-E", "^(CapEff|Seccomp|NoNewPrivs):", "/proc/self/status"])?
        .ok()?;
    let lines: Vec<&str> = status.lines().collect();
    // The fourteen capabilities of Docker's default, and a seccomp filter.
    ensure!(lines.contains(&"CapEff:\t00000000a80425fb"), "{status}");
    ensure!(lines.contains(&"Seccomp:\t2"), "{status}");
    engine.engine(["run", "--rm", IMAGE, "mount", "-t", "tmpfs", "none", "/tmp"])?.fails_with(1, "")?;
    // Masked and read-only paths.
    let said = engine
        .engine([
            "run",
            "--rm",
            IMAGE,
            "sh",
            "-c",
            "cat /proc/kcore | head -c 1 | wc -c 2>/dev/null; touch /proc/sys/x 2>&1 || true",
        ])?
        .ok()?;
    ensure!(said.contains("Read-only file system") || said.contains("No such file"), "{said}");
    // A device node that the device filter does not allow: made, but not opened.
    let said = engine.engine([
        "run",
        "--rm",
        IMAGE,
        "sh",
        "-c",
        "mknod /tmp/disk b 7 0 2>/dev/null; head -c 1 /tmp/disk",
    ])?;
    said.fails_with(1, "")?;
    Ok(())
}

fn a_read_only_root_and_a_memory_limit_hold(engine: &Engine) -> Result<()> {
    engine
        .engine(["run", "--rm", "--read-only", IMAGE, "touch", "/x"])?
        .fails_with(1, "Read-only file system")?;
    engine
        .engine(["run", "--rm", "--read-only", "--tmpfs", "/scratch", IMAGE, "touch", "/scratch/x"])?
        .ok()?;
    let hungry = engine.engine([
        "run",
        "--rm",
        "-m",
        "32m",
        IMAGE,
        "sh",
        "-c",
        "head -c 200000000 /dev/zero | tail -c 150000000 | wc -c",
    ])?;
    ensure!(!hungry.stdout.contains("150000000"), "150 MB were held in 32 MB: {hungry:?}");
    Ok(())
}

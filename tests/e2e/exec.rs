//! `engine exec`.

use anyhow::{Result, ensure};
use tests_harness::{Engine, IMAGE};

crate::scenarios![commands_run_in_a_running_container, exec_needs_a_running_container];

fn commands_run_in_a_running_container(engine: &Engine) -> Result<()> {
    engine.engine(["run", "-d", "--name", "host", "-e", "A=1", IMAGE, "sleep", "1000"])?.ok()?;
    let said = engine
        .engine([
            "exec",
            "-e",
            "B=2",
            "-w",
            "/tmp",
            "-u",
            "app",
            "host",
            "sh",
            "-c",
            "echo $A $B $PWD $(id -un)",
        ])?
        .ok()?;
    ensure!(said == "1 2 /tmp app", "{said}");
    engine.engine(["exec", "host", "sh", "-c", "exit 9"])?.exits(9)?;
    // As with dockerd the reason comes through the stream that was already handed over.
    let missing = engine.engine(["exec", "host", "nowhere"])?.exits(127)?;
    ensure!(missing.contains("exec: \"nowhere\": executable file not found in $PATH"), "{missing}");
    // A user that nobody knows is refused before anything runs.
    engine
        .engine(["exec", "-u", "nobody-here", "host", "true"])?
        .fails_with(1, "unable to find user nobody-here")?;
    let said = engine.engine_with_input(["exec", "-i", "host", "sh", "-c", "cat; echo end"], "in\n")?.ok()?;
    ensure!(said == "in\nend", "{said}");
    // The same namespaces and cgroup: it sees PID 1, and cannot do more than the container.
    let said = engine
        .engine([
            "exec",
            "host",
            "sh",
            "-c",
            "cat /proc/1/cmdline | tr '\\0' ' '; grep CapEff /proc/self/status",
        ])?
        .ok()?;
    ensure!(said == "sleep 1000 CapEff:\t00000000a80425fb", "{said}");
    engine.engine(["exec", "-d", "host", "touch", "/made"])?.ok()?;
    tests_harness::wait_until("the detached command has run", || {
        Ok((engine.engine(["exec", "host", "test", "-e", "/made"])?.code == 0).then_some(()))
    })?;
    in_a_terminal(engine)?;
    engine.engine(["rm", "-f", "host"])?.ok().map(drop)
}

fn in_a_terminal(engine: &Engine) -> Result<()> {
    let run =
        format!("exec {} exec -it host sh -c 'tty; echo $((40 + 2))'", engine.program("engine").display());
    let mut command = std::process::Command::new("script");
    engine.environment(&mut command);
    command.args(["-q", "-e", "-c", &run, "/dev/null"]);
    let said = tests_harness::run(command)?.ok()?;
    ensure!(said.contains("/dev/pts/0") && said.contains("42"), "{said}");
    Ok(())
}

fn exec_needs_a_running_container(engine: &Engine) -> Result<()> {
    engine.engine(["run", "--name", "ended", IMAGE, "true"])?.ok()?;
    engine.engine(["exec", "ended", "true"])?.fails_with(1, "is not running")?;
    engine.engine(["exec", "nobody", "true"])?.fails_with(1, "No such container: nobody")?;
    engine.engine(["rm", "ended"])?.ok().map(drop)
}

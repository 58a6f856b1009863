//! The stock docker CLI on the same socket.

use anyhow::{Result, bail, ensure};
use tests_harness::{Engine, Finished, IMAGE, Timed, wait_until};

crate::scenarios![
    the_stock_client_runs_containers,
    the_stock_client_holds_a_terminal_session,
    the_stock_client_follows_logs_and_stops,
    the_stock_client_works_on_images,
    the_stock_client_sees_events_and_versions,
    our_lists_read_like_the_stock_clients,
    our_attach_and_stats_read_like_the_stock_clients,
];

pub(crate) fn docker(engine: &Engine, arguments: &[&str]) -> Result<Finished> {
    match engine.docker(arguments) {
        Some(command) => tests_harness::run(command),
        None => bail!(
            "there is no docker CLI on this computer: install one (`apt-get install docker.io` or newer) to run this check"
        ),
    }
}

fn the_stock_client_runs_containers(engine: &Engine) -> Result<()> {
    docker(engine, &["run", "--rm", IMAGE, "sh", "-c", "exit 7"])?.exits(7)?;
    docker(engine, &["run", "--rm", IMAGE, "nowhere"])?
        .fails_with(127, "executable file not found in $PATH")?;
    let Some(command) = engine.docker(["run", "-i", "--rm", IMAGE, "cat"]) else { bail!("no docker CLI") };
    let said = Timed::new(command).input("hi\n").run()?.ok()?;
    ensure!(said == "hi", "{said}");
    let said = docker(engine, &["run", "--rm", "hello"])?.ok()?;
    ensure!(said.to_lowercase().contains("hello"), "{said}");
    let id = docker(engine, &["create", IMAGE, "true"])?.ok()?;
    let said = docker(engine, &["start", "-a", &id])?;
    ensure!(said.code == 0, "{said:?}");
    docker(engine, &["rm", &id])?.ok().map(drop)
}

fn the_stock_client_holds_a_terminal_session(engine: &Engine) -> Result<()> {
    let run =
        format!("stty rows 41 cols 101; exec docker run --rm -it {IMAGE} sh -c 'sleep 1; stty size; exit 4'");
    let mut command = std::process::Command::new("script");
    engine.environment(&mut command);
    command.args(["-q", "-e", "-c", &run, "/dev/null"]);
    let said = tests_harness::run(command)?.exits(4)?;
    ensure!(said.contains("41 101"), "{said}");
    Ok(())
}

fn the_stock_client_follows_logs_and_stops(engine: &Engine) -> Result<()> {
    let script = "trap 'echo bye; exit 0' TERM; echo started; while :; do sleep 0.1; done";
    docker(engine, &["run", "-d", "--name", "web", IMAGE, "sh", "-c", script])?.ok()?;
    let Some(command) = engine.docker(["logs", "-f", "web"]) else { bail!("no docker CLI") };
    let following = Timed::new(command).spawn()?;
    wait_until("the container has started", || {
        Ok(docker(engine, &["logs", "web"])?.stdout.contains("started").then_some(()))
    })?;
    let said = docker(engine, &["exec", "web", "cat", "/proc/1/comm"])?.ok()?;
    ensure!(said == "sh", "{said}");
    let listed = docker(engine, &["ps"])?.ok()?;
    ensure!(listed.contains("web") && listed.contains("Up "), "{listed}");
    docker(engine, &["stop", "web"])?.ok()?;
    let followed = following.finish()?.ok()?;
    ensure!(followed == "started\nbye", "{followed}");
    let code = docker(engine, &["inspect", "-f", "{{.State.ExitCode}}", "web"])?.ok()?;
    ensure!(code == "0", "{code}");
    docker(engine, &["rm", "web"])?.ok().map(drop)
}

fn the_stock_client_works_on_images(engine: &Engine) -> Result<()> {
    let listed = docker(engine, &["images"])?.ok()?;
    ensure!(listed.contains("busybox") && listed.contains("test"), "{listed}");
    docker(engine, &["tag", IMAGE, "docker:tagged"])?.ok()?;
    let history = docker(engine, &["history", "docker:tagged"])?.ok()?;
    ensure!(history.lines().count() == 2, "{history}");
    docker(engine, &["rmi", "docker:tagged"])?.ok()?;
    let missing = docker(engine, &["image", "inspect", "docker:tagged"])?;
    ensure!(missing.code == 1 && missing.stderr.contains("No such image"), "{missing:?}");
    Ok(())
}

fn the_stock_client_sees_events_and_versions(engine: &Engine) -> Result<()> {
    let version = docker(engine, &["version", "--format", "{{.Server.APIVersion}}"])?.ok()?;
    ensure!(version.starts_with("1."), "{version}");
    let driver = docker(engine, &["info", "--format", "{{.OSType}} {{.Driver}}"])?.ok()?;
    ensure!(driver.starts_with("linux "), "{driver}");
    docker(engine, &["run", "--rm", "--name", "eventful", IMAGE, "true"])?.ok()?;
    let now = engine_now(engine)?;
    let events = docker(
        engine,
        &[
            "events",
            "--since",
            "10m",
            "--until",
            &now,
            "--filter",
            "container=eventful",
            "--format",
            "{{.Action}}",
        ],
    )?
    .ok()?;
    let actions: Vec<&str> = events.lines().collect();
    for action in ["create", "attach", "start", "die", "destroy"] {
        ensure!(actions.contains(&action), "no `{action}` in {actions:?}");
    }
    Ok(())
}

/// The time of the engine, which its events bear; a machine's clock may be some milliseconds before this computer's.
fn engine_now(engine: &Engine) -> Result<String> {
    docker(engine, &["info", "--format", "{{.SystemTime}}"])?.ok()
}

/// The same words, columns and order from both clients.
fn our_lists_read_like_the_stock_clients(engine: &Engine) -> Result<()> {
    let since = engine_now(engine)?;
    engine.engine(["run", "--name", "compared", IMAGE, "sh", "-c", "exit 3"])?.exits(3)?;
    let until = engine_now(engine)?;
    let commands: [&[&str]; 7] = [
        &["ps", "-a"],
        &["ps", "-aq"],
        &["images"],
        &["images", "-q", "--no-trunc"],
        &["history", IMAGE],
        &["logs", "compared"],
        &["events", "--since", &since, "--until", &until],
    ];
    let trimmed = |text: &str| text.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>();
    for command in commands {
        // Ages tick on between two lists: theirs must be as ours was before it or is after it.
        let before = engine.engine(command)?.ok()?;
        let theirs = docker(engine, command)?.ok()?;
        let after = engine.engine(command)?.ok()?;
        ensure!(
            [&before, &after].iter().any(|ours| trimmed(ours) == trimmed(&theirs)),
            "{command:?}\nours before:\n{before}\ntheirs:\n{theirs}\nours after:\n{after}"
        );
    }
    let parsed = |text: String| serde_json::from_str::<serde_json::Value>(&text);
    for name in ["compared", IMAGE] {
        let theirs = docker(engine, &["inspect", name])?.ok()?;
        ensure!(
            parsed(engine.engine(["inspect", name])?.ok()?)? == parsed(theirs)?,
            "inspect {name} differs"
        );
    }
    engine.engine(["rm", "compared"])?.ok().map(drop)
}

fn our_attach_and_stats_read_like_the_stock_clients(engine: &Engine) -> Result<()> {
    let script = "while read word; do echo got $word; [ $word = end ] && exit 5; done";
    engine.engine(["run", "-d", "-i", "--name", "attached", IMAGE, "sh", "-c", script])?.ok()?;
    // A client whose input ends leaves the container's open.
    for (client, word) in [("docker", "one"), ("engine", "two")] {
        let command = match client {
            "docker" => engine.docker(["attach", "attached"]),
            _ => Some(engine.command(["attach", "attached"])),
        };
        let Some(command) = command else { bail!("no docker CLI") };
        let attached = Timed::new(command).input(format!("{word}\n")).spawn()?;
        wait_until("the word has arrived", || {
            Ok(engine.engine(["logs", "attached"])?.stdout.contains(word).then_some(()))
        })?;
        drop(attached);
    }
    let columns = ["stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}} {{.CPUPerc}}", "attached"];
    for said in [engine.engine(columns)?.ok()?, docker(engine, &columns)?.ok()?] {
        ensure!(said.starts_with("attached 1 ") && said.ends_with('%'), "{said}");
    }
    let said = engine.engine_with_input(["attach", "attached"], "end\n")?.exits(5)?;
    ensure!(said == "got end", "{said}");
    engine.engine(["attach", "attached"])?.fails_with(1, "cannot attach to a stopped container")?;
    engine.engine(["rm", "attached"])?.ok().map(drop)
}

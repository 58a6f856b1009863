//! `kill -9` of each process at bad moments: no orphan, no lost image or container, and the next command works.

use crate::Scenario;
use crate::networks::says;
use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};
use tests_harness::{Engine, Finished, IMAGE, Layer, TestImage, wait_until};

pub(crate) fn native_scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "crash::containers_survive_the_engine", body: containers_survive_the_engine },
        Scenario { name: "crash::a_killed_shim_ends_its_container", body: a_killed_shim_ends_its_container },
        Scenario { name: "crash::rounds_of_killing_lose_nothing", body: native_rounds },
    ]
}

pub(crate) fn machine_scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "crash::a_killed_daemon_takes_the_machine_with_it",
            body: a_killed_daemon_takes_the_machine_with_it,
        },
        Scenario { name: "crash::a_killed_vm_process_is_replaced", body: a_killed_vm_process_is_replaced },
        Scenario { name: "crash::published_ports_come_back", body: published_ports_come_back },
        Scenario {
            name: "crash::a_killed_engine_in_the_machine_returns",
            body: a_killed_engine_in_the_machine_returns,
        },
        Scenario { name: "crash::rounds_of_killing_lose_nothing", body: machine_rounds },
        Scenario {
            name: "crash::a_damaged_disk_is_never_formatted",
            body: a_damaged_disk_is_never_formatted,
        },
    ]
}

fn state(engine: &Engine, container: &str) -> Result<String> {
    engine.engine(["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", container])?.ok()
}

fn containers_survive_the_engine(engine: &Engine) -> Result<()> {
    let script = "i=0; while [ ! -e /end ]; do i=$((i+1)); echo line $i; sleep 0.05; done; exit 6";
    engine.engine(["run", "-d", "--name", "survivor", IMAGE, "sh", "-c", script])?.ok()?;
    engine.engine(["run", "-d", "--name", "ends-meanwhile", IMAGE, "sh", "-c", "sleep 1; exit 8"])?.ok()?;
    for script in ["sleep 1; exit 5", "while [ ! -e /end-exec ]; do sleep 0.1; done; exit 7"] {
        engine.engine(["exec", "-d", "survivor", "sh", "-c", script])?.ok()?;
    }
    let shown = api(engine, "/containers/survivor/json")?;
    let execs: Vec<String> = serde_json::from_value(shown["ExecIDs"].clone())?;
    ensure!(execs.len() == 2, "{execs:?}");
    let scripts = |id: &String| -> Result<String> {
        Ok(api(engine, &format!("/exec/{id}/json"))?["ProcessConfig"]["arguments"].to_string())
    };
    // In the order in which they were begun.
    let execs = if scripts(&execs[0])?.contains("exit 5") {
        execs
    } else {
        execs.into_iter().rev().collect::<Vec<_>>()
    };
    kill_native(engine)?;
    std::thread::sleep(Duration::from_secs(2));
    engine.boot()?;
    ensure!(state(engine, "survivor")? == "running 0", "{}", state(engine, "survivor")?);
    wait_until("the other is seen to have ended", || {
        Ok((state(engine, "ends-meanwhile")? == "exited 8").then_some(()))
    })?;
    // So it is with what was run in it: one exec goes on, of the other is known how it ended.
    let exec = |id: &str| -> Result<serde_json::Value> { api(engine, &format!("/exec/{id}/json")) };
    let ended = exec(&execs[0])?;
    ensure!(ended["Running"] == false && ended["ExitCode"] == 5, "{ended}");
    let running = exec(&execs[1])?;
    ensure!(running["Running"] == true && running["ExitCode"].is_null(), "{running}");
    engine.engine(["exec", "survivor", "touch", "/end-exec"])?.ok()?;
    wait_until("the exec is seen to have ended", || Ok((exec(&execs[1])?["ExitCode"] == 7).then_some(())))?;
    // Its output was kept while nobody served it, and exec works again.
    engine.engine(["exec", "survivor", "touch", "/end"])?.ok()?;
    let code = engine.engine(["wait", "survivor"])?.ok()?;
    ensure!(code == "6", "{code}");
    let logs = engine.engine(["logs", "survivor"])?.ok()?;
    let numbers: Vec<usize> =
        logs.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
    ensure!(
        numbers.len() > 30 && numbers.iter().enumerate().all(|(at, number)| *number == at + 1),
        "lines are missing: {logs}"
    );
    engine.engine(["rm", "survivor", "ends-meanwhile"])?.ok().map(drop)
}

/// What the API answers to a GET.
fn api(engine: &Engine, path: &str) -> Result<serde_json::Value> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail-with-body", "--unix-socket"]);
    command.arg(engine.docker_socket()).arg(format!("http://engine{path}"));
    Ok(serde_json::from_str(&tests_harness::run(command)?.ok()?)?)
}

fn a_killed_shim_ends_its_container(engine: &Engine) -> Result<()> {
    engine.engine(["run", "-d", "--name", "orphan", IMAGE, "sleep", "1000"])?.ok()?;
    engine.processes().kill("shim")?;
    wait_until("the container is seen to have ended", || {
        Ok(state(engine, "orphan")?.starts_with("exited").then_some(()))
    })?;
    engine.engine(["start", "orphan"])?.ok()?;
    engine.engine(["rm", "-f", "orphan"])?.ok()?;
    engine.engine(["run", "--rm", IMAGE, "true"])?.ok().map(drop)
}

fn a_killed_daemon_takes_the_machine_with_it(engine: &Engine) -> Result<()> {
    engine.engine(["run", "--name", "kept", IMAGE, "sh", "-c", "echo x > /x"])?.ok()?;
    engine.processes().kill("engined")?;
    engine.processes().expect_none().context("after kill -9 of engined")?;
    // The next command starts everything again.
    let names = engine.engine(["ps", "-a", "--format", "{{.Names}}"])?.ok()?;
    ensure!(names.contains("kept"), "{names}");
    engine.engine(["rm", "kept"])?.ok().map(drop)
}

fn a_killed_vm_process_is_replaced(engine: &Engine) -> Result<()> {
    let machine = machine_process(engine)?;
    for name in BTreeSet::from(["engine-vmm", machine]) {
        engine.engine(["run", "--rm", IMAGE, "true"])?.ok()?;
        let before = engine.processes().find(machine)?;
        engine.processes().kill(name)?;
        wait_until("the machine is seen to have ended", || {
            let gone = !engine.processes().list().iter().any(|process| process.pid == before.pid);
            Ok((gone && engine.engine(["machine", "status"])?.stdout.trim() == "stopped").then_some(()))
        })
        .with_context(|| format!("after kill -9 of {name}"))?;
        engine.engine(["run", "--rm", IMAGE, "true"])?.ok()?;
        engine.processes().find("engine-vmm")?;
        engine.processes().find(machine)?;
    }
    Ok(())
}

fn machine_process(engine: &Engine) -> Result<&'static str> {
    engine.stage.machine_process().context("this stage has no machine")
}

/// A published port is let go with whoever holds it, is back when the machine is, and nothing of it stays.
fn published_ports_come_back(engine: &Engine) -> Result<()> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let free = || {
        wait_until("the port is free", || Ok(TcpListener::bind(&address).ok().map(drop)))
            .with_context(|| address.clone())
    };
    let (publish, serve) = (format!("{address}:80"), "while :; do echo served | nc -l -p 80; done");
    let run = ["run", "-d", "--init", "--restart", "always", "--name", "served", "-p", &publish, IMAGE];
    engine.engine(run.into_iter().chain(["sh", "-c", serve]))?.ok()?;
    says(&address, "served")?;
    for name in ["engined", "engine-vmm", "engined"] {
        engine.processes().kill(name)?;
        free().with_context(|| format!("after kill -9 of {name}"))?;
        // The next command starts the machine, which starts the container.
        engine.engine(["ps"])?.ok()?;
        says(&address, "served").with_context(|| format!("after kill -9 of {name}"))?;
    }
    engine.engine(["rm", "-f", "served"])?.ok()?;
    free()
}

/// From a root shell in the machine: the engine, then a container's shim.
fn a_killed_engine_in_the_machine_returns(engine: &Engine) -> Result<()> {
    let in_machine = |script: &str| engine.engine(["machine", "shell", "-i", IMAGE, "sh", "-c", script]);
    let serve = "while :; do echo served | nc -l -p 80; done";
    let run = ["run", "-d", "--init", "--name", "stays", "-p", "127.0.0.1::80", IMAGE, "sh", "-c", serve];
    engine.engine(run)?.ok()?;
    let served = engine.engine(["port", "stays", "80/tcp"])?.ok()?;
    says(&served, "served")?;
    // Somebody else is just being published.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let publish = format!("{address}:80");
    let starting =
        engine.spawn(["run", "-d", "--name", "published", "-p", &publish, IMAGE, "sleep", "1000"])?;
    // The shell is a container too: what becomes of its own connection does not matter.
    in_machine(
        "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = guest-engine ] && kill -9 ${p#/proc/}; done",
    )?;
    let state = state(engine, "stays")?;
    ensure!(state == "running 0", "{state}");
    let said = engine.engine(["exec", "stays", "echo", "alive"])?.ok()?;
    ensure!(said == "alive", "{said}");
    says(&served, "served").context("after kill -9 of the engine in the machine")?;
    // Done or not: it runs with its port, or nobody has it.
    starting.finish()?;
    let mut published = Acknowledged::default();
    published.ports.push(("published".into(), address));
    published.nobody_holds_a_port_in_vain(engine, 1)?;
    engine.engine(["run", "--rm", IMAGE, "true"])?.ok()?;
    published.clean_up(engine)
}

/// Deterministic noise for choosing moments; the seed is printed with a failure.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// What the engine has acknowledged.
#[derive(Default)]
struct Acknowledged {
    images: BTreeSet<String>,
    /// By name, with the answer.
    containers: BTreeMap<String, Finished>,
    /// Where each round's container is published, acknowledged or not.
    ports: Vec<(String, String)>,
}

impl Acknowledged {
    /// All of it is there, and works.
    fn check(&self, engine: &Engine) -> Result<()> {
        let images = engine.engine(["images", "--format", "{{.Repository}}:{{.Tag}}"])?.ok()?;
        let containers = engine.engine(["ps", "-a", "--format", "{{.Names}}"])?.ok()?;
        let listed = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        let (images, containers) = (listed(&images), listed(&containers));
        if let Some(lost) = self.images.iter().find(|name| !images.contains(*name)) {
            bail!("the acknowledged image `{lost}` is lost; there are {images:?}");
        }
        if let Some((name, answer)) = self.containers.iter().find(|(name, _)| !containers.contains(*name)) {
            // What it was acknowledged as, and what is known of that now: of a name that is gone the container may be there.
            let now = engine.engine(["inspect", answer.stdout.trim()])?;
            let again = engine.engine(["ps", "-a", "--no-trunc"])?;
            bail!(
                "the acknowledged container `{name}` is lost; there are {containers:?}; acknowledged by {answer:?}; \
                 its id now: {now:?}; all: {again:?}"
            );
        }
        if let Some(image) = self.images.last() {
            engine.engine(["run", "--rm", image, "cat", "/noise"]).map(|run| run.code)?;
            engine.engine(["run", "--rm", image, "sh", "-c", "wc -c < /noise"])?.ok()?;
        }
        engine.engine(["run", "--rm", IMAGE, "true"])?.ok().map(drop)
    }

    /// Of the last `count`, whoever does not run holds no port: not one who was killed, nor one who was about to get it.
    fn nobody_holds_a_port_in_vain(&self, engine: &Engine, count: usize) -> Result<()> {
        for (name, address) in self.ports.iter().rev().take(count) {
            wait_until("a port is free, or its container runs", || {
                let free = || TcpListener::bind(address).is_ok();
                Ok((free() || state(engine, name).is_ok_and(|state| state == "running 0")).then_some(()))
            })
            .with_context(|| format!("{address} of {name}"))?;
        }
        Ok(())
    }

    fn clean_up(&self, engine: &Engine) -> Result<()> {
        engine.remove_containers()?;
        self.nobody_holds_a_port_in_vain(engine, usize::MAX)?;
        for image in &self.images {
            engine.engine(["rmi", "-f", image])?.ok()?;
        }
        Ok(())
    }
}

/// `rounds` times: something is going on, something is killed at a random moment, then everything acknowledged is there.
fn rounds(engine: &Engine, rounds: u64, moment_ms_max: u64, kill: impl Fn(u64) -> Result<()>) -> Result<()> {
    let mut dice = Dice(20_261_121);
    let mut acknowledged = Acknowledged::default();
    for round in 0..rounds {
        let name = format!("round{round}");
        let image = TestImage::new(vec![Layer::busybox()?, Layer::noise("noise", 4 << 20, round + 1)?]);
        engine.registry().push(&image, &name, "1")?;
        let reference = format!("{}/{name}:1", engine.registry_name());
        let pull = engine.spawn(["pull", "-q", &reference])?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let publish = format!("{address}:80");
        let start = engine.spawn(["run", "-d", "--name", &name, "-p", &publish, IMAGE, "sleep", "1000"])?;
        acknowledged.ports.push((name.clone(), address));
        let begun = Instant::now();
        let moment = Duration::from_millis(dice.roll(moment_ms_max));
        std::thread::sleep(moment.saturating_sub(begun.elapsed()));
        kill(round)?;
        // Either may have been answered before the kill, or not at all; an answer of 0 is a promise.
        if pull.finish()?.code == 0 {
            acknowledged.images.insert(reference);
        }
        let start = start.finish()?;
        if start.code == 0 {
            ensure!(!start.stdout.is_empty(), "round {round}: a success that names no container: {start:?}");
            acknowledged.containers.insert(name, start);
        }
        if engine.stage == tests_harness::Stage::Native {
            engine.boot()?;
        }
        acknowledged
            .check(engine)
            .and_then(|()| acknowledged.nobody_holds_a_port_in_vain(engine, 1))
            .with_context(|| format!("round {round}, killed after {} ms", moment.as_millis()))?;
    }
    acknowledged.clean_up(engine)
}

/// `kill -9`; what is on the disk then is consistent before anyone tidies.
fn kill_native(engine: &Engine) -> Result<()> {
    engine.end_native(true)?;
    engine.expect_sound_data()
}

fn native_rounds(engine: &Engine) -> Result<()> {
    rounds(engine, 20, 900, |_| kill_native(engine))
}

fn machine_rounds(engine: &Engine) -> Result<()> {
    rounds(engine, 20, 4000, |round| {
        let victim = ["engine-vmm", machine_process(engine)?, "engined"][usize::try_from(round % 3)?];
        let processes = engine.processes();
        let machine: Vec<_> =
            processes.list().into_iter().filter(|process| process.name != "engine").collect();
        processes.kill(victim)?;
        // A killed daemon gives the guest a moment to power off; all of it must be gone before anything is promised again.
        // A client that had not reached it yet begins another.
        if victim == "engined" { processes.expect_ended(&machine) } else { Ok(()) }
    })?;
    engine.engine(["machine", "stop"])?.ok()?;
    let mut check = Command::new("/usr/sbin/e2fsck");
    check.arg("-fn").arg(engine.path("machines/default/disk.raw"));
    tests_harness::run(check)?.ok().context("the data disk is not clean")?;
    engine.boot()
}

fn a_damaged_disk_is_never_formatted(engine: &Engine) -> Result<()> {
    engine.engine(["machine", "stop"])?.ok()?;
    let disk = engine.path("machines/default/disk.raw");
    let kept = engine.path("disk.kept");
    std::fs::rename(&disk, &kept)?;
    let result = damaged(engine, &disk);
    engine.engine(["machine", "stop"])?.ok()?;
    std::fs::rename(&kept, &disk)?;
    result?;
    engine.engine(["run", "--rm", IMAGE, "true"])?.ok().map(drop)
}

fn damaged(engine: &Engine, disk: &std::path::Path) -> Result<()> {
    let nonsense = b"this is somebody's data ".repeat(100_000);
    let file = std::fs::File::create(disk)?;
    std::io::Write::write_all(&mut &file, &nonsense)?;
    file.set_len(16 << 30)?;
    drop(file);
    let start = engine.engine(["machine", "start"])?;
    ensure!(start.code == 1 && start.stderr.contains("disk"), "{start:?}");
    let still = std::fs::File::open(disk)?;
    let mut head = vec![0; nonsense.len()];
    std::io::Read::read_exact(&mut &still, &mut head)?;
    ensure!(head == nonsense, "the disk was written to");
    Ok(())
}

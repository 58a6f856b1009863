//! Stopping and starting again: what was acknowledged is there.

use anyhow::{Context, Result, ensure};
use tests_harness::{Engine, IMAGE, Processes, Stage, TestImage, Timed, run};

crate::scenarios![
    data_survives_a_clean_restart,
    the_state_is_told,
    every_thread_of_the_vm_process_is_confined,
    two_first_calls_boot_one_machine,
    a_machine_takes_on_other_settings,
    a_machine_takes_on_other_memory
];

/// Stops the machine, or the natively run engine, cleanly and starts it again.
fn restart(engine: &Engine) -> Result<()> {
    match engine.stage {
        Stage::Native => {
            engine.end_native(false)?;
            engine.boot()
        }
        Stage::Qemu | Stage::Kvm => {
            engine.engine(["machine", "stop"])?.ok()?;
            let status = engine.engine(["machine", "status"])?.ok()?;
            ensure!(status == "stopped", "{status}");
            engine.engine(["machine", "start"])?.ok().map(drop)
        }
    }
}

fn data_survives_a_clean_restart(engine: &Engine) -> Result<()> {
    engine.engine(["run", "--name", "writer", IMAGE, "sh", "-c", "echo kept > /file"])?.ok()?;
    engine
        .engine([
            "run",
            "-d",
            "--name",
            "runner",
            IMAGE,
            "sh",
            "-c",
            "trap 'exit 0' TERM; while :; do sleep 0.1; done",
        ])?
        .ok()?;
    restart(engine)?;
    engine.engine(["start", "writer"])?.ok()?;
    let copy = engine.engine(["run", "--rm", IMAGE, "true"])?;
    ensure!(copy.code == 0, "{copy:?}");
    let names = engine.engine(["ps", "-a", "--format", "{{.Names}} {{.State}}"])?.ok()?;
    ensure!(names.contains("writer "), "{names}");
    // Natively containers outlive the engine; with the machine they end, by their own will.
    let runner = engine.engine(["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "runner"])?.ok()?;
    let expected = match engine.stage {
        Stage::Native => "running 0",
        Stage::Qemu | Stage::Kvm => "exited 0",
    };
    ensure!(runner == expected, "{runner}");
    engine.engine(["rm", "-f", "writer", "runner"])?.ok().map(drop)
}

fn the_state_is_told(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return engine.engine(["machine", "info"])?.fails_with(1, "cannot be used with --host");
    }
    let info = engine.engine(["machine", "info"])?.ok()?;
    for part in ["State:", "running", "Back end:", "Reason:", "Memory used:", "Disk used:", "Kernel:"] {
        ensure!(info.contains(part), "no `{part}` in {info}");
    }
    let console = engine.engine(["machine", "logs"])?.ok()?;
    ensure!(!console.is_empty(), "the console is empty");
    let socket = engine.engine(["env", "--socket"])?.ok()?;
    ensure!(socket == format!("unix://{}", engine.docker_socket().display()), "{socket}");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(engine.docker_socket())?.permissions());
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    let shell = engine
        .engine(["machine", "shell", "-i", IMAGE, "ls", "/host/usr/bin/guest-engine", "/host/init"])?
        .ok()?;
    ensure!(shell.contains("/host/usr/bin/guest-engine"), "{shell}");
    Ok(())
}

/// By the kernel's word: no new privileges, and a filter of system calls.
fn every_thread_of_the_vm_process_is_confined(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    let pid = engine.processes().find("engine-vmm")?.pid;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let has = |line: &str| status.lines().any(|found| found.split_whitespace().eq(line.split(' ')));
        ensure!(has("NoNewPrivs: 1") && has("Seccomp: 2"), "{status}");
    }
    Ok(())
}

fn two_first_calls_boot_one_machine(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    engine.engine(["machine", "shutdown"])?.ok()?;
    engine.processes().expect_none()?;
    let calls =
        [engine.spawn(["ps"])?, engine.spawn(["images"])?, engine.spawn(["run", "--rm", IMAGE, "true"])?];
    for call in calls {
        call.finish()?.ok()?;
    }
    // `find` fails when there are two.
    engine.processes().find("engined")?;
    engine.processes().find("engine-vmm")?;
    let machine = engine.stage.machine_process().context("the stage has a machine")?;
    engine.processes().find(machine).map(drop)
}

/// What a running machine can have of other settings it has at once, and the rest when it starts next.
fn a_machine_takes_on_other_settings(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    // A home of its own, in which the settings file alone tells the size of the disk and the processors.
    let command = |arguments: &[&str]| {
        let mut command = engine.command(arguments);
        command.env("ENGINE_HOME", engine.path("grown"));
        command.env_remove("ENGINE_MACHINE_DISK_GIB").env_remove("ENGINE_MACHINE_CPUS");
        command
    };
    let grown = |arguments: &[&str]| run(command(arguments));
    let set = |settings: &[&str], said: &str| -> Result<()> {
        let words: Vec<&str> = ["machine", "set"].iter().chain(settings).copied().collect();
        let set = grown(&words)?;
        ensure!(set.code == 0 && set.stderr.contains(said), "{set:?}");
        Ok(())
    };
    let total = || -> Result<u64> {
        Ok(grown(&["machine", "info", "-f", "{{.guest.disk_total_bytes}}"])?.ok()?.parse()?)
    };
    set(&["disk=1g", "cpus=2"], "`cpus` and `disk` count from the machine's next start\n")?;
    grown(&["machine", "start"])?.ok()?;
    let small = total()?;
    ensure!(small < 1 << 30, "{small}");

    // A container that was there before, and one that runs meanwhile.
    let archive = TestImage::busybox()?.archive(IMAGE)?;
    Timed::new(command(&["load"])).input(archive).run()?.ok()?;
    let write = "head -c 9999999 /dev/urandom > /data/bulk && md5sum /data/bulk > /data/sum";
    grown(&["run", "--rm", "-v", "kept:/data", IMAGE, "sh", "-c", write])?.ok()?;
    grown(&["run", "-d", "--name", "runner", IMAGE, "sleep", "1000"])?.ok()?;
    let in_runner = |text: &str| grown(&["exec", "runner", "sh", "-c", text])?.ok();
    let size = || -> Result<u64> {
        let table = in_runner("df -Pk /")?;
        let row = table.lines().nth(1).context("a row")?;
        Ok(row.split_whitespace().nth(1).context("a size")?.parse::<u64>()? << 10)
    };
    ensure!(size()? == small, "a container sees {} bytes and not {small}", size()?);
    set(&["disk=3g"], "the disk has 3 GiB now")?;
    let large = total()?;
    ensure!(large > 5 << 29 && size()? == large, "{small} bytes became {large}, in a container {}", size()?);
    grown(&["machine", "set", "disk=2g"])?.fails_with(1, "never shrinks")?;

    set(&["cpus=1"], "the machine runs on 1 CPU now")?;
    ensure!(in_runner("nproc")? == "1", "the container has the processor that was turned off");
    let counted = grown(&["info", "-f", "{{.NCPU}}"])?.ok()?;
    ensure!(counted == "1", "the engine counts {counted}");
    set(
        &["cpus=3"],
        "was started with 2 CPUs, and runs on 2; so `cpus` counts from the machine's next start",
    )?;
    set(&["cpus=2"], "the machine runs on 2 CPUs now")?;
    ensure!(in_runner("nproc")? == "2", "the container has not the processor that was turned on again");
    set(&["memory=2g"], "`ENGINE_MACHINE_MEMORY_MIB` is set where the daemon was started")?;

    grown(&["machine", "stop"])?.ok()?;
    set(&["disk=5g"], "`disk` counts from the machine's next start\n")?;
    let check = grown(&["run", "--rm", "-v", "kept:/data", IMAGE, "md5sum", "-c", "/data/sum"])?.ok()?;
    ensure!(check == "/data/bulk: OK", "{check}");
    let larger = total()?;
    ensure!(larger > 9 << 29, "{large} bytes became {larger}");
    grown(&["machine", "set", "cpus=none"])?.fails_with(1, "`none` is not a number of CPUs")?;
    grown(&["machine", "shutdown"])?.ok()?;
    Processes::of(&engine.path("grown")).expect_none()
}

/// A machine of ours has more memory at once when it is asked to, and gives that back. QEMU's has it when it starts next.
fn a_machine_takes_on_other_memory(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    let call = |arguments: &[&str]| {
        let mut command = engine.command(arguments);
        command.env("ENGINE_HOME", engine.path("larger")).env_remove("ENGINE_MACHINE_MEMORY_MIB");
        run(command)
    };
    let set = |memory: &str, said: &str| -> Result<()> {
        let set = call(&["machine", "set", &format!("memory={memory}")])?;
        ensure!(set.code == 0 && set.stderr.contains(said), "{set:?}");
        Ok(())
    };
    let figure = |name: &str| -> Result<u64> {
        let template = format!("{{{{.{name}}}}}");
        Ok(call(&["machine", "info", "-f", &template])?.ok()?.parse()?)
    };
    let total_mib = || Ok::<_, anyhow::Error>(figure("guest.memory_total_bytes")? >> 20);
    set("512m", "`memory` counts from the machine's next start\n")?;
    call(&["machine", "start"])?.ok()?;
    let small = total_mib()?;
    ensure!(small < 512, "{small}");
    if engine.stage == Stage::Qemu {
        set("1g", "the machine was started with 512 MiB, which QEMU does not change while it runs")?;
        ensure!(total_mib()? == small);
        call(&["machine", "stop"])?.ok()?;
        call(&["machine", "start"])?.ok()?;
        ensure!(total_mib()? > small + 400, "{small} MiB became {}", total_mib()?);
        return call(&["machine", "shutdown"])?.ok().map(drop);
    }
    let archive = TestImage::busybox()?.archive(IMAGE)?;
    let mut load = engine.command(["load"]);
    load.env("ENGINE_HOME", engine.path("larger"));
    Timed::new(load).input(archive).run()?.ok()?;
    call(&["run", "-d", "--name", "user", "--tmpfs", "/large:size=700m", IMAGE, "sleep", "1000"])?.ok()?;
    let in_user = |text: &str| call(&["exec", "user", "sh", "-c", text])?.ok();

    set("1152m", "the machine has 1152 MiB of memory now\n")?;
    ensure!(total_mib()? >= small + 640, "{small} MiB became {}", total_mib()?);
    let seen: u64 = in_user("awk '/MemTotal/ { print $2 }' /proc/meminfo")?.parse()?;
    ensure!(seen >> 10 >= small + 640, "a container sees {seen} KiB");
    // More than the machine had, and found as it was.
    let write =
        "head -c 10485760 /dev/urandom > /large/0 && for i in $(seq 59); do cp /large/0 /large/$i; done";
    in_user(write)?;
    in_user("for i in $(seq 59); do cmp /large/0 /large/$i || exit; done")?;
    let full = figure("memory_held_bytes")?;
    ensure!(full > 600 << 20, "{full} bytes are held while 600 MiB are in use");

    in_user("rm /large/*")?;
    // In blocks of 2 MiB.
    set("641m", "the machine has 642 MiB of memory now\n")?;
    ensure!(total_mib()? < small + 160, "{small} MiB became {}", total_mib()?);
    let held = figure("memory_held_bytes")?;
    ensure!(held < full - (400 << 20), "{full} bytes were held, and {held} are");
    set(
        "256m",
        "was started with 512 MiB, and has 512 MiB now; so `memory` counts from the machine's next start",
    )?;
    ensure!(total_mib()? <= small, "{small} MiB became {}", total_mib()?);
    set("2g", "the machine has 2048 MiB of memory now\n")?;
    call(&["machine", "stop"])?.ok()?;
    call(&["machine", "start"])?.ok()?;
    ensure!(total_mib()? > 1800, "{}", total_mib()?);
    call(&["machine", "shutdown"])?.ok()?;
    Processes::of(&engine.path("larger")).expect_none()
}

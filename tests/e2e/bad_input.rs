//! Mistakes and hostile input: a sentence, the right exit code, and nothing left.

use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tests_harness::{Engine, Finished, IMAGE, Layer, PATIENCE, Processes, Stage, TestImage, Timed, run};

crate::scenarios![
    mistakes_on_the_command_line_are_named,
    an_unknown_image_and_an_unreachable_registry_are_named,
    a_hostile_archive_is_refused_whole,
    a_broken_archive_is_refused,
    a_refused_client_may_finish_what_it_sends,
    what_is_not_offered_yet_is_refused_by_name,
    a_home_too_long_for_a_socket_is_refused,
    what_the_host_lacks_is_named,
    a_busy_socket_is_left_alone,
    a_full_disk_is_an_error_and_no_more,
];

fn mistakes_on_the_command_line_are_named(engine: &Engine) -> Result<()> {
    engine.engine(["run", "--wrong", IMAGE])?.fails_with(125, "--wrong")?;
    engine.engine(["frobnicate"])?.fails_with(125, "frobnicate")?;
    engine.engine(["run", "--rm", "--restart", "sometimes", IMAGE])?.fails_with(125, "sometimes")?;
    engine.engine(["run", "--rm", "-m", "many", IMAGE])?.fails_with(125, "`many`")?;
    engine.engine(["run", "--rm", "-u", "nobody-here", IMAGE, "true"])?.fails_with(125, "nobody-here")?;
    engine
        .engine(["run", "--rm", "--name", "no spaces", IMAGE, "true"])?
        .fails_with(125, "Invalid container name")?;
    engine.engine(["run", "--rm", "-it", IMAGE, "true"])?.fails_with(1, "the input device is not a TTY")?;
    engine.engine(["stop", "nobody"])?.fails_with(1, "No such container: nobody")?;
    engine.engine(["-H", "tcp://x", "ps"])?.fails_with(1, "unix:///path")
}

fn an_unknown_image_and_an_unreachable_registry_are_named(engine: &Engine) -> Result<()> {
    let missing = format!("{}/missing:1", engine.registry_name());
    let run = engine.engine(["run", "--rm", &missing])?;
    ensure!(run.code == 125 && run.stderr.contains("missing"), "{run:?}");
    // Port 1 of the same host: nobody listens.
    let host = engine.registry_name();
    let unreachable = format!("{}:1/x", host.split(':').next().unwrap_or_default());
    let pull = engine.engine(["pull", &unreachable])?;
    ensure!(pull.code == 1 && pull.stderr.contains(":1"), "{pull:?}");
    engine.engine(["pull", "lower/UPPER"])?.fails_with(1, "invalid reference format")
}

fn load(engine: &Engine, layer: Layer, tag: &str) -> Result<Finished> {
    let archive = TestImage::new(vec![layer]).archive(tag)?;
    engine.engine_with_input(["load"], archive)
}

fn a_hostile_archive_is_refused_whole(engine: &Engine) -> Result<()> {
    use tar_entries::*;
    let attacks: [(&str, Vec<Entry>); 5] = [
        ("by name", vec![(FILE, "../../../../escaped", "x")]),
        ("by absolute symlink", vec![(SYMLINK, "out", "/"), (FILE, "out/escaped-by-link", "x")]),
        ("by relative symlink", vec![(SYMLINK, "out", "../../../.."), (FILE, "out/escaped-by-link", "x")]),
        ("by hard link", vec![(HARDLINK, "shadow", "../../../../../../etc/shadow")]),
        ("by absolute hard link", vec![(HARDLINK, "passwd", "/../../../../etc/passwd")]),
    ];
    for (number, (how, entries)) in attacks.into_iter().enumerate() {
        let tag = format!("hostile:{number}");
        let loaded = load(engine, Layer::raw(&entries)?, &tag)?;
        // Either refused, or kept inside: never outside, and never half an image.
        let listed = engine.engine(["images", "-q", &tag])?.ok()?;
        ensure!((loaded.code == 0) != listed.is_empty(), "{how}: {loaded:?}, listed `{listed}`");
        for escaped in ["/escaped", "/escaped-by-link"] {
            ensure!(!Path::new(escaped).exists(), "{how}: `{escaped}` was written");
        }
        if loaded.code == 0 {
            engine.engine(["rmi", "-f", &tag])?.ok()?;
        } else {
            ensure!(!loaded.stderr.trim().is_empty(), "{how}: refused without a word");
        }
    }
    Ok(())
}

mod tar_entries {
    use tar::EntryType;
    pub(super) type Entry = (EntryType, &'static str, &'static str);
    pub(super) const FILE: EntryType = EntryType::Regular;
    pub(super) const SYMLINK: EntryType = EntryType::Symlink;
    pub(super) const HARDLINK: EntryType = EntryType::Link;
}

fn a_broken_archive_is_refused(engine: &Engine) -> Result<()> {
    let whole = TestImage::new(vec![Layer::noise("noise", 1 << 20, 3)?]).archive("broken:1")?;
    let cut = engine.engine_with_input(["load"], &whole[..whole.len() / 2])?;
    ensure!(cut.code == 1 && !cut.stderr.is_empty(), "{cut:?}");
    let nonsense = engine.engine_with_input(["load"], vec![7; 100_000])?;
    ensure!(nonsense.code == 1 && !nonsense.stderr.is_empty(), "{nonsense:?}");
    // A layer that is not what its configuration says.
    let image = TestImage::new(vec![Layer::noise("noise", 1000, 5)?]);
    let mut lying = image.archive("broken:2")?;
    let at = lying.windows(9).position(|window| window == b"diff_ids\"").unwrap_or(0) + 25;
    lying[at] = if lying[at] == b'0' { b'1' } else { b'0' };
    let lie = engine.engine_with_input(["load"], lying)?;
    ensure!(lie.code == 1 && !lie.stderr.is_empty(), "{lie:?}");
    let listed = engine.engine(["images", "--format", "{{.Repository}}"])?.ok()?;
    ensure!(!listed.contains("broken"), "{listed}");
    Ok(())
}

/// The refusal is known at the head of the request; the body is still on its way, and the connection serves on after it.
fn a_refused_client_may_finish_what_it_sends(engine: &Engine) -> Result<()> {
    const BODY: &[u8] = &[b'x'; 200_000];
    for path in ["/containers/nobody/archive?path=/", "/build", "/nowhere"] {
        let mut stream = UnixStream::connect(engine.docker_socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let method = if path.contains("archive") { "PUT" } else { "POST" };
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", BODY.len())?;
        let (first, rest) = BODY.split_at(BODY.len() / 2);
        stream.write_all(first).with_context(|| format!("{path}: the first half"))?;
        std::thread::sleep(Duration::from_millis(200));
        stream.write_all(rest).with_context(|| format!("{path}: the second half"))?;
        write!(stream, "GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut said = String::new();
        stream.read_to_string(&mut said).with_context(|| format!("{path}: the answers"))?;
        ensure!(said.starts_with("HTTP/1.1 4") || said.starts_with("HTTP/1.1 5"), "{path}: {said}");
        ensure!(said.contains("HTTP/1.1 200") && said.ends_with("OK"), "{path}: no second answer: {said}");
    }
    Ok(())
}

fn what_is_not_offered_yet_is_refused_by_name(engine: &Engine) -> Result<()> {
    let Some(mut command) = engine.docker(["build", "-"]) else { return Ok(()) };
    command.env("DOCKER_BUILDKIT", "0");
    let built = Timed::new(command).input(format!("FROM {IMAGE}\n")).run()?;
    built.fails_with(1, "building images: not supported by this version of the engine")
}

fn a_home_too_long_for_a_socket_is_refused(engine: &Engine) -> Result<()> {
    let mut command = engine.command(["machine", "status"]);
    command.env_remove("ENGINE_HOST").env("ENGINE_HOME", format!("/tmp/{}", "x".repeat(120)));
    run(command)?.fails_with(1, "set `ENGINE_HOME` to a shorter path")
}

/// A command with a home of its own below the engine's, whose daemon is ended afterwards.
fn elsewhere(engine: &Engine, name: &str, change: impl FnOnce(&mut Command)) -> Result<Finished> {
    let home = engine.path(name);
    let mut command = engine.command(["machine", "start"]);
    command.env_remove("ENGINE_HOST").env("ENGINE_HOME", &home);
    change(&mut command);
    let finished = run(command)?;
    let mut end = engine.command(["machine", "shutdown"]);
    end.env_remove("ENGINE_HOST").env("ENGINE_HOME", &home);
    run(end)?.ok()?;
    Processes::of(&home).expect_none()?;
    Ok(finished)
}

fn what_the_host_lacks_is_named(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    // With KVM nobody needs it.
    if engine.stage == Stage::Qemu {
        let no_qemu = elsewhere(engine, "no-qemu", |command| {
            command.env("PATH", "/nowhere");
        })?;
        no_qemu.fails_with(1, "qemu-system-x86")?;
    }
    let no_image = elsewhere(engine, "no-image", |command| {
        command.env("ENGINE_IMAGE", "/nowhere");
    })?;
    no_image.fails_with(1, "installer/quickstart")?;
    let no_kernel = engine.path("no-kernel-image");
    std::fs::create_dir(&no_kernel)?;
    std::fs::write(no_kernel.join("manifest.json"), r#"{"digest":"none","cmdline":""}"#)?;
    std::fs::write(no_kernel.join("initramfs"), "x")?;
    elsewhere(engine, "no-kernel", |command| {
        command.env("ENGINE_IMAGE", &no_kernel);
    })?
    .fails_with(1, "kernel")?;
    let wrong = elsewhere(engine, "wrong", |command| {
        command.env("ENGINE_MACHINE_MEMORY_MIB", "a lot");
    })?;
    wrong.fails_with(1, "`a lot`")
}

fn a_busy_socket_is_left_alone(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    let home = engine.path("busy");
    std::fs::create_dir(&home)?;
    let socket = home.join("engine.sock");
    let _other = std::os::unix::net::UnixListener::bind(&socket)?;
    let mut command = engine.command(["machine", "status"]);
    command.env("ENGINE_HOME", &home);
    run(command)?.fails_with(1, "another program already answers")?;
    UnixStream::connect(&socket).context("the other program's socket was taken")?;
    Processes::of(&home).expect_none()
}

/// With the machine it is the host's disk that is full: `borrowed::what_is_written_waits_for_space_on_the_hosts_disk`.
fn a_full_disk_is_an_error_and_no_more(engine: &Engine) -> Result<()> {
    if engine.stage != Stage::Native {
        return Ok(());
    }
    let image = engine.path("too-large.tar");
    std::fs::write(&image, TestImage::new(vec![Layer::noise("noise", 300 << 20, 9)?]).archive("large:1")?)?;
    let script = format!(
        "{server} --native --socket $home/s --data-root $home/data 2> $home/../small.log & pid=$!
         export ENGINE_HOST=unix://$home/s
         for i in $(seq 100); do $engine version > /dev/null 2>&1 && break; sleep 0.1; done
         $engine load -i {image}; code=$?
         $engine images -q large:1; $engine ps -a > /dev/null; alive=$?
         kill $pid; wait $pid
         echo load $code alive $alive",
        server = engine.program("guest-engine").display(),
        image = image.display(),
    );
    let home = engine.path("small");
    let finished = on_a_small_disk(engine, &home, "64m", &script)?;
    std::fs::remove_file(&image)?;
    let Some(finished) = finished else { return Ok(()) };
    // An error with a sentence, and the engine goes on.
    ensure!(finished.stdout.contains("load 1 alive 0") && finished.stderr.contains("space"), "{finished:?}");
    ensure!(!finished.stdout.contains("sha256"), "half an image is listed: {finished:?}");
    Processes::of(&home).expect_none()
}

/// Runs a shell script with `$engine`, and at `$home` a file system of this size, in a mount namespace of its own: nothing stays
/// mounted, whatever happens. `None` for want of the right to mount.
pub(crate) fn on_a_small_disk(
    engine: &Engine,
    home: &Path,
    size: &str,
    script: &str,
) -> Result<Option<Finished>> {
    if !rustix::process::geteuid().is_root() {
        crate::skip("a small file system can be mounted by root only");
        return Ok(None);
    }
    std::fs::create_dir(home)?;
    let script = format!(
        "set -u; home={home}; engine={program}; mount -t tmpfs -o size={size} none $home || exit 90\n{script}",
        home = home.display(),
        program = engine.program("engine").display(),
    );
    let mut command = Command::new("unshare");
    engine.environment(&mut command);
    command.args(["--mount", "--propagation", "private", "--", "sh", "-c", &script]);
    run(command).map(Some)
}

//! Shared folders, ours beside virtiofsd's, in one guest on QEMU's software processor and by one program.
//!
//! The machine gets a second virtio-fs device, which virtiofsd serves with its own defaults; a privileged container has both, the
//! folder of the one bound, that of the other mounted. One program inside does a little in the one and the same in the other, many
//! times: these computers are at times twice as fast as some seconds before. The ratio is the median of those of each time. Beside
//! it is told what can be counted: how much of a processor each server took, and how often it was woken.

use crate::boot::{median, mib};
use crate::idle::{Work, work};
use crate::through::{QEMU, real_qemu};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tests_harness::{Engine, Layer, Stage, TestImage, wait_until};

/// What makes this program the guest's end.
pub(crate) const GUEST: &str = "guest-files";

/// How often each is measured; who is first changes.
const ROUNDS: usize = 25;
const GUEST_IMAGE: &str = "files:1";
/// The folder with both shared ones, in the environment of the second run of this program.
const FOLDER: &str = "ENGINE_BENCH_FILES";
/// The number of virtiofsd's process, likewise.
const PEER: &str = "ENGINE_BENCH_VIRTIOFSD";
/// What virtiofsd's device is found by.
const TAG: &str = "virtiofsd";
/// Whose folder, below the one with both as in the container.
const SIDES: [&str; 2] = ["ours", "peer"];

/// What is measured: its name, what a figure counts, and how many of that one run does.
const ROWS: [(&str, &str, f64); 8] = [
    ("metadata", "calls/s", METADATA_FILES as f64 * 7.0),
    ("untar", "files/s", (UNTAR_FOLDERS * TREE_FILES) as f64),
    ("packages", "files/s", (PACKAGES * PACKAGE_FILES) as f64),
    ("walk-cold", "files/s", (TREE_FOLDERS * TREE_FILES) as f64),
    ("walk-later", "files/s", (TREE_FOLDERS * TREE_FILES) as f64),
    ("walk-again", "files/s", (TREE_FOLDERS * TREE_FILES) as f64),
    ("write", "MiB/s", mib_of(STREAM_BYTES)),
    ("read", "MiB/s", mib_of(STREAM_BYTES)),
];
const METADATA_FILES: usize = 50;
const UNTAR_FOLDERS: usize = 5;
const TREE_FOLDERS: usize = 20;
const TREE_FILES: usize = 20;
const PACKAGES: usize = 4;
const PACKAGE_FILES: usize = 20;
const STREAM_BYTES: usize = 48 << 20;
const CHUNK_BYTES: usize = 1 << 20;
/// Both servers' answers are believed no longer then.
const LATER: Duration = Duration::from_millis(1200);

const fn mib_of(bytes: usize) -> f64 {
    (bytes >> 20) as f64
}

/// Measures; the first call runs this program again with a QEMU in `PATH` that adds the device.
pub(crate) fn measure(names: &[String]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|name| !ROWS.iter().any(|(known, ..)| known == name)) {
        bail!("there is no row `{unknown}`; there are {:?}", ROWS.map(|(name, ..)| name));
    }
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return run_again() };
    let engine = Engine::start(Stage::Qemu)?;
    let program = fs::read(std::env::current_exe()?)?;
    engine.load(&TestImage::new(vec![Layer::busybox()?, Layer::program("bench", &program)?]), GUEST_IMAGE)?;
    let bind = format!("{}:/ours", folder.join("ours").display());
    let serve = format!("mkdir /peer && mount -t virtiofs {TAG} /peer && echo READY && sleep 100000");
    let options = ["run", "-d", "--name", "files", "--privileged", "-v", &bind, GUEST_IMAGE];
    engine.engine([&options[..], &["sh", "-c", &serve]].concat())?.ok()?;
    wait_until("both folders are there", || {
        let said = engine.engine(["logs", "files"])?.ok()?;
        Ok(said.contains("READY").then_some(()))
    })?;
    let virtiofsd = std::env::var(PEER).ok().and_then(|pid| pid.parse().ok()).context("whose virtiofsd?")?;
    let servers = [engine.processes().find("engine-vmm")?.pid, virtiofsd];
    println!("{:<11} {:<8} {:>9} {:>9}  ratio   servers' processor time, woken", "", "", "ours", "virtiofsd");
    for (name, unit, count) in ROWS {
        if !names.is_empty() && !names.iter().any(|wanted| wanted == name) {
            continue;
        }
        for side in SIDES {
            prepare(&folder.join(side).join(name), name)?;
        }
        let before = [work(servers[0])?, work(servers[1])?];
        let said = engine.engine(["exec", "files", "/bench", GUEST, name])?.ok()?;
        let after = [work(servers[0])?, work(servers[1])?];
        let seconds = said.lines().map(|line| {
            let (ours, peer) = line.split_once(' ').context("no two figures")?;
            Ok((ours.parse()?, peer.parse()?))
        });
        let seconds: Vec<(f64, f64)> =
            seconds.collect::<Result<_>>().with_context(|| format!("{name}: {said}"))?;
        ensure!(seconds.len() == ROUNDS, "{name}: {said}");
        let ours = count / median(seconds.iter().map(|(ours, _)| *ours));
        let peer = count / median(seconds.iter().map(|(_, peer)| *peer));
        let ratio = median(seconds.iter().map(|(ours, peer)| peer / ours));
        let kept = if ratio >= 1.0 { "kept" } else { "MISSED" };
        let since =
            |side: usize, what: fn(&Work) -> u64| what(&after[side]).saturating_sub(what(&before[side]));
        let ran = [0, 1].map(|side| Duration::from_nanos(since(side, |work| work.ran)).as_millis());
        let woken = [0, 1].map(|side| since(side, |work| work.slept));
        println!(
            "{name:<11} {unit:<8} {ours:>9.1} {peer:>9.1}   {ratio:.2}   {} ms to {}, {} to {}   promised >= 1: {kept}",
            ran[0], ran[1], woken[0], woken[1]
        );
    }
    engine.finish()
}

/// Ended with this program.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends by itself with its client, and cannot be killed then.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run_again() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("files-").tempdir()?;
    for side in SIDES {
        fs::create_dir(folder.path().join(side))?;
    }
    let socket = folder.path().join("socket");
    let log = File::create(folder.path().join("log"))?;
    let child = Command::new("virtiofsd")
        .arg("--socket-path")
        .arg(&socket)
        .arg("--shared-dir")
        .arg(folder.path().join("peer"))
        .args(["--sandbox", "none"])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start `virtiofsd`: `cargo install --root FOLDER virtiofsd` makes one; put `FOLDER/bin` into PATH")?;
    let mut child = Peer(child);
    wait_until("virtiofsd listens", || {
        if let Some(status) = child.0.try_wait()? {
            bail!("virtiofsd ended at once: {status}: {}", fs::read_to_string(folder.path().join("log"))?);
        }
        Ok(socket.exists().then_some(()))
    })?;
    let script = format!(
        "#!/bin/sh\nexec {} \"$@\" -chardev socket,id=virtiofsd,path={} \
         -device vhost-user-fs-pci,chardev=virtiofsd,tag={TAG},queue-size=1024\n",
        real_qemu()?,
        socket.display()
    );
    let wrapper = folder.path().join(QEMU);
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let status = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env("PATH", format!("{}:{path}", folder.path().display()))
        .env(FOLDER, folder.path())
        .env(PEER, child.0.id().to_string())
        .status()?;
    ensure!(status.success(), "the measurement failed: {status}");
    Ok(())
}

/// Makes the folder of one row, and in it what is there before.
fn prepare(folder: &Path, row: &str) -> Result<()> {
    fs::create_dir(folder)?;
    match row {
        "walk-cold" | "walk-later" | "walk-again" => {
            tar::Archive::new(&archive(TREE_FOLDERS)?[..]).unpack(folder)?;
        }
        "read" => write(folder)?,
        _ => {}
    }
    Ok(())
}

/// The guest's end, for one row; prints how many seconds each time took ours and the other.
pub(crate) fn guest(words: &[String]) -> Result<()> {
    let [row] = words else { bail!("a row is wanted") };
    let folders = SIDES.map(|side| Path::new("/").join(side).join(row));
    for round in 0..ROUNDS {
        let mut seconds = [0.0; SIDES.len()];
        for turn in 0..SIDES.len() {
            let side = (round + turn) % SIDES.len();
            seconds[side] = once(row, &folders[side], round)
                .with_context(|| format!("in {}", folders[side].display()))?
                .as_secs_f64();
        }
        println!("{} {}", seconds[0], seconds[1]);
    }
    Ok(())
}

/// Does what a row names in `folder`, which all rounds share.
fn once(row: &str, folder: &Path, round: usize) -> Result<Duration> {
    let own = folder.join(round.to_string());
    match row {
        "metadata" | "untar" | "packages" | "write" => fs::create_dir(&own)?,
        _ => set_scene(row, folder)?,
    }
    match row {
        "metadata" => timed(|| metadata(&own)),
        "untar" => {
            let archive = archive(UNTAR_FOLDERS)?;
            timed(|| Ok(tar::Archive::new(&archive[..]).unpack(&own)?))
        }
        "packages" => timed(|| packages(&own)),
        "write" => {
            let took = timed(|| write(&own))?;
            fs::remove_dir_all(&own)?;
            Ok(took)
        }
        "read" => timed(|| read(folder)),
        _ => timed(|| walk(folder)),
    }
}

/// What a row wants to be known or forgotten before.
fn set_scene(row: &str, folder: &Path) -> Result<()> {
    const FORGET: &str = "/proc/sys/vm/drop_caches";
    match row {
        "read" => fs::write(FORGET, "1")?,
        "walk-cold" => {
            walk(folder)?;
            fs::write(FORGET, "2")?;
        }
        "walk-later" => {
            walk(folder)?;
            std::thread::sleep(LATER);
        }
        "walk-again" => walk(folder)?,
        other => bail!("there is no row `{other}`"),
    }
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// Seven calls for each file: make, close, ask, change, rename, ask for what is not there, remove.
fn metadata(folder: &Path) -> Result<()> {
    for number in 0..METADATA_FILES {
        let (one, other) = (folder.join(format!("one-{number}")), folder.join(format!("other-{number}")));
        drop(File::create_new(&one)?);
        ensure!(fs::metadata(&one)?.len() == 0);
        fs::set_permissions(&one, PermissionsExt::from_mode(0o600))?;
        fs::rename(&one, &other)?;
        ensure!(!one.try_exists()?);
        fs::remove_file(&other)?;
    }
    Ok(())
}

/// A source tree: folders with files of up to 8 KiB.
fn archive(folders: usize) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for folder in 0..folders {
        for file in 0..TREE_FILES {
            let content = vec![b'x'; 512 * (1 + (folder + file) % 16)];
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            header.set_mtime(1_767_225_600);
            builder.append_data(&mut header, format!("d{folder}/file-{file}"), &content[..])?;
        }
    }
    Ok(builder.into_inner()?)
}

/// As package managers do it: each file under another name first, each package in a folder of its own that is read in the end.
fn packages(folder: &Path) -> Result<()> {
    for package in 0..PACKAGES {
        let lib = folder.join(format!("package-{package}/lib"));
        fs::create_dir_all(&lib)?;
        for file in 0..PACKAGE_FILES {
            let (new, name) = (lib.join(format!("{file}.js.new")), lib.join(format!("{file}.js")));
            fs::write(&new, vec![b'x'; 900])?;
            fs::rename(&new, &name)?;
        }
        ensure!(fs::read_dir(&lib)?.count() == PACKAGE_FILES);
    }
    Ok(())
}

/// What `git status` asks of every file.
fn walk(folder: &Path) -> Result<()> {
    let mut count = 0;
    for entry in fs::read_dir(folder)? {
        for file in fs::read_dir(entry?.path())? {
            count += usize::from(fs::symlink_metadata(file?.path())?.is_file());
        }
    }
    ensure!(count == TREE_FOLDERS * TREE_FILES, "{count} files");
    Ok(())
}

fn write(folder: &Path) -> Result<()> {
    let chunk = vec![0x5a; CHUNK_BYTES];
    let mut file = File::create_new(folder.join("stream"))?;
    for _ in 0..STREAM_BYTES / CHUNK_BYTES {
        file.write_all(&chunk)?;
    }
    Ok(file.sync_all()?)
}

fn read(folder: &Path) -> Result<()> {
    let (mut buffer, mut count) = (vec![0; CHUNK_BYTES], 0);
    let mut file = File::open(folder.join("stream"))?;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            some => count += some,
        }
    }
    ensure!(mib(count as u64) == mib_of(STREAM_BYTES), "{count} bytes");
    Ok(())
}

//! Shared folders, ours beside virtiofsd's, in one guest on QEMU's software processor and by one program.
//!
//! The machine gets a second virtio-fs device, which virtiofsd serves with its own defaults; a privileged container has both, the
//! folder of the one bound, that of the other mounted. Time is measured inside, in turn (A B A B), and medians are compared.

use crate::boot::{median, mib};
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

const ROUNDS: usize = 9;
const GUEST_IMAGE: &str = "files:1";
/// The folder with both shared ones, in the environment of the second run of this program.
const FOLDER: &str = "ENGINE_BENCH_FILES";
/// What virtiofsd's device is found by.
const TAG: &str = "virtiofsd";

/// What is measured: its name, what a figure counts, and how many of that one run does.
const ROWS: [(&str, &str, f64); 8] = [
    ("metadata", "calls/s", METADATA_FILES as f64 * 7.0),
    ("untar", "files/s", (TREE_FOLDERS * TREE_FILES) as f64),
    ("packages", "files/s", (PACKAGES * PACKAGE_FILES) as f64),
    ("walk-cold", "files/s", (TREE_FOLDERS * TREE_FILES) as f64),
    ("walk-later", "files/s", (TREE_FOLDERS * TREE_FILES) as f64),
    ("walk-again", "files/s", (TREE_FOLDERS * TREE_FILES) as f64),
    ("write", "MiB/s", mib_of(STREAM_BYTES)),
    ("read", "MiB/s", mib_of(STREAM_BYTES)),
];
/// The rows with one large file.
const STREAMS: [&str; 2] = ["write", "read"];
const METADATA_FILES: usize = 150;
const TREE_FOLDERS: usize = 20;
const TREE_FILES: usize = 20;
const PACKAGES: usize = 12;
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
    println!("{:<14} {:<8} {:>10} {:>10}   ratio", "shared folders", "", "ours", "virtiofsd");
    for (name, unit, count) in ROWS {
        if !names.is_empty() && !names.iter().any(|wanted| wanted == name) {
            continue;
        }
        let mut figures = [const { Vec::<f64>::new() }; 2];
        for round in 0..ROUNDS {
            for (side, figures) in ["ours", "peer"].iter().zip(&mut figures) {
                let place = format!("{side}/{name}-{round}");
                prepare(&folder.join(&place), name)?;
                let said =
                    engine.engine(["exec", "files", "/bench", GUEST, &format!("/{place}"), name])?.ok()?;
                let seconds: f64 =
                    said.trim().parse().with_context(|| format!("{name} in {side}: {said}"))?;
                figures.push(count / seconds);
                // Trees stay: what the host deletes, ours repeats inside, in the middle of the other's turn.
                if STREAMS.contains(&name) {
                    fs::remove_dir_all(folder.join(&place))?;
                }
            }
        }
        let [ours, peer] = figures.map(|figures| median(figures.into_iter()));
        let ratio = ours / peer;
        let kept = if ratio >= 1.0 { "kept" } else { "MISSED" };
        println!("{name:<14} {unit:<8} {ours:>10.1} {peer:>10.1}   {ratio:.2}  promised >= 1: {kept}");
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
    for side in ["ours", "peer"] {
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
        .status()?;
    ensure!(status.success(), "the measurement failed: {status}");
    Ok(())
}

/// Makes the folder for one run, and in it what is there before.
fn prepare(folder: &Path, row: &str) -> Result<()> {
    fs::create_dir(folder)?;
    match row {
        "walk-cold" | "walk-later" | "walk-again" => tar::Archive::new(&archive()?[..]).unpack(folder)?,
        "read" => write(folder)?,
        _ => {}
    }
    Ok(())
}

/// The guest's end: `FOLDER ROW`; prints how many seconds it took.
pub(crate) fn guest(words: &[String]) -> Result<()> {
    let [folder, row] = words else { bail!("a folder and a row are wanted") };
    let folder = PathBuf::from(folder);
    let took = match row.as_str() {
        "metadata" => timed(|| metadata(&folder))?,
        "untar" => {
            let archive = archive()?;
            timed(|| Ok(tar::Archive::new(&archive[..]).unpack(&folder)?))?
        }
        "packages" => timed(|| packages(&folder))?,
        "walk-cold" | "walk-later" | "walk-again" => {
            walk(&folder)?;
            match row.as_str() {
                "walk-cold" => fs::write("/proc/sys/vm/drop_caches", "2")?,
                "walk-later" => std::thread::sleep(LATER),
                _ => walk(&folder)?,
            }
            timed(|| walk(&folder))?
        }
        "write" => timed(|| write(&folder))?,
        "read" => timed(|| read(&folder))?,
        other => bail!("there is no row `{other}`"),
    };
    println!("{}", took.as_secs_f64());
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
fn archive() -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for folder in 0..TREE_FOLDERS {
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

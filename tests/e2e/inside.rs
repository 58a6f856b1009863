//! What this program does in containers with folders they share: it watches and attacks. It comes there by a bind itself, so
//! it is also read and run from a shared folder.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::fs::{CWD, RenameFlags};
use tests_harness::{Engine, IMAGE};

use crate::volumes::ok;

/// Prints what happens in folders: `KIND NAME` a line, `READY` first.
pub(crate) const WATCH: &str = "watch-folders";
/// Tries to get at a file outside a folder.
pub(crate) const ATTACK: &str = "attack-outside";

/// The file that says that the attack begins.
pub(crate) const READY: &str = "ready";

/// Where the folder with this program is bound.
const TOOLS: &str = "/tools";

/// Arguments of `docker run` for one of the parts above, with `folder` at `/app`.
pub(crate) fn play(engine: &Engine, options: &[&str], folder: &Path, words: &[&str]) -> Result<String> {
    let tools = engine.path("share-tools");
    if !tools.exists() {
        fs::create_dir_all(&tools)?;
        fs::copy(std::env::current_exe()?, tools.join("own"))?;
    }
    let binds = [format!("{}:/app", folder.display()), format!("{}:{TOOLS}:ro", tools.display())];
    let own = format!("{TOOLS}/own");
    let arguments = [&["run"], options, &["-v", &binds[0], "-v", &binds[1], IMAGE, &own], words].concat();
    ok(engine, &arguments)
}

/// [`WATCH`].
pub(crate) fn watch(folders: &[String]) -> Result<()> {
    const KINDS: [(ReadFlags, &str); 9] = [
        (ReadFlags::CREATE, "CREATE"),
        (ReadFlags::DELETE, "DELETE"),
        (ReadFlags::MOVED_FROM, "MOVED_FROM"),
        (ReadFlags::MOVED_TO, "MOVED_TO"),
        (ReadFlags::MODIFY, "MODIFY"),
        (ReadFlags::CLOSE_WRITE, "CLOSE_WRITE"),
        (ReadFlags::ATTRIB, "ATTRIB"),
        (ReadFlags::DELETE_SELF, "DELETE_SELF"),
        (ReadFlags::QUEUE_OVERFLOW, "OVERFLOW"),
    ];
    let wanted = WatchFlags::from_bits_retain(
        KINDS.iter().fold(0, |bits, (kind, _)| bits | kind.bits()) & !ReadFlags::QUEUE_OVERFLOW.bits(),
    );
    let instance = inotify::init(CreateFlags::CLOEXEC)?;
    for folder in folders {
        inotify::add_watch(&instance, folder.as_str(), wanted)?;
    }
    let mut out = std::io::stdout();
    writeln!(out, "READY")?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(&instance, &mut buffer);
    loop {
        let event = reader.next()?;
        let name = event.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        for (_, kind) in KINDS.iter().filter(|(kind, _)| event.events().contains(*kind)) {
            writeln!(out, "{kind} {name}")?;
        }
    }
}

/// [`ATTACK`]: `/app` and the path of a folder outside it, which has a file `canary`; both have the same parent on the host.
pub(crate) fn attack(words: &[String]) -> Result<()> {
    const ROUNDS: usize = 60;
    /// A slow processor does fewer.
    const TIME: Duration = Duration::from_secs(5);
    let [outside] = words else { bail!("the folder outside is missing") };
    let outside = Path::new(outside);
    let app = Path::new("/app");
    let name = outside.file_name().context("a folder has a name")?;
    fs::create_dir_all(app.join("way/below"))?;
    fs::write(app.join("way/canary"), "harmless")?;
    // In the folder's place on the host these would lead out.
    symlink(Path::new("..").join(name), app.join("beside"))?;
    symlink(outside, app.join("absolute"))?;
    fs::write(app.join(READY), "")?;
    let ended = AtomicBool::new(false);
    let leaked = std::thread::scope(|scope| {
        scope.spawn(|| {
            for link in ["beside", "absolute"].iter().cycle() {
                if ended.load(Ordering::Relaxed) {
                    break;
                }
                // A folder and a link change places again and again, under those who are on their way through them.
                let (way, link) = (app.join("way"), app.join(link));
                let _exchanged = rustix::fs::renameat_with(CWD, &way, CWD, &link, RenameFlags::EXCHANGE);
                // Renaming takes locks of the folder, and would leave nobody else a turn.
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let began = Instant::now();
        let rounds = (0..ROUNDS).take_while(|round| *round == 0 || began.elapsed() < TIME);
        let leaked = rounds.filter(|round| reaches(app, *round)).count();
        ended.store(true, Ordering::Relaxed);
        leaked
    });
    ensure!(leaked == 0, "the secret was read {leaked} times");
    Ok(())
}

/// Everything by which a file outside could be read, changed or taken. What fails is well; what succeeds must not show it.
fn reaches(app: &Path, round: usize) -> bool {
    let ways = ["way", "beside", "absolute", "way/below/../../way", "way/below/../../../out"];
    let taken = app.join(format!("taken-{round}"));
    let mut seen = false;
    for way in ways {
        let canary = app.join(way).join("canary");
        seen |= fs::read(&canary).is_ok_and(|bytes| bytes.starts_with(b"secret"));
        let _written =
            OpenOptions::new().write(true).open(&canary).and_then(|mut file| file.write_all(b"harmful!"));
        if fs::hard_link(&canary, &taken).is_ok() {
            seen |= fs::read(&taken).is_ok_and(|bytes| bytes.starts_with(b"secret"));
            let _removed = fs::remove_file(&taken);
        }
        let moved = app.join(way).join(format!("moved-{round}"));
        if fs::rename(&canary, &moved).is_ok() {
            seen |= fs::read(&moved).is_ok_and(|bytes| bytes.starts_with(b"secret"));
            let _back = fs::rename(&moved, &canary);
        }
        let _made = fs::write(app.join(way).join("planted"), "x");
        let _emptied = OpenOptions::new().write(true).open(&canary).and_then(|file| file.set_len(8));
    }
    seen
}

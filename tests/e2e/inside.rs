//! What this program does in containers with folders they share: it watches, attacks and works on files. It comes there by a
//! bind itself, so it is also read and run from a shared folder.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::fs::{CWD, FallocateFlags, RenameFlags};
use tests_harness::{Engine, IMAGE};

use crate::volumes::ok;

/// Prints what happens in folders: `KIND NAME` a line, `READY` first.
pub(crate) const WATCH: &str = "watch-folders";
/// Tries to get at a file outside a folder.
pub(crate) const ATTACK: &str = "attack-outside";
/// Works on a file at random, and compares it with what should be in it.
pub(crate) const WORK: &str = "work-at-random";

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

/// [`WORK`]: a file, which is made, and a number to begin at random with. What should be in the file is written beside it.
pub(crate) fn work(words: &[String]) -> Result<()> {
    const STEPS: usize = 1500;
    const BYTES_MAX: u64 = 256 << 10;
    let [path, seed] = words else { bail!("a file and a number are wanted") };
    let (path, mut random) = (PathBuf::from(path), Random(seed.parse()?));
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    File::create_new(&path)?;
    // Through two open files, one of them opened anew now and then.
    let (first, mut second) = (open()?, open()?);
    let mut model: Vec<u8> = Vec::new();
    for step in 0..STEPS {
        let file = if random.below(2) == 0 { &first } else { &second };
        let (offset, length) = (random.below(BYTES_MAX), random.below(16 << 10) + 1);
        let (from, to) = (offset as usize, (offset + length) as usize);
        match random.below(10) {
            0..=3 => {
                let bytes = vec![random.below(256) as u8; to - from];
                file.write_all_at(&bytes, offset)?;
                model.resize(model.len().max(to), 0);
                model[from..to].copy_from_slice(&bytes);
            }
            4..=6 => {
                let mut bytes = vec![0; to - from];
                let mut count = 0;
                while let read @ 1.. = file.read_at(&mut bytes[count..], offset + count as u64)? {
                    count += read;
                }
                let end = to.min(model.len());
                let wanted = model.get(from..end).unwrap_or_default();
                ensure!(bytes[..count] == *wanted, "step {step}: {count} bytes at {offset} are others");
            }
            7 => {
                file.set_len(offset)?;
                model.resize(from, 0);
            }
            8 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match rustix::fs::fallocate(file, flags, offset, length) {
                    // Not every file system of a host has holes.
                    Err(rustix::io::Errno::OPNOTSUPP) => {}
                    result => {
                        result?;
                        let end = to.min(model.len());
                        if let Some(hole) = model.get_mut(from..end) {
                            hole.fill(0);
                        }
                    }
                }
            }
            _ => second = open()?,
        }
        let size = fs::metadata(&path)?.len();
        ensure!(size == model.len() as u64, "step {step}: {size} bytes instead of {}", model.len());
    }
    first.sync_all()?;
    ensure!(fs::read(&path)? == model, "in the end the file is another");
    fs::write(path.with_extension("model"), &model)?;
    Ok(())
}

/// Numbers that look random (splitmix64), the same for the same beginning.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % end
    }
}

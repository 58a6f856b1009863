//! What this program does in containers with files of a shared folder: random work, compared at each step with what should
//! come of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, RenameFlags};
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Works on a file, and compares it with what should be in it.
pub(crate) const FILE: &str = "work-on-a-file";
/// Works on a tree of files, and on the same one somewhere else.
pub(crate) const TREE: &str = "work-on-a-tree";

const PAGE_BYTES: u64 = 4096;

/// [`FILE`]: a file, which is made, and a number to begin at random with. What should be in the file is written beside it.
pub(crate) fn on_a_file(words: &[String]) -> Result<()> {
    const STEPS: usize = 1500;
    const BYTES_MAX: u64 = 256 << 10;
    let [path, seed] = words else { bail!("a file and a number are wanted") };
    let (path, mut random) = (PathBuf::from(path), Random(seed.parse()?));
    let names = [path.clone(), path.with_extension("renamed")];
    let mut name = 0;
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    File::create_new(&path)?;
    // Through two open files, one of them opened anew now and then.
    let (first, mut second) = (open(&path)?, open(&path)?);
    let mut model: Vec<u8> = Vec::new();
    for step in 0..STEPS {
        let file = if random.below(2) == 0 { &first } else { &second };
        let (offset, length) = (random.below(BYTES_MAX), random.below(16 << 10) + 1);
        let (from, to) = (offset as usize, (offset + length) as usize);
        let end = to.min(model.len());
        match random.below(14) {
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
                    Err(Errno::OPNOTSUPP) => {}
                    result => {
                        result?;
                        if let Some(hole) = model.get_mut(from..end) {
                            hole.fill(0);
                        }
                    }
                }
            }
            9 => {
                let bytes = vec![random.below(256) as u8; length as usize];
                // As long as the others, so that it does not grow for ever.
                if (model.len() as u64) < BYTES_MAX {
                    OpenOptions::new().append(true).open(&names[name])?.write_all(&bytes)?;
                    model.extend(&bytes);
                }
            }
            10 | 11 if from < end => {
                let start = offset / PAGE_BYTES * PAGE_BYTES;
                let at = FileOffset::new(file.try_clone()?, start);
                let mapped: MmapRegion = MmapRegion::from_file(at, end - start as usize)?;
                let mut bytes = vec![0; end - from];
                mapped.as_volatile_slice().read_slice(&mut bytes, (offset - start) as usize)?;
                ensure!(bytes == model[from..end], "step {step}: mapped, bytes at {offset} are others");
                bytes.fill(random.below(256) as u8);
                mapped.as_volatile_slice().write_slice(&bytes, (offset - start) as usize)?;
                model[from..end].copy_from_slice(&bytes);
            }
            12 => {
                fs::rename(&names[name], &names[1 - name])?;
                name = 1 - name;
            }
            _ => second = open(&names[name])?,
        }
        let size = fs::metadata(&names[name])?.len();
        ensure!(size == model.len() as u64, "step {step}: {size} bytes instead of {}", model.len());
    }
    first.sync_all()?;
    ensure!(fs::read(&names[name])? == model, "in the end the file is another");
    fs::rename(&names[name], &path)?;
    fs::write(path.with_extension("model"), &model)?;
    Ok(())
}

/// The names in the tree: folders, and names that are in each of them.
const FOLDERS: [&str; 5] = ["", "a", "b", "a/a", "a/a/b"];
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// [`TREE`]: an empty folder, one to compare it with, and a number to begin at random with. Prints what there is in the end.
pub(crate) fn on_a_tree(words: &[String]) -> Result<()> {
    const STEPS: usize = 700;
    let [one, other, seed] = words else { bail!("two folders and a number are wanted") };
    let (one, other, mut random) = (Path::new(one), Path::new(other), Random(seed.parse()?));
    let mut done = BTreeMap::new();
    for step in 0..STEPS {
        let work = Work::any(&mut random);
        let (ours, theirs) = (work.run(one), work.run(other));
        ensure!(ours == theirs, "step {step}, {work:?}: {ours:?} instead of {theirs:?}");
        *done.entry(theirs.map_err(|error| error.raw_os_error())).or_insert(0) += 1;
        if step % 50 == 0 || step + 1 == STEPS {
            let (ours, theirs) = (tree(one)?, tree(other)?);
            ensure!(ours == theirs, "after step {step} there is\n{ours}\ninstead of\n{theirs}");
        }
    }
    // Work of which nothing succeeds, or all, compares little.
    ensure!(done.len() > 3 && done.get(&Ok(())).is_some_and(|count| *count > STEPS / 5), "{done:?}");
    print(&tree(one)?)
}

fn print(text: &str) -> Result<()> {
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// One call; paths are relative to the folder.
#[derive(Debug)]
enum Work {
    Write(PathBuf, usize),
    MakeFolder(PathBuf),
    MakePipe(PathBuf),
    Symlink(PathBuf),
    Link(PathBuf, PathBuf),
    Rename(PathBuf, PathBuf, RenameFlags),
    Unlink(PathBuf),
    RemoveFolder(PathBuf),
    Permissions(PathBuf, u32),
}

impl Work {
    fn any(random: &mut Random) -> Self {
        let path = |random: &mut Random| {
            let folder = FOLDERS[random.below(FOLDERS.len() as u64) as usize];
            Path::new(folder).join(NAMES[random.below(NAMES.len() as u64) as usize])
        };
        let (one, other, number) = (path(random), path(random), random.below(9000) as usize);
        match random.below(18) {
            0..=3 => Self::Write(one, number),
            4..=7 => Self::MakeFolder(one),
            8 => Self::MakePipe(one),
            9 => Self::Symlink(one),
            10 => Self::Link(one, other),
            11..=13 => Self::Rename(one, other, RenameFlags::from_bits_retain(number as u32 % 3)),
            14 | 15 => Self::Unlink(one),
            16 => Self::RemoveFolder(one),
            // An ordinary user on the host keeps the right to look.
            _ => Self::Permissions(one, number as u32 & 0o777 | 0o700),
        }
    }

    fn run(&self, root: &Path) -> Result<(), Errno> {
        let at = |path: &PathBuf| root.join(path);
        let outcome = |result: std::io::Result<()>| {
            result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
        };
        match self {
            Self::Write(path, length) => {
                // Nobody reads the pipes: to open one for writing would take for ever.
                let pipe =
                    |metadata: fs::Metadata| FileType::from_raw_mode(metadata.mode()) == FileType::Fifo;
                match fs::metadata(at(path)).is_ok_and(pipe) {
                    true => Err(Errno::NXIO),
                    false => outcome(fs::write(at(path), vec![b'x'; *length])),
                }
            }
            Self::MakeFolder(path) => outcome(fs::create_dir(at(path))),
            Self::MakePipe(path) => {
                rustix::fs::mknodat(CWD, at(path), FileType::Fifo, Mode::from_raw_mode(0o644), 0)
            }
            // One of a name in the same folder, which may be there.
            Self::Symlink(path) => outcome(std::os::unix::fs::symlink("c", at(path))),
            Self::Link(from, to) => rustix::fs::linkat(CWD, at(from), CWD, at(to), AtFlags::empty()),
            Self::Rename(from, to, flags) => rustix::fs::renameat_with(CWD, at(from), CWD, at(to), *flags),
            Self::Unlink(path) => outcome(fs::remove_file(at(path))),
            Self::RemoveFolder(path) => outcome(fs::remove_dir(at(path))),
            Self::Permissions(path, mode) => rustix::fs::chmod(at(path), Mode::from_raw_mode(*mode)),
        }
    }
}

/// What is below a folder, a line each: path, kind and permissions, links and size of what is no folder, and where links lead.
pub(crate) fn tree(root: &Path) -> Result<String> {
    let (mut lines, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let metadata = fs::symlink_metadata(&path)?;
            let mut line = format!("{} {:o}", path.strip_prefix(root)?.display(), metadata.mode());
            if metadata.is_dir() {
                folders.push(path);
            } else {
                write!(line, " {} {}", metadata.nlink(), metadata.len())?;
                if metadata.is_symlink() {
                    write!(line, " {}", fs::read_link(&path)?.display())?;
                }
            }
            lines.push(line);
        }
    }
    lines.sort();
    Ok(lines.join("\n"))
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

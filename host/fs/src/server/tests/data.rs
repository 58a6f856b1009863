//! Any work on one file by several open files has the results that the host's own file system gives for the same calls.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::files::shared;
use super::folder;
use super::guest::Guest;

/// How many times the file can be open.
const SLOTS: usize = 3;
/// Beyond several pages, and no multiple of one.
const OFFSET_MAX: u64 = 20_000;
const LENGTH_MAX: u64 = 9_000;
/// What the file is called by turns.
const NAMES: [&str; 2] = ["file", "other name"];

#[derive(Clone, Debug)]
enum Step {
    /// Reading, writing or both.
    Open(usize, u32),
    Close(usize),
    Read(usize, u64, u64),
    Write(usize, u64, u64, u8),
    Append(usize, u64, u8),
    /// By what is open, or by the name.
    Truncate(Option<usize>, u64),
    Allocate(usize, u64, u64, FallocateFlags),
    Copy((usize, u64), (usize, u64), u64),
    Seek(usize, u64, bool),
    Rename,
    /// Another name for it; the first goes.
    Relink,
    /// A file of the other name takes its place; what is open stays the old one.
    Replace,
}

fn step() -> impl Strategy<Value = Step> {
    let (slot, offset, length) = (0..SLOTS, 0..OFFSET_MAX, 1..LENGTH_MAX);
    let mode = prop_oneof![
        Just(FallocateFlags::empty()),
        Just(FallocateFlags::KEEP_SIZE),
        Just(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
        Just(FallocateFlags::ZERO_RANGE),
        Just(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
    ];
    let at = || (slot.clone(), offset.clone());
    prop_oneof![
        3 => (slot.clone(), 0..3u32).prop_map(|(slot, flags)| Step::Open(slot, flags)),
        1 => slot.clone().prop_map(Step::Close),
        4 => (at(), length.clone()).prop_map(|((slot, offset), length)| Step::Read(slot, offset, length)),
        5 => (at(), length.clone(), any::<u8>())
            .prop_map(|((slot, offset), length, byte)| Step::Write(slot, offset, length, byte)),
        2 => (slot.clone(), length.clone(), any::<u8>())
            .prop_map(|(slot, length, byte)| Step::Append(slot, length, byte)),
        2 => (prop::option::of(slot.clone()), offset.clone())
            .prop_map(|(slot, size)| Step::Truncate(slot, size)),
        3 => (at(), length.clone(), mode)
            .prop_map(|((slot, offset), length, mode)| Step::Allocate(slot, offset, length, mode)),
        2 => (at(), at(), length).prop_map(|(from, to, length)| Step::Copy(from, to, length)),
        1 => (at(), any::<bool>()).prop_map(|((slot, offset), hole)| Step::Seek(slot, offset, hole)),
        1 => Just(Step::Rename),
        1 => Just(Step::Relink),
        1 => Just(Step::Replace),
    ]
}

/// So many bytes that begin with `byte` and are not all the same.
fn pattern(byte: u8, length: u64) -> Vec<u8> {
    (0..length).map(|at| byte.wrapping_add((at % 251) as u8)).collect()
}

/// What a step gives back: data or a number.
type Outcome = Result<Vec<u8>, Errno>;

fn told(number: u64) -> Outcome {
    Ok(number.to_le_bytes().to_vec())
}

/// The file as the guest's kernel works on it.
struct Inside {
    guest: Guest,
    root: u64,
    name: usize,
    open: [Option<u64>; SLOTS],
}

impl Inside {
    fn node(&self) -> Result<u64, Errno> {
        Ok(self.guest.lookup(self.root, NAMES[self.name])?.node)
    }

    fn run(&mut self, step: &Step) -> Outcome {
        let (guest, root, name) = (&self.guest, self.root, NAMES[self.name]);
        let handle = |slot: usize| self.open[slot].ok_or(Errno::BADF);
        match *step {
            Step::Open(slot, flags) => {
                let new = guest.open(self.node()?, flags)?;
                if let Some(old) = self.open[slot].replace(new) {
                    self.guest.release(old);
                }
            }
            Step::Close(slot) => guest.release(self.open[slot].take().ok_or(Errno::BADF)?),
            Step::Read(slot, offset, length) => return guest.read(handle(slot)?, offset, length as u32),
            Step::Write(slot, offset, length, byte) => {
                return told(guest.write(handle(slot)?, offset, &pattern(byte, length))?.into());
            }
            Step::Append(slot, length, byte) => {
                // The guest's kernel asks for the end.
                let end = guest.attributes(self.node()?)?.size;
                return told(guest.write(handle(slot)?, end, &pattern(byte, length))?.into());
            }
            Step::Truncate(None, size) => {
                return told(guest.change(self.node()?, 1 << 3, (0, 0, 0, size))?.size);
            }
            Step::Truncate(Some(slot), size) => {
                guest.truncate(self.node()?, handle(slot)?, size)?;
            }
            Step::Allocate(slot, offset, length, mode) => {
                guest.with_range(43, handle(slot)?, offset, length, mode.bits())?;
            }
            Step::Copy((from, from_offset), (to, to_offset), length) => {
                let words = [handle(from)?, from_offset, 0, handle(to)?, to_offset, length, 0];
                let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let count = guest.ask(47, 2, &body)?;
                return told(u32::from_le_bytes([count[0], count[1], count[2], count[3]]).into());
            }
            Step::Seek(slot, offset, hole) => {
                return guest.with_range(46, handle(slot)?, offset, if hole { 4 } else { 3 }, 0);
            }
            Step::Rename => {
                guest.rename((root, name), (root, NAMES[1 - self.name]), 0)?;
                self.name = 1 - self.name;
            }
            Step::Relink => {
                guest.link(self.node()?, root, NAMES[1 - self.name])?;
                guest.unlink(root, name)?;
                self.name = 1 - self.name;
            }
            Step::Replace => {
                let (_, new) = guest.create(root, NAMES[1 - self.name], 2, 0o644)?;
                guest.write(new, 0, &pattern(1, 5000))?;
                guest.release(new);
                guest.rename((root, NAMES[1 - self.name]), (root, name), 0)?;
            }
        }
        Ok(Vec::new())
    }
}

/// The same on the host.
struct Beside {
    folder: PathBuf,
    name: usize,
    open: [Option<OwnedFd>; SLOTS],
}

impl Beside {
    fn path(&self, name: usize) -> PathBuf {
        self.folder.join(NAMES[name])
    }

    fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))
    }

    fn run(&mut self, step: &Step) -> Outcome {
        let path = self.path(self.name);
        let file = |slot: usize| self.open[slot].as_ref().ok_or(Errno::BADF);
        match *step {
            Step::Open(slot, flags) => {
                self.open[slot] = Some(Self::open(&path, OFlags::from_bits_retain(flags))?);
            }
            Step::Close(slot) => drop(self.open[slot].take().ok_or(Errno::BADF)?),
            Step::Read(slot, offset, length) => {
                let mut bytes = vec![0; length as usize];
                let count = rustix::io::pread(file(slot)?, &mut bytes, offset)?;
                bytes.truncate(count);
                return Ok(bytes);
            }
            Step::Write(slot, offset, length, byte) => {
                return told(rustix::io::pwrite(file(slot)?, &pattern(byte, length), offset)? as u64);
            }
            Step::Append(slot, length, byte) => {
                let end = rustix::fs::stat(&path)?.st_size as u64;
                return told(rustix::io::pwrite(file(slot)?, &pattern(byte, length), end)? as u64);
            }
            Step::Truncate(None, size) => {
                rustix::fs::ftruncate(Self::open(&path, OFlags::WRONLY)?, size)?;
                return told(size);
            }
            Step::Truncate(Some(slot), size) => rustix::fs::ftruncate(file(slot)?, size)?,
            Step::Allocate(slot, offset, length, mode) => {
                rustix::fs::fallocate(file(slot)?, mode, offset, length)?;
            }
            Step::Copy((from, mut from_offset), (to, mut to_offset), length) => {
                let (from, to) = (file(from)?, file(to)?);
                let (at, into) = (Some(&mut from_offset), Some(&mut to_offset));
                return told(rustix::fs::copy_file_range(from, at, to, into, length as usize)? as u64);
            }
            Step::Seek(slot, offset, hole) => {
                let from = if hole { SeekFrom::Hole(offset) } else { SeekFrom::Data(offset) };
                return told(rustix::fs::seek(file(slot)?, from)?);
            }
            Step::Rename => {
                rustix::fs::rename(&path, self.path(1 - self.name))?;
                self.name = 1 - self.name;
            }
            Step::Relink => {
                rustix::fs::link(&path, self.path(1 - self.name))?;
                rustix::fs::unlink(&path)?;
                self.name = 1 - self.name;
            }
            Step::Replace => {
                let new = self.path(1 - self.name);
                rustix::io::pwrite(
                    Self::open(&new, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?,
                    &pattern(1, 5000),
                    0,
                )?;
                rustix::fs::rename(new, path)?;
            }
        }
        Ok(Vec::new())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn a_file_behaves_like_one_on_the_hosts_disk(steps in prop::collection::vec(step(), 1..80)) {
        let (within, guest, root) = shared();
        let outside = folder();
        let (_, first) = guest.create(root, NAMES[0], 2, 0o644).unwrap();
        let own = Beside::open(&outside.path().join(NAMES[0]), OFlags::RDWR | OFlags::CREATE).unwrap();
        let mut inside = Inside { guest, root, name: 0, open: [Some(first), None, None] };
        let mut beside =
            Beside { folder: outside.path().to_owned(), name: 0, open: [Some(own), None, None] };
        for step in &steps {
            prop_assert_eq!(inside.run(step), beside.run(step), "{:?}", step);
            let node = inside.node().unwrap();
            let size = fs::metadata(beside.path(beside.name)).unwrap().len();
            prop_assert_eq!(inside.guest.attributes(node).unwrap().size, size, "{:?}", step);
        }
        let read = |folder: &Path| fs::read(folder.join(NAMES[beside.name])).unwrap();
        prop_assert_eq!(read(within.path()), read(outside.path()));
    }
}

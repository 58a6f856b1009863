//! Caches of files, by control group: who made the kernel read or write a page first is charged for it.
//!
//! A group with processes keeps what it uses:
//!
//! - One that did some work between [`Caches::look`] and [`Caches::let_go`] is left alone.
//! - Of the others goes what the kernel thinks is not in use (`inactive_file`). It goes by the ages of pages: a group that is asked
//!   for very little has it look which were touched by programs that have mapped them, and the rest grow older.
//! - Reading by a system call does not make a page younger. So if much of what went comes back, it was in use all the same,
//!   and the group is left alone the next time, then the next two, and so on.
//!
//! What a container has left behind when it ended is nobody's, and goes as a whole.
//!
//! Linux `Documentation/admin-guide/cgroup-v2.rst`: `memory.stat`, `memory.reclaim`, `cpu.stat`;
//! `Documentation/mm/multigen_lru.rst`: ageing.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::mounts::CGROUPS;

/// Asked for at a time: between two the machine may turn out to be in use again.
const STEP_BYTES: u64 = 32 << 20;
/// A page: so little that it only makes the kernel look at ages.
const PAGE_BYTES: u64 = 4096;
/// What is not worth the work.
const TRIFLE_BYTES: u64 = 1 << 20;
/// When this much was freed, what is left is moved together: only whole blocks of free pages are reported to the host.
const COMPACT_BYTES: u64 = 8 << 20;
/// A group that worked for more than this part of the time was at work: a program that waits and looks at a clock now and then does
/// not.
const WORK_PART: u32 = 200;
/// When this part of what a group lost has come back, it was in use.
const BACK_PART: u64 = 4;
/// How often a group is left alone at the most before it is tried again.
const SPARED_MAX: u32 = 64;
/// Moves pages together when written to (Linux `Documentation/admin-guide/sysctl/vm.rst`).
const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// What a group says of its pages in `memory.stat`, with the groups below it. In bytes, but for `refaults`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pages {
    /// Of files.
    file: u64,
    /// Of these, those with no file behind them.
    shmem: u64,
    /// Of these, those that programs have mapped.
    mapped: u64,
    /// Of these, those that nobody came back to.
    inactive: u64,
    /// How many pages of files were read again after they had been reclaimed, ever.
    refaults: u64,
}

impl Pages {
    fn of(group: &Path) -> Self {
        // A group may be gone by now.
        Self::parse(&fs::read_to_string(group.join("memory.stat")).unwrap_or_default())
    }

    fn parse(stat: &str) -> Self {
        Self {
            file: figure(stat, "file"),
            shmem: figure(stat, "shmem"),
            mapped: figure(stat, "file_mapped"),
            inactive: figure(stat, "inactive_file"),
            refaults: figure(stat, "workingset_refault_file"),
        }
    }

    /// Caches that no program has mapped. Shared memory is among the mapped, or a little too much is kept.
    fn cache(self) -> u64 {
        self.file.saturating_sub(self.shmem).saturating_sub(self.mapped)
    }

    /// What of it a group with processes may do without.
    fn unused(self) -> u64 {
        self.inactive.min(self.cache())
    }
}

/// The figure of this name in a file of `NAME FIGURE` lines; zero if there is none.
fn figure(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|line| line.trim().parse().ok()).unwrap_or(0)
}

/// What is remembered of a group with processes.
#[derive(Debug, Default)]
struct Known {
    /// What its processes had worked when it was looked at.
    worked: Duration,
    /// Pages it lost the last time, and its count of refaults after that.
    lost: Option<(u64, u64)>,
    /// How often it is left alone from here on.
    spared: u32,
    /// How often it was to be left alone the last time that what it lost came back.
    sparing: u32,
}

impl Known {
    /// Whether the group has been at work since it was looked at.
    fn works(&self, worked: Duration, within: Duration) -> bool {
        worked.saturating_sub(self.worked) > within / WORK_PART
    }

    /// Whether the group is left alone this time, because it came back to what it lost.
    fn is_spared(&mut self, pages: Pages) -> bool {
        if let Some((lost, refaults)) = self.lost.take() {
            let back = pages.refaults.saturating_sub(refaults);
            self.sparing = match back > lost / BACK_PART {
                true => self.sparing.saturating_mul(2).clamp(1, SPARED_MAX),
                false => 0,
            };
            self.spared = self.sparing;
        }
        let spared = self.spared > 0;
        self.spared = self.spared.saturating_sub(1);
        spared
    }
}

/// What came of letting go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes that are free now.
    pub freed: u64,
    /// A group keeps caches because it was at work; it may not be the next time.
    pub at_work: bool,
}

/// The machine's caches, and what is remembered of who uses them.
#[derive(Debug, Default)]
pub struct Caches {
    known: HashMap<PathBuf, Known>,
    looked: Option<Instant>,
}

impl Caches {
    /// Looks who is there, some time before caches are let go of.
    pub fn look(&mut self) {
        let groups: Vec<PathBuf> = tree().into_iter().flat_map(|(_, groups)| groups).collect();
        self.known.retain(|group, _| groups.contains(group));
        for group in groups {
            reclaim(&group, PAGE_BYTES);
            let worked = worked(&group);
            self.known.entry(group).or_default().worked = worked;
        }
        self.looked = Some(Instant::now());
    }

    /// Lets go of what nobody uses, until `stop` says that somebody uses the machine. Blocks for as long as the kernel works on
    /// it.
    pub fn let_go(&mut self, stop: &dyn Fn() -> bool) -> Outcome {
        let within = self.looked.map_or(Duration::ZERO, |looked| looked.elapsed());
        let mut outcome = Outcome::default();
        for (parent, groups) in tree() {
            let mut owned = 0;
            for group in &groups {
                let of_group = self.let_go_of(group, within, stop);
                outcome.freed += of_group.freed;
                outcome.at_work |= of_group.at_work;
                owned += Pages::of(group).cache();
            }
            // The rest is of groups that are gone. The kernel takes from these first.
            if groups != [parent.clone()] {
                outcome.freed += shrink(&parent, Pages::of(&parent).cache().saturating_sub(owned), stop);
            }
        }
        if outcome.freed >= COMPACT_BYTES
            && !stop()
            && let Err(error) = fs::write(COMPACT, "1")
        {
            debug!(%error, "memory cannot be moved together");
        }
        outcome
    }

    /// Lets go of what one group does not use.
    fn let_go_of(&mut self, group: &Path, within: Duration, stop: &dyn Fn() -> bool) -> Outcome {
        let freed = |freed| Outcome { freed, at_work: false };
        let pages = Pages::of(group);
        if !has_processes(group) {
            return freed(shrink(group, pages.cache(), stop));
        }
        // One that came only now is at work too.
        let known = self.known.get_mut(group).filter(|known| !known.works(worked(group), within));
        let Some(known) = known else {
            return Outcome { freed: 0, at_work: pages.unused() >= TRIFLE_BYTES };
        };
        if known.is_spared(pages) {
            return freed(0);
        }
        let bytes = shrink(group, pages.unused(), stop);
        if bytes > 0 {
            known.lost = Some((bytes / PAGE_BYTES, Pages::of(group).refaults));
        }
        freed(bytes)
    }
}

/// What the processes of a group have worked, ever.
fn worked(group: &Path) -> Duration {
    let stat = fs::read_to_string(group.join("cpu.stat")).unwrap_or_default();
    Duration::from_micros(figure(&stat, "usage_usec"))
}

/// Reclaims caches of a group and those below, step by step. Returns the bytes it has lost.
fn shrink(group: &Path, bytes: u64, stop: &dyn Fn() -> bool) -> u64 {
    if bytes < TRIFLE_BYTES {
        return 0;
    }
    let before = Pages::of(group).file;
    let mut left = bytes;
    while left > 0 && !stop() && reclaim(group, left.min(STEP_BYTES)) {
        left = left.saturating_sub(STEP_BYTES);
    }
    let freed = before.saturating_sub(Pages::of(group).file);
    debug!(group = %group.display(), bytes, freed, "caches reclaimed");
    freed
}

/// Asks for pages of files; `false` when there were fewer.
fn reclaim(group: &Path, bytes: u64) -> bool {
    // Swapping costs those who come back more than reading a file again.
    match fs::write(group.join("memory.reclaim"), format!("{bytes} swappiness=0")) {
        Ok(()) => true,
        Err(error) => {
            if error.kind() != io::ErrorKind::WouldBlock {
                debug!(group = %group.display(), bytes, %error, "caches cannot be reclaimed");
            }
            false
        }
    }
}

/// Whether there are processes in a group, or in those below. One that does not tell is taken to have some.
fn has_processes(group: &Path) -> bool {
    fs::read_to_string(group.join("cgroup.events"))
        .map_or(true, |events| !events.lines().any(|line| line == "populated 0"))
}

/// The groups right below the root, each with those right below it, or with itself if the memory of these is not counted.
fn tree() -> Vec<(PathBuf, Vec<PathBuf>)> {
    let groups = |parent: PathBuf| match accounted(&parent) {
        none if none.is_empty() => (parent.clone(), vec![parent]),
        groups => (parent, groups),
    };
    accounted(Path::new(CGROUPS)).into_iter().map(groups).collect()
}

/// The groups right below one whose memory is counted by itself.
fn accounted(group: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.join("memory.reclaim").exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "anon 5\nfile 1000\nshmem 100\nfile_mapped 200\ninactive_file 600\nactive_file 300\n\
        workingset_refault_anon 1\nworkingset_refault_file 7\n";

    #[test]
    fn what_is_mapped_or_shared_is_no_cache() {
        let pages = Pages::parse(STAT);
        let expected = Pages { file: 1000, shmem: 100, mapped: 200, inactive: 600, refaults: 7 };
        assert_eq!(pages, expected);
        assert_eq!((pages.cache(), pages.unused()), (700, 600));
        assert_eq!(Pages { mapped: 500, ..pages }.unused(), 400);
        assert_eq!(Pages::parse("file x\n"), Pages::default());
    }

    #[test]
    fn a_group_that_works_keeps_its_caches() {
        let known = Known { worked: Duration::from_secs(10), ..Known::default() };
        let within = Duration::from_secs(30);
        let after = |millis: u64| Duration::from_millis(10_000 + millis);
        assert!(!known.works(after(150), within));
        assert!(known.works(after(151), within));
        // Of a group of the same name, with a count that began anew.
        assert!(!known.works(Duration::ZERO, within));
    }

    #[test]
    fn a_group_that_comes_back_to_what_it_lost_is_left_alone_ever_longer() {
        let mut known = Known::default();
        let rounds_until_asked = |known: &mut Known, back: u64| {
            known.lost = Some((1000, 50));
            let pages = Pages { refaults: 50 + back, ..Pages::default() };
            (0..).take_while(|_| known.is_spared(pages)).count()
        };
        assert_eq!(rounds_until_asked(&mut known, 250), 0, "a quarter may");
        for expected in [1, 2, 4, 8, 16, 32, 64, 64] {
            assert_eq!(rounds_until_asked(&mut known, 251), expected);
        }
        assert_eq!(rounds_until_asked(&mut known, 0), 0);
        assert_eq!(rounds_until_asked(&mut known, 1000), 1, "from the beginning");
    }
}

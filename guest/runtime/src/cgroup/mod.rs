//! A container's control group: kill, freeze, count, remove.
//!
//! Works on the three layouts there are: v1 (a folder per hierarchy), hybrid (v1 plus a v2 tree beside it) and pure v2.
//! Making the group and setting its first limits is libcontainer's; this is what must also work without it, after its
//! process was killed. [`support`] tells which limits the kernel can enforce, [`Cgroup::update`] changes them.

pub mod oom;
pub mod support;
mod update;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest_mountinfo::Mount;
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

pub use self::oom::OomWatch;
pub use self::support::Support;

/// How long killed processes may take to go away: one in an uninterruptible read from a slow disk needs seconds.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a freeze may take.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Why a group could not be changed.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// Not absolute, or it climbs.
    #[error("cgroup path {path} must be absolute and without `..`, and not the root")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {verb} {path}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something took too long.
    #[error("the processes of cgroup {path} did not {what} within {seconds} s")]
    Timeout {
        /// Which group.
        path: PathBuf,
        /// What was waited for.
        what: &'static str,
        /// How long.
        seconds: u64,
    },
    /// No hierarchy can freeze it.
    #[error("cgroup {path} cannot be frozen: it is in no hierarchy with a freezer")]
    NoFreezer {
        /// Which group.
        path: PathBuf,
    },
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::File { verb, path, source }
}

/// The root of one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    /// Version 2.
    unified: bool,
}

impl Hierarchy {
    /// Whether its controllers are shared out to the groups below.
    fn is_shared_out(&self) -> bool {
        fs::read_to_string(self.root.join("cgroup.subtree_control"))
            .is_ok_and(|shared| !shared.trim().is_empty())
    }
}

/// One group, in every hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
    folders: Vec<Hierarchy>,
}

impl Cgroup {
    /// The group at an absolute path below the roots of all mounted hierarchies. It need not exist.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        use std::path::Component;
        let invalid = || CgroupError::Path { path: path.to_owned() };
        let relative = path.strip_prefix("/").map_err(|_| invalid())?;
        let plain = relative.components().all(|component| matches!(component, Component::Normal(_)));
        if !plain || relative.as_os_str().is_empty() {
            return Err(invalid());
        }
        let table = Path::new("/proc/thread-self/mountinfo");
        let mounts = guest_mountinfo::read().map_err(failed("read", table))?;
        let folders = hierarchies(mounts)
            .into_iter()
            .map(|hierarchy| Hierarchy { root: hierarchy.root.join(relative), ..hierarchy })
            .collect();
        Ok(Self { path: path.to_owned(), folders })
    }

    /// Whether any folder of it exists.
    pub fn exists(&self) -> bool {
        self.existing().next().is_some()
    }

    /// The v2 folder where v2 is the only version: the one a device filter must guard.
    pub fn pure_unified(&self) -> Option<&Path> {
        match self.folders.as_slice() {
            [only] if only.unified => Some(&only.root),
            _ => None,
        }
    }

    fn existing(&self) -> impl Iterator<Item = &Hierarchy> {
        self.folders.iter().filter(|folder| folder.root.is_dir())
    }

    /// Where one of its control files is, in whichever hierarchy has it.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        self.existing().map(|folder| folder.root.join(name)).find(|path| path.exists())
    }

    /// Open files, one a hierarchy: a process that writes `0` into each has joined the group.
    ///
    /// An init system such as systemd moves into a group below and shares the controllers out to groups like that. Version 2
    /// then has no processes in the group itself (Linux `Documentation/admin-guide/cgroup-v2.rst`, "No Internal Process
    /// Constraint"), and the door is that of the first process's own group. `of_init` is that process's `/proc/PID/cgroup`.
    pub fn doors(&self, of_init: &str) -> io::Result<Vec<fs::File>> {
        let of_init = of_init.lines().find_map(|line| line.strip_prefix("0::")).map(Path::new);
        let below = of_init.and_then(|path| path.strip_prefix(&self.path).ok());
        let open = |folder: &Hierarchy| {
            let group = match below {
                Some(below) if folder.unified && folder.is_shared_out() => folder.root.join(below),
                _ => folder.root.clone(),
            };
            fs::OpenOptions::new().write(true).open(group.join("cgroup.procs"))
        };
        self.existing().map(open).collect()
    }

    /// The ids of all processes in it and below, each once, in ascending order.
    pub fn processes(&self) -> Vec<i32> {
        // Every hierarchy holds all of them; one that is not in the first was just being moved.
        let groups = self.existing().next().map(|folder| tree(&folder.root)).unwrap_or_default();
        let pids: std::collections::BTreeSet<i32> =
            groups.iter().flat_map(|group| processes(group)).map(|pid| pid.as_raw_nonzero().get()).collect();
        pids.into_iter().collect()
    }

    /// Kills every process in it and below, and waits until they are gone. Idempotent.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + KILL_TIMEOUT;
        loop {
            let mut living = 0;
            for folder in self.existing() {
                living += kill_folder(folder)?;
            }
            if living == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                let seconds = KILL_TIMEOUT.as_secs();
                return Err(CgroupError::Timeout {
                    path: self.path.clone(),
                    what: "end after SIGKILL",
                    seconds,
                });
            }
            sleep(POLL_INTERVAL);
        }
    }

    /// Removes the empty group and the groups below it. Idempotent.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + KILL_TIMEOUT;
        for folder in &self.folders {
            for group in tree(&folder.root) {
                loop {
                    match fs::remove_dir(&group) {
                        Ok(()) => break,
                        Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                        // Not empty: a process that has ended leaves its group only when it is reaped, and one that was
                        // just joining arrives late.
                        Err(error)
                            if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
                        {
                            self.kill()?;
                            sleep(POLL_INTERVAL);
                        }
                        Err(error) => return Err(failed("remove", &group)(error)),
                    }
                }
            }
        }
        Ok(())
    }

    /// Freezes or thaws every process in it, and waits for that.
    pub fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let deadline = Instant::now() + FREEZE_TIMEOUT;
        let folder = self
            .existing()
            .find(|folder| folder.root.join(freezer_file(folder)).exists())
            .ok_or_else(|| CgroupError::NoFreezer { path: self.path.clone() })?;
        let file = folder.root.join(freezer_file(folder));
        let (word, events) = match (folder.unified, frozen) {
            (true, true) => ("1", Some("frozen 1")),
            (true, false) => ("0", Some("frozen 0")),
            (false, true) => ("FROZEN", None),
            (false, false) => ("THAWED", None),
        };
        loop {
            fs::write(&file, word).map_err(failed("write", &file))?;
            let reached = match events {
                Some(line) => {
                    let events = folder.root.join("cgroup.events");
                    let text = fs::read_to_string(&events).map_err(failed("read", &events))?;
                    text.lines().any(|found| found == line)
                }
                None => fs::read_to_string(&file).map_err(failed("read", &file))?.trim_end() == word,
            };
            if reached {
                return Ok(());
            }
            if Instant::now() > deadline {
                if frozen {
                    // Half frozen is worse than running.
                    fs::write(&file, if folder.unified { "0" } else { "THAWED" })
                        .map_err(failed("write", &file))?;
                }
                let what = if frozen { "freeze" } else { "thaw" };
                let seconds = FREEZE_TIMEOUT.as_secs();
                return Err(CgroupError::Timeout { path: self.path.clone(), what, seconds });
            }
            sleep(POLL_INTERVAL);
        }
    }

    /// How many processes the kernel has killed in it for want of memory; 0 where nobody counts.
    pub fn oom_kills(&self) -> u64 {
        self.existing()
            .flat_map(|folder| {
                let name = if folder.unified { "memory.events" } else { "memory.oom_control" };
                fs::read_to_string(folder.root.join(name)).ok()
            })
            .filter_map(|text| counter(&text, "oom_kill"))
            .sum()
    }
}

fn freezer_file(folder: &Hierarchy) -> &'static str {
    if folder.unified { "cgroup.freeze" } else { "freezer.state" }
}

/// Kills what is in one folder; how many processes that were.
fn kill_folder(folder: &Hierarchy) -> Result<usize, CgroupError> {
    let pids: Vec<Pid> = tree(&folder.root).iter().flat_map(|group| processes(group)).collect();
    if pids.is_empty() {
        return Ok(0);
    }
    let kill_file = folder.root.join("cgroup.kill");
    if folder.unified && kill_file.exists() {
        return fs::write(&kill_file, "1").map(|()| pids.len()).map_err(failed("write", &kill_file));
    }
    for pid in &pids {
        match kill_process(*pid, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(failed("kill a process of", &folder.root)(error.into())),
        }
    }
    let freezer = folder.root.join("freezer.state");
    if freezer.exists() {
        // A frozen process dies only when it is thawed.
        fs::write(&freezer, "THAWED").map_err(failed("write", &freezer))?;
    }
    Ok(pids.len())
}

/// The processes of one group. A group that has gone has none.
fn processes(group: &Path) -> Vec<Pid> {
    let listed = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    // 0 stands for a process this namespace cannot name.
    listed.lines().filter_map(|line| line.parse().ok().and_then(Pid::from_raw)).collect()
}

/// A group and all below it, deepest first. Empty when it does not exist.
fn tree(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(folder) = pending.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        pending.extend(below.map(|entry| entry.path()));
        found.push(folder);
    }
    found.reverse();
    found
}

/// The value in a `name value` line.
fn counter(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The mounted hierarchies.
fn hierarchies(mounts: Vec<Mount>) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for mount in mounts {
        let unified = match mount.kind.as_str() {
            "cgroup" => false,
            "cgroup2" => true,
            _ => continue,
        };
        // A mount of a part of a hierarchy (a container's own view of it) does not start at the root.
        let hierarchy = Hierarchy { root: mount.point, unified };
        if mount.root == Path::new("/") && !found.contains(&hierarchy) {
            found.push(hierarchy);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_in_all_layouts() {
        let hybrid = "22 1 0:5 / /proc rw - proc proc rw\n\
            30 22 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
            31 22 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            32 22 0:27 /part /other rw - cgroup2 cgroup2 rw\n";
        let roots: Vec<_> = hierarchies(guest_mountinfo::parse(hybrid.as_bytes()))
            .into_iter()
            .map(|found| (found.root, found.unified))
            .collect();
        assert_eq!(
            roots,
            [("/sys/fs/cgroup/cpu".into(), false), ("/sys/fs/cgroup/unified".into(), true)]
                as [(PathBuf, bool); 2]
        );
        assert!(hierarchies(Vec::new()).is_empty());
    }

    #[test]
    fn paths_that_could_reach_other_groups_are_refused() {
        for path in ["", "/", "relative", "/a/../b", "/..", "//"] {
            assert!(Cgroup::open(Path::new(path)).is_err(), "{path}");
        }
        assert!(Cgroup::open(Path::new("/engine/abc")).is_ok());
    }

    #[test]
    fn a_group_that_is_not_there_is_clean() {
        let group = Cgroup::open(Path::new("/no-such-group-of-a-test/x")).unwrap();
        group.kill().unwrap();
        group.remove().unwrap();
        assert!(!group.exists());
        assert_eq!(group.oom_kills(), 0);
        assert!(matches!(group.freeze(true), Err(CgroupError::NoFreezer { .. })));
    }

    #[test]
    fn an_init_system_that_shares_out_is_joined_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("one"), folder.path().join("two"));
        for group in [&first, &second] {
            fs::create_dir_all(group.join("init.scope")).unwrap();
            fs::write(group.join("cgroup.procs"), "").unwrap();
            fs::write(group.join("init.scope/cgroup.procs"), "").unwrap();
        }
        let folders = [(&first, false), (&second, true)]
            .map(|(root, unified)| Hierarchy { root: root.clone(), unified })
            .to_vec();
        let group = Cgroup { path: "/engine/a".into(), folders };
        let files = [&first, &second]
            .map(|group| [group.join("cgroup.procs"), group.join("init.scope/cgroup.procs")]);
        let joined = |of_init: &str| {
            for mut door in group.doors(of_init).unwrap() {
                io::Write::write_all(&mut door, b"0").unwrap();
            }
            let entered = files.as_flattened().iter().map(|file| {
                let count = fs::read_to_string(file).unwrap().len();
                fs::write(file, "").unwrap();
                count
            });
            entered.collect::<Vec<_>>()
        };
        let of_init = "5:cpu:/engine/a/init.scope\n0::/engine/a/init.scope\n";
        assert_eq!(joined(of_init), [1, 0, 1, 0], "nothing is shared out");
        fs::write(second.join("cgroup.subtree_control"), "cpu memory\n").unwrap();
        assert_eq!(joined(of_init), [1, 0, 0, 1], "version 2 below, version 1 where it was");
        for elsewhere in ["0::/engine/another\n", ""] {
            assert_eq!(joined(elsewhere), [1, 0, 1, 0], "{elsewhere}");
        }
    }

    #[test]
    fn oom_kills_are_read_from_either_version() {
        assert_eq!(counter("low 0\noom 3\noom_kill 2\noom_group_kill 0\n", "oom_kill"), Some(2));
        assert_eq!(counter("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", "oom_kill"), Some(1));
        assert_eq!(counter("", "oom_kill"), None);
    }
}

//! Cleaning up after a shim that cannot do it itself.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use crate::cgroup::{Cgroup, CgroupError};
use crate::external::External;
use crate::shim::record::{self, EXIT_FILE, RecordError, STATE_FILE, StateRecord};
use crate::shim::{Exit, SOCKET_FILE};
use crate::sys::{self, ProcessStamp};

/// The runtime's own state, below a shim's folder.
pub const RUNTIME_DIR: &str = "runtime";
/// The bundle as handed to the runtime, below a shim's folder.
pub const BUNDLE_DIR: &str = "bundle";

/// How long a killed process may take to go.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Why something was left behind.
#[derive(Debug, Error)]
pub enum ReapError {
    /// A record could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The group could not be removed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A process could not be ended.
    #[error("cannot end process {pid}")]
    Process {
        /// Which one.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be removed.
    #[error("cannot remove {path}")]
    Remove {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Ends a shim, its container and everything in it, and removes the cgroup, the runtime's state and the socket.
///
/// Idempotent, and right at any moment of a shim's life: before it wrote anything, half-way through creating, after it
/// has gone. `exit.json` and logs stay; what `exit.json` says is returned. Blocks for some milliseconds usually, for
/// [`END_TIMEOUT`] at worst.
pub fn reap(dir: &Path) -> Result<Option<Exit>, ReapError> {
    if let Some(state) = record::read::<StateRecord>(dir, STATE_FILE)? {
        // The shim first, or it would go on making what is being removed.
        end(&state.shim)?;
        end_children(dir)?;
        // Once the shim is gone its record is final: one written since the read names init.
        let state = record::read::<StateRecord>(dir, STATE_FILE)?.unwrap_or(state);
        release(dir, &state)?;
    }
    remove_files(dir)?;
    Ok(record::read(dir, EXIT_FILE)?)
}

/// Ends the container of a record and removes its cgroup.
pub fn release(dir: &Path, state: &StateRecord) -> Result<(), ReapError> {
    let cgroup = state.cgroup.as_ref().map(|path| Cgroup::open(path)).transpose()?;
    release_from(dir, state, cgroup.as_ref())
}

/// The same, from a cgroup that has been opened.
pub fn release_from(dir: &Path, state: &StateRecord, cgroup: Option<&Cgroup>) -> Result<(), ReapError> {
    if let Some(runtime) = &state.runtime
        && dir.join(RUNTIME_DIR).exists()
    {
        // It may have more to remove than we know of. What it fails at, as where it made nothing yet, is done below.
        let _ = External::new(runtime, &state.container, dir).delete();
    }
    if let Some(init) = &state.init {
        signal(init)?;
    }
    if let Some(cgroup) = cgroup {
        cgroup.kill()?;
        cgroup.remove()?;
    }
    Ok(())
}

/// Removes what a shim leaves in its folder but for logs and `exit.json`.
pub fn remove_files(dir: &Path) -> Result<(), ReapError> {
    ignore_missing(&dir.join(SOCKET_FILE), |path| fs::remove_file(path))?;
    remove_runtime(dir)
}

/// Removes what creating a container leaves in a shim's folder.
pub fn remove_runtime(dir: &Path) -> Result<(), ReapError> {
    for name in [RUNTIME_DIR, BUNDLE_DIR] {
        ignore_missing(&dir.join(name), |path| fs::remove_dir_all(path))?;
    }
    // Last: as long as it is there, there may be something to remove.
    ignore_missing(&dir.join(STATE_FILE), |path| fs::remove_file(path))
}

fn ignore_missing(path: &Path, remove: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), ReapError> {
    match remove(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ReapError::Remove { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn signal(process: &ProcessStamp) -> Result<(), ReapError> {
    let failed = |source| ReapError::Process { pid: process.pid, source };
    if let Some(descriptor) = process.open().map_err(failed)? {
        sys::kill(&descriptor).map_err(failed)?;
    }
    Ok(())
}

/// Kills a process and waits until it has ended.
fn end(process: &ProcessStamp) -> Result<(), ReapError> {
    let failed = |source| ReapError::Process { pid: process.pid, source };
    let Some(descriptor) = process.open().map_err(failed)? else { return Ok(()) };
    sys::kill(&descriptor).map_err(failed)?;
    let timeout = Timespec { tv_sec: END_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
    match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)) {
        Ok(0) => Err(failed(io::ErrorKind::TimedOut.into())),
        Ok(_) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

/// Ends what a shim had forked to make a container and that is not in its cgroup yet. Nothing names such a process but
/// its command line, which it shares with the shim until it executes something else.
fn end_children(dir: &Path) -> Result<(), ReapError> {
    loop {
        let children = children_of(dir);
        if children.is_empty() {
            return Ok(());
        }
        // One that was forking while it was killed leaves another: look again.
        children.iter().try_for_each(end)?;
    }
}

fn children_of(dir: &Path) -> Vec<ProcessStamp> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| is_shim_of(&line, dir) || is_runtime_of(&line, dir))
        })
        .filter_map(|pid| ProcessStamp::of(pid).ok())
        .collect()
}

/// Whether a command line is `shim --dir DIR` for this folder.
fn is_shim_of(command_line: &[u8], dir: &Path) -> bool {
    let mut arguments = command_line.split(|byte| *byte == 0);
    let (_program, flag, folder) = (arguments.next(), arguments.next(), arguments.next());
    let same = |folder: &[u8]| {
        let folder = Path::new(OsStr::from_bytes(folder));
        folder == dir
            || folder.canonicalize().ok().is_some_and(|one| dir.canonicalize().is_ok_and(|two| one == two))
    };
    flag == Some(b"--dir") && folder.is_some_and(same)
}

/// Whether a command line is another runtime's that works for this folder's shim: `… --root DIR/runtime --log …`.
fn is_runtime_of(command_line: &[u8], dir: &Path) -> bool {
    let root = dir.join(RUNTIME_DIR);
    let arguments: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    let works = |words: &[&[u8]]| matches!(words, [b"--root", folder, b"--log"] if *folder == root.as_os_str().as_bytes());
    arguments.windows(3).any(works)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_folder_is_reaped_and_keeps_its_logs() {
        let dir = std::env::temp_dir().join(format!("reap-{}", std::process::id()));
        fs::create_dir_all(dir.join(RUNTIME_DIR)).unwrap();
        fs::write(dir.join("log"), "kept").unwrap();
        let exit = Exit { code: 3, finished_at: jiff::Timestamp::UNIX_EPOCH, oom_killed: false };
        record::write(&dir, EXIT_FILE, &exit).unwrap();
        assert_eq!(reap(&dir).unwrap(), Some(exit.clone()));
        assert_eq!(reap(&dir).unwrap(), Some(exit));
        assert!(!dir.join(RUNTIME_DIR).exists() && dir.join("log").exists());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn children_are_known_by_their_command_line() {
        let dir = Path::new("/run/engine/c1");
        assert!(is_shim_of(b"/usr/bin/shim\0--dir\0/run/engine/c1\0", dir));
        assert!(!is_shim_of(b"/usr/bin/shim\0--dir\0/run/engine/c2\0", dir));
        assert!(!is_shim_of(b"ls\0/run/engine/c1\0", dir));
        assert!(!is_shim_of(b"", dir));
        let line = b"crun\0--debug\0--root\0/run/engine/c1/runtime\0--log\0/x\0create\0c1\0";
        assert!(is_runtime_of(line, dir) && !is_runtime_of(line, Path::new("/run/engine/c2")));
        assert!(!is_runtime_of(b"ls\0/run/engine/c1/runtime\0", dir));
    }

    #[test]
    fn a_record_of_dead_processes_is_no_obstacle() {
        let dir = std::env::temp_dir().join(format!("reap-dead-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let gone = ProcessStamp { pid: 1, started: u64::MAX };
        let cgroup = Some(format!("/reap-test-{}", std::process::id()).into());
        let state =
            StateRecord { container: "c".into(), shim: gone, init: Some(gone), cgroup, runtime: None };
        record::write(&dir, STATE_FILE, &state).unwrap();
        assert_eq!(reap(&dir).unwrap(), None);
        assert!(!dir.join(STATE_FILE).exists());
        fs::remove_dir_all(&dir).unwrap();
    }
}

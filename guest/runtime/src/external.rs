//! Another OCI runtime, driven by its command line: the one that runc has, and crun, youki, runsc and others after it.
//!
//! `PROGRAM [ARGUMENT…] --root DIR/runtime --log FILE --log-format json VERB …`. The runtime makes the container and goes
//! away; the container's processes become children of whoever is their subreaper, the shim. What went wrong is the last
//! error of the log, as for containerd's shim for runc. Every call has a deadline, for the shim has one thread only.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Deserialize;
use thiserror::Error;

use crate::reap::RUNTIME_DIR;
use crate::shim::{ErrorKind, ExternalRuntime};

/// How long one call may take: one that mounts and makes cgroups on a busy machine without a real processor needs seconds.
const DEADLINE: Duration = Duration::from_secs(50);
/// How much of a log is read.
const LOG_LEN_MAX: u64 = 1 << 20;
const LOG_FILE: &str = "log.json";

/// Why the runtime did not do something.
#[derive(Debug, Error)]
pub enum ExternalError {
    /// It said why, or ended with a status.
    #[error("{message}")]
    Failed {
        /// In its own words.
        message: String,
    },
    /// It did not end.
    #[error("`{program} {verb}` did not end within {} s", DEADLINE.as_secs())]
    Deadline {
        /// The program.
        program: String,
        /// What it was to do.
        verb: String,
    },
    /// A step around it failed.
    #[error("cannot {step}")]
    Setup {
        /// Which step.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ExternalError {
    /// What the failure means for the caller: as dockerd, by the words.
    pub fn kind(&self) -> ErrorKind {
        let Self::Failed { message } = self else { return ErrorKind::Other };
        let text = message.to_lowercase();
        match () {
            () if text.contains("executable file not found")
                || text.contains("no such file or directory") =>
            {
                ErrorKind::NotFound
            }
            () if text.contains("permission denied") || text.contains("not a directory") => {
                ErrorKind::NotExecutable
            }
            () => ErrorKind::Other,
        }
    }
}

fn setup(step: &'static str) -> impl FnOnce(io::Error) -> ExternalError {
    move |source| ExternalError::Setup { step, source }
}

/// The runtime of one container.
#[derive(Debug, Clone)]
pub struct External {
    runtime: ExternalRuntime,
    container: String,
    folder: PathBuf,
}

/// What the runtime hands to a container's process as its own.
#[derive(Debug)]
pub struct Handed {
    /// Standard input.
    pub stdin: Stdio,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error. The runtime's own complaints come here too.
    pub stderr: Stdio,
}

impl External {
    /// The runtime of a container whose shim has this folder.
    pub fn new(runtime: &ExternalRuntime, container: &str, dir: &Path) -> Self {
        Self { runtime: runtime.clone(), container: container.to_owned(), folder: dir.join(RUNTIME_DIR) }
    }

    /// Which program it is.
    pub fn runtime(&self) -> &ExternalRuntime {
        &self.runtime
    }

    /// Makes the container of a bundle; its init waits to be started. Answers init's process id.
    ///
    /// `handed` are the process's streams; with a terminal they are the runtime's own, and the terminal's master comes to
    /// the socket `console`.
    pub fn create(
        &self,
        bundle: &Path,
        handed: Handed,
        console: Option<&Path>,
    ) -> Result<i32, ExternalError> {
        self.make(handed, console, |command| command.arg("create").arg("--bundle").arg(bundle))
    }

    /// Runs another process in the container, described by a file. Answers its process id.
    pub fn exec(&self, process: &Path, handed: Handed, console: Option<&Path>) -> Result<i32, ExternalError> {
        self.make(handed, console, |command| command.args(["exec", "--detach", "--process"]).arg(process))
    }

    fn make(
        &self,
        handed: Handed,
        console: Option<&Path>,
        verb: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Result<i32, ExternalError> {
        let pid_file = self.folder.join("pid");
        let mut command = self.command();
        verb(&mut command).arg("--pid-file").arg(&pid_file);
        if let Some(console) = console {
            command.arg("--console-socket").arg(console);
        }
        command.arg(&self.container);
        command.stdin(handed.stdin).stdout(handed.stdout).stderr(handed.stderr);
        self.finish(command, None)?;
        let pid = fs::read_to_string(&pid_file)
            .and_then(|text| text.trim().parse().map_err(io::Error::other))
            .map_err(setup("read the process id that the runtime left"))?;
        fs::remove_file(&pid_file).map_err(setup("remove the runtime's file with a process id"))?;
        Ok(pid)
    }

    /// Lets init execute its program.
    pub fn start(&self) -> Result<(), ExternalError> {
        self.plain(&["start".as_ref(), self.container.as_ref()])
    }

    /// Sends a signal to init.
    pub fn kill(&self, signal: i32) -> Result<(), ExternalError> {
        self.plain(&["kill".as_ref(), self.container.as_ref(), signal.to_string().as_ref()])
    }

    /// Freezes or thaws every process.
    pub fn freeze(&self, frozen: bool) -> Result<(), ExternalError> {
        self.plain(&[if frozen { "pause" } else { "resume" }.as_ref(), self.container.as_ref()])
    }

    /// Changes limits to those of a file.
    pub fn update(&self, resources: &Path) -> Result<(), ExternalError> {
        self.plain(&["update".as_ref(), "--resources".as_ref(), resources.as_ref(), self.container.as_ref()])
    }

    /// Kills what still runs and removes the container.
    pub fn delete(&self) -> Result<(), ExternalError> {
        self.plain(&["delete".as_ref(), "--force".as_ref(), self.container.as_ref()])
    }

    /// A verb that concerns no streams.
    fn plain(&self, words: &[&OsStr]) -> Result<(), ExternalError> {
        let said = File::from(
            memfd_create("said", MemfdFlags::CLOEXEC)
                .map_err(|error| setup("make a file in memory")(error.into()))?,
        );
        let mut command = self.command();
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(said.try_clone().map_err(setup("share a file in memory"))?);
        self.finish(command, Some(said))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.runtime.program);
        command.args(&self.runtime.arguments);
        command.arg("--root").arg(&self.folder).arg("--log").arg(self.folder.join(LOG_FILE));
        command.args(["--log-format", "json"]);
        command
    }

    /// Runs it to its end. `said` is where its standard error goes, if that is not a container's.
    fn finish(&self, mut command: Command, said: Option<File>) -> Result<(), ExternalError> {
        let log = self.folder.join(LOG_FILE);
        match fs::remove_file(&log) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(setup("remove the runtime's old log")(error));
            }
            _ => {}
        }
        let program = &self.runtime.program;
        let child =
            command.spawn().map_err(|error| ExternalError::Failed { message: not_run(program, &error) })?;
        // Our copies of the container's streams are in it.
        let verb = verb_of(&command, &self.runtime);
        drop(command);
        let status = wait(child)
            .map_err(setup("wait for the runtime"))?
            .ok_or_else(|| ExternalError::Deadline { program: program.display().to_string(), verb })?;
        if status.success() {
            return Ok(());
        }
        let logged = read(&log).map(|bytes| last_error(&bytes)).unwrap_or_default();
        let spoken = || said.and_then(|file| read_memory(file).ok()).filter(|text| !text.is_empty());
        let message = logged.or_else(spoken).unwrap_or_else(|| status.to_string());
        Err(ExternalError::Failed { message })
    }
}

fn verb_of(command: &Command, runtime: &ExternalRuntime) -> String {
    // Behind the runtime's own arguments come three with a value each.
    let verb = command.get_args().nth(runtime.arguments.len() + 6);
    verb.map(|verb| verb.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A program that could not be run, in the words of containerd's shim, by which clients tell the exit status.
fn not_run(program: &Path, error: &io::Error) -> String {
    let reason = error.raw_os_error().map_or_else(|| error.to_string(), crate::lookup::words);
    match program.components().count() {
        1 if error.kind() == io::ErrorKind::NotFound => {
            format!("exec: {:?}: executable file not found in $PATH", program.display().to_string())
        }
        _ => format!("fork/exec {}: {reason}", program.display()),
    }
}

/// Waits for a child's end, which nobody else may collect; `None` when it had to be killed.
fn wait(mut child: Child) -> io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    let handle = pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec { tv_sec: DEADLINE.as_secs().cast_signed(), tv_nsec: 0 };
    loop {
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) => {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
        }
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LOG_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn read_memory(mut file: File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(LOG_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// The last error of a runtime's log: one JSON object a line. What is none is passed over.
pub fn last_error(log: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Entry {
        level: String,
        msg: String,
    }
    let entries =
        log.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Entry>(line).ok());
    let mut errors = entries.filter(|entry| matches!(entry.level.as_str(), "error" | "fatal" | "panic"));
    errors.next_back().map(|entry| entry.msg.trim().to_owned()).filter(|message| !message.is_empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    /// A runtime that is a shell script, and a folder for it that goes away.
    struct Script {
        dir: PathBuf,
    }

    impl Script {
        fn new(name: &str, script: &str) -> (Self, External) {
            let dir = std::env::temp_dir().join(format!("external-{name}-{}", std::process::id()));
            fs::create_dir_all(dir.join(RUNTIME_DIR)).unwrap();
            let program = dir.join("runtime.sh");
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            let runtime = ExternalRuntime { program, arguments: vec!["--debug".into()] };
            let external = External::new(&runtime, "c1", &dir);
            (Self { dir }, external)
        }
    }

    impl Drop for Script {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.dir).unwrap();
        }
    }

    #[test]
    fn the_words_of_a_call_are_those_of_runc() {
        let (script, external) = Script::new("words", "echo \"$@\" >> \"$3\"/words");
        external.start().unwrap();
        external.kill(9).unwrap();
        external.freeze(true).unwrap();
        external.update(Path::new("/r.json")).unwrap();
        external.delete().unwrap();
        let root = script.dir.join(RUNTIME_DIR);
        let words = fs::read_to_string(root.join("words")).unwrap();
        let global = format!("--debug --root {0} --log {0}/log.json --log-format json ", root.display());
        let calls: Vec<&str> = words.lines().map(|line| line.strip_prefix(&global).unwrap()).collect();
        assert_eq!(
            calls,
            ["start c1", "kill c1 9", "pause c1", "update --resources /r.json c1", "delete --force c1"]
        );
    }

    #[test]
    fn a_failure_is_told_in_the_words_of_the_log_or_else_of_the_errors_or_else_by_the_status() {
        let said = |name: &str, script: &str| {
            let (_script, external) = Script::new(name, script);
            external.start().unwrap_err().to_string()
        };
        let log = r#"echo '{"level":"error","msg":"no"}' > "$5"; echo loud >&2; exit 1"#;
        assert_eq!(said("log", log), "no");
        assert_eq!(said("errors", "echo loud >&2; exit 1"), "loud");
        assert_eq!(said("status", "exit 3"), "exit status: 3");
    }

    #[test]
    fn a_process_id_is_taken_from_the_file() {
        let (script, external) =
            Script::new("pid", r#"while [ "$1" != --pid-file ]; do shift; done; printf 123 > "$2""#);
        let handed = || Handed { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() };
        assert_eq!(external.create(Path::new("/b"), handed(), None).unwrap(), 123);
        assert_eq!(external.exec(Path::new("/p"), handed(), Some(Path::new("/s"))).unwrap(), 123);
        assert!(!script.dir.join(RUNTIME_DIR).join("pid").exists());
    }

    #[test]
    fn a_program_that_is_not_there_is_named_as_containerd_does() {
        let run = |program: &str| {
            let runtime = ExternalRuntime { program: program.into(), arguments: Vec::new() };
            External::new(&runtime, "c", Path::new("/nowhere")).start().unwrap_err()
        };
        let missing = run("no-such-runtime");
        assert_eq!(missing.to_string(), "exec: \"no-such-runtime\": executable file not found in $PATH");
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert_eq!(run("/nowhere/x").to_string(), "fork/exec /nowhere/x: no such file or directory");
        assert_eq!(run("/etc").kind(), ErrorKind::NotExecutable);
    }

    #[test]
    fn the_last_error_of_a_log_counts() {
        let log = b"{\"level\":\"error\",\"msg\":\"first\"}\nnoise\n{\"level\":\"error\",\"msg\":\"last\\n\"}\n{\"level\":\"info\",\"msg\":\"x\"}\n";
        assert_eq!(last_error(log).as_deref(), Some("last"));
        assert_eq!(last_error(b""), None);
    }

    proptest! {
        #[test]
        fn any_log_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            last_error(&bytes);
        }
    }
}

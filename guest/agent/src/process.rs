//! Child processes of PID 1: its own, and the orphans of everyone else.
//!
//! PID 1 inherits every process whose parent ends, shims above all, and has to collect them all. One place does so:
//! nothing else in the agent waits for a process, so a status cannot go to the wrong one. Everything runs on one
//! thread; a child is registered before the thread can get round to collecting it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::debug;

/// Bytes of a tool's output that are kept: the last ones, where tools put their reason.
const OUTPUT_MAX: usize = 16 << 10;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with a status.
    Status(i32),
    /// By a signal.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Status(status) => write!(formatter, "ended with status {status}"),
            Exit::Signal(number) => write!(formatter, "was killed by signal {number}"),
        }
    }
}

/// A process that was started here.
#[derive(Debug)]
pub struct Child {
    /// Its number, valid until its exit has been received.
    pub pid: Pid,
    /// How it ended. Never closes without a value while the collector lives.
    pub exit: oneshot::Receiver<Exit>,
}

impl Child {
    /// Sends it a signal. A process that has ended takes none, which is no error.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        // The number may be another process's once the exit has been collected, and it has not been while the
        // channel is empty: both happen on this thread.
        if !self.exit.is_empty() || self.exit.is_terminated() {
            return Ok(());
        }
        match rustix::process::kill_process(self.pid, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// What a tool left behind.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub exit: Exit,
    /// The end of what it printed, without surrounding white space.
    pub output: String,
}

impl fmt::Display for Outcome {
    /// One line, not too long: tools like to spread out.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LENGTH_MAX: usize = 400;
        let lines: Vec<&str> = self.output.split(['\n', '\r', '\t']).map(str::trim).collect();
        let line = lines.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        let line: String =
            line.chars().filter(|character| !character.is_control()).take(LENGTH_MAX).collect();
        write!(formatter, "{}: {line}", self.exit)
    }
}

/// The children we wait for. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Processes {
    waiting: Rc<RefCell<HashMap<Pid, oneshot::Sender<Exit>>>>,
}

/// What one round of collecting met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// There are processes that live on.
    Alive,
    /// This process has no children at all.
    None,
}

impl Processes {
    /// Starts a process.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let child = command.spawn()?;
        let number = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = number.ok_or_else(|| io::Error::other("the kernel gave an impossible process number"))?;
        let (sender, exit) = oneshot::channel();
        self.waiting.borrow_mut().insert(pid, sender);
        Ok(Child { pid, exit })
    }

    /// Runs a tool to its end with nothing on its standard input, and returns what it printed.
    ///
    /// Not safe to drop: the tool would run on.
    pub async fn run(&self, program: &str, arguments: &[&str]) -> Result<Outcome> {
        let began = Instant::now();
        let (reader, writer) = io::pipe()?;
        let child = {
            let mut command = Command::new(program);
            command.args(arguments).stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
            self.spawn(&mut command).with_context(|| format!("cannot start {program}"))?
            // The command holds the pipe's writing end: it must be gone for the pipe to end.
        };
        let mut reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
        let mut output = Vec::new();
        while reader.read_buf(&mut output).await? > 0 {
            if output.len() > 2 * OUTPUT_MAX {
                output.drain(..output.len() - OUTPUT_MAX);
            }
        }
        let exit = child.exit.await.with_context(|| format!("lost track of {program}"))?;
        let output = String::from_utf8_lossy(&output).trim().to_owned();
        debug!(program, ?arguments, %exit, took = ?began.elapsed(), output, "tool");
        Ok(Outcome { exit, output })
    }

    /// Collects processes that ended, for ever.
    pub async fn collect(self) -> Result<()> {
        let mut ended = signal(SignalKind::child()).context("cannot listen for ended processes")?;
        loop {
            self.collect_now();
            // Never closes: the signal driver lives as long as the runtime.
            ended.recv().await;
        }
    }

    /// Collects all processes that have ended by now.
    pub fn collect_now(&self) -> Rest {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.ended(pid, status),
                Ok(None) => return Rest::Alive,
                Err(Errno::INTR) => {}
                Err(_no_children) => return Rest::None,
            }
        }
    }

    fn ended(&self, pid: Pid, status: WaitStatus) {
        let exit = match (status.exit_status(), status.terminating_signal()) {
            (Some(status), _) => Exit::Status(status),
            (None, Some(number)) => Exit::Signal(number),
            // Stopped or continued, which was not asked for.
            (None, None) => return,
        };
        if let Some(waiting) = self.waiting.borrow_mut().remove(&pid) {
            // Whoever started it may have lost interest.
            let _unwanted = waiting.send(exit);
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio::task::LocalSet;

    /// Collecting waits for any child of the process, and tests share a process: whoever starts a child holds this.
    pub static CHILDREN: Mutex<()> = Mutex::new(());

    #[test]
    fn statuses_reach_their_owners_and_orphans_are_collected() {
        let _children = CHILDREN.lock().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let local = LocalSet::new();
        local.block_on(&runtime, async {
            let processes = Processes::default();
            let collector = tokio::task::spawn_local(processes.clone().collect());

            let outcome = processes.run("sh", &["-c", "echo out; echo err >&2; exit 7"]).await.unwrap();
            assert_eq!(outcome.exit, Exit::Status(7));
            assert_eq!(outcome.output, "out\nerr");
            assert_eq!(outcome.to_string(), "ended with status 7: out; err");

            let mut sleeper = processes.spawn(Command::new("sleep").arg("1000")).unwrap();
            let quick = processes.spawn(&mut Command::new("true")).unwrap();
            assert_eq!(quick.exit.await.unwrap(), Exit::Status(0));
            sleeper.signal(Signal::TERM).unwrap();
            assert_eq!((&mut sleeper.exit).await.unwrap(), Exit::Signal(15));
            sleeper.signal(Signal::KILL).unwrap();

            let long = processes.run("sh", &["-c", "head -c 100000 /dev/zero | tr '\\0' x; echo end"]).await;
            let output = long.unwrap().output;
            assert!(output.ends_with("xend") && output.len() <= 3 * OUTPUT_MAX, "{}", output.len());

            let error = processes.run("/nonexistent/tool", &[]).await.unwrap_err();
            assert!(error.to_string().contains("/nonexistent/tool"), "{error}");
            assert!(processes.waiting.borrow().is_empty(), "nothing is waited for any more");
            assert_eq!(processes.collect_now(), Rest::None);
            collector.abort();
        });
    }
}

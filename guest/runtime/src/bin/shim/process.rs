//! One process of the container, from before it exists until its last byte of output.
//!
//! `Waiting → Running → Ended → Settled`: ended when the kernel says so, settled when its output has drained too, which
//! is when waiters learn of it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use guest_runtime::shim::{ConsoleSize, Exit, ProcessId, Stdin};
use jiff::Timestamp;
use oci_spec::runtime::Process as OciProcess;
use rustix::process::{Pid, PidfdFlags, WaitStatus, pidfd_open};
use rustix::termios::tcsetwinsize;

use crate::container::{Made, Wanted};
use crate::log::LogFile;
use crate::program::{Outcome, window};
use crate::streams::Streams;

/// How long output may keep coming after the end of its process: a grandchild may hold the pipe for ever.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// How much input is taken from clients ahead of the process.
const INPUT_LEN_MAX: usize = 64 * 1024;

/// An end that has not settled.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    pub code: i32,
    pub finished_at: Timestamp,
    pub drain_until: Instant,
}

/// One process.
pub struct Process {
    pub id: ProcessId,
    pub terminal: bool,
    pub stdin: Stdin,
    pub size: Option<ConsoleSize>,
    /// What to run, of an exec'd process that has not started.
    pub description: Option<Box<OciProcess>>,
    pub pid: i32,
    pub handle: Option<OwnedFd>,
    pub outcome: Option<Outcome>,
    pub started: bool,
    pub streams: Streams,
    pub log: Option<LogFile>,
    /// The last write to the log failed.
    pub log_fails: bool,
    pub ended: Option<Ended>,
    pub exit: Option<Exit>,
    /// The status to report when the program could not be executed.
    pub failed_code: Option<i32>,
    input: Vec<u8>,
    input_ends: bool,
}

impl Process {
    pub fn new(id: ProcessId, terminal: bool, stdin: Stdin, size: Option<ConsoleSize>) -> Self {
        Self {
            id,
            terminal,
            stdin,
            size,
            description: None,
            pid: 0,
            handle: None,
            outcome: None,
            started: false,
            streams: Streams::default(),
            log: None,
            log_fails: false,
            ended: None,
            exit: None,
            failed_code: None,
            input: Vec::new(),
            input_ends: false,
        }
    }

    pub fn wanted(&self) -> Wanted {
        Wanted { terminal: self.terminal, stdin: self.stdin, size: self.size }
    }

    /// Takes over what the runtime has made.
    pub fn adopt(&mut self, made: Made) -> std::io::Result<()> {
        self.pid = made.pid;
        self.streams = made.streams;
        self.outcome = Some(made.outcome);
        if let Some(pid) = Pid::from_raw(made.pid) {
            self.handle = Some(pidfd_open(pid, PidfdFlags::empty())?);
        }
        self.flush_input();
        Ok(())
    }

    /// Whether it runs, started or not.
    pub fn is_alive(&self) -> bool {
        self.handle.is_some() && self.ended.is_none()
    }

    /// Notes what the kernel said of its end.
    pub fn end(&mut self, status: WaitStatus) {
        let code = status
            .exit_status()
            .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
            .unwrap_or(255);
        self.end_with(self.failed_code.unwrap_or(code));
    }

    /// Notes an end with a status.
    pub fn end_with(&mut self, code: i32) {
        self.handle = None;
        self.ended =
            Some(Ended { code, finished_at: Timestamp::now(), drain_until: Instant::now() + DRAIN_TIMEOUT });
    }

    /// Whether its output has drained.
    pub fn is_drained(&self) -> bool {
        self.streams.outputs.iter().all(Option::is_none)
    }

    pub fn resize(&mut self, size: ConsoleSize) -> std::io::Result<()> {
        self.size = Some(size);
        match &self.streams.terminal {
            Some(terminal) => Ok(tcsetwinsize(terminal, window(size))?),
            None => Ok(()),
        }
    }

    /// Whether more input may be read from a client. What nobody will read is taken and dropped.
    pub fn has_input_room(&self) -> bool {
        self.input.len() < INPUT_LEN_MAX || !self.takes_input()
    }

    fn takes_input(&self) -> bool {
        let open = self.streams.stdin.is_some() || (self.pid == 0 && self.exit.is_none());
        open && self.stdin != Stdin::None && !self.input_ends && self.ended.is_none()
    }

    /// Whether input waits for the process to read.
    pub fn has_input(&self) -> bool {
        !self.input.is_empty() && self.streams.stdin.is_some()
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        if self.takes_input() {
            self.input.extend_from_slice(bytes);
            self.flush_input();
        }
    }

    /// A client that was feeding it has come to its end.
    pub fn feeder_left(&mut self) {
        if self.stdin == Stdin::Once {
            self.end_input();
        }
    }

    /// Closes the input once what is queued has been written. A terminal has no end of input but the character for it.
    pub fn end_input(&mut self) {
        if !self.terminal {
            self.input_ends = true;
            self.flush_input();
        }
    }

    /// Writes what the process takes.
    pub fn flush_input(&mut self) {
        let Some(stdin) = &self.streams.stdin else { return };
        let mut written = 0;
        let mut broken = false;
        while written < self.input.len() {
            match rustix::io::write(stdin, &self.input[written..]) {
                Ok(count) => written += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    // It has closed its end: the rest is for nobody.
                    broken = true;
                    break;
                }
            }
        }
        self.input.drain(..written);
        if broken {
            self.input = Vec::new();
        }
        if (broken && !self.terminal) || (self.input.is_empty() && self.input_ends) {
            self.streams.stdin = None;
        }
        if self.input.is_empty() {
            self.input = Vec::new();
        }
    }

    /// Lets go of everything but the exit status.
    pub fn release(&mut self) {
        self.streams = Streams::default();
        self.input = Vec::new();
        self.outcome = None;
        self.log = None;
        self.handle = None;
        self.description = None;
    }
}

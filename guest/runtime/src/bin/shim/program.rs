//! The last steps inside the container: find the program, and become it.
//!
//! libcontainer calls this in the forked child, after namespaces, root, user and capabilities are set. Failures go to
//! the shim through a pipe that closes by itself at `execve`: its end is the sign that the program runs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::rc::Rc;

use guest_runtime::defaults;
use guest_runtime::lookup::{self, LookupError};
use guest_runtime::shim::{ConsoleSize, ErrorKind};
use guest_runtime::sys::exec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::{Capabilities, LinuxCapabilities, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use serde::{Deserialize, Serialize};

use crate::filter::Filter;

/// How long after the start signal a program may take to be executed. Beyond, it counts as running.
const EXECUTE_TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A failure in the child's own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: ErrorKind,
    pub message: String,
}

/// Finds and executes a process's program.
#[derive(Clone)]
pub struct Program {
    report: Rc<Report>,
    size: Option<ConsoleSize>,
    foreign: Vec<RawFd>,
    seal: Option<Rc<Seal>>,
    found: RefCell<PathBuf>,
    home: RefCell<Option<String>>,
}

/// The last that is done to a process before its program is looked for.
#[derive(Debug)]
pub struct Seal {
    pub filter: Filter,
    /// What it may do in the end, when it was given more for the filter to be installed.
    pub capabilities: Option<LinuxCapabilities>,
}

impl Seal {
    fn apply(&self) -> io::Result<()> {
        self.filter.install()?;
        match &self.capabilities {
            Some(capabilities) => Ok(set_capabilities(None, kernel_sets(capabilities))?),
            None => Ok(()),
        }
    }
}

/// The shim's end of the pipe.
#[derive(Debug)]
pub struct Outcome {
    pipe: File,
}

impl Program {
    /// A program that will be executed in a terminal of this size, if it has one. `foreign` are the shim's own
    /// descriptors: the process lets go of them as early as it can. `seal` is put on it when it is all else.
    pub fn new(
        size: Option<ConsoleSize>,
        foreign: &[RawFd],
        seal: Option<Seal>,
    ) -> io::Result<(Self, Outcome)> {
        let (report, outcome) = Report::new()?;
        let program = Self {
            report: Rc::new(report),
            size,
            foreign: foreign.to_vec(),
            seal: seal.map(Rc::new),
            found: RefCell::default(),
            home: RefCell::default(),
        };
        Ok((program, outcome))
    }

    fn fail(&self, error: &LookupError) -> String {
        let failure = Failure { kind: error.kind(), message: error.to_string() };
        self.report.tell(&failure);
        failure.message
    }

    fn other(&self, step: &str, error: &dyn std::error::Error) -> ExecutorError {
        let message = format!("{step}: {}", crate::trace::chain(error));
        self.report.tell(&Failure { kind: ErrorKind::Other, message: message.clone() });
        ExecutorError::Other(message)
    }
}

/// The child's end of the pipe. Closes by itself at `execve`.
pub struct Report(OwnedFd);

impl Report {
    pub fn new() -> io::Result<(Self, Outcome)> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok((Self(writer), Outcome { pipe: File::from(reader) }))
    }

    /// Tells the shim.
    pub fn tell(&self, failure: &Failure) {
        if let Ok(text) = serde_json::to_vec(failure) {
            // A failure is short enough for one write into an empty pipe. If the shim is gone, nobody wants to know.
            let _ = rustix::io::write(&self.0, &text);
        }
    }
}

/// What the kernel said of a program that it did not execute.
pub fn refused(program: PathBuf, error: &io::Error) -> Failure {
    let errno = error.raw_os_error().unwrap_or(rustix::io::Errno::INVAL.raw_os_error());
    let error = LookupError::Refused { program, errno };
    Failure { kind: error.kind(), message: error.to_string() }
}

/// Capabilities as the kernel numbers them.
pub fn kernel_set(capabilities: &Option<Capabilities>) -> CapabilitySet {
    let bits =
        capabilities.iter().flatten().fold(0, |bits, capability| bits | 1 << defaults::number(*capability));
    CapabilitySet::from_bits_retain(bits)
}

/// The three sets that the kernel takes at once.
pub fn kernel_sets(capabilities: &LinuxCapabilities) -> CapabilitySets {
    CapabilitySets {
        effective: kernel_set(capabilities.effective()),
        permitted: kernel_set(capabilities.permitted()),
        inheritable: kernel_set(capabilities.inheritable()),
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        exec::close_inherited(&self.foreign);
        if let Some(seal) = &self.seal
            && let Err(error) = seal.apply()
        {
            let message = format!("cannot install the seccomp filter: {}", crate::trace::chain(&error));
            self.report.tell(&Failure { kind: ErrorKind::Other, message: message.clone() });
            return Err(ExecutorValidationError::ArgValidationError(message));
        }
        let process = spec.process().as_ref();
        let environment = process.and_then(|process| process.env().clone()).unwrap_or_default();
        let program =
            process.and_then(|process| process.args().as_ref()?.first().cloned()).unwrap_or_default();
        let found = lookup::find(&program, &environment)
            .map_err(|error| ExecutorValidationError::ArgValidationError(self.fail(&error)))?;
        self.found.replace(found);
        Ok(())
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The spec's own list has the order; only HOME may have been added to it, from the container's passwd.
        self.home.replace(envs.get("HOME").cloned());
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let arguments = process.args().clone().unwrap_or_default();
        let mut environment = process.env().clone().unwrap_or_default();
        if let Some(home) = self.home.take()
            && !environment.iter().any(|entry| entry.starts_with("HOME="))
        {
            environment.push(format!("HOME={home}"));
        }
        if let Some(size) = self.size {
            // Before the program asks. It may have closed a terminal of its own making: not worth failing for.
            let _ = tcsetwinsize(rustix::stdio::stdin(), window(size));
        }
        exec::reset_signals().map_err(|error| self.other("cannot reset signals", &error))?;
        let program = self.found.take();
        let error = exec::execute(&program, &arguments, &environment);
        let errno = error.raw_os_error().unwrap_or(rustix::io::Errno::INVAL.raw_os_error());
        Err(ExecutorError::Other(self.fail(&LookupError::Refused { program, errno })))
    }
}

/// A terminal's size as the kernel takes it.
pub fn window(size: ConsoleSize) -> Winsize {
    Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Outcome {
    /// Of a program that is known to have been executed.
    pub fn executed() -> io::Result<Self> {
        Report::new().map(|(_report, outcome)| outcome)
    }

    /// Waits until the program has been executed, or has failed.
    pub fn wait(self) -> Option<Failure> {
        let mut text = Vec::new();
        loop {
            let mut ready = [PollFd::new(&self.pipe, PollFlags::IN)];
            match poll(&mut ready, Some(&EXECUTE_TIMEOUT)) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) | Ok(0) => return None,
                Ok(_) => {}
            }
            let mut chunk = [0; 4096];
            match (&self.pipe).read(&mut chunk) {
                Ok(0) | Err(_) => break,
                Ok(count) => text.extend_from_slice(&chunk[..count]),
            }
        }
        // Nothing said means executed. A message cut short by a kill is no message.
        serde_json::from_slice(&text).ok()
    }

    /// What a failed creation said before it gave up.
    pub fn said(&self) -> Option<Failure> {
        let mut ready = [PollFd::new(&self.pipe, PollFlags::IN)];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        if !matches!(poll(&mut ready, Some(&zero)), Ok(1..)) {
            return None;
        }
        let mut chunk = [0; 4096];
        let count = (&self.pipe).read(&mut chunk).ok()?;
        serde_json::from_slice(&chunk[..count]).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_means_executed_and_a_failure_is_told() {
        let (program, outcome) = Program::new(None, &[], None).unwrap();
        drop(program);
        assert_eq!(outcome.wait(), None);
        let (program, outcome) = Program::new(None, &[], None).unwrap();
        program.fail(&LookupError::NotInPath { program: "foo".into() });
        drop(program);
        let failure = outcome.wait().unwrap();
        assert_eq!(failure.kind, ErrorKind::NotFound);
        assert_eq!(failure.message, "exec: \"foo\": executable file not found in $PATH");
    }

    #[test]
    fn capability_sets_become_the_kernels_bits() {
        let set = kernel_set(&Some(defaults::capabilities()));
        assert_eq!(set.bits(), 0xa804_25fb);
        assert_eq!(kernel_set(&None).bits(), 0);
    }
}

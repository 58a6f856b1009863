//! `docker-init`: a container's first process, when its program should not be that (`--init`).
//!
//! The shim's own file, mounted into the container under this name. It runs the program as a child in a process group
//! of its own, in the terminal's foreground where there is one, passes every signal on, collects whoever ends (orphans
//! are given to the first process), and ends with the program's status. The end of a first process ends all others.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use guest_runtime::sys::{AllSignals, exec};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, wait};

/// What the program is called inside a container.
pub const NAME: &str = "docker-init";
/// As a shell says that a program is not there, or is not one.
const STATUS_NOT_FOUND: u8 = 127;
const STATUS_NOT_EXECUTABLE: u8 = 126;
const STATUS_FAILURE: u8 = 1;
const STATUS_SIGNALLED: i32 = 128;

/// Whether this process was started under the name.
pub fn is_called(name: Option<&std::ffi::OsStr>) -> bool {
    name.is_some_and(|name| Path::new(name).file_name().is_some_and(|file| file == NAME))
}

/// `docker-init [--] PROGRAM [ARGUMENT…]`.
pub fn run(mut arguments: Vec<std::ffi::OsString>) -> ExitCode {
    if arguments.first().is_some_and(|first| first == "--") {
        arguments.remove(0);
    }
    let Some((program, rest)) = arguments.split_first() else {
        return refuse("usage: docker-init [--] PROGRAM [ARGUMENT...]", STATUS_FAILURE);
    };
    // Before the child is there, so that no signal for it is lost.
    let signals = match AllSignals::new() {
        Ok(signals) => signals,
        Err(error) => {
            return refuse(&format!("docker-init: cannot wait for signals: {error}"), STATUS_FAILURE);
        }
    };
    let child = match exec::spawn_in_foreground(program, rest) {
        Ok(child) => child,
        Err(error) => {
            let status = match error.kind() {
                io::ErrorKind::NotFound => STATUS_NOT_FOUND,
                _ => STATUS_NOT_EXECUTABLE,
            };
            let program = Path::new(program).display();
            return refuse(&format!("docker-init: cannot execute {program}: {error}"), status);
        }
    };
    match attend(&signals, child) {
        Ok(status) => ExitCode::from(status),
        Err(error) => refuse(&format!("docker-init: {error}"), STATUS_FAILURE),
    }
}

fn refuse(text: &str, status: u8) -> ExitCode {
    #[expect(clippy::print_stderr, reason = "standard error is the container's")]
    {
        eprintln!("{text}");
    }
    ExitCode::from(status)
}

/// Passes signals on until the child has ended.
fn attend(signals: &AllSignals, child: Pid) -> io::Result<u8> {
    loop {
        match signals.next()? {
            number if number == Signal::CHILD.as_raw() => {
                if let Some(status) = collect(child)? {
                    return Ok(status);
                }
            }
            number => signals.pass_on(child, number)?,
        }
    }
}

/// Collects everyone who has ended; the child's status once it is among them.
fn collect(child: Pid) -> io::Result<Option<u8>> {
    let mut own = None;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((ended, status))) if ended == child => own = status_of(status).or(own),
            Ok(Some(_)) => {}
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(own),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn status_of(status: WaitStatus) -> Option<u8> {
    let code = status.exit_status().or(status.terminating_signal().map(|signal| STATUS_SIGNALLED + signal));
    code.map(|code| code.to_le_bytes()[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides() {
        let called = |name: &str| is_called(Some(name.as_ref()));
        assert!(called("/sbin/docker-init") && called("docker-init"));
        assert!(!called("/usr/bin/shim") && !called("/docker-init/shim") && !is_called(None));
    }
}

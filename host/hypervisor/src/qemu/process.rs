//! One running QEMU: its descriptors, its end, its last words.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::Arc;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{PidfdFlags, Signal};

use super::command::{Machine, arguments};

/// Inherited descriptors get numbers from here on, clear of the standard three.
const FIRST_FD: RawFd = 10;
/// What is kept of QEMU's standard error: its last words matter.
const STDERR_BYTES_MAX: usize = 8 * 1024;

/// Descriptors that QEMU inherits, with their numbers there.
#[derive(Debug, Default)]
pub struct PassedFds(Vec<OwnedFd>);

impl PassedFds {
    /// Adds a descriptor; returns the number it has in QEMU.
    pub fn pass(&mut self, fd: impl Into<OwnedFd>) -> RawFd {
        self.0.push(fd.into());
        FIRST_FD + self.0.len() as RawFd - 1
    }
}

/// Everything needed to start QEMU.
#[derive(Debug)]
pub struct Launch {
    /// The program, as [`find`](super::find) found it.
    pub program: PathBuf,
    /// The machine.
    pub machine: Machine,
    /// The descriptors its devices name.
    pub fds: PassedFds,
}

/// QEMU could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start `{}`", program.display())]
pub struct LaunchError {
    program: PathBuf,
    #[source]
    source: io::Error,
}

/// A started QEMU. [`wait`](Self::wait) for it from any thread; [`Killer`] ends it from any other.
#[derive(Debug)]
pub struct Process {
    child: Child,
    killer: Killer,
    stderr: ChildStderr,
}

/// How QEMU ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code 0.
    pub success: bool,
    /// How it ended, as a phrase: `exited with code 1`, `was killed by signal 9`.
    pub description: String,
    /// The last of what it wrote to standard error.
    pub stderr: String,
}

/// Ends a QEMU, without the race between a process id and its reuse.
#[derive(Debug, Clone)]
pub struct Killer {
    pidfd: Arc<OwnedFd>,
}

/// Tells how much memory a QEMU holds for its guest.
#[derive(Debug)]
pub struct Meter {
    /// Open from the beginning: it stays this process's, whatever becomes of its number.
    status: File,
}

impl Meter {
    /// Bytes of the guest's RAM that the host holds now: RAM is all that QEMU shares.
    pub fn memory_held(&self) -> io::Result<u64> {
        let mut text = [0; 4096];
        let length = self.status.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(&text[..length]);
        let kib = text.lines().find_map(|line| line.strip_prefix("RssShmem:")?.trim().strip_suffix(" kB"));
        kib.and_then(|kib| kib.trim().parse().ok())
            .map(|kib: u64| kib * 1024)
            .ok_or_else(|| io::Error::other("the kernel does not tell QEMU's shared memory"))
    }
}

impl Launch {
    /// Starts QEMU, which dies with the calling thread.
    pub fn spawn(self) -> Result<Process, LaunchError> {
        let failed = |source| LaunchError { program: self.program.clone(), source };
        let mut command = Command::new(&self.program);
        command.args(arguments(&self.machine));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let numbered = self.fds.0.into_iter().zip(FIRST_FD..);
        let mappings = numbered.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect();
        command.fd_mappings(mappings).map_err(|error| failed(io::Error::other(error)))?;
        crate::process::die_with_parent(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        match supervise(&mut child) {
            Ok((killer, stderr)) => Ok(Process { child, killer, stderr }),
            Err(source) => {
                // Without its guards the process must not stay; it dies with us even if this fails.
                drop(child.kill().and_then(|()| child.wait()));
                Err(failed(source))
            }
        }
    }
}

fn supervise(child: &mut Child) -> io::Result<(Killer, ChildStderr)> {
    let pidfd = rustix::process::pidfd_open(crate::process::pid_of(child)?, PidfdFlags::empty())?;
    let stderr = child.stderr.take().ok_or_else(|| io::Error::other("standard error is not a pipe"))?;
    Ok((Killer { pidfd: Arc::new(pidfd) }, stderr))
}

/// Reads to the end, keeps the last part.
fn last_words(mut stderr: impl Read) -> String {
    let mut kept = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        match stderr.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => {
                tracing::debug!(text = %String::from_utf8_lossy(&chunk[..count]).trim_end(), "QEMU says");
                kept.extend_from_slice(&chunk[..count]);
                kept.drain(..kept.len().saturating_sub(STDERR_BYTES_MAX));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, "cannot read QEMU's messages");
                break;
            }
        }
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

impl Process {
    /// A handle that ends this process.
    pub fn killer(&self) -> Killer {
        self.killer.clone()
    }

    /// QEMU's process id, for messages.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// A handle that tells what this process holds.
    pub fn meter(&self) -> io::Result<Meter> {
        Ok(Meter { status: File::open(format!("/proc/{}/status", self.id()))? })
    }

    /// Waits until QEMU has ended. Its messages are read here, and nobody else has the other end of their pipe.
    pub fn wait(mut self) -> io::Result<Exit> {
        let stderr = last_words(self.stderr);
        let status = self.child.wait()?;
        Ok(Exit { success: status.success(), description: describe(status), stderr })
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended in an unknown way".into(),
    }
}

impl Killer {
    /// Ends QEMU at once. Harmless when it has already ended.
    pub fn kill(&self) {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(%error, "cannot kill QEMU"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::Accelerator;

    /// A script in QEMU's place.
    fn launch(script: &str, fds: PassedFds) -> (tempfile::TempDir, Result<Process, LaunchError>) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("qemu");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let machine = Machine {
            accelerator: Accelerator::Tcg,
            cpus: 1,
            memory_mib: 64,
            kernel: "/kernel".into(),
            initramfs: "/initramfs".into(),
            cmdline: String::new(),
            devices: Vec::new(),
            monitor: None,
        };
        // Another test's fork may hold the freshly written script open for writing for a moment (ETXTBSY).
        let process = loop {
            let fds = PassedFds(fds.0.iter().map(|fd| fd.try_clone().unwrap()).collect());
            match (Launch { program: program.clone(), machine: machine.clone(), fds }).spawn() {
                Err(error) if error.source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                other => break other,
            }
        };
        (folder, process)
    }

    #[test]
    fn failures_keep_the_last_words() {
        let (_folder, process) = launch("echo could not set up >&2; exit 3", PassedFds::default());
        let exit = process.unwrap().wait().unwrap();
        assert_eq!(exit.description, "exited with code 3");
        assert_eq!((exit.success, exit.stderr.as_str()), (false, "could not set up"));
    }

    #[test]
    fn only_the_end_of_many_messages_is_kept() {
        let text = format!("{}end", "x".repeat(STDERR_BYTES_MAX * 3));
        let kept = last_words(text.as_bytes());
        assert_eq!(kept.len(), STDERR_BYTES_MAX);
        assert!(kept.ends_with("xend"));
    }

    #[test]
    fn descriptors_have_the_numbers_that_were_told() {
        let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut fds = PassedFds::default();
        assert_eq!(fds.pass(File::open("/dev/null").unwrap()), 10);
        assert_eq!(fds.pass(theirs), 11);
        let script = r#"[ "$(readlink /proc/$$/fd/10)" = /dev/null ] && [ -S /proc/$$/fd/11 ]"#;
        let (_folder, process) = launch(script, fds);
        assert!(process.unwrap().wait().unwrap().success);
    }

    #[test]
    fn killing_twice_is_harmless() {
        let (_folder, process) = launch("exec sleep 600", PassedFds::default());
        let process = process.unwrap();
        let (killer, meter) = (process.killer(), process.meter().unwrap());
        assert!(meter.memory_held().unwrap() < 1 << 20, "a shell shares next to nothing");
        killer.kill();
        assert_eq!(process.wait().unwrap().description, "was killed by signal 9");
        killer.kill();
        assert!(meter.memory_held().is_err(), "nobody else's memory is told for its own");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let (folder, process) = launch("true", PassedFds::default());
        drop(process.unwrap().wait());
        let program = folder.path().join("missing");
        let machine = Machine {
            accelerator: Accelerator::Tcg,
            cpus: 1,
            memory_mib: 1,
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            cmdline: String::new(),
            devices: Vec::new(),
            monitor: None,
        };
        let error = Launch { program, machine, fds: PassedFds::default() }.spawn().unwrap_err();
        assert!(error.to_string().ends_with("/missing`"), "{error}");
    }
}

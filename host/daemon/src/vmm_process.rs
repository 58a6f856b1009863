//! `VmmProcess`: one `engine-vmm` child and the two threads that speak with it.
//!
//! The control channel blocks, so one thread sends and one receives; the supervisor meets them through queues. The
//! child ends when the channel closes, whoever closes it: dropping `VmmProcess` is enough to be rid of the machine.

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use guest_protocol::port;
use host_vmm::MachineSpec;
use host_vmm::control::{Channel, Command as VmmCommand, Event};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;
use tracing::{debug, warn};

/// Where the child finds its end of the control channel.
const CONTROL_FD: i32 = 3;
/// A child that takes no command for this long is stuck; the supervisor's deadlines deal with it.
const SEND_TIME_MAX: Duration = Duration::from_secs(5);

/// What the threads report, in order. `Gone` is the last.
pub(crate) enum Report {
    Event(Event, Vec<OwnedFd>),
    /// The process has been reaped; how it ended.
    Gone(String),
}

pub(crate) struct VmmProcess {
    commands: mpsc::Sender<(VmmCommand, Option<OwnedFd>)>,
    /// The process while it has not been reaped, so that a signal cannot meet another one.
    process: Arc<Mutex<Option<rustix::process::Pid>>>,
}

impl VmmProcess {
    /// Starts `program` on `spec`. `report` is called on a thread of its own.
    pub(crate) fn spawn(
        program: &Path,
        spec: MachineSpec,
        log: File,
        report: impl Fn(Report) + Send + 'static,
    ) -> Result<Self> {
        let (ours, theirs) =
            UnixStream::pair().context("cannot make the control channel of the VM process")?;
        let child = Command::new(program)
            .args(["--control-fd", &CONTROL_FD.to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot duplicate the log of the VM process")?)
            .stderr(log)
            .fd_mappings(vec![FdMapping { parent_fd: theirs.into(), child_fd: CONTROL_FD }])
            .context("cannot hand the control channel to the VM process")?
            .spawn()
            .with_context(|| format!("cannot start the VM process `{}`", program.display()))?;
        let (mut sender, mut receiver) =
            Channel::new(ours).context("cannot use the control channel of the VM process")?.split();
        sender.set_timeout(SEND_TIME_MAX).context("cannot set a time limit on the control channel")?;
        let process = Arc::new(Mutex::new(Some(rustix::process::Pid::from_child(&child))));

        let (commands, queue) = mpsc::channel::<(VmmCommand, Option<OwnedFd>)>();
        commands.send((VmmCommand::Start(spec), None)).context("the command queue is closed")?;
        std::thread::Builder::new().name("vmm-commands".into()).spawn(move || {
            for (command, fd) in queue {
                let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
                if let Err(error) = sender.send(&command, &fds) {
                    debug!(%error, "the VM process takes no more commands");
                    break;
                }
            }
            // The end of the queue is the end of the machine.
            sender.shutdown();
        })?;
        let reaped = Arc::clone(&process);
        std::thread::Builder::new().name("vmm-events".into()).spawn(move || {
            loop {
                match receiver.receive::<Event>() {
                    Ok(Some((event, fds))) => report(Report::Event(event, fds)),
                    Ok(None) => break,
                    Err(error) => {
                        warn!(%error, "the VM process does not speak the control protocol");
                        break;
                    }
                }
            }
            report(Report::Gone(reap(child, &reaped)));
        })?;
        Ok(Self { commands, process })
    }

    /// What takes connections to published ports into the machine, past the supervisor.
    pub(crate) fn sink(&self) -> host_forward::Sink {
        let commands = self.commands.clone();
        Arc::new(move |header, stream| {
            let connect = VmmCommand::Connect { port: port::FORWARD, header: Some(header) };
            if commands.send((connect, Some(stream))).is_err() {
                debug!("a connection was dropped: the machine is gone");
            }
        })
    }

    /// Sends one command with its descriptor. A process that is gone has said so by [`Report::Gone`].
    pub(crate) fn send(&self, command: VmmCommand, fd: Option<OwnedFd>) {
        if self.commands.send((command, fd)).is_err() {
            debug!("a command for a VM process that is gone was dropped");
        }
    }

    /// SIGKILL, when it does not answer commands.
    pub(crate) fn kill(&self) {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = *process
            && let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        {
            warn!(%error, "the VM process cannot be killed");
        }
    }
}

/// Waits for the end of `child` and returns how it ended.
fn reap(mut child: Child, process: &Mutex<Option<rustix::process::Pid>>) -> String {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    // First wait without reaping: as long as the process is a zombie its number belongs to it.
    let pid = Pid::from_child(&child);
    while let Err(rustix::io::Errno::INTR) =
        waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
    {}
    *process.lock().unwrap_or_else(PoisonError::into_inner) = None;
    match child.wait() {
        Ok(status) => status.to_string(),
        Err(error) => format!("its status is lost: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host_vmm::{BackendChoice, DiskSpec, NetworkSpec};

    fn spec() -> MachineSpec {
        MachineSpec {
            cpus: 1,
            memory_mib: 512,
            kernel: "/none".into(),
            vmlinux: None,
            initramfs: "/none".into(),
            cmdline: String::new(),
            disk: DiskSpec { path: "/none".into(), size_bytes: 1 << 30 },
            console_log: "/none".into(),
            backend: BackendChoice::Qemu,
            network: NetworkSpec::None,
            shares: Vec::new(),
            boot_timeout_seconds: 60,
        }
    }

    /// A child that ignores the protocol stands in for one that hangs, and one that dies at once.
    #[test]
    fn a_stuck_process_can_be_killed_and_is_reaped() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("stuck");
        std::fs::write(&program, "#!/bin/sh\nexec sleep 1000\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&program, mode).unwrap();
        let (reports, received) = mpsc::channel();
        let log = tempfile::tempfile().unwrap();
        let process = VmmProcess::spawn(&program, spec(), log, move |report| {
            let _ = reports.send(report);
        })
        .unwrap();
        process.kill();
        match received.recv_timeout(Duration::from_secs(60)).unwrap() {
            Report::Gone(status) => assert!(status.contains("signal: 9"), "{status}"),
            Report::Event(event, _) => panic!("{event:?}"),
        }
        assert!(process.process.lock().unwrap().is_none());
        process.kill();
    }

    #[test]
    fn a_missing_program_is_named() {
        let log = tempfile::tempfile().unwrap();
        let Err(error) = VmmProcess::spawn(Path::new("/nowhere/engine-vmm"), spec(), log, |_| {}) else {
            panic!("there is no such program");
        };
        assert!(error.to_string().contains("/nowhere/engine-vmm"));
    }
}

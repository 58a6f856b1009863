//! The `engine-vmm` process against a script in QEMU's place: how it starts, stops and dies.
//!
//! What needs a real guest is in tests/e2e.
#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use host_vmm::control::{self, Event, StopReason};
use host_vmm::{BackendChoice, Channel, DiskSpec, MachineSpec, NetworkSpec};

const LIMIT: Duration = Duration::from_secs(30);

/// An `engine-vmm` of our own, whose QEMU is a script that first writes its process id to a file.
struct Vmm {
    folder: tempfile::TempDir,
    process: Child,
    control: Option<control::Sender>,
    events: mpsc::Receiver<Event>,
}

impl Vmm {
    fn start(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        let qemu = file("qemu-system-x86_64");
        let text = format!("#!/bin/sh\necho $$ > {}\n{script}\n", file("pid").display());
        fs::write(file("script"), text).unwrap();
        // Copied by another process: while a file is open for writing here, a fork of another test's could inherit
        // that, and then nobody can execute the file (ETXTBSY).
        assert!(Command::new("cp").arg(file("script")).arg(&qemu).status().unwrap().success());
        fs::set_permissions(&qemu, PermissionsExt::from_mode(0o755)).unwrap();
        fs::write(file("kernel"), [[0; 0x202].as_slice(), b"HdrS"].concat()).unwrap();
        fs::write(file("initramfs"), b"initramfs").unwrap();
        let spec = MachineSpec {
            cpus: 1,
            memory_mib: 256,
            kernel: file("kernel"),
            vmlinux: None,
            initramfs: file("initramfs"),
            cmdline: String::new(),
            disk: DiskSpec { path: file("disk.raw"), size_bytes: 64 * 1024 * 1024 },
            console_log: file("console.log"),
            backend: BackendChoice::Qemu,
            network: NetworkSpec::Nat,
            shares: Vec::new(),
            boot_timeout_seconds: 60,
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_engine-vmm"));
        let path = format!("{}:/usr/bin:/bin", folder.path().display());
        command.args(["--control-fd", "9"]).env("PATH", path).env("ENGINE_LOG", "warn").stdin(Stdio::null());
        let mapping = FdMapping { parent_fd: theirs.into(), child_fd: 9 };
        let process = command.fd_mappings(vec![mapping]).unwrap().spawn().unwrap();
        // The command holds the other end, which must be closed here for an end of file to be seen.
        drop(command);
        let (mut control, mut receiver) = Channel::new(ours).unwrap().split();
        control.send(&control::Command::Start(spec), &[]).unwrap();
        let (sender, events) = mpsc::channel();
        std::thread::spawn(move || {
            while let Ok(Some((event, _fds))) = receiver.receive() {
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Self { folder, process, control: Some(control), events }
    }

    fn send(&mut self, command: &control::Command) {
        self.control.as_mut().unwrap().send(command, &[]).unwrap();
    }

    fn stopped(&self) -> StopReason {
        loop {
            if let Event::Stopped { reason } = self.events.recv_timeout(LIMIT).expect("the machine ends") {
                return reason;
            }
        }
    }

    /// The process id of the script, once it runs.
    fn qemu(&self) -> u32 {
        let file = self.folder.path().join("pid");
        wait_for("the script to start", || {
            fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok())
        })
    }

    fn exit(&mut self) -> ExitStatus {
        let process = &mut self.process;
        wait_for("engine-vmm to exit", || process.try_wait().unwrap())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Already gone in a test that passes.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A process that has ended but was not reaped by its new parent counts as gone.
fn is_gone(pid: u32) -> Option<()> {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => {
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])).then_some(())
        }
        Err(_) => Some(()),
    }
}

#[test]
fn stopping_a_machine_that_is_not_up_kills_it() {
    let mut vmm = Vmm::start("exec sleep 600");
    let qemu = vmm.qemu();
    vmm.send(&control::Command::Stop);
    assert_eq!(vmm.stopped(), StopReason::Killed);
    assert!(vmm.exit().success());
    assert!(is_gone(qemu).is_some());
}

#[test]
fn a_stop_right_after_the_start_is_heard() {
    let mut vmm = Vmm::start("exec sleep 600");
    vmm.send(&control::Command::Kill);
    assert_eq!(vmm.stopped(), StopReason::Killed);
    assert!(vmm.exit().success());
}

#[test]
fn qemu_dies_with_its_engine_vmm() {
    let mut vmm = Vmm::start("exec sleep 600");
    let qemu = vmm.qemu();
    vmm.process.kill().unwrap();
    vmm.exit();
    wait_for("QEMU to die", || is_gone(qemu));
}

#[test]
fn everything_ends_when_the_daemon_is_gone() {
    let mut vmm = Vmm::start("exec sleep 600");
    let qemu = vmm.qemu();
    vmm.control.take().unwrap().shutdown();
    assert!(vmm.exit().success());
    assert!(is_gone(qemu).is_some());
}

#[test]
fn a_qemu_that_fails_is_quoted() {
    let mut vmm = Vmm::start("echo 'qemu: cannot allocate memory' >&2; exit 1");
    let StopReason::Failed { message, console_tail } = vmm.stopped() else {
        panic!("the machine has failed")
    };
    assert_eq!(
        message,
        "QEMU exited with code 1 while the virtual machine was starting: qemu: cannot allocate memory"
    );
    assert_eq!(console_tail, "");
    assert!(vmm.exit().success());
}

#[test]
fn a_killed_qemu_is_told_from_one_that_was_asked_to_end() {
    let mut vmm = Vmm::start("exec sleep 600");
    let pid = rustix::process::Pid::from_raw(vmm.qemu() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let StopReason::Failed { message, .. } = vmm.stopped() else { panic!("the machine has failed") };
    assert_eq!(message, "QEMU was killed by signal 9 while the virtual machine was starting");
    assert!(vmm.exit().success());
}

#[test]
fn a_socket_that_is_not_there_is_named() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_engine-vmm")).args(["--control-fd", "77"]).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && words.contains("--control-fd 77 is not an open file"), "{words}");
}

#[test]
fn the_disk_of_a_running_machine_grows_as_far_as_it_may() {
    const MIB: u64 = 1 << 20;
    let mut vmm = Vmm::start("exec sleep 600");
    vmm.qemu();
    let disk = vmm.folder.path().join("disk.raw");
    let pid = rustix::process::Pid::from_child(&vmm.process);
    let mut grow = |size_bytes| {
        vmm.send(&control::Command::GrowDisk { size_bytes });
        loop {
            match vmm.events.recv_timeout(LIMIT).expect("an answer") {
                Event::DiskGrown { size_bytes } => return Ok(size_bytes),
                Event::DiskRefused { message } => return Err(message),
                Event::Stage { .. } | Event::Running { .. } => {}
                event => panic!("{event:?}"),
            }
        }
    };
    assert_eq!(grow(96 * MIB), Ok(96 * MIB));
    // `ulimit -f`, which by itself would end the process.
    let limit = rustix::process::Rlimit { current: Some(128 * MIB), maximum: None };
    rustix::process::prlimit(Some(pid), rustix::process::Resource::Fsize, limit).unwrap();
    let refused = grow(256 * MIB).unwrap_err();
    let expected = "the disk's file cannot be made 268435456 bytes large: File too large";
    assert!(refused.starts_with(expected), "{refused}");
    assert!(grow(64 * MIB).unwrap_err().contains("never shrinks"));
    assert_eq!(fs::metadata(&disk).unwrap().len(), 96 * MIB);
    assert_eq!(grow(128 * MIB), Ok(128 * MIB));
    assert_eq!(fs::metadata(&disk).unwrap().len(), 128 * MIB);
    vmm.send(&control::Command::Kill);
    assert_eq!(vmm.stopped(), StopReason::Killed);
}

#[test]
fn memory_that_cannot_change_is_refused_with_the_reason() {
    let mut vmm = Vmm::start("exec sleep 600");
    vmm.qemu();
    vmm.send(&control::Command::SetMemory { memory_mib: 1024 });
    let refused = loop {
        match vmm.events.recv_timeout(LIMIT).expect("an answer") {
            Event::MemoryRefused { message } => break message,
            Event::Stage { .. } | Event::Running { .. } => {}
            event => panic!("{event:?}"),
        }
    };
    assert!(refused.starts_with("the machine was started with "), "{refused}");
    assert!(refused.ends_with(" MiB, which QEMU does not change while it runs"), "{refused}");
    vmm.send(&control::Command::Kill);
    assert_eq!(vmm.stopped(), StopReason::Killed);
}

#[test]
fn a_second_machine_cannot_have_the_same_disk() {
    let mut first = Vmm::start("exec sleep 600");
    first.qemu();
    let disk = first.folder.path().join("disk.raw");
    let file = fs::File::open(disk).unwrap();
    let lock = || rustix::fs::flock(file.as_fd(), rustix::fs::FlockOperation::NonBlockingLockExclusive);
    assert_eq!(lock(), Err(rustix::io::Errno::WOULDBLOCK));
    first.send(&control::Command::Kill);
    first.exit();
    lock().unwrap();
}

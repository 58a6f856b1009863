//! The VM image on a machine of ours, on the real KVM: from `start` to an answer of the Docker API, and back down.
//!
//! Where KVM or the image is missing these tests are shown as ignored and say why: `tests/run kvm` (arm64:
//! `tests/nested/run-arm64`) runs them in a machine that has both.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "says why tests are not run")]

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use guest_protocol::port;
use host_hypervisor::kvm::probe::{Usability, probe};
use host_vmm::control::{self, Channel, Event, StopReason};
use host_vmm::{BackendChoice, DiskSpec, MachineSpec, NetworkSpec};
use libtest_mimic::{Arguments, Failed, Trial};

/// Under a software processor inside which KVM is emulated, a boot takes most of a minute, and several on a busy computer.
const LIMIT: Duration = Duration::from_secs(480);
/// The folder of a VM image.
const IMAGE: &str = "ENGINE_IMAGE";
/// What runs these tests where both are.
const RUN: &str = if cfg!(target_arch = "aarch64") { "tests/nested/run-arm64" } else { "tests/run kvm" };
/// How many boots in a row `boots_in_a_row` shall make; without it there is no such test.
const BOOTS: &str = "ENGINE_TEST_BOOTS";

type Test = fn() -> Result<(), Failed>;

const TESTS: [(&str, Test); 2] = [
    ("a_machine_is_killed_in_the_middle_of_its_boot", kill_while_booting),
    ("a_kernel_that_dies_is_told_with_its_last_lines", dying_kernel),
];
const TEST_OF_IMAGE: (&str, Test) = if cfg!(target_arch = "aarch64") {
    // There is no VM image for arm64 yet: what boots is Debian's kernel, with an /init that tries the devices
    // (`tests/nested/run-arm64`).
    ("a_plain_image_finds_its_devices_and_powers_off", boot_and_try_devices)
} else {
    ("the_image_boots_answers_and_powers_off", boot_answer_and_power_off)
};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let missing = match (probe(), std::env::var_os(IMAGE)) {
        (Usability::Unusable { reason }, _) => Some(format!("KVM is not usable here: {reason}")),
        (Usability::Usable, None) => Some(format!("{IMAGE} does not name the folder of a VM image")),
        (Usability::Usable, Some(_)) => None,
    };
    if let Some(reason) = &missing {
        println!("{reason}. `{RUN}` runs these {} tests.", TESTS.len() + 1);
    }
    let mut tests = TESTS.to_vec();
    tests.push(TEST_OF_IMAGE);
    if std::env::var_os(BOOTS).is_some() {
        tests.push(("boots_in_a_row", boots_in_a_row));
    }
    let trials =
        tests.into_iter().map(|(name, test)| Trial::test(name, test).with_ignored_flag(missing.is_some()));
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// One engine-vmm with a machine on KVM.
struct Vmm {
    folder: tempfile::TempDir,
    process: Child,
    control: control::Sender,
    events: mpsc::Receiver<Event>,
    /// What the guest opened. Nobody answers, but a session that is closed at once would only be opened again.
    accepted: Arc<Mutex<Vec<OwnedFd>>>,
}

impl Vmm {
    fn start(cmdline: &str) -> Result<Self, Failed> {
        let folder = tempfile::tempdir()?;
        let image = PathBuf::from(std::env::var_os(IMAGE).ok_or("no image")?).canonicalize()?;
        let spec = MachineSpec {
            cpus: 2,
            memory_mib: 512,
            kernel: image.join("kernel"),
            vmlinux: Some(image.join("vmlinux")).filter(|path| path.is_file()),
            initramfs: image.join("initramfs"),
            cmdline: cmdline.into(),
            disk: DiskSpec { path: folder.path().join("disk.raw"), size_bytes: 1 << 30 },
            console_log: folder.path().join("console.log"),
            backend: BackendChoice::Kvm,
            network: NetworkSpec::Nat,
            shares: Vec::new(),
            boot_timeout_seconds: 400,
        };
        let (ours, theirs) = UnixStream::pair()?;
        let program =
            std::env::var_os("ENGINE_VMM").unwrap_or_else(|| env!("CARGO_BIN_EXE_engine-vmm").into());
        let mut command = Command::new(program);
        command.args(["--control-fd", "9"]).env("ENGINE_LOG", "warn").stdin(Stdio::null());
        let mapping = FdMapping { parent_fd: theirs.into(), child_fd: 9 };
        let process = command.fd_mappings(vec![mapping])?.spawn()?;
        // The command holds the other end, which must be closed here for an end of file to be seen.
        drop(command);
        let (mut control, mut receiver) = Channel::new(ours)?.split();
        control.send(&control::Command::Start(spec), &[])?;
        let (sender, events) = mpsc::channel();
        let accepted = Arc::new(Mutex::new(Vec::new()));
        let keep = accepted.clone();
        std::thread::spawn(move || {
            while let Ok(Some((event, fds))) = receiver.receive() {
                keep.lock().unwrap().extend(fds);
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Ok(Self { folder, process, control, events, accepted })
    }

    /// Waits for an event; fails with the console when the machine ends instead.
    fn until(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<Event, Failed> {
        loop {
            match self.events.recv_timeout(LIMIT) {
                Ok(event) if wanted(&event) => return Ok(event),
                Ok(Event::Stopped { reason }) => {
                    return Err(format!("waited for {what}, but the machine ended: {reason:#?}").into());
                }
                Ok(_) => {}
                Err(error) => return Err(format!("waited for {what}: {error}\n{}", self.console()).into()),
            }
        }
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("console.log")).unwrap_or_default()
    }

    /// A connection to a port of the guest.
    fn connect(&mut self, port: u32) -> Result<UnixStream, Failed> {
        let (ours, theirs) = UnixStream::pair()?;
        self.control.send(&control::Command::Connect { port, header: None }, &[theirs.as_fd()])?;
        ours.set_read_timeout(Some(LIMIT))?;
        Ok(ours)
    }

    /// Asks for `/_ping` until somebody listens on the API's port.
    fn ping(&mut self) -> Result<String, Failed> {
        let deadline = std::time::Instant::now() + LIMIT;
        loop {
            let mut stream = self.connect(port::API)?;
            let mut answer = String::new();
            let asked = stream
                .write_all(b"GET /_ping HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\r\n")
                .and_then(|()| stream.read_to_string(&mut answer));
            match asked {
                Ok(count) if count > 0 => return Ok(answer),
                result if std::time::Instant::now() > deadline => {
                    return Err(format!("no answer to /_ping: {result:?}\n{}", self.console()).into());
                }
                _ => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    fn stopped(&self) -> Result<StopReason, Failed> {
        match self.until("its end", |event| matches!(event, Event::Stopped { .. }))? {
            Event::Stopped { reason } => Ok(reason),
            _ => Err("another event".into()),
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Already gone in a test that passes.
        drop(self.process.kill());
        drop(self.process.wait());
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn is_session(event: &Event) -> bool {
    matches!(event, Event::Accepted { port } if *port == port::SESSION)
}

fn boot_answer_and_power_off() -> Result<(), Failed> {
    let mut vmm = Vmm::start("quiet cgroup_no_v1=all")?;
    let running = vmm.until("the processors", |event| matches!(event, Event::Running { .. }))?;
    assert!(matches!(&running, Event::Running { backend, .. } if backend == "kvm"), "{running:?}");
    vmm.until("the guest's session", is_session)?;
    let answer = vmm.ping()?;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("OK"), "{answer}");
    vmm.control.send(&control::Command::Stop, &[])?;
    assert_eq!(vmm.stopped()?, StopReason::PoweredOff, "{}", vmm.console());
    assert!(vmm.process.wait()?.success());
    Ok(())
}

fn kill_while_booting() -> Result<(), Failed> {
    let mut vmm = Vmm::start("")?;
    vmm.until("the processors", |event| matches!(event, Event::Running { .. }))?;
    vmm.control.send(&control::Command::Kill, &[])?;
    assert_eq!(vmm.stopped()?, StopReason::Killed);
    assert!(vmm.process.wait()?.success());
    Ok(())
}

/// The console, both processors, the interrupts of the devices and both directions of the disk; then the guest's own end.
fn boot_and_try_devices() -> Result<(), Failed> {
    const WRITTEN: &str = "written by the guest";
    let mut vmm = Vmm::start("quiet")?;
    assert_eq!(vmm.stopped()?, StopReason::PoweredOff, "{}", vmm.console());
    let console = vmm.console();
    // Block, random numbers, vsock, file system, balloon, memory that grows, network card.
    for line in ["2 processors", "7 devices", "16 random bytes", &format!("disk {WRITTEN}")] {
        assert!(console.contains(&format!("guest: {line}")), "no `{line}` in:\n{console}");
    }
    let disk = std::fs::File::open(vmm.folder.path().join("disk.raw"))?;
    let mut bytes = [0; WRITTEN.len()];
    std::os::unix::fs::FileExt::read_exact_at(&disk, &mut bytes, 0)?;
    assert_eq!(bytes, WRITTEN.as_bytes());
    assert!(vmm.process.wait()?.success());
    Ok(())
}

/// Every boot comes to the guest's session and ends as it is told to: by power-off and by force, in turn.
fn boots_in_a_row() -> Result<(), Failed> {
    let count: u32 = std::env::var(BOOTS)?.parse()?;
    for boot in 1..=count {
        let (command, reason) = match boot % 2 {
            0 => (control::Command::Stop, StopReason::PoweredOff),
            _ => (control::Command::Kill, StopReason::Killed),
        };
        let told = |error: Failed| Failed::from(format!("boot {boot} of {count}: {}", words(&error)));
        let mut vmm = Vmm::start("quiet cgroup_no_v1=all").map_err(told)?;
        vmm.until("the guest's session", is_session).map_err(told)?;
        vmm.control.send(&command, &[])?;
        assert_eq!(vmm.stopped().map_err(told)?, reason, "boot {boot} of {count}: {}", vmm.console());
        assert!(vmm.process.wait()?.success());
        if boot % 10 == 0 {
            println!("{boot} boots of {count}");
        }
    }
    Ok(())
}

fn words(failed: &Failed) -> &str {
    failed.message().unwrap_or("failed")
}

fn dying_kernel() -> Result<(), Failed> {
    let mut vmm = Vmm::start("rdinit=/nothing init=/nothing")?;
    let StopReason::Failed { message, console_tail } = vmm.stopped()? else {
        return Err("a kernel without an init has not failed".into());
    };
    assert!(message.starts_with("the guest's kernel died while the guest was booting: "), "{message}");
    assert!(console_tail.contains("Kernel panic"), "{console_tail}");
    assert!(vmm.process.wait()?.success());
    Ok(())
}

//! The `engine-vmm` program: one machine, driven by one thread.
//!
//! ```text
//!   Waiting ──Start──▶ Starting ──▶ Booting ──session opened──▶ Up
//!      │                  │            │                         │
//!      │                  │            │ Stop: kill              │ Stop, end of file: power port, then kill
//!      ▼                  ▼            ▼                         ▼
//!     exit            Stopped ◀────────┴── the machine's end ─────┘
//! ```
//!
//! The main thread owns the machine and everything that changes; a thread reads the control channel, others belong to
//! the machine, and all report to one queue. QEMU is started by the main thread, so it dies with this process however
//! that ends. The end of the control channel is the daemon's death: the guest is powered off and the program exits.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use guest_protocol::port;
use host_hypervisor::qemu::MonitorEvent;

use crate::backend::{Backend, choose_backend};
use crate::confine::{Class, Confinement};
use crate::control::{self, Channel, Command, Event, StopReason};
use crate::machine::{self, Ended, Running, Signal};
use crate::spec::MachineSpec;

/// How long the guest may take to power off when the daemon asks.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);
/// How long it may take when the daemon has died. Shorter than the next machine's wait for the disk.
const ORPHAN_TIME_MAX: Duration = Duration::from_secs(5);
/// Between two connections to the guest's power port: the agent may just be starting.
const POWER_RETRY: Duration = Duration::from_millis(500);
/// A kernel that has panicked resets the machine at once; this is for one that cannot even do that.
const PANIC_TIME_MAX: Duration = Duration::from_secs(2);
/// How long the daemon may leave an event unread before it counts as dead.
const SEND_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two looks at the device threads.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// QEMU's end and its devices' ends are seen by different threads; this is the order's slack.
const LOST_DEVICE_GRACE: Duration = Duration::from_secs(2);

/// Serves one machine to the daemon at the other end of `channel`, until it has ended.
///
/// Must be called on the main thread (see the module).
pub fn run(channel: Channel) -> anyhow::Result<()> {
    raise_file_limit();
    outlive_file_size_limit();
    let (sender, mut receiver) = channel.split();
    sender.set_timeout(SEND_TIME_MAX).context("cannot set up the control channel")?;
    let spec = match receiver.receive::<Command>().context("cannot read the first command")? {
        Some((Command::Start(spec), _)) => spec,
        Some((command, _)) => anyhow::bail!("the first command must be `start`, not {command:?}"),
        None => return Ok(()),
    };
    let (signals, inbox) = mpsc::channel();
    let commands = signals.clone();
    // Not joined: it ends with the channel or with the process.
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            if let Err(error) = Confinement::without_files(Class::Driver).enter() {
                tracing::error!(error = %format!("{error:#}"), "cannot confine the control thread");
                drop(commands.send(Signal::DaemonGone));
                return;
            }
            while let Ok(Some((command, fds))) = receiver.receive().inspect_err(|error| {
                tracing::warn!(error = %format!("{error:?}"), "cannot read a command");
            }) {
                if commands.send(Signal::Command(command, fds)).is_err() {
                    return;
                }
            }
            drop(commands.send(Signal::DaemonGone));
        })
        .context("cannot start the control thread")?;
    let mut daemon = Daemon { sender, gone: false };
    let reason = Start { inbox: Inbox { receiver: inbox, waiting: VecDeque::new() }, daemon: &mut daemon }
        .machine(&spec, signals);
    tracing::info!(?reason, "the machine has ended");
    daemon.tell(&Event::Stopped { reason }, None);
    daemon.sender.shutdown();
    Ok(())
}

/// Every connection into the guest is a descriptor here; the usual soft limit of 1024 is soon reached.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// A file that would outgrow the user's limit (`ulimit -f`) is an error of who makes it grow, and not the end of this
/// process, which is what the signal that comes with the error does where nobody takes it.
fn outlive_file_size_limit() {
    extern "C" fn go_on(_number: libc::c_int, _about: *mut libc::siginfo_t, _context: *mut libc::c_void) {}
    if let Err(error) = vmm_sys_util::signal::register_signal_handler(libc::SIGXFSZ, go_on) {
        tracing::warn!(%error, "cannot take the signal of the limit of file sizes");
    }
}

/// The daemon, as long as it is there.
struct Daemon {
    sender: control::Sender,
    gone: bool,
}

impl Daemon {
    fn tell(&mut self, event: &Event, fd: Option<&OwnedFd>) {
        if self.gone {
            return;
        }
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        if let Err(error) = self.sender.send(event, &fds) {
            tracing::warn!(error = %format!("{error:?}"), "cannot reach the daemon");
            self.gone = true;
            // Half a message may have been sent: the conversation is over, which the control thread hears as well.
            self.sender.shutdown();
        }
    }

    fn stage(&mut self, name: &str) {
        tracing::info!(stage = name, "starting");
        self.tell(&Event::Stage { name: name.into() }, None);
    }
}

/// The queue of signals, with a look ahead for those that call a start off.
struct Inbox {
    receiver: Receiver<Signal>,
    waiting: VecDeque<Signal>,
}

impl Inbox {
    /// Whether the machine is to end before it has begun. Keeps all signals.
    fn called_off(&mut self) -> bool {
        self.waiting.extend(self.receiver.try_iter());
        let ends = |signal: &Signal| {
            matches!(signal, Signal::DaemonGone | Signal::Command(Command::Stop | Command::Kill, _))
        };
        self.waiting.iter().any(ends)
    }

    fn next(&mut self, deadline: Instant) -> Result<Signal, RecvTimeoutError> {
        match self.waiting.pop_front() {
            Some(signal) => Ok(signal),
            None => self.receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        }
    }
}

/// From the spec to a running machine.
struct Start<'a> {
    inbox: Inbox,
    daemon: &'a mut Daemon,
}

impl Start<'_> {
    /// Brings the machine up and sees it through to its end.
    fn machine(mut self, spec: &MachineSpec, signals: mpsc::Sender<Signal>) -> StopReason {
        match self.start(spec, signals) {
            Ok((running, backend)) => {
                Driver::new(running, self.inbox, self.daemon, &backend, spec).until_stopped()
            }
            Err(_) if self.inbox.called_off() => StopReason::Killed,
            Err(error) => StopReason::Failed { message: format!("{error:#}"), console_tail: String::new() },
        }
    }

    fn start(
        &mut self,
        spec: &MachineSpec,
        signals: mpsc::Sender<Signal>,
    ) -> anyhow::Result<(Running, Backend)> {
        self.stage("checking the machine")?;
        spec.validate()?;
        self.stage("choosing how to run it")?;
        let backend = choose_backend(spec.backend)?;
        tracing::info!(accelerator = backend.accelerator.name(), reason = backend.reason, "back end chosen");
        self.stage("preparing its devices")?;
        let inbox = std::cell::RefCell::new(&mut self.inbox);
        let built = machine::build(spec, &backend, signals, &|| inbox.borrow_mut().called_off())?;
        self.stage(&format!("starting {}", backend.title()))?;
        Ok((built.start()?, backend))
    }

    fn stage(&mut self, name: &str) -> anyhow::Result<()> {
        anyhow::ensure!(!self.inbox.called_off(), "the start was called off");
        self.daemon.stage(name);
        Ok(())
    }
}

/// How far a running machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Launching,
    Booting,
    Up,
}

impl Stage {
    /// For "… while …".
    fn phrase(self) -> &'static str {
        match self {
            Self::Launching => "the virtual machine was starting",
            Self::Booting => "the guest was booting",
            Self::Up => "the machine was running",
        }
    }
}

/// Why a machine is ending, if somebody here decided so.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cause {
    Stop,
    Kill,
    Panic(String),
    BootTimeout(Duration),
    LostDevice(&'static str, String),
}

/// Sees a running machine through to its end.
struct Driver<'a> {
    running: Running,
    inbox: Inbox,
    daemon: &'a mut Daemon,
    backend: &'a Backend,
    /// The memory it was started with, in MiB.
    started_mib: u32,
    stage: Stage,
    cause: Option<Cause>,
    shutdown: Option<MonitorEvent>,
    boot_timeout: Duration,
    /// When the guest has had its time to boot.
    boot_deadline: Option<Instant>,
    /// When QEMU is killed.
    kill_at: Option<Instant>,
    /// When the guest is asked again to power off.
    power_at: Option<Instant>,
    check_at: Instant,
    /// Our ends of connections to the power port: closing one early could look like a cancelled request.
    power_streams: Vec<UnixStream>,
}

impl<'a> Driver<'a> {
    fn new(
        running: Running,
        inbox: Inbox,
        daemon: &'a mut Daemon,
        backend: &'a Backend,
        spec: &MachineSpec,
    ) -> Self {
        let (now, boot_timeout) = (Instant::now(), spec.boot_timeout());
        Self {
            running,
            inbox,
            daemon,
            backend,
            started_mib: spec.memory_mib,
            stage: Stage::Launching,
            cause: None,
            shutdown: None,
            boot_timeout,
            boot_deadline: Some(now + boot_timeout),
            kill_at: None,
            power_at: None,
            check_at: now + CHECK_INTERVAL,
            power_streams: Vec::new(),
        }
    }

    fn until_stopped(mut self) -> StopReason {
        loop {
            match self.inbox.next(self.deadline()) {
                Ok(Signal::Ended(ended)) => return self.stopped(&ended),
                Ok(signal) => self.signal(signal),
                Err(RecvTimeoutError::Timeout) => {}
                // The machine's threads hold senders for as long as it runs.
                Err(RecvTimeoutError::Disconnected) => self.running.kill(),
            }
            self.clock(Instant::now());
        }
    }

    fn deadline(&self) -> Instant {
        let others = [self.boot_deadline, self.kill_at, self.power_at];
        others.into_iter().flatten().fold(self.check_at, Instant::min)
    }

    fn signal(&mut self, signal: Signal) {
        match signal {
            Signal::Command(command, fds) => self.command(command, fds),
            Signal::DaemonGone => {
                tracing::warn!("the daemon has gone; powering the guest off");
                self.daemon.gone = true;
                self.stop(ORPHAN_TIME_MAX);
            }
            Signal::Accepted { port, stream } => self.accepted(port, &stream),
            Signal::DiskGrown(Ok(size_bytes)) => {
                tracing::info!(size_bytes, "the disk has grown");
                self.daemon.tell(&Event::DiskGrown { size_bytes }, None);
            }
            Signal::DiskGrown(Err(error)) => {
                let message = format!("{:#}", anyhow::Error::from(error));
                tracing::warn!(why = message, "the disk does not grow");
                self.daemon.tell(&Event::DiskRefused { message }, None);
            }
            Signal::MemoryPlugged(bytes) => {
                let started_mib = self.started_mib;
                let memory_mib = u64::from(started_mib) + (bytes >> 20);
                tracing::info!(memory_mib, "the machine's memory is set");
                self.daemon.tell(&Event::MemorySet { memory_mib, started_mib }, None);
            }
            Signal::DiskWaits(waits) => self.daemon.tell(&Event::DiskWaits { waits }, None),
            Signal::ResolversChanged => self.daemon.tell(&Event::ResolversChanged, None),
            Signal::Panicked(line) => {
                tracing::error!(line, "the guest's kernel panicked");
                self.end(Cause::Panic(line), PANIC_TIME_MAX);
            }
            Signal::Monitor(MonitorEvent::Ready) => self.ready(),
            Signal::Monitor(event) => {
                // It is on its way out and needs no more asking.
                self.power_at = None;
                self.shutdown = Some(event);
            }
            // Handled by the caller, which owns the machine.
            Signal::Ended(_) => {}
        }
    }

    fn command(&mut self, command: Command, fds: Vec<OwnedFd>) {
        match command {
            Command::Start(_) => tracing::warn!("a machine is started once; ignoring another start"),
            Command::Connect { port, header } => match <[OwnedFd; 1]>::try_from(fds) {
                Ok([stream]) => self.running.connect(port, header.as_ref(), stream),
                Err(fds) => tracing::warn!(port, count = fds.len(), "connect needs one file descriptor"),
            },
            Command::Resolvers { resolv_conf } => self.running.tell_resolvers(resolv_conf),
            Command::Measure => self.daemon.tell(&Event::Measured(self.running.usage()), None),
            Command::GrowDisk { size_bytes } => {
                if !self.running.grow_disk(size_bytes) {
                    let message = "the machine has no disk".to_owned();
                    self.daemon.tell(&Event::DiskRefused { message }, None);
                }
            }
            Command::SetMemory { memory_mib } => self.set_memory(memory_mib),
            Command::Stop => self.stop(STOP_TIME_MAX),
            Command::Kill => self.end(Cause::Kill, Duration::ZERO),
        }
    }

    fn set_memory(&mut self, memory_mib: u32) {
        let more = u64::from(memory_mib.saturating_sub(self.started_mib)) << 20;
        let message = match self.running.set_memory(more) {
            Ok(true) => return,
            Ok(false) => format!(
                "the machine was started with {} MiB, which {} does not change while it runs",
                self.started_mib,
                self.backend.title()
            ),
            Err(error) => format!("{:#}", anyhow::Error::from(error)),
        };
        tracing::warn!(why = message, "the memory stays as it is");
        self.daemon.tell(&Event::MemoryRefused { message }, None);
    }

    fn ready(&mut self) {
        if self.stage == Stage::Launching {
            self.stage = Stage::Booting;
            self.daemon.stage("booting the guest");
            let event = Event::Running {
                backend: self.backend.name().into(),
                reason: self.backend.reason.clone(),
                accelerator: self.backend.accelerator,
            };
            self.daemon.tell(&event, None);
        }
    }

    fn accepted(&mut self, port: u32, stream: &OwnedFd) {
        if port == port::SESSION && self.stage != Stage::Up {
            tracing::info!("the guest is up");
            self.stage = Stage::Up;
            self.boot_deadline = None;
        }
        self.daemon.tell(&Event::Accepted { port }, Some(stream));
    }

    /// Asks the guest to power off; a guest that is not up yet has nothing to lose and is killed.
    fn stop(&mut self, limit: Duration) {
        if self.stage == Stage::Up {
            self.power_at.get_or_insert_with(Instant::now);
            self.end(Cause::Stop, limit);
        } else {
            self.end(Cause::Stop, Duration::ZERO);
        }
    }

    /// Kills the machine after `limit`, for this cause unless there is an earlier one.
    fn end(&mut self, cause: Cause, limit: Duration) {
        self.cause.get_or_insert(cause);
        self.boot_deadline = None;
        let at = Instant::now() + limit;
        self.kill_at = Some(self.kill_at.map_or(at, |earlier| earlier.min(at)));
    }

    fn clock(&mut self, now: Instant) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.boot_deadline) {
            self.end(Cause::BootTimeout(self.boot_timeout), Duration::ZERO);
        }
        if due(self.kill_at) {
            if self.cause == Some(Cause::Stop) && self.stage == Stage::Up {
                tracing::warn!("the guest did not power off in time; killing it");
                self.cause = Some(Cause::Kill);
            }
            self.running.kill();
            self.kill_at = None;
            self.power_at = None;
        }
        if due(self.power_at) {
            self.power_off();
            self.power_at = Some(now + POWER_RETRY);
        }
        if self.check_at <= now {
            self.check_at = now + CHECK_INTERVAL;
            if let Some((device, fault)) = self.running.lost_device() {
                tracing::error!(device, fault, "a device has failed");
                self.end(Cause::LostDevice(device, fault), LOST_DEVICE_GRACE);
            }
        }
    }

    /// Any connection to the guest's power port means "power off".
    fn power_off(&mut self) {
        match UnixStream::pair() {
            Ok((ours, theirs)) => {
                self.running.connect(port::POWER, None, theirs.into());
                self.power_streams.push(ours);
            }
            Err(error) => tracing::warn!(%error, "cannot make a socket to ask the guest to power off"),
        }
    }

    fn stopped(self, ended: &Ended) -> StopReason {
        let stopped = self.running.stopped();
        // QEMU says its last words before it ends, but another thread reads them.
        let mut shutdown = self.shutdown;
        for signal in self.inbox.waiting.into_iter().chain(self.inbox.receiver.try_iter()) {
            match signal {
                Signal::Monitor(event) if event != MonitorEvent::Ready => shutdown = Some(event),
                _ => {}
            }
        }
        stop_reason(self.cause, shutdown, ended, self.stage, stopped.console_tail)
    }
}

/// How the machine ended, from everything that is known at its end.
fn stop_reason(
    cause: Option<Cause>,
    shutdown: Option<MonitorEvent>,
    ended: &Ended,
    stage: Stage,
    console_tail: String,
) -> StopReason {
    let failed = |message: String| StopReason::Failed { message, console_tail };
    let phrase = stage.phrase();
    match (cause, shutdown) {
        (Some(Cause::Panic(line)), _) => failed(format!("the guest's kernel died while {phrase}: {line}")),
        (_, Some(MonitorEvent::PoweredOff)) => StopReason::PoweredOff,
        (Some(Cause::Stop), Some(MonitorEvent::Reset)) => StopReason::PoweredOff,
        (Some(Cause::Stop | Cause::Kill), _) => StopReason::Killed,
        (Some(Cause::BootTimeout(limit)), _) => failed(format!(
            "the guest did not come up within {} s: it was killed while {phrase}",
            limit.as_secs()
        )),
        (Some(Cause::LostDevice(device, fault)), _) => {
            failed(format!("the {device} device failed while {phrase}: {fault}"))
        }
        (None, Some(MonitorEvent::Reset)) => failed(format!("the guest restarted itself while {phrase}")),
        (None, _) => {
            let words = if ended.words.is_empty() { String::new() } else { format!(": {}", ended.words) };
            failed(format!("{} while {phrase}{words}", ended.clause))
        }
    }
}

#[cfg(test)]
mod tests {
    use host_hypervisor::vcpu::End;

    use super::*;

    fn ended(clause: &str, words: &str) -> Ended {
        Ended { clause: clause.into(), words: words.into() }
    }

    fn reason(cause: Option<Cause>, shutdown: Option<MonitorEvent>, stage: Stage) -> StopReason {
        stop_reason(cause, shutdown, &ended("QEMU exited with code 0", ""), stage, "last line".into())
    }

    fn message(reason: StopReason) -> String {
        match reason {
            StopReason::Failed { message, console_tail } => {
                assert_eq!(console_tail, "last line");
                message
            }
            other => panic!("{other:?} is not a failure"),
        }
    }

    #[test]
    fn a_guest_that_powers_off_has_not_failed() {
        let off = Some(MonitorEvent::PoweredOff);
        for cause in [None, Some(Cause::Stop), Some(Cause::Kill)] {
            assert_eq!(reason(cause, off.clone(), Stage::Up), StopReason::PoweredOff);
        }
        assert_eq!(reason(Some(Cause::Stop), Some(MonitorEvent::Reset), Stage::Up), StopReason::PoweredOff);
    }

    #[test]
    fn killed_is_what_we_killed() {
        for cause in [Cause::Stop, Cause::Kill] {
            assert_eq!(reason(Some(cause), None, Stage::Booting), StopReason::Killed);
        }
    }

    #[test]
    fn failures_name_the_stage() {
        let panic = Some(Cause::Panic("Kernel panic - not syncing: x".into()));
        assert_eq!(
            message(reason(panic, Some(MonitorEvent::Reset), Stage::Booting)),
            "the guest's kernel died while the guest was booting: Kernel panic - not syncing: x"
        );
        assert_eq!(
            message(reason(Some(Cause::BootTimeout(Duration::from_secs(60))), None, Stage::Booting)),
            "the guest did not come up within 60 s: it was killed while the guest was booting"
        );
        assert_eq!(
            message(reason(
                Some(Cause::LostDevice("vsock", "its thread panicked: x".into())),
                None,
                Stage::Up
            )),
            "the vsock device failed while the machine was running: its thread panicked: x"
        );
        assert_eq!(
            message(reason(None, Some(MonitorEvent::Reset), Stage::Booting)),
            "the guest restarted itself while the guest was booting"
        );
    }

    #[test]
    fn qemu_failures_carry_its_words() {
        let ended = ended("QEMU exited with code 1", "qemu: cannot allocate memory");
        let reason = stop_reason(None, None, &ended, Stage::Launching, "last line".into());
        assert_eq!(
            message(reason),
            "QEMU exited with code 1 while the virtual machine was starting: qemu: cannot allocate memory"
        );
    }

    #[test]
    fn a_processor_that_cannot_go_on_is_named_with_its_place() {
        let end = End::Failed("the processor cannot execute an instruction (rip 0xfff0)".into());
        assert_eq!(
            message(stop_reason(None, None, &Ended::of_processors(end), Stage::Up, "last line".into())),
            "the virtual machine ended while the machine was running: \
             the processor cannot execute an instruction (rip 0xfff0)"
        );
        // What ends because it was to end has no reason of its own.
        for end in [End::Stopped, End::PoweredOff] {
            assert_eq!(Ended::of_processors(end).words, "");
        }
    }

    #[test]
    fn a_stop_in_the_queue_calls_a_start_off_and_stays_there() {
        let (sender, receiver) = mpsc::channel();
        let mut inbox = Inbox { receiver, waiting: VecDeque::new() };
        sender.send(Signal::Command(Command::Connect { port: 1, header: None }, Vec::new())).unwrap();
        assert!(!inbox.called_off());
        sender.send(Signal::Command(Command::Stop, Vec::new())).unwrap();
        assert!(inbox.called_off() && inbox.called_off());
        let now = Instant::now();
        assert!(matches!(inbox.next(now), Ok(Signal::Command(Command::Connect { .. }, _))));
        assert!(matches!(inbox.next(now), Ok(Signal::Command(Command::Stop, _))));
        assert!(matches!(inbox.next(now), Err(RecvTimeoutError::Timeout)));
    }

    /// The whole program up to the point where QEMU would be needed.
    fn first_events(spec: &MachineSpec) -> Vec<Event> {
        let (mut daemon, vmm) = Channel::pair().unwrap();
        let program = std::thread::spawn(move || run(vmm));
        daemon.send(&Command::Start(spec.clone()), &[]).unwrap();
        let mut events = Vec::new();
        while let Some((event, _)) = daemon.receive().unwrap() {
            events.push(event);
        }
        program.join().unwrap().unwrap();
        events
    }

    #[test]
    fn a_machine_without_a_kernel_ends_with_a_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let spec: MachineSpec = serde_json::from_value(serde_json::json!({
            "cpus": 1, "memory_mib": 512,
            "kernel": folder.path().join("kernel"), "initramfs": folder.path().join("initramfs"),
            "disk": { "path": folder.path().join("disk.raw"), "size_bytes": 67_108_864 },
            "console_log": folder.path().join("console.log"),
        }))
        .unwrap();
        let events = first_events(&spec);
        assert!(matches!(&events[0], Event::Stage { name } if name == "checking the machine"), "{events:?}");
        let Some(Event::Stopped { reason: StopReason::Failed { message, .. } }) = events.last() else {
            panic!("{events:?}");
        };
        assert!(
            message.starts_with("cannot read the kernel `/") && message.contains("No such file"),
            "{message}"
        );
        assert!(!spec.disk.path.exists());
    }

    #[test]
    fn a_daemon_that_goes_before_the_start_ends_the_program() {
        let (daemon, vmm) = Channel::pair().unwrap();
        drop(daemon);
        run(vmm).unwrap();
    }

    #[test]
    fn the_first_command_must_be_a_start() {
        let (mut daemon, vmm) = Channel::pair().unwrap();
        daemon.send(&Command::Stop, &[]).unwrap();
        assert!(run(vmm).unwrap_err().to_string().contains("must be `start`, not Stop"));
    }
}

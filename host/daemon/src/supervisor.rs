//! `Supervisor`: the only task that starts, stops or restarts the machine.
//!
//! Requests come in through a queue ([`Handle`]), the pure [`Lifecycle`] says what follows, and this task carries it
//! out. Everyone else reads the state from a watch channel.

use crate::bounded_log::BoundedLog;
use crate::image::VmImage;
use crate::leases::Leases;
use crate::lifecycle::{Action, Input, Lifecycle, Ticket};
use crate::session::{self, Ask};
use crate::settings::{HostSize, Settings, engine_settings, proxies};
use crate::shares::Shares;
use crate::state_dir::StateDir;
use crate::vmm_process::{Report, VmmProcess};
use anyhow::{Context, Result};
use guest_protocol::{
    EngineSettings, EngineState, Failure, FailureKind, GuestInfo, Notice, Request, Response, port, share,
};
use host_api::{BackendChoice, MachineState, MachineStatus};
use host_vmm::control::{Command, Event, StopReason};
use host_vmm::{DiskSpec, MachineSpec, NetworkSpec, ShareSpec, Usage};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

/// Where the host's name servers are.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More than any; the VM process takes no longer messages.
const RESOLV_CONF_BYTES_MAX: usize = 64 * 1024;
/// The one machine of this release.
pub(crate) const MACHINE: &str = "default";
/// Each of the guest's log files; the one before it is kept too.
const ENGINE_LOG_BYTES_MAX: u64 = 4 << 20;
/// Requests that may wait. Each holds a connection; more wait in the sockets' backlogs.
const QUEUE_LENGTH_MAX: usize = 1024;
/// How long the guest may take for its figures.
const INFO_TIME_MAX: Duration = Duration::from_secs(5);

/// How long the VM process may take to make the disk's file larger, which is one call.
const GROW_TIME_MAX: Duration = Duration::from_secs(30);

/// How long the guest may take to follow to another size of its memory, which goes on meanwhile.
const MEMORY_TIME_MAX: Duration = Duration::from_secs(90);

/// What a machine has of memory once it was asked to have another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemorySize {
    /// What it has now.
    pub(crate) now_mib: u64,
    /// What it was started with, which is the least.
    pub(crate) started_mib: u32,
}

/// Asks the supervisor. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Handle {
    requests: mpsc::Sender<Message>,
    status: watch::Receiver<MachineStatus>,
}

enum Message {
    Ensure(oneshot::Sender<Result<(), String>>),
    Stop(oneshot::Sender<Result<(), String>>),
    Remove(oneshot::Sender<Result<(), String>>),
    Handover {
        port: u32,
        fd: OwnedFd,
    },
    Guest(Request, session::Reply),
    GrowDisk(u64, oneshot::Sender<Result<(), String>>),
    SetMemory(u32, oneshot::Sender<Result<MemorySize, String>>),
    Usage(oneshot::Sender<Usage>),
    Backend(oneshot::Sender<Option<BackendChoice>>),
    /// From the VM process of that generation.
    Vmm(u64, Report),
    /// From the guest of that generation.
    Notice(u64, Notice),
    SessionEnded(u64, String),
}

impl Handle {
    /// Returns when the machine's API answers, or why it cannot.
    pub(crate) async fn ensure(&self) -> Result<(), String> {
        self.ask(Message::Ensure).await.and_then(|answer| answer)
    }

    /// Returns when there is no machine any more.
    pub(crate) async fn stop(&self) -> Result<(), String> {
        self.ask(Message::Stop).await.and_then(|answer| answer)
    }

    /// Deletes the stopped machine's files.
    pub(crate) async fn remove(&self) -> Result<(), String> {
        self.ask(Message::Remove).await.and_then(|answer| answer)
    }

    /// Hands a connected socket to the VM process, to be joined to `port` in the guest.
    pub(crate) async fn hand_over(&self, port: u32, fd: OwnedFd) {
        if self.requests.send(Message::Handover { port, fd }).await.is_err() {
            debug!(port, "a connection was dropped: the daemon is ending");
        }
    }

    /// The guest's own figures; `None` when it does not run or does not answer in time.
    pub(crate) async fn guest_info(&self) -> Option<GuestInfo> {
        match tokio::time::timeout(INFO_TIME_MAX, self.ask_guest(Request::Info)).await {
            Ok(Ok(Response::Info(guest))) => Some(guest),
            answer => {
                debug!(?answer, "the guest gives no figures");
                None
            }
        }
    }

    /// Asks the guest's agent; the session bounds how long that takes.
    pub(crate) async fn ask_guest(&self, request: Request) -> Result<Response, Failure> {
        let gone = |_| Failure::new(FailureKind::Closed, "there is no session with the machine");
        self.ask(|reply| Message::Guest(request, reply)).await.map_err(gone).flatten()
    }

    /// Makes the disk of the running machine larger, which its guest's kernel is told. `Ok(Err)` is why the disk is as
    /// large as it was; with `Err` nobody knows: the machine has ended, or its process does not answer.
    pub(crate) async fn grow_disk(&self, size_bytes: u64) -> Result<Result<(), String>, String> {
        let asked = self.ask(|reply| Message::GrowDisk(size_bytes, reply));
        let silent = || format!("the VM process did not answer within {} s", GROW_TIME_MAX.as_secs());
        tokio::time::timeout(GROW_TIME_MAX, asked).await.unwrap_or_else(|_| Err(silent()))
    }

    /// Has the running machine use more or less memory. `Ok(Err)` is why it has what it had; with `Err` nobody knows.
    pub(crate) async fn set_memory(&self, memory_mib: u32) -> Result<Result<MemorySize, String>, String> {
        let asked = self.ask(|reply| Message::SetMemory(memory_mib, reply));
        let silent = || format!("the machine was still at it after {} s", MEMORY_TIME_MAX.as_secs());
        tokio::time::timeout(MEMORY_TIME_MAX, asked).await.unwrap_or_else(|_| Err(silent()))
    }

    /// What the machine uses; `None` when it does not run or the VM process does not answer in time.
    pub(crate) async fn usage(&self) -> Option<Usage> {
        tokio::time::timeout(INFO_TIME_MAX, self.ask(Message::Usage)).await.ok()?.ok()
    }

    /// What runs the machine now.
    pub(crate) async fn backend(&self) -> Option<BackendChoice> {
        self.ask(Message::Backend).await.ok().flatten()
    }

    pub(crate) fn status(&self) -> watch::Receiver<MachineStatus> {
        self.status.clone()
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, String> {
        let ended = "the daemon is ending";
        let (reply, answer) = oneshot::channel();
        self.requests.send(message(reply)).await.map_err(|_| ended.to_owned())?;
        answer.await.map_err(|_| ended.to_owned())
    }
}

pub(crate) struct Supervisor {
    state_dir: Arc<StateDir>,
    /// The folder of our programs.
    programs: PathBuf,
    image_dir: PathBuf,
    host: HostSize,
    lifecycle: Lifecycle,
    start: Instant,
    tickets: HashMap<Ticket, oneshot::Sender<Result<(), String>>>,
    next_ticket: u64,
    /// Counts VM processes, so that the last words of an old one are not taken for the new one's.
    generation: u64,
    vmm: Option<VmmProcess>,
    /// How the VM process said that it ended.
    stop_reason: Option<StopReason>,
    backend: Option<BackendChoice>,
    /// What the machine's containers hold on this host.
    leases: Option<Arc<Leases>>,
    /// The folders it was offered when it was started.
    shares: Arc<Shares>,
    /// Who waits for the VM process to tell what the machine uses.
    measurements: Vec<oneshot::Sender<Usage>>,
    /// Who waits for the VM process to make the disk larger, in the order of asking.
    growths: VecDeque<oneshot::Sender<Result<(), String>>>,
    /// Who waits for the machine to have another size of memory, in the order of asking.
    sizes: VecDeque<oneshot::Sender<Result<MemorySize, String>>>,
    session: Option<mpsc::Sender<Ask>>,
    /// What the engine in the running machine is told.
    engine_settings: Option<EngineSettings>,
    requests: mpsc::Receiver<Message>,
    /// For the threads and tasks that report to this one.
    reports: mpsc::Sender<Message>,
    status: watch::Sender<MachineStatus>,
}

impl Supervisor {
    pub(crate) fn new(state_dir: Arc<StateDir>, programs: PathBuf, image_dir: PathBuf) -> (Self, Handle) {
        let (reports, requests) = mpsc::channel(QUEUE_LENGTH_MAX);
        let state = MachineState::Stopped { reason: None };
        let (status, watched) = watch::channel(MachineStatus { machine: MACHINE.into(), state });
        let handle = Handle { requests: reports.clone(), status: watched };
        let supervisor = Self {
            state_dir,
            programs,
            image_dir,
            host: HostSize::read(),
            lifecycle: Lifecycle::new(),
            start: Instant::now(),
            tickets: HashMap::new(),
            next_ticket: 0,
            generation: 0,
            vmm: None,
            stop_reason: None,
            backend: None,
            leases: None,
            shares: Arc::default(),
            measurements: Vec::new(),
            growths: VecDeque::new(),
            sizes: VecDeque::new(),
            session: None,
            engine_settings: None,
            requests,
            reports,
            status,
        };
        (supervisor, handle)
    }

    /// Serves requests until the task is dropped.
    pub(crate) async fn run(mut self) {
        loop {
            let deadline = self.lifecycle.deadline().map(|at| self.start + at);
            let message = tokio::select! {
                message = self.requests.recv() => message,
                () = sleep_until(deadline) => {
                    self.handle(Input::Deadline);
                    continue;
                }
            };
            let Some(message) = message else { return };
            self.take(message);
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Ensure(reply) => {
                let ticket = self.ticket(reply);
                self.handle(Input::Ensure(ticket));
            }
            Message::Stop(reply) => {
                let ticket = self.ticket(reply);
                self.handle(Input::Stop(ticket));
            }
            Message::Remove(reply) => drop(reply.send(self.remove())),
            Message::Handover { port, fd } => match &self.vmm {
                Some(vmm) => vmm.send(Command::Connect { port, header: None }, Some(fd)),
                None => debug!(port, "a connection was dropped: the machine is gone"),
            },
            Message::Guest(request, reply) => match &self.session {
                // A full queue drops the reply, which its asker takes for no answer.
                Some(session) => drop(session.try_send(Ask::Request(request, reply))),
                None => drop(reply),
            },
            Message::GrowDisk(size_bytes, reply) => {
                if let Some(vmm) = &self.vmm {
                    vmm.send(Command::GrowDisk { size_bytes }, None);
                    self.growths.push_back(reply);
                }
            }
            Message::SetMemory(memory_mib, reply) => {
                if let Some(vmm) = &self.vmm {
                    vmm.send(Command::SetMemory { memory_mib }, None);
                    self.sizes.push_back(reply);
                }
            }
            Message::Usage(reply) => {
                if let Some(vmm) = &self.vmm {
                    vmm.send(Command::Measure, None);
                    self.measurements.push(reply);
                }
            }
            Message::Backend(reply) => drop(reply.send(self.backend.clone())),
            Message::Vmm(generation, report) if generation == self.generation => self.vmm_reported(report),
            Message::Notice(generation, notice) if generation == self.generation => self.noticed(notice),
            Message::SessionEnded(generation, why) if generation == self.generation => {
                info!(%why, "the control session ended");
                self.session = None;
                self.handle(Input::SessionLost);
            }
            Message::Vmm(..) | Message::Notice(..) | Message::SessionEnded(..) => {}
        }
    }

    fn ticket(&mut self, reply: oneshot::Sender<Result<(), String>>) -> Ticket {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.tickets.insert(ticket, reply);
        ticket
    }

    /// Feeds the lifecycle, carries out what follows, publishes the state.
    fn handle(&mut self, input: Input) {
        self.feed(input);
        while let Some(action) = self.lifecycle.next_action() {
            match action {
                Action::Spawn => match self.spawn() {
                    Ok(vmm) => {
                        self.leases = Some(Arc::new(Leases::new(vmm.sink(), Arc::clone(&self.shares))));
                        self.vmm = Some(vmm);
                    }
                    Err(error) => self.feed(Input::VmmExited(Some(format!("{error:#}")))),
                },
                Action::PowerOff => self.power_off(),
                Action::Kill => {
                    if let Some(vmm) = &self.vmm {
                        warn!("the machine is ended by force");
                        vmm.send(Command::Kill, None);
                        vmm.kill();
                    }
                }
                Action::Grant(ticket) => self.answer(ticket, Ok(())),
                Action::Refuse(ticket, why) => self.answer(ticket, Err(why)),
            }
        }
        let state = self.lifecycle.state();
        self.status.send_if_modified(|status| {
            let changed = status.state != state;
            if changed {
                if status.state.name() != state.name() {
                    info!(machine = MACHINE, state = state.name(), "machine state");
                }
                status.state = state;
            }
            changed
        });
    }

    fn feed(&mut self, input: Input) {
        let unix_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.lifecycle.handle(input, self.start.elapsed(), unix_s);
    }

    fn answer(&mut self, ticket: Ticket, answer: Result<(), String>) {
        if let Some(reply) = self.tickets.remove(&ticket) {
            // Whoever asked may have given up.
            let _ = reply.send(answer);
        }
    }

    fn spawn(&mut self) -> Result<VmmProcess> {
        self.generation += 1;
        self.stop_reason = None;
        self.session = None;
        let generation = self.generation;
        let settings = self.settings()?;
        let shares = Shares::new(&settings.shares, &self.state_dir.home().docker_socket(), |name| {
            std::env::var_os(name)
        });
        let spec = self.spec(&settings, &shares)?;
        self.shares = Arc::new(shares);
        self.engine_settings = engine_settings(&self.state_dir.home().engine_settings())?;
        let dir = self.state_dir.machine_dir(MACHINE)?;
        let path = dir.join("vmm.log");
        let log = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot write the log `{}`", path.display()))?;
        let reports = self.reports.clone();
        VmmProcess::spawn(&self.programs.join("engine-vmm"), spec, log, move |report| {
            // The queue is closed only when the daemon ends, and with it the machine.
            let _ = reports.blocking_send(Message::Vmm(generation, report));
        })
    }

    /// What the settings and the image make of the machine now.
    fn spec(&self, settings: &Settings, shares: &Shares) -> Result<MachineSpec> {
        let image = VmImage::open(&self.image_dir)?;
        let dir = self.state_dir.machine_dir(MACHINE)?;
        let certificates = self.state_dir.home().certificates();
        std::fs::create_dir_all(&certificates)
            .with_context(|| format!("cannot make the folder `{}`", certificates.display()))?;
        let certificates =
            ShareSpec { name: share::CERTIFICATES.to_owned(), path: certificates, read_only: true };
        Ok(MachineSpec {
            cpus: settings.cpus,
            memory_mib: settings.memory_mib,
            kernel: image.kernel(),
            vmlinux: image.vmlinux(),
            initramfs: image.initramfs(),
            cmdline: image.cmdline,
            disk: DiskSpec {
                path: self.state_dir.home().machine_disk(MACHINE),
                size_bytes: settings.disk_gib << 30,
            },
            console_log: dir.join("console.log"),
            backend: settings.backend,
            network: NetworkSpec::Nat,
            shares: shares.specs().into_iter().chain([certificates]).collect(),
            boot_timeout_seconds: u32::try_from(crate::lifecycle::BOOT_TIME_MAX.as_secs())?,
        })
    }

    fn settings(&self) -> Result<Settings> {
        Settings::load(&self.state_dir.home().settings(), |name| std::env::var(name).ok(), self.host)
    }

    fn power_off(&mut self) {
        // The guest's own way first: it stops its containers. The VM process ends when the guest has, and the
        // lifecycle's deadline is there for a guest that does not.
        let asked = self.session.as_ref().is_some_and(|session| session.try_send(Ask::PowerOff).is_ok());
        if !asked && let Some(vmm) = &self.vmm {
            vmm.send(Command::Stop, None);
        }
    }

    fn remove(&self) -> Result<(), String> {
        let state = self.lifecycle.state();
        if !matches!(state, MachineState::Stopped { .. }) {
            return Err(format!("the machine `{MACHINE}` is {}: stop it first", state.name()));
        }
        let dir = self.state_dir.home().machine_dir(MACHINE);
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("cannot delete `{}`: {error}", dir.display()))
            }
            _ => Ok(()),
        }
    }

    fn vmm_reported(&mut self, report: Report) {
        match report {
            Report::Event(Event::Stage { name }, _) => self.handle(Input::Stage(name)),
            Report::Event(Event::Running { backend, reason, accelerator }, _) => {
                info!(%backend, accelerator = accelerator.name(), %reason, "the machine's processors run");
                self.backend =
                    Some(BackendChoice { backend, accelerator: accelerator.name().to_owned(), reason });
                self.handle(Input::Stage("booting the guest".into()));
            }
            Report::Event(Event::Accepted { port }, fds) => self.accepted(port, fds),
            Report::Event(Event::ResolversChanged, _) => self.tell_resolvers(),
            Report::Event(Event::Measured(usage), _) => {
                for reply in self.measurements.drain(..) {
                    if reply.send(usage).is_err() {
                        debug!("who asked what the machine uses has given up");
                    }
                }
            }
            Report::Event(Event::DiskGrown { .. }, _) => answer(&mut self.growths, Ok(())),
            Report::Event(Event::DiskRefused { message }, _) => answer(&mut self.growths, Err(message)),
            Report::Event(Event::MemorySet { memory_mib, started_mib }, _) => {
                answer(&mut self.sizes, Ok(MemorySize { now_mib: memory_mib, started_mib }));
            }
            Report::Event(Event::MemoryRefused { message }, _) => answer(&mut self.sizes, Err(message)),
            Report::Event(Event::DiskWaits { waits }, _) => {
                let trouble = waits.then(|| full(&self.state_dir.home().machine_disk(MACHINE)));
                match &trouble {
                    Some(trouble) => warn!("{trouble}"),
                    None => info!("what the machine writes waits for space no more"),
                }
                self.handle(Input::Trouble(trouble));
            }
            Report::Event(Event::Stopped { reason }, _) => self.stop_reason = Some(reason),
            Report::Gone(status) => {
                self.vmm = None;
                self.session = None;
                self.backend = None;
                self.measurements.clear();
                self.growths.clear();
                self.sizes.clear();
                if let Some(leases) = self.leases.take() {
                    tokio::spawn(async move { leases.close().await });
                }
                let reason = match self.stop_reason.take() {
                    Some(StopReason::PoweredOff) => "the guest powered itself off".into(),
                    Some(StopReason::Killed) => "the machine was killed".into(),
                    Some(StopReason::Failed { message, console_tail }) => {
                        with_console(message, &console_tail)
                    }
                    None => unexpected_end(status),
                };
                self.handle(Input::VmmExited(Some(reason)));
            }
        }
    }

    /// The VM process may open no file of the host's.
    fn tell_resolvers(&self) {
        match (&self.vmm, std::fs::read_to_string(RESOLV_CONF)) {
            (Some(vmm), Ok(resolv_conf)) if resolv_conf.len() <= RESOLV_CONF_BYTES_MAX => {
                vmm.send(Command::Resolvers { resolv_conf }, None);
            }
            (_, result) => {
                let length = result.map(|text| text.len());
                warn!(?length, "the machine keeps its name servers: `{RESOLV_CONF}` cannot be used");
            }
        }
    }

    fn accepted(&mut self, port: u32, fds: Vec<OwnedFd>) {
        let generation = self.generation;
        let Some(stream) = fds.into_iter().next().and_then(|fd| into_stream(fd).ok()) else {
            warn!(port, "the VM process reported a connection without a socket");
            return;
        };
        match port {
            port::SESSION if self.session.is_some() => warn!("a second control session was refused"),
            port::SESSION => {
                let (asks, queue) = mpsc::channel(16);
                self.session = Some(asks);
                let told = (self.engine_settings.clone(), proxies(|name| std::env::var(name).ok()));
                let reports = self.reports.clone();
                let notices = reports.clone();
                tokio::spawn(async move {
                    let why = session::drive(stream, told, queue, move |notice| {
                        if notices.try_send(Message::Notice(generation, notice)).is_err() {
                            warn!("a notice of the guest was lost: the daemon is overloaded");
                        }
                    })
                    .await;
                    let _ = reports.send(Message::SessionEnded(generation, why)).await;
                });
            }
            port::LEASES => {
                if let Some(leases) = &self.leases {
                    tokio::spawn(Arc::clone(leases).serve(stream));
                }
            }
            port::LOG => {
                let path = self.state_dir.home().machine_dir(MACHINE).join("engine.log");
                tokio::spawn(async move {
                    if let Err(error) = keep_log(stream, path).await {
                        warn!(%error, "the guest's log is not kept");
                    }
                });
            }
            _ => warn!(port, "the guest connected to a port that nobody serves"),
        }
    }

    fn noticed(&mut self, notice: Notice) {
        match notice {
            Notice::Engine(EngineState::Starting) => self.handle(Input::Stage("starting the engine".into())),
            Notice::Engine(EngineState::Ready) => self.handle(Input::EngineReady),
            Notice::Engine(EngineState::Failed { reason, retry_in_ms }) => {
                warn!(%reason, retry_in_ms, "the engine in the guest failed");
                self.handle(Input::EngineFailed(reason));
            }
            Notice::Fault { what, reason } => {
                warn!(%what, %reason, "the guest cannot go on");
                self.handle(Input::Fault(reason));
            }
            Notice::PoweringOff => debug!("the guest is powering off"),
        }
    }
}

/// What is told of a VM process that ended without a word.
/// Answers whoever has waited longest.
fn answer<T>(waiting: &mut VecDeque<oneshot::Sender<T>>, outcome: T) {
    if let Some(reply) = waiting.pop_front()
        && reply.send(outcome).is_err()
    {
        debug!("who asked for another size has given up");
    }
}

fn unexpected_end(status: String) -> String {
    // SIGSYS.
    match status.contains("signal: 31") {
        true => "the VM process was ended by its confinement: it made a system call that it does not need, which is a \
                 fault of ours or an attack from inside the machine; `engine machine start` starts the machine again"
            .into(),
        false => format!("the VM process ended unexpectedly ({status}): see `engine machine logs --vmm`"),
    }
}

/// What is told while there is no space for what the machine writes.
fn full(disk: &Path) -> String {
    format!(
        "there is no space left on this computer for the machine's disk `{}`: what containers write waits until some is freed",
        disk.display()
    )
}

/// `message` with the console's last lines below it, few enough to read.
fn with_console(message: String, console: &str) -> String {
    let lines: Vec<&str> = console.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(8)..];
    if last.is_empty() { message } else { format!("{message}; last console lines:\n  {}", last.join("\n  ")) }
}

fn into_stream(fd: OwnedFd) -> std::io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Writes what the guest logs into the bounded file at `path` until the stream ends.
async fn keep_log(mut stream: UnixStream, path: PathBuf) -> std::io::Result<()> {
    let mut log = BoundedLog::open(&path, ENGINE_LOG_BYTES_MAX)?;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            count => log.write_all(&buffer[..count])?,
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_the_consoles_last_lines() {
        let console = (0..20).map(|number| format!("line {number}\n\n")).collect::<String>();
        let text = with_console("the kernel panicked".into(), &console);
        assert!(text.starts_with("the kernel panicked; last console lines:\n  line 12\n"), "{text}");
        assert_eq!(with_console("x".into(), ""), "x");
    }

    #[tokio::test]
    async fn without_an_image_every_caller_learns_how_to_get_one() {
        let dir = tempfile::tempdir().unwrap();
        let home = host_api::Home::at(dir.path().to_path_buf()).unwrap();
        let state_dir = Arc::new(StateDir::claim(home).unwrap().unwrap());
        let (supervisor, handle) = Supervisor::new(state_dir, dir.path().into(), dir.path().join("none"));
        tokio::spawn(supervisor.run());
        for _ in 0..2 {
            let why = handle.ensure().await.unwrap_err();
            assert!(why.contains("installer/quickstart"), "{why}");
        }
        let state = handle.status().borrow().state.clone();
        assert!(matches!(state, MachineState::Stopped { reason: Some(_) }));
        handle.stop().await.unwrap();
        handle.remove().await.unwrap();
    }
}

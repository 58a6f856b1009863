//! A machine's life, as types: `Built → Running → Stopped`.
//!
//! ```text
//! MachineSpec ──build──▶ Built ──start──▶ Running ──stopped──▶ Stopped
//!                  │               │
//!                  ▼               ▼
//!             BuildError      StartError        dropping any of them frees what it holds
//! ```
//!
//! Each phase consumes the one before, so a machine cannot be started twice or asked for its console's last lines
//! while it runs. The threads of a machine (devices, console, monitor, the one that waits for its end) report to one
//! channel of [`Signal`]s; whoever drives the machine reads it. They are the same whether QEMU runs it or this process.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use guest_protocol::forward::Header;
use host_devices::virtio::block::GrowError;
use host_hypervisor::kvm;
use host_hypervisor::memory::{self, MemoryError, Ram};
use host_hypervisor::qemu::{self, Launch, LaunchError, Monitor, MonitorEvent};
use host_hypervisor::reserve::Reserve;
use host_hypervisor::threads::Control;
use host_hypervisor::vcpu::End;

use crate::attach::{
    self, AttachError, Attached, Connector, ConsoleTail, Context, Disk, Hotplug, InProcess, MemoryMeter,
    Plug, Qemu,
};
use crate::backend::{Backend, Provider};
use crate::confine::{Class, ConfineError, Confinement};
use crate::control::{Command, Usage};
use crate::spec::{self, MachineSpec};

/// What happens to a machine, from all its threads.
#[derive(Debug)]
pub enum Signal {
    /// The daemon asks for something.
    Command(Command, Vec<OwnedFd>),
    /// The control channel has ended.
    DaemonGone,
    /// The guest connected to a port of the host.
    Accepted {
        /// The host's port.
        port: u32,
        /// The connection's host end.
        stream: OwnedFd,
    },
    /// The host's resolvers may be others now, and whoever uses them cannot look.
    ResolversChanged,
    /// What became of [`Running::grow_disk`]: the disk's size in bytes.
    DiskGrown(Result<u64, GrowError>),
    /// What became of [`Running::set_memory`]: the bytes that the guest has beside those of its start.
    MemoryPlugged(u64),
    /// Whether what the guest writes waits, because there is no space left for the data disk's file.
    DiskWaits(bool),
    /// The guest's kernel has panicked, with this message.
    Panicked(String),
    /// How the machine is: what QEMU's monitor tells, or the processors in this process.
    Monitor(MonitorEvent),
    /// What ran the machine has ended.
    Ended(Ended),
}

/// How what ran a machine ended, for when nothing else explains it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// What happened, as a clause: `QEMU exited with code 1`.
    pub clause: String,
    /// Its last words, if any.
    pub words: String,
}

impl Ended {
    fn of_qemu(exit: io::Result<qemu::Exit>) -> Self {
        match exit {
            Ok(exit) => Self { clause: format!("QEMU {}", exit.description), words: exit.stderr },
            Err(error) => Self { clause: "QEMU could not be waited for".into(), words: error.to_string() },
        }
    }

    pub(crate) fn of_processors(end: End) -> Self {
        let words = match end {
            End::Failed(reason) => reason,
            End::PoweredOff | End::Reset | End::Stopped => String::new(),
        };
        Self { clause: "the virtual machine ended".into(), words }
    }
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A device could not be attached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The thread for a device could not be confined.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// Connections to QEMU could not be made.
    #[error("cannot make the monitor's sockets")]
    Sockets(#[source] io::Error),
    /// There is no memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM does not give us the machine, or its kernel cannot be loaded.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

/// Why a built machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// QEMU could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// There are no threads left.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// A thread could not be confined.
    #[error(transparent)]
    Confine(#[from] ConfineError),
}

/// All devices are there, nothing runs yet.
pub struct Built {
    prepared: Prepared,
    signals: Sender<Signal>,
    reach: Reach,
    memory: Option<MemoryMeter>,
    parts: Parts,
}

/// What its devices are reached by, as far as it has them.
struct Reach {
    connector: Option<Connector>,
    disk: Option<Disk>,
    hotplug: Option<Hotplug>,
    resolvers: Option<host_net::Teller>,
    opener: Option<host_net::Opener>,
}

/// What will run the machine.
enum Prepared {
    Qemu { launch: Box<Launch>, monitor: UnixStream },
    InProcess(Box<kvm::Machine>, Option<Reserve>),
}

/// The machine runs.
pub struct Running {
    killer: Killer,
    reach: Reach,
    meter: Meter,
    growth: Option<kvm::Growth>,
    threads: Vec<JoinHandle<()>>,
    parts: Parts,
}

/// The machine has ended and everything it held is free again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// The last lines of its console.
    pub console_tail: String,
}

/// Ends the machine at once, and harmlessly when it has ended.
enum Killer {
    Qemu(qemu::Killer),
    Processors(Control),
}

impl Killer {
    fn kill(&self) {
        match self {
            Self::Qemu(killer) => killer.kill(),
            Self::Processors(control) => control.stop(),
        }
    }
}

/// Tells what the machine holds of the host's memory.
enum Meter {
    Qemu(Option<qemu::Meter>),
    InProcess(Option<MemoryMeter>),
}

impl Meter {
    /// Bytes held now, and bytes given back so far.
    fn read(&self) -> (Option<u64>, Option<u64>) {
        let told = |held: io::Result<u64>| {
            held.inspect_err(|error| tracing::debug!(%error, "cannot tell what memory the machine holds"))
                .ok()
        };
        match self {
            Self::Qemu(meter) => (meter.as_ref().and_then(|meter| told(meter.memory_held())), None),
            Self::InProcess(Some(meter)) => (told(meter.held()), Some(meter.given_back())),
            Self::InProcess(None) => (None, None),
        }
    }
}

struct Parts {
    attached: Vec<Box<dyn Attached>>,
    console: Option<ConsoleTail>,
}

impl Drop for Parts {
    fn drop(&mut self) {
        for device in self.attached.drain(..) {
            device.detach();
        }
    }
}

/// Builds the machine: opens the back ends and starts the device models.
///
/// Blocks while another process holds the disk, until `called_off` says true.
pub fn build(
    spec: &MachineSpec,
    backend: &Backend,
    signals: Sender<Signal>,
    called_off: &dyn Fn() -> bool,
) -> Result<Built, BuildError> {
    // Devices are attached on other threads, which hear of it by this.
    let stopped = AtomicBool::new(false);
    let has_stopped = || stopped.load(Ordering::Relaxed);
    let mut context = Context {
        plug: match &backend.provider {
            Provider::Qemu(_) => Plug::Qemu(Qemu::new().map_err(BuildError::Sockets)?),
            Provider::InProcess => {
                let ram = Ram::new(memory::allocate(spec.memory_mib)?);
                Plug::InProcess(InProcess::new(ram, Reserve::new(spec.memory_mib, spec::host_mib())?))
            }
        },
        signals: signals.clone(),
        called_off: &has_stopped,
        followers: None,
        connector: None,
        disk: None,
        memory: None,
        hotplug: None,
        resolvers: None,
        opener: None,
        console: None,
    };
    let mut parts = Parts { attached: Vec::new(), console: None };
    for attachment in attach::attachments(spec, &context.plug) {
        let name = attachment.name();
        let context = &mut context;
        let waiting = || stopped.store(called_off(), Ordering::Relaxed);
        let device = attachment.confinement().run(|| attachment.attach(context), waiting)?;
        parts.attached.push(device.map_err(|source| AttachError { name, source })?);
    }
    parts.console = context.console;
    let prepared = match (context.plug, &backend.provider) {
        (Plug::Qemu(plug), Provider::Qemu(program)) => prepare_qemu(spec, backend, plug, program)?,
        (Plug::InProcess(mut plug), _) => {
            let reserve = plug.reserve.take();
            Prepared::InProcess(Box::new(prepare_kvm(spec, plug)?), reserve)
        }
        (Plug::Qemu(_), Provider::InProcess) => unreachable!("the plug was made for the provider"),
    };
    let reach = Reach {
        connector: context.connector,
        disk: context.disk,
        hotplug: context.hotplug,
        resolvers: context.resolvers,
        opener: context.opener,
    };
    Ok(Built { prepared, signals, reach, memory: context.memory, parts })
}

fn prepare_qemu(
    spec: &MachineSpec,
    backend: &Backend,
    mut plug: Qemu,
    program: &Path,
) -> Result<Prepared, BuildError> {
    let (monitor, theirs) = UnixStream::pair().map_err(BuildError::Sockets)?;
    let machine = qemu::Machine {
        accelerator: backend.accelerator,
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        kernel: spec.kernel.clone(),
        initramfs: spec.initramfs.clone(),
        cmdline: spec.kernel_cmdline(),
        devices: plug.devices,
        monitor: Some(plug.fds.pass(theirs)),
    };
    let launch = Launch { program: program.to_owned(), machine, fds: plug.fds };
    Ok(Prepared::Qemu { launch: Box::new(launch), monitor })
}

fn prepare_kvm(spec: &MachineSpec, plug: InProcess) -> Result<kvm::Machine, kvm::Error> {
    kvm::Machine::build(kvm::Spec {
        cpus: spec.cpus,
        memory: plug.memory,
        kernel: spec.vmlinux.as_deref().unwrap_or(&spec.kernel),
        initramfs: &spec.initramfs,
        cmdline: &spec.kernel_cmdline(),
        console: plug.console.unwrap_or_else(|| Box::new(io::sink())),
        slots: plug.slots,
    })
}

impl Built {
    /// Lets the machine run, and confines the calling thread and all that it starts later.
    ///
    /// QEMU dies with the calling thread: call it from one that lives as long as the process.
    pub fn start(self) -> Result<Running, StartError> {
        match self.prepared {
            Prepared::Qemu { launch, monitor } => {
                let process = launch.spawn()?;
                tracing::info!(pid = process.id(), "QEMU started");
                let killer = Killer::Qemu(process.killer());
                let meter = process.meter().inspect_err(|error| {
                    tracing::warn!(%error, "cannot tell what memory QEMU holds");
                });
                let meter = Meter::Qemu(meter.ok());
                let mut running = Running::new(killer, self.reach, meter, None, self.parts);
                Confinement::without_files(Class::Driver).enter()?;
                let signals = self.signals.clone();
                running.thread("qemu-wait", move || {
                    send(&signals, Signal::Ended(Ended::of_qemu(process.wait())));
                })?;
                let mut monitor = Monitor::new(monitor);
                running.thread("qemu-monitor", move || {
                    while let Some(event) = monitor.next_event() {
                        send(&self.signals, Signal::Monitor(event));
                    }
                })?;
                Ok(running)
            }
            Prepared::InProcess(machine, reserve) => {
                let growth = reserve.map(|reserve| machine.growth(reserve));
                let machine = Confinement::without_files(Class::Processor)
                    .run(|| machine.start(), || {})?
                    .map_err(StartError::Thread)?;
                tracing::info!("the processors run");
                let killer = Killer::Processors(machine.control());
                let meter = Meter::InProcess(self.memory);
                let mut running = Running::new(killer, self.reach, meter, growth, self.parts);
                Confinement::without_files(Class::Driver).enter()?;
                send(&self.signals, Signal::Monitor(MonitorEvent::Ready));
                running.thread("vcpu-wait", move || {
                    let end = machine.wait();
                    match end {
                        End::PoweredOff => send(&self.signals, Signal::Monitor(MonitorEvent::PoweredOff)),
                        End::Reset => send(&self.signals, Signal::Monitor(MonitorEvent::Reset)),
                        End::Stopped | End::Failed(_) => {}
                    }
                    send(&self.signals, Signal::Ended(Ended::of_processors(end)));
                })?;
                Ok(running)
            }
        }
    }
}

/// The driver stops listening only when the machine is over.
fn send(signals: &Sender<Signal>, signal: Signal) {
    if signals.send(signal).is_err() {
        tracing::debug!("a signal came after the machine's end");
    }
}

impl Running {
    fn new(killer: Killer, reach: Reach, meter: Meter, growth: Option<kvm::Growth>, parts: Parts) -> Self {
        Self { killer, reach, meter, growth, threads: Vec::new(), parts }
    }

    fn thread(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(body).map_err(StartError::Thread)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Connects a stream socket to a vsock port of the guest. The socket is closed if nobody listens there.
    /// The guest reads `header` first, if there is one; but one with a landing has the stream go there, by the machine's
    /// network if it has that.
    pub fn connect(&self, port: u32, header: Option<&Header>, stream: OwnedFd) {
        if let (Some(opener), Some(landing)) = (&self.reach.opener, header.and_then(|header| header.landing))
        {
            return opener.open(landing, stream);
        }
        match &self.reach.connector {
            Some(connector) => connector.connect(port, header, stream),
            None => tracing::debug!(port, "this machine has no vsock device"),
        }
    }

    /// Tells the machine's network what the host's `resolv.conf` holds now.
    pub fn tell_resolvers(&self, resolv_conf: String) {
        if let Some(teller) = &self.reach.resolvers {
            teller.tell(resolv_conf);
        }
    }

    /// Makes the data disk larger while the guest uses it; what becomes of it comes as [`Signal::DiskGrown`]. `false` when
    /// the machine has none.
    pub fn grow_disk(&self, size_bytes: u64) -> bool {
        self.reach.disk.as_ref().inspect(|disk| disk.grow(size_bytes)).is_some()
    }

    /// Has the guest use `bytes` beside the memory of its start, or as near to that as it can; what it uses then comes as
    /// [`Signal::MemoryPlugged`]. `false` when the machine's memory stays as it is.
    pub fn set_memory(&mut self, bytes: u64) -> Result<bool, kvm::GrowError> {
        let (Some(growth), Some(hotplug)) = (&mut self.growth, &self.reach.hotplug) else { return Ok(false) };
        hotplug.request(bytes, growth.grant(bytes)?);
        Ok(true)
    }

    /// What the machine uses now.
    pub fn usage(&self) -> Usage {
        let (memory_held_bytes, memory_given_back_bytes) = self.meter.read();
        let open_streams = self.reach.connector.as_ref().map_or(0, Connector::open_streams);
        Usage { open_streams, memory_held_bytes, memory_given_back_bytes }
    }

    /// Ends the machine at once.
    pub fn kill(&self) {
        self.killer.kill();
    }

    /// The name of a device that does its work no more, which is a fault as long as the machine runs, and what the
    /// fault is, as a clause.
    pub fn lost_device(&self) -> Option<(&'static str, String)> {
        self.parts.attached.iter().find_map(|device| device.fault().map(|fault| (device.name(), fault)))
    }

    /// After [`Signal::Ended`]: takes everything down and reads the console's last lines.
    pub fn stopped(mut self) -> Stopped {
        self.take_down();
        Stopped { console_tail: self.parts.console.as_ref().map(ConsoleTail::text).unwrap_or_default() }
    }

    fn take_down(&mut self) {
        // Harmless if it has ended, and without it the threads below would not end.
        self.killer.kill();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the machine panicked");
            }
        }
        for device in self.parts.attached.drain(..) {
            device.detach();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.take_down();
    }
}

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
//! while it runs. The threads of a machine (devices, console, monitor, the one that waits for QEMU) report to one
//! channel of [`Signal`]s; whoever drives the machine reads it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use guest_protocol::forward::Header;
use host_hypervisor::qemu::{Exit, Killer, Launch, LaunchError, Machine, Monitor, MonitorEvent};

use crate::attach::{self, AttachError, Attached, Connector, ConsoleTail, Context};
use crate::backend::Backend;
use crate::control::Command;
use crate::spec::MachineSpec;

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
    /// The guest's kernel has panicked, with this message.
    Panicked(String),
    /// QEMU tells how the machine is.
    Monitor(MonitorEvent),
    /// QEMU has ended.
    Ended(io::Result<Exit>),
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A device could not be attached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Connections to QEMU could not be made.
    #[error("cannot make the monitor's sockets")]
    Sockets(#[source] io::Error),
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
}

/// All devices are there, nothing runs yet.
pub struct Built {
    launch: Launch,
    monitor: UnixStream,
    signals: Sender<Signal>,
    connector: Option<Connector>,
    parts: Parts,
}

/// QEMU runs.
pub struct Running {
    killer: Killer,
    connector: Option<Connector>,
    threads: Vec<JoinHandle<()>>,
    parts: Parts,
}

/// The machine has ended and everything it held is free again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// The last lines of its console.
    pub console_tail: String,
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
    let mut context = Context {
        devices: Vec::new(),
        fds: Default::default(),
        signals: signals.clone(),
        called_off,
        connector: None,
        console: None,
    };
    let mut parts = Parts { attached: Vec::new(), console: None };
    for attachment in attach::attachments(spec) {
        let name = attachment.name();
        let device = attachment.attach(&mut context).map_err(|source| AttachError { name, source })?;
        parts.attached.push(device);
    }
    parts.console = context.console;
    let (monitor, theirs) = UnixStream::pair().map_err(BuildError::Sockets)?;
    let machine = Machine {
        accelerator: backend.accelerator,
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        kernel: spec.kernel.clone(),
        initramfs: spec.initramfs.clone(),
        cmdline: spec.kernel_cmdline(),
        devices: context.devices,
        monitor: Some(context.fds.pass(theirs)),
    };
    let launch = Launch { program: backend.program.clone(), machine, fds: context.fds };
    Ok(Built { launch, monitor, signals, connector: context.connector, parts })
}

impl Built {
    /// Starts QEMU. It dies with the calling thread: call it from one that lives as long as the process.
    pub fn start(self) -> Result<Running, StartError> {
        let process = self.launch.spawn()?;
        tracing::info!(pid = process.id(), "QEMU started");
        let mut running = Running {
            killer: process.killer(),
            connector: self.connector,
            threads: Vec::new(),
            parts: self.parts,
        };
        let signals = self.signals.clone();
        running.thread("qemu-wait", move || send(&signals, Signal::Ended(process.wait())))?;
        let mut monitor = Monitor::new(self.monitor);
        running.thread("qemu-monitor", move || {
            while let Some(event) = monitor.next_event() {
                send(&self.signals, Signal::Monitor(event));
            }
        })?;
        Ok(running)
    }
}

/// The driver stops listening only when the machine is over.
fn send(signals: &Sender<Signal>, signal: Signal) {
    if signals.send(signal).is_err() {
        tracing::debug!("a signal came after the machine's end");
    }
}

impl Running {
    fn thread(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(body).map_err(StartError::Thread)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Connects a stream socket to a vsock port of the guest. The socket is closed if nobody listens there.
    /// The guest reads `header` first, if there is one.
    pub fn connect(&self, port: u32, header: Option<&Header>, stream: OwnedFd) {
        match &self.connector {
            Some(connector) => connector.connect(port, header, stream),
            None => tracing::debug!(port, "this machine has no vsock device"),
        }
    }

    /// How many vsock streams are open, from either side.
    pub fn open_streams(&self) -> u64 {
        self.connector.as_ref().map_or(0, Connector::open_streams)
    }

    /// Ends the machine at once.
    pub fn kill(&self) {
        self.killer.kill();
    }

    /// The name of a device whose thread has ended, which is a fault as long as QEMU runs.
    pub fn lost_device(&self) -> Option<&'static str> {
        self.parts.attached.iter().find(|device| device.has_ended()).map(|device| device.name())
    }

    /// After [`Signal::Ended`]: takes everything down and reads the console's last lines.
    pub fn stopped(mut self) -> Stopped {
        self.take_down();
        Stopped { console_tail: self.parts.console.as_ref().map(ConsoleTail::text).unwrap_or_default() }
    }

    fn take_down(&mut self) {
        // Harmless if QEMU has ended, and without it the threads below would not end.
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

//! How each device becomes part of a machine: one file per device, the only wiring code.
//!
//! An [`Attachment`] is a device's spec. Attaching it opens its back end, starts its thread, and adds to the
//! [`Context`] what QEMU must be told. What is left running is [`Attached`], until it is detached.

mod block;
mod console;
mod net;
mod rng;
mod vsock;

use std::error::Error;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;

use host_devices::virtio::VirtioDevice;
use host_devices::virtio::vhost_user;
use host_hypervisor::qemu::{Device, PassedFds};

pub(crate) use console::ConsoleTail;
pub(crate) use vsock::Connector;

use crate::machine::Signal;
use crate::spec::{MachineSpec, NetworkSpec};

/// A device could not be attached.
#[derive(Debug, thiserror::Error)]
#[error("cannot attach the {name} device")]
pub struct AttachError {
    /// The device.
    pub name: &'static str,
    /// Why.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

/// A device's spec, which knows how to become a device.
pub(crate) trait Attachment {
    /// The device's name in messages.
    fn name(&self) -> &'static str;

    /// Opens the back end and starts the device.
    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>>;
}

/// A device that is part of a machine.
pub(crate) trait Attached: Send {
    /// The device's name in messages.
    fn name(&self) -> &'static str;

    /// Whether its thread has ended. Normal once QEMU has, a fault before.
    fn has_ended(&self) -> bool;

    /// Ends the device and waits for its thread.
    fn detach(self: Box<Self>);
}

/// What attaching collects.
pub(crate) struct Context<'a> {
    /// The devices QEMU is told about.
    pub devices: Vec<Device>,
    /// The descriptors QEMU inherits.
    pub fds: PassedFds,
    /// Where devices report what happens.
    pub signals: Sender<Signal>,
    /// True when the start is called off meanwhile.
    pub called_off: &'a dyn Fn() -> bool,
    /// The way into the guest, once there is a vsock device.
    pub connector: Option<Connector>,
    /// The console's last lines, once there is a console.
    pub console: Option<ConsoleTail>,
}

impl Context<'_> {
    /// Serves a device model to QEMU, which is told about it in the words of `describe`.
    fn serve(
        &mut self,
        name: &'static str,
        device: impl VirtioDevice + 'static,
        describe: impl FnOnce(RawFd) -> Device,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let (ours, theirs) = UnixStream::pair()?;
        let server = vhost_user::serve(Box::new(device), ours)?;
        let fd = self.fds.pass(theirs);
        self.devices.push(describe(fd));
        Ok(Box::new(Served { name, server }))
    }
}

/// A device model of ours that QEMU uses over vhost-user.
struct Served {
    name: &'static str,
    server: vhost_user::Server,
}

impl Attached for Served {
    fn name(&self) -> &'static str {
        self.name
    }

    fn has_ended(&self) -> bool {
        self.server.is_finished()
    }

    fn detach(self: Box<Self>) {
        self.server.stop();
    }
}

/// Everything a machine with this spec has, in the order of attaching.
pub(crate) fn attachments(spec: &MachineSpec) -> Vec<Box<dyn Attachment>> {
    let mut list: Vec<Box<dyn Attachment>> = vec![
        // The disk first: its lock says whether this machine may exist at all.
        Box::new(block::Attachment { disk: spec.disk.clone() }),
        Box::new(console::Attachment { log: spec.console_log.clone() }),
        Box::new(rng::Attachment),
        Box::new(vsock::Attachment),
    ];
    match spec.network {
        NetworkSpec::Nat => list.push(Box::new(net::Attachment)),
        NetworkSpec::None => {}
    }
    list
}

/// Waits for a device's thread, whose end `hurry` provokes.
fn join(name: &'static str, thread: std::thread::JoinHandle<()>, hurry: impl FnOnce()) {
    hurry();
    if thread.join().is_err() {
        tracing::error!(device = name, "a device's thread panicked");
    }
}

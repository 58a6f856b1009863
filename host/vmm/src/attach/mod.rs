//! How each device becomes part of a machine: one file per device, the only wiring code.
//!
//! An [`Attachment`] is a device's spec. Attaching it opens its back end, starts its thread, and puts it into what
//! runs the machine ([`Plug`]): QEMU is told about it, a machine of ours gets it in a virtio-mmio slot. What is left
//! running is [`Attached`], until it is detached.

mod balloon;
mod block;
mod console;
mod fs;
mod mem;
mod net;
mod plug;
mod rng;
mod vsock;

use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender};

pub(crate) use balloon::MemoryMeter;
pub(crate) use block::Disk;
pub(crate) use console::ConsoleTail;
pub(crate) use mem::Hotplug;
pub(crate) use plug::{InProcess, Plug, Qemu};
pub(crate) use vsock::Connector;

use crate::confine::Confinement;
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
pub(crate) trait Attachment: Send {
    /// The device's name in messages.
    fn name(&self) -> &'static str;

    /// What is left to the thread that attaches it, and to all threads that it starts.
    fn confinement(&self) -> Confinement;

    /// Opens the back end and starts the device. Runs on a thread that is confined so.
    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>>;
}

/// A device that is part of a machine.
pub(crate) trait Attached: Send {
    /// The device's name in messages.
    fn name(&self) -> &'static str;

    /// Why it does its work no more, as a clause; `None` while it does. What is normal once the machine has ended is a
    /// fault before.
    fn fault(&self) -> Option<String>;

    /// Ends the device and waits for its thread.
    fn detach(self: Box<Self>);
}

/// What attaching collects.
pub(crate) struct Context<'a> {
    /// What runs the machine.
    pub plug: Plug,
    /// Where devices report what happens.
    pub signals: Sender<Signal>,
    /// True when the start is called off meanwhile.
    pub called_off: &'a (dyn Fn() -> bool + Sync),
    /// Streams on which the guest wants to hear of changes in shared folders, once there is a vsock device.
    pub followers: Option<Receiver<OwnedFd>>,
    /// The way into the guest, once there is a vsock device.
    pub connector: Option<Connector>,
    /// Makes the data disk larger, once there is one.
    pub disk: Option<Disk>,
    /// What a machine in this process holds of the host's memory, once it has a balloon.
    pub memory: Option<MemoryMeter>,
    /// Has the guest use more or less memory, once it can.
    pub hotplug: Option<Hotplug>,
    /// Tells the NAT about the host's resolvers, once there is one.
    pub resolvers: Option<host_net::Teller>,
    /// Gives the NAT connections for the guest, once there is one.
    pub opener: Option<host_net::Opener>,
    /// The console's last lines, once there is a console.
    pub console: Option<ConsoleTail>,
}

/// Everything a machine with this spec has, in the order of attaching.
pub(crate) fn attachments(spec: &MachineSpec, plug: &Plug) -> Vec<Box<dyn Attachment>> {
    let mut list: Vec<Box<dyn Attachment>> = vec![
        // The disk first: its lock says whether this machine may exist at all.
        Box::new(block::Attachment { disk: spec.disk.clone() }),
        Box::new(console::Attachment { log: spec.console_log.clone() }),
        Box::new(rng::Attachment),
        Box::new(vsock::Attachment),
        Box::new(fs::Attachment::new(spec.shares.clone())),
        Box::new(balloon::Attachment),
    ];
    if let Plug::InProcess(InProcess { reserve: Some(reserve), .. }) = plug {
        list.push(Box::new(mem::Attachment { start: reserve.start(), bytes: reserve.bytes() }));
    }
    match spec.network {
        NetworkSpec::Nat => list.push(Box::new(net::Attachment::new())),
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

//! Memory that a machine of ours gets and gives back while it runs. QEMU's machines have what they were started with.

use std::error::Error;
use std::sync::mpsc::Sender;

use host_devices::virtio::mem::{Backend, Handle, Mem};
use vm_memory::GuestAddress;

use super::{Attached, Context, Plug, balloon};
use crate::confine::{Class, Confinement};
use crate::machine::Signal;

pub(super) struct Attachment {
    /// Where the guest finds what it gets.
    pub start: GuestAddress,
    /// How many bytes that can be.
    pub bytes: u64,
}

/// Has the guest use more or less of what was set aside for it, from any thread.
#[derive(Clone)]
pub(crate) struct Hotplug {
    handle: Handle,
    signals: Sender<Signal>,
}

impl Hotplug {
    /// Wants the guest to have `bytes` more than at its start, of the first `granted`. What it has in the end comes as
    /// [`Signal::MemoryPlugged`].
    pub(crate) fn request(&self, bytes: u64, granted: u64) {
        let signals = self.signals.clone();
        // Nobody listens any more once the machine is over.
        self.handle
            .request(bytes, granted, move |plugged| drop(signals.send(Signal::MemoryPlugged(plugged))));
    }
}

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn confinement(&self) -> Confinement {
        Confinement::without_files(Class::Device)
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let Plug::InProcess(machine) = &mut context.plug else {
            return Err("a machine of QEMU's has the memory it was started with".into());
        };
        let meter = context.memory.clone().ok_or("the balloon, which knows the memory, comes first")?;
        let Self { start, bytes } = *self;
        let device = Mem::new(Backend { start, bytes, discard: Box::new(balloon::discard(meter)) })?;
        context.hotplug = Some(Hotplug { handle: device.handle(), signals: context.signals.clone() });
        machine.serve("mem", Box::new(device))
    }
}

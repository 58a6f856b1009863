//! The balloon: how free memory of the guest goes back to the host. QEMU's own device, which punches its memory file by
//! itself, or ours in a machine of ours.

use std::error::Error;
use std::io;
use std::sync::Arc;

use host_devices::counter::Counter;
use host_devices::virtio::balloon::{Backend, Balloon};
use host_hypervisor::memory::{self, Ram};
use host_hypervisor::qemu::Device;
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::{Attached, Context, Plug};
use crate::confine::{Class, Confinement};

pub(super) struct Attachment;

/// Tells what a machine in this process holds of the host's memory, from any thread.
#[derive(Clone)]
pub(crate) struct MemoryMeter {
    memory: Ram,
    given_back: Arc<Counter>,
}

impl MemoryMeter {
    /// Bytes held for the guest now.
    pub(crate) fn held(&self) -> io::Result<u64> {
        memory::held(&self.memory.memory())
    }

    /// Bytes given back since the machine started; the same page counts every time.
    pub(crate) fn given_back(&self) -> u64 {
        self.given_back.get()
    }
}

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn confinement(&self) -> Confinement {
        Confinement::without_files(Class::Device)
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        match &mut context.plug {
            Plug::Qemu(qemu) => Ok(qemu.own("balloon", Device::Balloon)),
            Plug::InProcess(machine) => {
                let meter =
                    MemoryMeter { memory: machine.memory.clone(), given_back: Arc::new(Counter::default()) };
                let device = Balloon::new(Backend { discard: Box::new(discard(meter.clone())) })?;
                context.memory = Some(meter);
                machine.serve("balloon", Box::new(device))
            }
        }
    }
}

/// Gives ranges back; says once that the host does not take them.
pub(super) fn discard(meter: MemoryMeter) -> impl FnMut(GuestAddress, u64) + Send {
    let mut told = false;
    move |start, length| match memory::give_back(&meter.memory.memory(), start, length) {
        Ok(bytes) => meter.given_back.add(bytes),
        Err(error) if !told => {
            told = true;
            tracing::warn!(%error, length, "cannot give free memory of the guest back to the host");
        }
        Err(_) => {}
    }
}

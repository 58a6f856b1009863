//! Random numbers: QEMU's own device, which does no I/O but getrandom, or ours in a machine of ours.

use std::error::Error;

use host_devices::virtio::rng::Rng;
use host_hypervisor::qemu::Device;

use super::{Attached, Context, Plug};

pub(super) struct Attachment;

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        match &mut context.plug {
            Plug::Qemu(qemu) => Ok(qemu.own("rng", Device::Rng)),
            Plug::InProcess(machine) => machine.serve("rng", Box::new(Rng::new()?)),
        }
    }
}

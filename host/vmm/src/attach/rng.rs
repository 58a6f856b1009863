//! Random numbers: QEMU's own device, which does no I/O but getrandom, or ours in a machine of ours.

use std::error::Error;

use host_devices::virtio::rng::Rng;
use host_hypervisor::qemu::Device;

use super::{Attached, Context, Plug};
use crate::confine::{Class, Confinement};

pub(super) struct Attachment;

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn confinement(&self) -> Confinement {
        Confinement::without_files(Class::Device)
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

//! Random numbers. QEMU's own device: it does no I/O but getrandom.

use std::error::Error;

use host_hypervisor::qemu::Device;

use super::{Attached, Context};

pub(super) struct Attachment;

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        context.devices.push(Device::Rng);
        Ok(self)
    }
}

impl Attached for Attachment {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn has_ended(&self) -> bool {
        false
    }

    fn detach(self: Box<Self>) {}
}

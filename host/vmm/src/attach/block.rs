//! The data disk: a locked raw file behind a block device.

use std::error::Error;
use std::path::Path;
use std::sync::mpsc::Sender;

use host_devices::virtio::VirtioDevice;
use host_devices::virtio::block::{Block, Handle};
use host_hypervisor::qemu::Device;

use super::{Attached, Context};
use crate::confine::{Class, Confinement, Files};
use crate::disk;
use crate::machine::Signal;
use crate::spec::DiskSpec;

/// What the guest finds the disk by.
const SERIAL: &str = "engine-data";

/// One thread serves all of a disk's queues, so more of them would only take turns.
const QUEUES: usize = 1;

pub(super) struct Attachment {
    pub disk: DiskSpec,
}

/// Makes the data disk larger, from any thread.
#[derive(Clone)]
pub(crate) struct Disk {
    handle: Handle,
    signals: Sender<Signal>,
}

impl Disk {
    /// Makes the disk's file and the disk this large. What became of it comes as [`Signal::DiskGrown`].
    pub(crate) fn grow(&self, size_bytes: u64) {
        let signals = self.signals.clone();
        // Nobody listens any more once the machine is over.
        self.handle.grow(size_bytes, move |grown| drop(signals.send(Signal::DiskGrown(grown))));
    }
}

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "block"
    }

    fn confinement(&self) -> Confinement {
        let folder = self.disk.path.parent().unwrap_or(Path::new("/"));
        Confinement { class: Class::Device, files: Files::default().writing(folder) }
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let file = disk::open(&self.disk, context.called_off)?;
        let device = Block::from_file(file, SERIAL, false, QUEUES)?;
        let (handle, signals) = (device.handle(), context.signals.clone());
        // Nobody listens any more once the machine is over.
        handle.watch(move |waits| drop(signals.send(Signal::DiskWaits(waits))));
        context.disk = Some(Disk { handle, signals: context.signals.clone() });
        let sizes = device.queue_sizes();
        let (queues, queue_size) = (sizes.len() as u16, sizes.iter().copied().min().unwrap_or(1));
        context.plug.serve("block", device, |fd| Device::VhostUserBlock { fd, queues, queue_size })
    }
}

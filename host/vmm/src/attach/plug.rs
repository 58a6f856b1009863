//! Where a device goes: to QEMU over vhost-user, or into a virtio-mmio slot of a machine in this process.

use std::error::Error;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use host_devices::virtio::mmio::MmioDevice;
use host_devices::virtio::{Memory, VirtioDevice, vhost_user};
use host_hypervisor::arch::x86_64::board::Registers;
use host_hypervisor::kvm::{Console, Slot};
use host_hypervisor::qemu::{Device, PassedFds};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Attached;

/// What runs the machine, collecting its devices.
pub(crate) enum Plug {
    Qemu(Qemu),
    InProcess(InProcess),
}

/// What QEMU will be told and given.
#[derive(Default)]
pub(crate) struct Qemu {
    /// The devices on its command line.
    pub devices: Vec<Device>,
    /// The descriptors it inherits.
    pub fds: PassedFds,
}

/// What a machine in this process will consist of.
pub(crate) struct InProcess {
    /// Its RAM.
    pub memory: GuestMemoryMmap,
    /// Its virtio-mmio slots.
    pub slots: Vec<Slot>,
    /// Where its serial line goes, once there is a console.
    pub console: Option<Console>,
}

impl InProcess {
    pub fn new(memory: GuestMemoryMmap) -> Self {
        Self { memory, slots: Vec::new(), console: None }
    }
}

impl Plug {
    /// Puts a device model into the machine. QEMU is told about it in the words of `describe`.
    pub fn serve(
        &mut self,
        name: &'static str,
        device: impl VirtioDevice + 'static,
        describe: impl FnOnce(RawFd) -> Device,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        match self {
            Self::Qemu(qemu) => qemu.serve(name, Box::new(device), describe),
            Self::InProcess(machine) => machine.serve(name, Box::new(device)),
        }
    }
}

impl Qemu {
    /// Adds a device that QEMU has itself.
    pub fn own(&mut self, name: &'static str, device: Device) -> Box<dyn Attached> {
        self.devices.push(device);
        Box::new(Own { name })
    }

    fn serve(
        &mut self,
        name: &'static str,
        device: Box<dyn VirtioDevice>,
        describe: impl FnOnce(RawFd) -> Device,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let (ours, theirs) = UnixStream::pair()?;
        let server = vhost_user::serve(device, ours)?;
        let fd = self.fds.pass(theirs);
        self.devices.push(describe(fd));
        Ok(Box::new(Served { name, server }))
    }
}

impl InProcess {
    /// Puts a device model into the next slot.
    pub fn serve(
        &mut self,
        name: &'static str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let device = MmioDevice::new(device, Memory::new(self.memory.clone()), interrupt.try_clone()?)?;
        let kicks = device.kicks().iter().map(EventFd::try_clone).collect::<io::Result<_>>()?;
        let device = Arc::new(device);
        self.slots.push(Slot { registers: Arc::new(Window(device.clone())), kicks, interrupt });
        Ok(Box::new(Slotted { name, device }))
    }
}

/// A device of QEMU's.
struct Own {
    name: &'static str,
}

impl Attached for Own {
    fn name(&self) -> &'static str {
        self.name
    }

    fn has_ended(&self) -> bool {
        false
    }

    fn detach(self: Box<Self>) {}
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

/// A device's registers, as the machine's board wants them.
struct Window(Arc<MmioDevice>);

impl Registers for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// A device model in a slot. It has no connection that could end; should its thread, its transport tells the guest
/// (`DEVICE_NEEDS_RESET`).
struct Slotted {
    name: &'static str,
    device: Arc<MmioDevice>,
}

impl Attached for Slotted {
    fn name(&self) -> &'static str {
        self.name
    }

    fn has_ended(&self) -> bool {
        false
    }

    fn detach(self: Box<Self>) {
        // The board's hold on it went with the machine, so this ends the device's thread and waits for it.
        drop(self.device);
    }
}

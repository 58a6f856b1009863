//! Where a device goes: to QEMU over vhost-user, or into a virtio-mmio slot of a machine in this process.

use std::error::Error;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use host_devices::virtio::mmio::MmioDevice;
use host_devices::virtio::{Life, VirtioDevice, vhost_user};
use host_hypervisor::arch::slots::Registers;
use host_hypervisor::kvm::{Console, Slot};
use host_hypervisor::memory::Ram;
use host_hypervisor::qemu::{Device, PassedFds};
use host_hypervisor::reserve::Reserve;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Attached;

/// What runs the machine, collecting its devices.
pub(crate) enum Plug {
    Qemu(Qemu),
    InProcess(InProcess),
}

/// What QEMU will be told and given.
pub(crate) struct Qemu {
    /// The devices on its command line.
    pub devices: Vec<Device>,
    /// Where it comes to for the network card, until that is attached. Threads that attach may not listen.
    waiting: Option<vhost_user::Waiting>,
    /// The descriptors it inherits.
    pub fds: PassedFds,
}

/// What a machine in this process will consist of.
pub(crate) struct InProcess {
    /// Its RAM.
    pub memory: Ram,
    /// What it can get while it runs.
    pub reserve: Option<Reserve>,
    /// Its virtio-mmio slots.
    pub slots: Vec<Slot>,
    /// Where its serial line goes, once there is a console.
    pub console: Option<Console>,
}

impl InProcess {
    pub fn new(memory: Ram, reserve: Option<Reserve>) -> Self {
        Self { memory, reserve, slots: Vec::new(), console: None }
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
    pub fn new() -> io::Result<Self> {
        let waiting = Some(vhost_user::Waiting::new()?);
        Ok(Self { devices: Vec::new(), waiting, fds: PassedFds::default() })
    }

    /// Puts a network card into the machine. QEMU is told about it in the words of `describe`, from the name at which it
    /// finds it.
    pub fn serve_card(
        &mut self,
        name: &'static str,
        card: Box<dyn VirtioDevice>,
        describe: impl FnOnce(String) -> Device,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let waiting = self.waiting.take().ok_or("a machine has one network card")?;
        self.devices.push(describe(waiting.name().to_owned()));
        let life = card.life();
        let server = vhost_user::serve_waiting(card, waiting)?;
        Ok(Box::new(Served { name, life, server }))
    }

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
        let life = device.life();
        let server = vhost_user::serve(device, ours)?;
        let fd = self.fds.pass(theirs);
        self.devices.push(describe(fd));
        Ok(Box::new(Served { name, life, server }))
    }
}

impl InProcess {
    /// Puts a device model into the next slot.
    pub fn serve(
        &mut self,
        name: &'static str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let life = device.life();
        let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let device = MmioDevice::new(device, self.memory.clone(), interrupt.try_clone()?)?;
        let kicks = device.kicks().iter().map(EventFd::try_clone).collect::<io::Result<_>>()?;
        let device = Arc::new(device);
        self.slots.push(Slot { registers: Arc::new(Window(device.clone())), kicks, interrupt });
        Ok(Box::new(Slotted { name, life, device }))
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

    fn fault(&self) -> Option<String> {
        None
    }

    fn detach(self: Box<Self>) {}
}

/// A device model of ours that QEMU uses over vhost-user.
struct Served {
    name: &'static str,
    life: Life,
    server: vhost_user::Server,
}

impl Attached for Served {
    fn name(&self) -> &'static str {
        self.name
    }

    fn fault(&self) -> Option<String> {
        let connection = || self.server.is_finished().then(|| "its connection to QEMU has ended".into());
        self.life.failure().map(str::to_owned).or_else(connection)
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

/// A device model in a slot. It has no connection that could end, but a thread.
struct Slotted {
    name: &'static str,
    life: Life,
    device: Arc<MmioDevice>,
}

impl Attached for Slotted {
    fn name(&self) -> &'static str {
        self.name
    }

    fn fault(&self) -> Option<String> {
        self.life.failure().map(str::to_owned)
    }

    fn detach(self: Box<Self>) {
        // The board's hold on it went with the machine, so this ends the device's thread and waits for it.
        drop(self.device);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use host_devices::virtio::balloon::{self, Balloon};
    use host_hypervisor::memory;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Registers of the driver's way to a running queue (virtio 1.3 §4.2.2).
    const DRIVER_FEATURES: u64 = 0x20;
    const DRIVER_FEATURES_SELECT: u64 = 0x24;
    const QUEUE_SIZE: u64 = 0x38;
    const QUEUE_READY: u64 = 0x44;
    const QUEUE_NOTIFY: u64 = 0x50;
    const STATUS: u64 = 0x70;
    const QUEUE_ADDRESSES: [(u64, u32); 3] = [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)];
    const DESCRIPTORS: u32 = 0x1_0000;
    const AVAILABLE: u32 = 0x1_1000;
    const USED: u32 = 0x1_2000;
    const PAGES: u32 = 0x1_3000;

    #[test]
    fn a_device_that_dies_in_its_slot_is_noticed_with_the_reason() {
        let ram = memory::allocate(16).unwrap();
        let discard = Box::new(|start: GuestAddress, _| panic!("no place for {:#x}", start.0));
        let device = Balloon::new(balloon::Backend { discard }).unwrap();
        let mut machine = InProcess::new(Ram::new(ram.clone()), None);
        let attached = machine.serve("balloon", Box::new(device)).unwrap();
        let slot = machine.slots.remove(0);
        let write = |offset, value: u32| slot.registers.write(offset, &value.to_le_bytes());
        // One page goes into the balloon.
        ram.write_obj(5_u32, GuestAddress(PAGES.into())).unwrap();
        ram.write_slice(&[PAGES, 0, 4, 0].map(u32::to_le_bytes).concat(), GuestAddress(DESCRIPTORS.into()))
            .unwrap();
        ram.write_obj(1_u16, GuestAddress(u64::from(AVAILABLE) + 2)).unwrap();
        write(STATUS, 3);
        write(DRIVER_FEATURES_SELECT, 1);
        write(DRIVER_FEATURES, 1);
        write(STATUS, 11);
        write(QUEUE_SIZE, 16);
        for (register, address) in QUEUE_ADDRESSES {
            write(register, address);
        }
        write(QUEUE_READY, 1);
        assert_eq!(attached.fault(), None);
        write(STATUS, 15);
        write(QUEUE_NOTIFY, 0);
        let deadline = Instant::now() + Duration::from_secs(60);
        while attached.fault().is_none() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(attached.fault().as_deref(), Some("its thread panicked: no place for 0x5000"));
        // What the guest does next neither hangs nor dies.
        write(STATUS, 0);
        attached.detach();
    }
}

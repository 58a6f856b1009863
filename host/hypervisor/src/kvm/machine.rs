//! A machine on KVM: memory, interrupt controllers, slots, and processors about to take their first instruction.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::KvmVcpu;
use super::{Error, Growth, os_error, setup, sys};
use crate::arch::boot::Parameters;
use crate::arch::native::board::Board;
use crate::arch::native::{boot, layout};
use crate::arch::slots::{self, Registers};
use crate::memory::Ram;
use crate::reserve::Reserve;
use crate::threads::Threads;

/// Where the guest's serial line goes.
pub type Console = Box<dyn Write + Send>;

/// What a machine is made of.
pub struct Spec<'a> {
    /// How many processors.
    pub cpus: u32,
    /// Its RAM, from [`memory::allocate`](crate::memory::allocate).
    pub memory: Ram,
    /// A kernel of this architecture: on x86-64 a vmlinux or a bzImage, on arm64 an Image.
    pub kernel: &'a Path,
    /// The initial root file system.
    pub initramfs: &'a Path,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Takes what the guest prints on its serial line. May block: it then holds the processor that prints.
    pub console: Console,
    /// The virtio-mmio slots in use, in order.
    pub slots: Vec<Slot>,
}

/// A virtio-mmio device, as the machine sees it.
pub struct Slot {
    /// Its registers.
    pub registers: Arc<dyn Registers>,
    /// One per queue: becomes readable when the guest notifies that queue.
    pub kicks: Vec<EventFd>,
    /// Interrupts the guest when written.
    pub interrupt: EventFd,
}

/// A machine that has not run yet.
pub struct Machine {
    // Dropped in this order: the processors, the machine, and its memory last.
    vcpus: Vec<KvmVcpu>,
    vm: Arc<VmFd>,
    board: Arc<Board>,
    memory: Ram,
}

/// A machine whose processors run. Keeps everything that they use until they have ended.
pub struct Running {
    threads: Threads,
    _vm: Arc<VmFd>,
    _memory: Ram,
}

impl Machine {
    /// Builds the machine and loads its kernel.
    pub fn build(spec: Spec<'_>) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(|error| Error::Open(os_error(error)))?;
        check_capabilities(&kvm)?;
        let vm = kvm.create_vm().map_err(setup("create a virtual machine"))?;
        let memory = spec.memory.memory();
        map_memory(&vm, &memory)?;
        let vcpus = sys::create_processors(&kvm, &vm, spec.cpus)?;
        let serial_interrupt = eventfd()?;
        vm.register_irqfd(&serial_interrupt, layout::SERIAL_GSI).map_err(setup("wire the serial line"))?;
        let places =
            spec.slots.iter().enumerate().map(|(index, slot)| wire(&vm, index, slot, spec.slots.len()));
        let places = places.collect::<Result<Vec<_>, _>>()?;
        let parameters = Parameters { cmdline: spec.cmdline, cpus: spec.cpus, slots: &places };
        let mut kernel = open("kernel", spec.kernel)?;
        let mut initramfs = open("initramfs", spec.initramfs)?;
        let entry = boot::load(&memory, &mut kernel, &mut initramfs, parameters)?;
        if let Some(first) = vcpus.first() {
            let failed =
                |error| Error::Vcpu { index: 0, step: "its first instruction", source: os_error(error) };
            sys::set_entry(first, entry).map_err(failed)?;
        }
        let registers = spec.slots.into_iter().map(|slot| slot.registers).collect();
        let board = Arc::new(Board::new(spec.console, serial_interrupt, registers));
        let vcpus = vcpus.into_iter().map(KvmVcpu::new).collect();
        Ok(Self { vcpus, vm: Arc::new(vm), board, memory: spec.memory })
    }

    /// Adds RAM of this reserve to the machine, from any thread and for as long as it runs.
    pub fn growth(&self, reserve: Reserve) -> Growth {
        Growth::new(Arc::clone(&self.vm), self.memory.clone(), reserve)
    }

    /// Lets all processors run, each on a thread of its own.
    pub fn start(self) -> io::Result<Running> {
        let threads = Threads::start(self.vcpus, self.board)?;
        Ok(Running { threads, _vm: self.vm, _memory: self.memory })
    }
}

impl Running {
    /// Holds, resumes and stops the machine from any thread.
    pub fn control(&self) -> crate::threads::Control {
        self.threads.control()
    }

    /// Waits until the machine has ended, frees it, and tells how it did.
    pub fn wait(self) -> crate::vcpu::End {
        self.threads.wait()
    }
}

fn check_capabilities(kvm: &Kvm) -> Result<(), Error> {
    let needed = [
        (Cap::Irqchip, "interrupt controllers (KVM_CAP_IRQCHIP)"),
        (Cap::Irqfd, "interrupts by file descriptor (KVM_CAP_IRQFD)"),
        (Cap::Ioeventfd, "notifications by file descriptor (KVM_CAP_IOEVENTFD)"),
        (Cap::UserMemory, "memory of ours (KVM_CAP_USER_MEMORY)"),
        (Cap::ImmediateExit, "the immediate exit (KVM_CAP_IMMEDIATE_EXIT, Linux 4.13)"),
    ];
    let mut needed = needed.iter().chain(sys::CAPABILITIES);
    match needed.find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, what)) => Err(Error::Lacks { what }),
        None => Ok(()),
    }
}

fn map_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for (slot, region) in memory.iter().enumerate() {
        // SAFETY: the range is one whole mapping that `memory` owns, and `Machine` and `Running` keep the RAM, of which
        // nothing is ever taken out, until the processors have ended.
        unsafe { map_region(vm, slot, region) }?;
    }
    Ok(())
}

/// Gives a machine a range of its memory. Everybody in this process accesses it as volatile memory only.
///
/// # Safety
///
/// The region's mapping must stay until the machine's processors have ended.
pub(super) unsafe fn map_region(vm: &VmFd, slot: usize, region: &GuestRegionMmap) -> Result<(), Error> {
    let region = kvm_userspace_memory_region {
        // There are not as many as there are descriptors, let alone numbers.
        slot: slot as u32,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the range is mapped, and stays so as the caller promises.
    unsafe { vm.set_user_memory_region(region) }.map_err(setup("give memory to a virtual machine"))
}

/// Connects a device's descriptors to its slot.
fn wire(vm: &VmFd, index: usize, slot: &Slot, count: usize) -> Result<slots::Slot, Error> {
    let limit = layout::MMIO_SLOTS;
    let place = layout::mmio_slot(index).ok_or(Error::TooManyDevices { count, limit })?;
    vm.register_irqfd(&slot.interrupt, place.gsi).map_err(setup("wire a device's interrupt"))?;
    let notify = IoEventAddress::Mmio(place.address + slots::QUEUE_NOTIFY);
    for (queue, kick) in (0_u32..).zip(&slot.kicks) {
        vm.register_ioevent(kick, &notify, queue).map_err(setup("wire a device's notifications"))?;
    }
    Ok(place)
}

fn eventfd() -> Result<EventFd, Error> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| Error::Setup { step: "get an event descriptor", source })
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::File { what, path: path.display().to_string(), source })
}

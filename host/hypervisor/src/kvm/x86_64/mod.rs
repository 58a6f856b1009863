//! A PC on KVM: its interrupt controllers, and what its processors start with.

mod cpuid;
pub(super) mod probe;
mod registers;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

pub(super) use self::registers::set_entry;
use super::{Error, os_error, setup};
use crate::arch::x86_64::layout;

/// What KVM must be able to do for a PC, beside what every machine needs.
pub(super) const CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::Pit2, "an interval timer (KVM_CAP_PIT2)"),
    (Cap::SetTssAddr, "a place for its task state segment (KVM_CAP_SET_TSS_ADDR)"),
    (Cap::SetIdentityMapAddr, "a place for its identity map (KVM_CAP_SET_IDENTITY_MAP_ADDR)"),
];

/// Creates the interrupt controllers and all processors. All but the first wait until the kernel starts them.
pub(super) fn create_processors(kvm: &Kvm, vm: &VmFd, cpus: u32) -> Result<Vec<VcpuFd>, Error> {
    // Before the processors, each of which gets its local one.
    create_interrupt_controllers(vm)?;
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(setup("tell the features it supports"))?;
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut vcpus = Vec::with_capacity(cpus as usize);
    for index in 0..cpus {
        let failed = |step| move |error| Error::Vcpu { index, step, source: os_error(error) };
        let vcpu = vm.create_vcpu(index.into()).map_err(failed("it cannot be created"))?;
        let mut cpuid = supported.clone();
        let topology = cpuid::Topology { index, cpus, deadline_timer };
        cpuid::adapt(cpuid.as_mut_slice(), topology);
        // Before the MSRs: some exist only with a feature.
        vcpu.set_cpuid2(&cpuid).map_err(failed("its features"))?;
        registers::set_msrs(&vcpu, index)?;
        registers::set_local_interrupts(&vcpu).map_err(failed("its local interrupts"))?;
        registers::set_fpu(&vcpu).map_err(failed("its floating-point state"))?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn create_interrupt_controllers(vm: &VmFd) -> Result<(), Error> {
    vm.set_identity_map_address(layout::IDENTITY_MAP).map_err(setup("place its identity map"))?;
    vm.set_tss_address(layout::TASK_STATE as usize).map_err(setup("place its task state segment"))?;
    vm.create_irq_chip().map_err(setup("create interrupt controllers"))?;
    // The "speaker" is port 0x61, through which old code reads the timer.
    let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(timer).map_err(setup("create an interval timer"))
}

/// Keeps the guest's watchdogs from taking a pause for a hang. A guest that has not turned its KVM clock on yet has none
/// to tell.
pub(super) fn resumed(vcpu: &VcpuFd) {
    if let Err(error) = vcpu.kvmclock_ctrl() {
        tracing::debug!(%error, "the guest's clock was not told of the pause");
    }
}

/// Where a processor is, as a phrase.
pub(super) fn place(vcpu: &VcpuFd) -> String {
    match vcpu.get_regs() {
        Ok(registers) => format!("rip={:#x} rsp={:#x}", registers.rip, registers.rsp),
        Err(error) => format!("registers unknown: {error}"),
    }
}

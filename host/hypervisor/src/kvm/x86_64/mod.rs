//! What KVM's x86-64 processors start with.

mod cpuid;
mod registers;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{Error, os_error, setup};
use crate::arch::x86_64::boot::Entry;

/// Creates all processors. The first begins at `entry`; the others wait until the kernel starts them.
pub(super) fn create_vcpus(kvm: &Kvm, vm: &VmFd, cpus: u32, entry: Entry) -> Result<Vec<VcpuFd>, Error> {
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
        if index == 0 {
            registers::set_entry(&vcpu, entry).map_err(failed("its first instruction"))?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

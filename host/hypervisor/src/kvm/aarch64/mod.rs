//! An Arm machine on KVM: its interrupt controller, and what its processors start with.

pub(super) mod probe;

use std::mem::offset_of;

use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_REG_ARM_CORE, KVM_REG_ARM64,
    KVM_REG_SIZE_U64, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_regs, kvm_vcpu_init, user_pt_regs,
};
use kvm_ioctls::{Cap, DeviceFd, Kvm, VcpuFd, VmFd};

use super::{Error, os_error, setup};
use crate::arch::aarch64::boot::Entry;
use crate::arch::aarch64::layout;

/// What KVM must be able to do for an Arm machine, beside what every machine needs.
pub(super) const CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::ArmPsci02, "power control (KVM_CAP_ARM_PSCI_0_2)"),
    (Cap::OneReg, "single registers (KVM_CAP_ONE_REG)"),
];

/// A core register's number (KVM API §4.68): its offset in `kvm_regs`, in words of 32 bits.
const fn core_register(offset: usize) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | (offset / 4) as u64
}

const X0: u64 = core_register(offset_of!(kvm_regs, regs) + offset_of!(user_pt_regs, regs));
const SP_EL1: u64 = core_register(offset_of!(kvm_regs, sp_el1));
const PC: u64 = core_register(offset_of!(kvm_regs, regs) + offset_of!(user_pt_regs, pc));

/// Creates all processors and the interrupt controller. All processors but the first are off until the kernel turns them on.
pub(super) fn create_processors(_: &Kvm, vm: &VmFd, cpus: u32) -> Result<Vec<VcpuFd>, Error> {
    let mut init = preferred_init(vm).map_err(setup("tell what its processors are"))?;
    let mut vcpus = Vec::with_capacity(cpus as usize);
    for index in 0..cpus {
        let failed = |step| move |error| Error::Vcpu { index, step, source: os_error(error) };
        let vcpu = vm.create_vcpu(index.into()).map_err(failed("it cannot be created"))?;
        if index > 0 {
            init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        vcpu.vcpu_init(&init).map_err(failed("its features"))?;
        vcpus.push(vcpu);
    }
    // After the processors: each has a redistributor in it.
    create_interrupt_controller(vm)?;
    Ok(vcpus)
}

/// What this host's processors start with: their kind, and KVM's PSCI (version 1.x where the kernel has it).
fn preferred_init(vm: &VmFd) -> Result<kvm_vcpu_init, kvm_ioctls::Error> {
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init)?;
    init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    Ok(init)
}

/// A GICv3 (Linux `Documentation/virt/kvm/devices/arm-vgic-v3.rst`). The machine keeps it when the descriptor is closed.
///
/// From here on interrupt n of the machine is its shared peripheral interrupt n: KVM's routing when nobody gives another.
fn create_interrupt_controller(vm: &VmFd) -> Result<(), Error> {
    let mut device =
        kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, ..Default::default() };
    let gic = vm.create_device(&mut device).map_err(setup("create an interrupt controller (GICv3)"))?;
    let place = |kind: u32, address: u64| set(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, kind, &address);
    place(KVM_VGIC_V3_ADDR_TYPE_DIST, layout::DISTRIBUTOR).map_err(setup("place the GIC's distributor"))?;
    place(KVM_VGIC_V3_ADDR_TYPE_REDIST, layout::REDISTRIBUTORS)
        .map_err(setup("place the GIC's redistributors"))?;
    const PRIVATE_INTERRUPTS: u32 = 32;
    set(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &(PRIVATE_INTERRUPTS + layout::SPIS))
        .map_err(setup("set the number of interrupts"))?;
    let init = kvm_device_attr {
        group: KVM_DEV_ARM_VGIC_GRP_CTRL,
        attr: KVM_DEV_ARM_VGIC_CTRL_INIT.into(),
        ..Default::default()
    };
    gic.set_device_attr(&init).map_err(setup("start the interrupt controller"))
}

/// Sets what an attribute of a device reads from memory.
fn set<T>(device: &DeviceFd, group: u32, kind: u32, value: &T) -> Result<(), kvm_ioctls::Error> {
    let attribute =
        kvm_device_attr { group, attr: kind.into(), addr: std::ptr::from_ref(value) as u64, flags: 0 };
    device.set_device_attr(&attribute)
}

/// Puts the first processor in front of the kernel's first instruction. The rest is as after a reset, which is what a
/// kernel wants: EL1, MMU off, interrupts masked.
pub(super) fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    set_register(vcpu, X0, entry.device_tree.0)?;
    set_register(vcpu, PC, entry.instruction.0)
}

fn set_register(vcpu: &VcpuFd, register: u64, value: u64) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_one_reg(register, &value.to_le_bytes()).map(drop)
}

fn register(vcpu: &VcpuFd, register: u64) -> Result<u64, kvm_ioctls::Error> {
    let mut value = [0; 8];
    vcpu.get_one_reg(register, &mut value)?;
    Ok(u64::from_le_bytes(value))
}

/// The architected timer counts on while a processor is held, and there is no other clock that could be told.
pub(super) fn resumed(_: &VcpuFd) {}

/// Where a processor is, as a phrase.
pub(super) fn place(vcpu: &VcpuFd) -> String {
    match register(vcpu, PC).and_then(|pc| Ok((pc, register(vcpu, SP_EL1)?))) {
        Ok((pc, stack)) => format!("pc={pc:#x} sp_el1={stack:#x}"),
        Err(error) => format!("registers unknown: {error}"),
    }
}

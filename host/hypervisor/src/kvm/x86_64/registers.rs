//! The registers a processor starts with.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{Error, os_error};
use crate::arch::x86_64::boot::Entry;
use crate::arch::x86_64::layout;

/// Model-specific registers as after a reset, but for cacheable memory and fast string instructions.
const START_MSRS: [(u32, u64); 11] = [
    (0x174, 0),       // IA32_SYSENTER_CS
    (0x175, 0),       // IA32_SYSENTER_ESP
    (0x176, 0),       // IA32_SYSENTER_EIP
    (0xc000_0081, 0), // IA32_STAR
    (0xc000_0082, 0), // IA32_LSTAR
    (0xc000_0083, 0), // IA32_CSTAR
    (0xc000_0084, 0), // IA32_FMASK
    (0xc000_0102, 0), // IA32_KERNEL_GS_BASE
    (0x10, 0),        // IA32_TIME_STAMP_COUNTER
    (0x1a0, 1),       // IA32_MISC_ENABLE: fast strings
    (0x2ff, 0x806),   // IA32_MTRR_DEF_TYPE: write-back wherever nothing else is said
];

pub(super) fn set_msrs(vcpu: &VcpuFd, index: u32) -> Result<(), Error> {
    let failed = |step, source| Error::Vcpu { index, step, source };
    let entries = START_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries)
        .map_err(|error| failed("a list of its MSRs", std::io::Error::other(format!("{error:?}"))))?;
    let accepted = vcpu.set_msrs(&msrs).map_err(|error| failed("its MSRs", os_error(error)))?;
    if accepted == entries.len() {
        Ok(())
    } else {
        Err(Error::StartRegisters { index, accepted, count: entries.len() })
    }
}

/// Legacy interrupts come in by LINT0, non-maskable ones by LINT1, as the board of a PC wires them.
pub(super) fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 0b100;
    const MODE_EXTERNAL: u32 = 0b111;
    let mut apic = vcpu.get_lapic()?;
    let mut mode = |register: usize, mode: u32| {
        let bytes = &mut apic.regs[register..register + 4];
        let old = bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u32::from(byte as u8));
        let new = old & !0x700 | mode << 8;
        for (byte, value) in bytes.iter_mut().zip(new.to_le_bytes()) {
            *byte = value as _;
        }
    };
    mode(LVT_LINT0, MODE_EXTERNAL);
    mode(LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&apic)
}

pub(super) fn set_fpu(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })
}

/// Puts the first processor in front of the kernel's first instruction.
pub(in crate::kvm) fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    const CR0_PROTECTED: u64 = 1;
    const CR0_EXTENSION: u64 = 1 << 4;
    const CR0_PAGING: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LONG: u64 = 1 << 8 | 1 << 10;
    let mut special = vcpu.get_sregs()?;
    let long = matches!(entry, Entry::Long { .. });
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    special.cs = kvm_segment { selector: 0x10, type_: 0xb, l: long.into(), db: (!long).into(), ..flat };
    let data = kvm_segment { selector: 0x18, type_: 0x3, db: 1, ..flat };
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    let mut registers = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        Entry::Pvh { instruction } => {
            special.cr0 = CR0_PROTECTED | CR0_EXTENSION;
            (special.cr4, special.efer) = (0, 0);
            (registers.rip, registers.rbx) = (instruction.0, layout::START_INFO.0);
        }
        Entry::Long { instruction } => {
            special.gdt.base = layout::GDT.0;
            special.gdt.limit = 4 * 8 - 1;
            special.cr3 = layout::PAGE_TABLES.0;
            special.cr0 = CR0_PROTECTED | CR0_EXTENSION | CR0_PAGING;
            (special.cr4, special.efer) = (CR4_PAE, EFER_LONG);
            (registers.rip, registers.rsi) = (instruction.0, layout::BOOT_PARAMS.0);
        }
    }
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&registers)
}

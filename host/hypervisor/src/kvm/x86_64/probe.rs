//! The probe's guest: a few AVX instructions in 64-bit mode, and a counted loop. It reports on ports.

use std::io;

use kvm_bindings::{kvm_segment, kvm_xcr, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::kvm::probe::{Problem, Report, SLICE_ROUNDS, setup};

/// What vector instructions are called.
pub(in crate::kvm) const VECTOR: &str = "AVX";

const PORT_VECTOR: u16 = 0x11;
const PORT_LOOP: u16 = 0x10;
/// The page tables: one of each level, the last with one 2 MiB page that maps the whole memory to itself.
const TABLES: GuestAddress = GuestAddress(0x1000);
const CODE: GuestAddress = GuestAddress(0x4000);

/// 21 + 21 in a vector register, reported at [`PORT_VECTOR`].
const VECTOR_CODE: &[u8] = &[
    0xb8,
    21,
    0,
    0,
    0, // mov eax, 21
    0xc5,
    0xf9,
    0x6e,
    0xc8, // vmovd xmm1, eax
    0xc5,
    0xf1,
    0xfe,
    0xc9, // vpaddd xmm1, xmm1, xmm1
    0xc5,
    0xf9,
    0x7e,
    0xc8, // vmovd eax, xmm1
    0xc5,
    0xf8,
    0x77, // vzeroupper
    0xe6,
    PORT_VECTOR as u8, // out PORT_VECTOR, al
];

/// Counts down for ever, reporting the remainder at [`PORT_LOOP`] after each slice.
fn loop_code() -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, SLICE_ROUNDS
    code.extend(SLICE_ROUNDS.to_le_bytes());
    code.extend([
        0x48,
        0xff,
        0xc9, // dec rcx
        0x75,
        0xfb, // jnz to dec
        0x88,
        0xc8, // mov al, cl
        0xe6,
        PORT_LOOP as u8, // out PORT_LOOP, al
        0xeb,
        0xf0, // jmp to mov
    ]);
    code
}

/// Puts the guest into memory and its processor before it. Whether it tries vector instructions: processors without AVX
/// do not.
pub(in crate::kvm) fn prepare(
    kvm: &Kvm,
    _: &VmFd,
    vcpu: &VcpuFd,
    memory: &GuestMemoryMmap,
) -> Result<bool, Problem> {
    let vector = set_features(kvm, vcpu)?;
    let mut code = if vector { VECTOR_CODE.to_vec() } else { Vec::new() };
    code.extend(loop_code());
    load(memory, &code)
        .map_err(|error| Problem::Setup { step: "load the test", source: io::Error::other(error) })?;
    enter_long_mode(vcpu)?;
    Ok(vector)
}

/// What the guest says by leaving in this way.
pub(in crate::kvm) fn report(exit: &VcpuExit<'_>) -> Option<Report> {
    match exit {
        VcpuExit::IoOut(PORT_VECTOR, [value, ..]) => Some(Report::Vector(*value)),
        VcpuExit::IoOut(PORT_LOOP, [value, ..]) => Some(Report::Loop(*value)),
        // Without an interrupt table every exception is a triple fault.
        VcpuExit::Shutdown => Some(Report::Fault),
        _ => None,
    }
}

/// Gives the processor what the host's offers; true if that includes AVX.
fn set_features(kvm: &Kvm, vcpu: &VcpuFd) -> Result<bool, Problem> {
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(setup("tell the processor features it supports"))?;
    vcpu.set_cpuid2(&cpuid).map_err(setup("set processor features"))?;
    const XSAVE: u32 = 1 << 26;
    const AVX: u32 = 1 << 28;
    let basic = cpuid.as_slice().iter().find(|entry| entry.function == 1);
    Ok(basic.is_some_and(|entry| entry.ecx & (XSAVE | AVX) == XSAVE | AVX))
}

fn load(memory: &GuestMemoryMmap, code: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let [level4, level3, level2] = [TABLES.0, TABLES.0 + 0x1000, TABLES.0 + 0x2000];
    memory.write_obj(level3 | PRESENT_WRITABLE, GuestAddress(level4))?;
    memory.write_obj(level2 | PRESENT_WRITABLE, GuestAddress(level3))?;
    memory.write_obj(LARGE | PRESENT_WRITABLE, GuestAddress(level2))?;
    memory.write_slice(code, CODE)
}

/// The state a 64-bit kernel runs in: flat segments, paging on, SSE and AVX enabled (Intel SDM vol. 3, §10.8.5).
fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), Problem> {
    let mut sregs = vcpu.get_sregs().map_err(setup("read processor registers"))?;
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x08, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: 0x10, type_: 0x3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    let avx = kvm_has_xsave(vcpu)?;
    sregs.cr3 = TABLES.0;
    // PAE, OSFXSR, OSXMMEXCPT, and OSXSAVE where there is XSAVE.
    sregs.cr4 = (1 << 5) | (1 << 9) | (1 << 10) | if avx { 1 << 18 } else { 0 };
    // PE, MP, ET, NE, WP, PG.
    sregs.cr0 = 1 | (1 << 1) | (1 << 4) | (1 << 5) | (1 << 16) | (1 << 31);
    // LME, LMA.
    sregs.efer = (1 << 8) | (1 << 10);
    vcpu.set_sregs(&sregs).map_err(setup("enter 64-bit mode"))?;
    if avx {
        // x87, SSE and AVX state.
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: 0b111 };
        vcpu.set_xcrs(&xcrs).map_err(setup("enable AVX"))?;
    }
    let mut regs = vcpu.get_regs().map_err(setup("read processor registers"))?;
    regs.rip = CODE.0;
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(setup("set processor registers"))
}

/// Whether the processor was given XSAVE and AVX.
fn kvm_has_xsave(vcpu: &VcpuFd) -> Result<bool, Problem> {
    let cpuid =
        vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(setup("read processor features"))?;
    let basic = cpuid.as_slice().iter().find(|entry| entry.function == 1);
    Ok(basic.is_some_and(|entry| entry.ecx & (1 << 26) != 0 && entry.ecx & (1 << 28) != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loop_jumps_where_it_should() {
        let code = loop_code();
        assert_eq!(code.len(), 16);
        // `jnz` ends at 10 and goes back to `dec` at 5; `jmp` ends at 16 and goes back to `mov` at 0.
        assert_eq!(10 + i32::from(code[9] as i8), 5);
        assert_eq!(16 + i32::from(code[15] as i8), 0);
    }
}

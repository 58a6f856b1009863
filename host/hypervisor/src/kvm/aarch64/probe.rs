//! The probe's guest: a few Advanced SIMD instructions at EL1 without the MMU, and a counted loop. It reports by storing
//! where there is no memory.

use std::io;

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::kvm::probe::{Problem, Report, SLICE_ROUNDS, setup};

/// What vector instructions are called.
pub(in crate::kvm) const VECTOR: &str = "Advanced SIMD";

/// Where an exception goes that the guest raises itself: `VBAR_EL1` is 0 after KVM's reset.
const FAULT_VECTOR: GuestAddress = GuestAddress(0x200);
const CODE: GuestAddress = GuestAddress(0x4000);
/// No memory here. The guest stores a word of its result to this address for the vector, ...
const REPORT_VECTOR: u64 = 0x1000_0000;
/// ... to this one for the loop, ...
const REPORT_LOOP: u64 = REPORT_VECTOR + 8;
/// ... and to this one for a fault.
const REPORT_FAULT: u64 = REPORT_VECTOR + 16;

/// 21 + 21 in a vector register, then the loop: counts down for ever, reporting the remainder after each slice.
const INSTRUCTIONS: [u32; 14] = [
    0xd2a0_060a,                       // mov x10, #3 << 20
    0xd518_104a,                       // msr cpacr_el1, x10: vector instructions do not trap
    0xd503_3fdf,                       // isb
    0x5280_02a9,                       // mov w9, #21
    0x4e04_0d20,                       // dup v0.4s, w9
    0x4ea0_8400,                       // add v0.4s, v0.4s, v0.4s
    0x0e04_3c09,                       // mov w9, v0.s[0]
    0xd2a2_000a,                       // mov x10, #REPORT_VECTOR
    0xb900_0149,                       // str w9, [x10]
    0xd280_0009 | (SLICE_ROUNDS << 5), // mov x9, #SLICE_ROUNDS
    0xf100_0529,                       // subs x9, x9, #1
    0x54ff_ffe1,                       // b.ne to subs
    0xb900_0949,                       // str w9, [x10, #8]
    0x17ff_fffc,                       // b to mov x9
];
/// The fault's report.
const FAULT_INSTRUCTIONS: [u32; 3] = [
    0xd2a2_000a, // mov x10, #REPORT_VECTOR
    0xb900_1149, // str w9, [x10, #16]
    0x1400_0000, // b to itself
];
// `mov` takes 16 bits.
const _: () = assert!(SLICE_ROUNDS <= 0xffff && REPORT_VECTOR == 0x1000 << 16);

/// Puts the guest into memory and its processor before it. Whether it tries vector instructions: every such processor has
/// them.
pub(in crate::kvm) fn prepare(
    _: &Kvm,
    vm: &VmFd,
    vcpu: &VcpuFd,
    memory: &GuestMemoryMmap,
) -> Result<bool, Problem> {
    load(memory)
        .map_err(|error| Problem::Setup { step: "load the test", source: io::Error::other(error) })?;
    let init = super::preferred_init(vm).map_err(setup("tell what its processors are"))?;
    vcpu.vcpu_init(&init).map_err(setup("set processor features"))?;
    super::set_register(vcpu, super::PC, CODE.0).map_err(setup("set processor registers"))?;
    Ok(true)
}

fn load(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    let bytes =
        |instructions: &[u32]| -> Vec<u8> { instructions.iter().flat_map(|one| one.to_le_bytes()).collect() };
    memory.write_slice(&bytes(&INSTRUCTIONS), CODE)?;
    memory.write_slice(&bytes(&FAULT_INSTRUCTIONS), FAULT_VECTOR)
}

/// What the guest says by leaving in this way.
pub(in crate::kvm) fn report(exit: &VcpuExit<'_>) -> Option<Report> {
    match exit {
        VcpuExit::MmioWrite(REPORT_VECTOR, [value, ..]) => Some(Report::Vector(*value)),
        VcpuExit::MmioWrite(REPORT_LOOP, [value, ..]) => Some(Report::Loop(*value)),
        VcpuExit::MmioWrite(REPORT_FAULT, _) => Some(Report::Fault),
        _ => None,
    }
}

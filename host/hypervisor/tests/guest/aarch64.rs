//! Instructions for arm64, at EL1 without the MMU.

#[path = "../kernel/image.rs"]
mod image;

use vm_memory::GuestAddress;

/// A kernel whose first processor runs `code`.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    image::image(code, 4096)
}

/// Little-endian words.
const fn words<const N: usize, const BYTES: usize>(instructions: [u32; N]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    let mut at = 0;
    while at < BYTES {
        bytes[at] = instructions[at / 4].to_le_bytes()[at % 4];
        at += 1;
    }
    bytes
}

/// Where [`COUNT`] counts.
pub const COUNTER: GuestAddress = GuestAddress(0x8040_0000);
/// Adds one to the word at [`COUNTER`], for ever.
pub const COUNT: &[u8] = &words::<5, 20>([
    0xd2b0_0800, // mov x0, #0x80400000
    0xb940_0001, // ldr w1, [x0]
    0x1100_0421, // add w1, w1, #1
    0xb900_0001, // str w1, [x0]
    0x17ff_fffd, // b to ldr
]);
/// By PSCI's SYSTEM_RESET, and stay.
pub const RESET: &[u8] = &words::<4, 16>([
    0x52b0_8000, // mov w0, #0x84000000
    0x7280_0120, // movk w0, #9
    0xd400_0002, // hvc #0
    0x1400_0000, // b to itself
]);
/// By PSCI's SYSTEM_OFF, and stay.
pub const POWER_OFF: &[u8] = &words::<4, 16>([
    0x52b0_8000, // mov w0, #0x84000000
    0x7280_0100, // movk w0, #8
    0xd400_0002, // hvc #0
    0x1400_0000, // b to itself
]);
/// `ok` on the serial line, as a word and as a byte.
pub const PRINT_OK: &[u8] = &words::<5, 20>([
    0xd2a2_0001, // mov x1, #0x10000000
    0x5280_0de2, // mov w2, #'o'
    0xb900_0022, // str w2, [x1]
    0x5280_0d62, // mov w2, #'k'
    0x3900_0022, // strb w2, [x1]
]);
/// From register 0x10 of the first slot to register 0x20.
pub const COPY_REGISTER: &[u8] = &words::<3, 12>([
    0xd2a2_2001, // mov x1, #0x11000000
    0xb940_1022, // ldr w2, [x1, #0x10]
    0xb900_2022, // str w2, [x1, #0x20]
]);
/// Queue 1 of the first slot.
pub const NOTIFY: &[u8] = &words::<3, 12>([
    0xd2a2_2001, // mov x1, #0x11000000
    0x5280_0022, // mov w2, #1
    0xb900_5022, // str w2, [x1, #0x50]
]);
/// Turns processor 17, of affinity 0x101, on by PSCI's CPU_ON, with the context 7. That one stores what it finds in `x0`
/// behind the counter, and counts.
pub const COUNT_ON_ANOTHER: &[u8] = &words::<15, 60>([
    0xd2b8_8000, // mov x0, #0xc4000000
    0xf280_0060, // movk x0, #3
    0xd280_2021, // mov x1, #0x101
    0x1000_0082, // adr x2, four instructions on
    0xd280_00e3, // mov x3, #7
    0xd400_0002, // hvc #0
    0x1400_0000, // b to itself
    0xd2b0_0801, // mov x1, #0x80400000
    0xb900_0420, // str w0, [x1, #4]
    0xd503_3f9f, // dsb sy
    0xd2b0_0800, // mov x0, #0x80400000
    0xb940_0001, // ldr w1, [x0]
    0x1100_0421, // add w1, w1, #1
    0xb900_0001, // str w1, [x0]
    0x17ff_fffd, // b to ldr
]);
/// Makes the first slot's interrupt edge-triggered in the GIC's distributor, stores to register 0x20 of the slot, and waits
/// until the interrupt is pending.
pub const WAIT_FOR_INTERRUPT: &[u8] = &words::<7, 28>([
    0xd2a1_0003, // mov x3, #0x08000000
    0x5280_0102, // mov w2, #8
    0xb90c_0862, // str w2, [x3, #0xc08]: GICD_ICFGR2, interrupt 33
    0xd2a2_2001, // mov x1, #0x11000000
    0xb900_2022, // str w2, [x1, #0x20]
    0xb942_0462, // ldr w2, [x3, #0x204]: GICD_ISPENDR1
    0x360f_ffe2, // tbz w2, #1, to ldr
]);

//! Instructions for x86-64, in 32-bit mode.

#[path = "../kernel/vmlinux.rs"]
mod vmlinux;

use vm_memory::GuestAddress;

/// A kernel whose first processor runs `code`.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    vmlinux::vmlinux(&[&[0x90; 0x10], code].concat(), 4096, true)
}

/// Where [`COUNT`] counts.
pub const COUNTER: GuestAddress = GuestAddress(0x20_0000);
/// `inc dword [0x200000]; jmp` to it.
pub const COUNT: &[u8] = &[0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xf8];
/// By the keyboard controller: `mov al, 0xfe; out 0x64, al`, and stay.
pub const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
/// By ACPI: `mov edx, 0x604; mov ax, 5 << 10 | 1 << 13; out dx, ax`, and stay.
pub const POWER_OFF: &[u8] = &[0xba, 4, 6, 0, 0, 0x66, 0xb8, 0, 0x34, 0x66, 0xef, 0xeb, 0xfe];
/// `mov edx, 0x3f8; mov al, 'o'; out dx, al; mov al, 'k'; out dx, al`.
pub const PRINT_OK: &[u8] = &[0xba, 0xf8, 3, 0, 0, 0xb0, b'o', 0xee, 0xb0, b'k', 0xee];
/// From register 0x10 of the first slot to register 0x20: `mov eax, [0xd0000010]; mov [0xd0000020], eax`.
pub const COPY_REGISTER: &[u8] = &[0xa1, 0x10, 0, 0, 0xd0, 0xa3, 0x20, 0, 0, 0xd0];
/// Queue 1 of the first slot: `mov dword [0xd0000050], 1`.
pub const NOTIFY: &[u8] = &[0xc7, 0x05, 0x50, 0, 0, 0xd0, 1, 0, 0, 0];

/// An undefined instruction without an interrupt table: `ud2`.
pub const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];

//! `bpf(2)`, as far as a device filter needs it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::device_filter::Instruction;

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Several programs may be attached to one group; all must agree. runc and systemd attach the same way.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The start of `union bpf_attr` as BPF_PROG_LOAD reads it, up to `expected_attach_type` (kernel 4.17).
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface_index: u32,
    expected_attach_type: u32,
}

/// The start of `union bpf_attr` as BPF_PROG_ATTACH reads it.
#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// Loads a cgroup device program; the kernel verifies it.
pub fn load_device_program(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        expected_attach_type: BPF_CGROUP_DEVICE,
        ..LoadAttributes::default()
    };
    attributes.name[..6].copy_from_slice(b"engine");
    instructions.as_ptr().expose_provenance();
    license.as_ptr().expose_provenance();
    // SAFETY: `attributes` is a prefix of union bpf_attr of the size given, and outlives the call. The two pointers in it
    // come from a live slice of `instruction_count` 8-byte instructions and a NUL-terminated static; the kernel only
    // reads them, and only during the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<LoadAttributes>())
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a successful BPF_PROG_LOAD returns a new descriptor (close-on-exec) that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// Attaches a device program to a cgroup v2 folder. It stays as long as the group.
pub fn attach_device_program(cgroup: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_fd().as_raw_fd() as u32,
        program: program.as_fd().as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attributes` is a prefix of union bpf_attr of the size given, holds only integers and outlives the call;
    // both descriptors are open for the length of their borrows.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attributes, size_of::<AttachAttributes>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

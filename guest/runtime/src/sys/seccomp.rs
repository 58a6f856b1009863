//! Putting a seccomp filter on the calling process.

use std::io;

/// The size of one instruction of a filter: `struct sock_filter` of the kernel (a 16-bit code, two 8-bit jumps, a 32-bit
/// value).
pub const INSTRUCTION_LEN: usize = 8;

/// Installs a program (instructions in this machine's byte order, one after the other) as a filter of the calling thread,
/// with `SECCOMP_FILTER_FLAG_*` of seccomp(2).
///
/// The kernel checks the program. It wants CAP_SYS_ADMIN, or that no new privileges can be had.
pub fn install(program: &[u8], flags: u32) -> io::Result<()> {
    let (instructions, rest) = program.as_chunks::<INSTRUCTION_LEN>();
    let length = u16::try_from(instructions.len()).ok().filter(|_| rest.is_empty());
    let length = length.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let mut instructions: Vec<libc::sock_filter> = instructions
        .iter()
        .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        })
        .collect();
    let program = libc::sock_fprog { len: length, filter: instructions.as_mut_ptr() };
    // SAFETY: `program` names `length` instructions that live until the call returns; the kernel copies them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_program_is_refused() {
        assert_eq!(install(&[0; 7], 0).unwrap_err().kind(), io::ErrorKind::InvalidData);
        // A program that does not end in a return: the kernel says so, and nothing is installed.
        assert_eq!(install(&[0; 8], 0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}

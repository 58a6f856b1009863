//! The few calls for which no safe wrapper exists. All `unsafe` of the agent is here.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::Signal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Sends a signal to every process of the machine but this one. No process at all is no error.
pub fn signal_all(signal: Signal) -> io::Result<()> {
    // SAFETY: kill takes two integers and touches no memory of ours. As PID 1, -1 means everyone else.
    let result = unsafe { libc::kill(-1, signal.as_raw()) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

/// Has a file's readiness watched, for as long as the result lives.
pub fn register_file(file: File, interest: Interest) -> io::Result<AsyncFd<File>> {
    // SAFETY: the file owns its descriptor, gives the same one at every call, and is closed only when the result, which owns
    // it, is dropped.
    unsafe { AsyncFd::register_with_interest(file, interest) }.map_err(Into::into)
}

/// Starts swapping to a block device with a swap header. It is told at once which pages of it are free again.
pub fn swap_on(device: &CStr) -> io::Result<()> {
    // Linux include/uapi/linux/swap.h: SWAP_FLAG_DISCARD, and of its two kinds the one as pages become free.
    const FLAGS: libc::c_int = 0x10000 | 0x40000;
    // SAFETY: swapon reads a path that ends with a NUL and lives for the call, and touches no other memory of ours.
    match unsafe { libc::swapon(device.as_ptr(), FLAGS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has a file system give back what is free in so many bytes from `start` on, in pieces of `minimum` bytes or more. `file` is any
/// of its files or folders. Returns the bytes given back.
pub fn trim(file: &File, start: u64, length: u64, minimum: u64) -> io::Result<u64> {
    // Linux include/uapi/linux/fs.h: struct fstrim_range and FITRIM, _IOWR('X', 121, struct fstrim_range).
    const FITRIM: libc::c_ulong = 0xc018_5879;
    let mut range = [start, length, minimum];
    // SAFETY: the descriptor is open for the call, and the kernel reads and writes three numbers of 64 bits, which `range` is.
    match unsafe { libc::ioctl(file.as_raw_fd(), FITRIM, range.as_mut_ptr()) } {
        0 => Ok(range[1]),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the command's process join a cgroup before it runs the program, so that nothing it starts is outside.
///
/// `procs` is the cgroup's `cgroup.procs`, open for writing. The process also leads a session of its own, so that
/// no signal meant for the console reaches it.
pub fn start_in_cgroup(command: &mut Command, procs: File) {
    let enter = move || {
        // "0" is the writer itself.
        (&procs).write_all(b"0")?;
        rustix::process::setsid()?;
        Ok(())
    };
    // SAFETY: the closure runs in the forked child and makes only the system calls write and setsid; it allocates
    // nothing and takes no lock. `procs` is owned by the closure and close-on-exec.
    unsafe { command.pre_exec(enter) };
}

//! Becoming the container's program.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::Pid;

/// The kernel's signals are numbered from 1 to this.
const SIGNAL_MAX: i32 = 64;

/// Gives signals the state a program expects at its birth: nothing blocked, everything at its default.
///
/// An ignored signal survives `execve`. The Rust runtime ignores SIGPIPE; glibc's `posix_spawn`, by which a shim itself
/// is started, leaves its two internal signals ignored, and its `signal` function refuses to touch those: so the kernel
/// is asked directly.
pub fn reset_signals() -> io::Result<()> {
    // `struct sigaction` of the kernel: handler (0 is SIG_DFL), flags, restorer, mask; 8 bytes each.
    let default = [0_u64; 4];
    for number in 1..=SIGNAL_MAX {
        // SAFETY: `default` is a whole kernel sigaction, only read during the call, and SIG_DFL installs no handler; the
        // old action is not asked for. SIGKILL and SIGSTOP answer EINVAL and always are at their default.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                number,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            );
        }
    }
    let none = 0_u64;
    // SAFETY: `none` is a whole kernel signal set of the size given, only read during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Runs a program as a child that leads a process group, in the foreground of the terminal if its input is one.
///
/// The caller must be the leader of the terminal's session. Signals of the child are at their defaults.
pub fn spawn_in_foreground(program: &OsStr, arguments: &[OsString]) -> io::Result<Pid> {
    let mut command = Command::new(program);
    command.args(arguments);
    // SAFETY: runs in the child between fork and exec, and calls nothing but the kernel, on integers.
    unsafe {
        command.pre_exec(|| {
            libc::setpgid(0, 0);
            // A group in the background that takes the terminal is stopped, unless it does not care.
            libc::signal(libc::SIGTTOU, libc::SIG_IGN);
            // Fails where standard input is no terminal, or not this session's: then there is nothing to take.
            libc::tcsetpgrp(0, libc::getpid());
            reset_signals()
        });
    }
    let child = command.spawn()?;
    // The pid of a child is positive.
    Pid::from_raw(child.id().cast_signed()).ok_or_else(|| io::Error::other("a child without a number"))
}

/// Closes descriptors that a fork has inherited and its process must not keep open.
///
/// Only for a process that will execute a program or exit, and never use or drop what owns these descriptors: a
/// container's init, which may wait for its start for days, and must not keep the shim's connections open if that dies.
pub fn close_inherited(descriptors: &[RawFd]) {
    for descriptor in descriptors {
        // SAFETY: closing an integer has no memory effects; by this function's contract nobody in this process uses the
        // descriptor afterwards, so no other file can be hit through a reused number.
        unsafe {
            libc::close(*descriptor);
        }
    }
}

/// Replaces this process by a program, with exactly these arguments and environment, in this order.
///
/// Returns only when that failed.
pub fn execute(program: &Path, arguments: &[String], environment: &[String]) -> io::Error {
    match try_execute(program, arguments, environment) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_execute(
    program: &Path,
    arguments: &[String],
    environment: &[String],
) -> io::Result<std::convert::Infallible> {
    use std::os::unix::ffi::OsStrExt;
    let program = CString::new(program.as_os_str().as_bytes())?;
    let arguments = c_strings(arguments)?;
    let environment = c_strings(environment)?;
    let argument_pointers = pointers(&arguments);
    let environment_pointers = pointers(&environment);
    // SAFETY: all three point to NUL-terminated strings, the two arrays end in a null pointer, and everything they point
    // to lives until the call returns or this process image is gone.
    unsafe {
        libc::execve(program.as_ptr(), argument_pointers.as_ptr(), environment_pointers.as_ptr());
    }
    Err(io::Error::last_os_error())
}

fn c_strings(strings: &[String]) -> io::Result<Vec<CString>> {
    Ok(strings.iter().map(|string| CString::new(string.as_bytes())).collect::<Result<_, _>>()?)
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

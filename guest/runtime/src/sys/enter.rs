//! Going into a running container.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What is above the standard streams.
const FIRST_OTHER: u32 = 3;

/// Forks a child that is born in a pid namespace, and returns its id in the caller's own.
///
/// The child runs `work` and exits with what that returns; a program it executes meanwhile takes its place. `own` is the
/// pid namespace of the caller, whose later children are born there again.
///
/// Only for a program with a single thread: the child is a copy of the calling thread alone.
pub fn fork_into(
    namespace: BorrowedFd<'_>,
    own: BorrowedFd<'_>,
    work: impl FnOnce() -> i32,
) -> io::Result<i32> {
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::ProcessID))?;
    // SAFETY: by this function's contract there is no other thread whose locks the child could find taken for ever, so
    // it may do whatever its parent may. It never returns from here.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = work();
        // SAFETY: ends the process without running what the parent has registered for its own end.
        unsafe { libc::_exit(code) }
    }
    let forked = if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) };
    move_into_link_name_space(own, Some(LinkNameSpaceType::ProcessID))?;
    forked
}

/// Marks every descriptor but the standard streams to be closed at `execve`.
pub fn close_others_at_execution() -> io::Result<()> {
    // SAFETY: plain integers; nothing is closed now, so no descriptor anybody owns becomes invalid in this process.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, FIRST_OTHER, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

//! Two edges between a program and the processes around it that need unsafe code.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::FdFlags;
use rustix::process::{Pid, Signal};

/// Makes the child die with the thread that spawns it.
///
/// The kernel ties the death signal to the parent *thread*: spawn from one that lives as long as the process.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let parent = rustix::process::getpid();
    let hook = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the request took effect.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::Error::from(rustix::io::Errno::SRCH));
        }
        Ok(())
    };
    // SAFETY: the hook makes two system calls (prctl, getppid) and neither allocates nor takes locks, so it may run
    // between fork and exec of a threaded process.
    unsafe { command.pre_exec(hook) }
}

/// A descriptor that this program was started with, by number.
///
/// The original stays open under its number but is marked so that children do not inherit it.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from(rustix::io::Errno::BADF));
    }
    // SAFETY: the number is not -1. The borrow ends with this function, and a number that is not open only makes the
    // system calls below fail with EBADF: nothing is closed through it.
    let original = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(original, FdFlags::CLOEXEC)?;
    Ok(rustix::io::fcntl_dupfd_cloexec(original, 3)?)
}

/// The process id as a number for messages.
pub(crate) fn pid_of(child: &std::process::Child) -> io::Result<Pid> {
    let raw = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    raw.ok_or_else(|| io::Error::other("the child has no process id"))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            command.arg("600").stdin(Stdio::null());
            die_with_parent(&mut command).spawn().unwrap()
        })
        .join()
        .unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the child outlived its parent");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }

    #[test]
    fn inherited_descriptors_are_checked() {
        assert!(inherited(-1).is_err());
        assert_eq!(inherited(100_000).unwrap_err().raw_os_error(), Some(libc::EBADF));
        let file = std::fs::File::open("/dev/null").unwrap();
        let copy = inherited(file.as_raw_fd()).unwrap();
        assert_ne!(copy.as_raw_fd(), file.as_raw_fd());
        assert!(rustix::io::fcntl_getfd(&copy).unwrap().contains(FdFlags::CLOEXEC));
    }
}

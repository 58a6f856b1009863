//! The system calls nobody wraps safely, each as a small safe function. The only unsafe code of this crate.

#![expect(unsafe_code, reason = "thin wrappers over system calls; each block says why it is sound")]

pub mod bpf;
pub mod enter;
pub mod exec;
pub mod seccomp;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use serde::{Deserialize, Serialize};

/// A descriptor that this program was started with, by number.
///
/// The original stays open under its number but is marked so that children do not inherit it.
pub fn inherited(number: std::os::fd::RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from(rustix::io::Errno::BADF));
    }
    // SAFETY: the number is not -1. The borrow ends with this function, and a number that is not open only makes the
    // system calls below fail with EBADF: nothing is closed through it.
    let original = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(original, rustix::io::FdFlags::CLOEXEC)?;
    Ok(rustix::io::fcntl_dupfd_cloexec(original, 3)?)
}

/// A process id that cannot be mistaken for a later process of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStamp {
    /// The process id.
    pub pid: i32,
    /// When it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub started: u64,
}

impl ProcessStamp {
    /// The stamp of a living process.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started = start_time(&stat).ok_or_else(|| {
            io::Error::other(format!("/proc/{pid}/stat has no start time: {}", stat.trim_end()))
        })?;
        Ok(Self { pid, started })
    }

    /// The stamp of this process.
    pub fn of_self() -> io::Result<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// A descriptor of the process, or `None` when it is gone (a zombie of it still counts as there).
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The number may have been reused before the descriptor was opened; it cannot be after.
        match Self::of(self.pid) {
            Ok(now) if now == *self => Ok(Some(descriptor)),
            _ => Ok(None),
        }
    }
}

/// Field 22 of a `stat` line. The name in field 2 may hold spaces and parentheses, so count from the last one.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Sends a signal by its number, real-time signals included, to the process behind a descriptor.
///
/// `Ok(false)` when the process has already ended.
pub fn signal(process: impl AsFd, number: i32) -> io::Result<bool> {
    // SAFETY: the call reads nothing but its integer arguments (the siginfo pointer is null, which asks for the default),
    // and the descriptor is open for the length of the borrow.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_fd().as_raw_fd(),
            number,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        error => Err(error),
    }
}

/// Whether the process behind a descriptor has ended, collected or not.
pub fn has_ended(process: impl AsFd) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&now))? > 0)
}

/// SIGKILL.
pub fn kill(process: impl AsFd) -> io::Result<bool> {
    signal(process, Signal::KILL.as_raw())
}

/// A descriptor that is readable when a child has ended, whichever child it is.
///
/// A pidfd tells of one child, and only of one whose number is known: of a child that failed early, it is not.
#[derive(Debug)]
pub struct ChildEnds(OwnedFd);

impl ChildEnds {
    /// Blocks SIGCHLD in the calling thread, and so in what it forks: [`exec::reset_signals`] undoes that for a program.
    pub fn new() -> io::Result<Self> {
        // The kernel's signal set: bit 0 is signal 1.
        let set = 1_u64 << (libc::SIGCHLD - 1);
        // SAFETY: `set` is a whole kernel signal set of the size given, only read during the call; the old one is not
        // asked for.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_BLOCK,
                &raw const set,
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; -1 asks for a new descriptor.
        let descriptor = unsafe {
            libc::syscall(
                libc::SYS_signalfd4,
                -1,
                &raw const set,
                size_of::<u64>(),
                libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
            )
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor, and nobody else knows of it. It fits: descriptors are ints.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor as i32) }))
    }

    /// Takes note, so that it is readable again only after another end. To be called before children are collected.
    pub fn clear(&self) {
        // A `signalfd_siginfo`. At most one SIGCHLD is pending at a time; without any there is nothing to take.
        let mut record = [0; 128];
        let _ = rustix::io::read(&self.0, &mut record);
    }
}

impl AsFd for ChildEnds {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Every signal of this process, to be taken one after another.
#[derive(Debug)]
pub struct AllSignals(());

impl AllSignals {
    /// Blocks all signals that can be blocked, but for those that tell of this program's own mistakes.
    pub fn new() -> io::Result<Self> {
        let set = Self::SET;
        // SAFETY: `set` is a whole kernel signal set of the size given, only read during the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const set,
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
        if result == 0 { Ok(Self(())) } else { Err(io::Error::last_os_error()) }
    }

    /// The kernel's signal set: bit 0 is signal 1.
    const SET: u64 = {
        let own = [
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGABRT,
            libc::SIGTRAP,
            libc::SIGSYS,
        ];
        let (mut set, mut at) = (u64::MAX, 0);
        while at < own.len() {
            set &= !(1 << (own[at] - 1));
            at += 1;
        }
        set
    };

    /// Waits for the next signal; its number.
    pub fn next(&self) -> io::Result<i32> {
        let set = Self::SET;
        loop {
            // SAFETY: the set is read only, of the size given; neither details nor a time limit are asked for.
            let number = unsafe {
                libc::syscall(
                    libc::SYS_rt_sigtimedwait,
                    &raw const set,
                    std::ptr::null_mut::<libc::siginfo_t>(),
                    std::ptr::null::<libc::timespec>(),
                    size_of::<u64>(),
                )
            };
            match i32::try_from(number) {
                Ok(number) if number > 0 => return Ok(number),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Sends a signal, by its number, to a child that has not been waited for.
    pub fn pass_on(&self, child: Pid, number: i32) -> io::Result<()> {
        // SAFETY: integers only.
        if unsafe { libc::kill(child.as_raw_nonzero().get(), number) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        }
    }
}

/// Does something among another mount namespace's mounts, with that one's root as the root.
///
/// The work is done by a thread that has ended when this returns: the caller stays where it is, and as single as it was.
pub fn in_mount_namespace<T: Send>(
    namespace: impl AsFd,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    const STACK_LEN: usize = 256 * 1024;
    let namespace = namespace.as_fd();
    let inside = || {
        // SAFETY: the danger is in unsharing the table of descriptors, which stays shared. Only the current folder and the
        // root become this thread's own, as `setns` demands.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))?;
        work()
    };
    thread::scope(|scope| {
        let worker = thread::Builder::new().stack_size(STACK_LEN).spawn_scoped(scope, inside)?;
        worker.join().unwrap_or_else(|_| Err(io::Error::other("the work in the mount namespace panicked")))
    })
}

/// Does something in a mount namespace that is made for it: a copy of this process's, which ends when this returns unless
/// a process that was started there goes on in it. `prepare` comes first and changes the copy; all its mounts pass their
/// changes on to this process's peers as before until it says otherwise.
///
/// The caller must have one thread only: the kernel moves no other one, and takes no process of several back. Its current
/// folder is the root afterwards.
pub fn in_mounts_of_its_own<T>(
    prepare: impl FnOnce() -> io::Result<()>,
    work: impl FnOnce() -> T,
) -> io::Result<T> {
    let namespace = fs::File::open("/proc/self/ns/mnt")?;
    // A namespace is entered at its root, which need not be ours.
    let root = fs::File::open("/")?;
    // SAFETY: the danger is in unsharing the table of descriptors, which is not asked for.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    let done = prepare().map(|()| work());
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
    rustix::process::fchdir(&root)?;
    rustix::process::chroot(".")?;
    done
}

/// Gives free heap pages back. A shim lives as long as its container and needs little after creating it.
pub fn trim_heap() {
    // SAFETY: malloc_trim has no preconditions; it only releases memory the allocator considers free.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_time_is_found_behind_any_name() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987 20";
        assert_eq!(start_time(&format!("7 (a) b) c) {fields}")), Some(987));
        assert_eq!(start_time("7 (short) S 1"), None);
        assert_eq!(start_time(""), None);
    }

    #[test]
    fn a_stamp_of_another_time_names_nobody() {
        let mut stamp = ProcessStamp::of_self().unwrap();
        assert!(stamp.open().unwrap().is_some());
        stamp.started += 1;
        assert!(stamp.open().unwrap().is_none());
    }

    #[test]
    fn the_end_of_any_child_is_told_once() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        // SIGCHLD goes to any thread that does not block it, and libtest has others: raise it in this one.
        let ends = ChildEnds::new().unwrap();
        let ready = |seconds| {
            let timeout = Timespec { tv_sec: seconds, tv_nsec: 0 };
            poll(&mut [PollFd::new(&ends, PollFlags::IN)], Some(&timeout)).unwrap() == 1
        };
        assert!(!ready(0));
        ends.clear();
        // SAFETY: plain integers; the thread is this one.
        unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGCHLD);
        }
        assert!(ready(10));
        ends.clear();
        assert!(!ready(0));
    }

    #[test]
    fn signals_reach_a_child_and_miss_a_dead_one() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let descriptor = ProcessStamp::of(child.id() as i32).unwrap().open().unwrap().unwrap();
        assert!(kill(&descriptor).unwrap());
        child.wait().unwrap();
        assert!(!kill(&descriptor).unwrap());
    }
}

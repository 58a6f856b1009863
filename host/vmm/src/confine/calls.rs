//! The system calls of each class of threads: seccomp (Linux `Documentation/userspace-api/seccomp_filter.rst`).
//!
//! The programs are static, so what they call is what is written here and in the C library they were built with. No class
//! executes programs, changes users or namespaces, mounts, or traces.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::ConfineError;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A device model that works on descriptors it was given, and on files it opens at its beginning.
    Device,
    /// The NAT and its card: a device that opens sockets to the world.
    Network,
    /// A server of shared folders: a device that does to files what guests ask for.
    Files,
    /// A virtual processor.
    Processor,
    /// The thread that drives the machine, and those that wait for its parts or talk to the daemon.
    Driver,
}

/// What every thread does: memory, locks, time, descriptors it has, starting and ending threads.
const COMMON: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_prctl,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Files by name. The C library opens some of the kernel's when it is short of memory, and a panic looks for the program's
/// own, so they are no reason to end a process; classes without files are told that they may not, Landlock or not.
const OPENING: &[c_long] = &[libc::SYS_openat, libc::SYS_readlinkat, libc::SYS_getcwd];

/// Files by name (Landlock says which) and their contents.
const DEVICE: &[c_long] = &[
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_accept4,
];

/// Sockets to the world, and QEMU that comes to the card: at a socket made before, for nobody here listens.
const NETWORK: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_geteuid,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
];

/// The machine's end, and everybody's.
const DRIVER: &[c_long] =
    &[libc::SYS_pread64, libc::SYS_wait4, libc::SYS_waitid, libc::SYS_pidfd_send_signal];

/// Since Linux 5.1 new calls have one number on all architectures. The C library's bindings name this one for some only.
const FCHMODAT2: c_long = 452;

/// What a guest may have done to its files: names, links, attributes, owners, locks.
const FILES: &[c_long] = &[
    libc::SYS_openat2,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_getdents64,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_truncate,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_statfs,
    libc::SYS_syncfs,
    libc::SYS_sync_file_range,
    libc::SYS_copy_file_range,
    libc::SYS_splice,
    libc::SYS_sendfile,
    libc::SYS_fadvise64,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_flistxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    libc::SYS_umask,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_fchdir,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_pipe2,
    libc::SYS_unshare,
];

/// Calls that only the oldest architectures have: newer ones do with the more general calls above. By the list each
/// belongs to.
#[cfg(target_arch = "x86_64")]
mod older {
    use super::c_long;

    pub(super) const COMMON: &[c_long] = &[libc::SYS_epoll_wait, libc::SYS_poll];
    pub(super) const OPENING: &[c_long] = &[libc::SYS_readlink];
    pub(super) const DEVICE: &[c_long] = &[libc::SYS_stat, libc::SYS_rename, libc::SYS_unlink];
    pub(super) const FILES: &[c_long] = &[libc::SYS_chmod];
}

#[cfg(not(target_arch = "x86_64"))]
mod older {
    use super::c_long;

    pub(super) const COMMON: &[c_long] = &[];
    pub(super) const OPENING: &[c_long] = &[];
    pub(super) const DEVICE: &[c_long] = &[];
    pub(super) const FILES: &[c_long] = &[];
}

/// `FIONBIO`: a descriptor stops blocking. The standard library's way for sockets.
const FIONBIO: u64 = 0x5421;
/// Requests to KVM have this in their second byte (`KVMIO`).
const KVM_REQUESTS: u64 = 0xae00;
/// The byte they have it in.
const REQUEST_TYPE: u64 = 0xff00;
/// `KVM_SET_USER_MEMORY_REGION`, by which a running machine gets more memory.
const KVM_SET_MEMORY: u64 = 0x4020_ae46;
/// File locks of open file descriptions, advisory locks and copies are `fcntl` and allowed; requests to copy blocks of one
/// file into another (`FICLONE`, `FICLONERANGE`, `FS_IOC_*FLAGS`) are of types 0x94 and `f`.
const FILE_REQUESTS: [u64; 2] = [0x9400, 0x6600];

impl Class {
    fn calls(self) -> Vec<&'static [c_long]> {
        let own: &[&[c_long]] = match self {
            Self::Device => &[DEVICE, older::DEVICE],
            Self::Network => &[NETWORK],
            Self::Files => &[DEVICE, older::DEVICE, FILES, older::FILES],
            Self::Processor => &[],
            Self::Driver => &[DRIVER],
        };
        [&[COMMON, older::COMMON, OPENING, older::OPENING], own].concat()
    }

    fn filter(self) -> Result<BpfProgram, BackendError> {
        let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
            self.calls().into_iter().flatten().map(|call| (*call, Vec::new())).collect();
        // Memory that can be executed is made by nobody.
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            let condition = masked(2, libc::PROT_EXEC as u64, 0)?;
            rules.insert(call, vec![SeccompRule::new(vec![condition])?]);
        }
        let mut requests = vec![masked(1, u64::from(u32::MAX), FIONBIO)?];
        match self {
            Self::Processor => requests.push(masked(1, REQUEST_TYPE, KVM_REQUESTS)?),
            Self::Files => {
                for kind in FILE_REQUESTS {
                    requests.push(masked(1, REQUEST_TYPE, kind)?);
                }
            }
            Self::Driver => requests.push(masked(1, u64::from(u32::MAX), KVM_SET_MEMORY)?),
            Self::Device | Self::Network => {}
        }
        let requests: Result<Vec<_>, _> =
            requests.into_iter().map(|condition| SeccompRule::new(vec![condition])).collect();
        rules.insert(libc::SYS_ioctl, requests?);
        let target = std::env::consts::ARCH.try_into()?;
        let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, target)?;
        filter.try_into()
    }

    /// Restricts the calling thread and those it starts.
    pub(super) fn restrict(self) -> Result<(), ConfineError> {
        let failed = |source| ConfineError::Calls { class: self, source };
        let opens = matches!(self, Self::Device | Self::Files);
        let refusal = (!opens).then(without_opening);
        // The last one takes the call that adds filters.
        let filters = refusal.into_iter().chain([self.filter()]);
        for filter in filters {
            let program = filter.map_err(|error| failed(Box::new(error)))?;
            seccompiler::apply_filter(&program).map_err(|error| failed(Box::new(error)))?;
        }
        Ok(())
    }
}

/// Refuses to open files; of several filters the strictest counts.
fn without_opening() -> Result<BpfProgram, BackendError> {
    let rules = OPENING.iter().chain(older::OPENING).map(|call| (*call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EACCES.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// The bits of `mask` in this argument are those of `value`.
fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
}

//! Interrupting a thread that is inside `KVM_RUN`, or on its way there.
//!
//! A signal brings the thread back out of the guest. One that comes just before it enters would be lost, so the kicker
//! first sets `immediate_exit` in the page that the thread shares with the kernel: entering then fails at once. The
//! thread clears the flag before it looks at what is wanted of it.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::vcpu::Kick;

/// Which of the real-time signals; the first are the C library's.
fn signal() -> libc::c_int {
    SIGRTMIN() + 4
}

/// A flag in the page shared with the kernel (`kvm_run::immediate_exit`).
#[derive(Debug, Clone, Copy)]
pub(super) struct ImmediateExit(*const AtomicU8);

// SAFETY: the pointer is to one byte that every side accesses atomically; whoever holds it keeps the page mapped
// (`ThreadKick`, `KvmVcpu`).
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    /// # Safety
    ///
    /// `flag` must stay valid for as long as the value is used, and be accessed by nobody but through this type and by
    /// the kernel.
    pub(super) unsafe fn new(flag: *mut u8) -> Self {
        Self(flag.cast_const().cast())
    }

    pub(super) fn set(self, value: u8) {
        // SAFETY: `new` demands that the byte is valid; an AtomicU8 has a byte's size and alignment.
        unsafe { (*self.0).store(value, Ordering::SeqCst) }
    }
}

/// Kicks one thread.
///
/// [`threads`](crate::threads) drops it on that thread before the thread and its processor end, and never uses it
/// afterwards: both the thread's id and the flag's page are valid whenever [`Kick::kick`] runs.
pub(super) struct ThreadKick {
    thread: libc::pthread_t,
    flag: ImmediateExit,
}

impl ThreadKick {
    /// A kick for the calling thread.
    pub(super) fn for_this_thread(flag: ImmediateExit) -> io::Result<Self> {
        static HANDLER: OnceLock<Result<(), i32>> = OnceLock::new();
        let registered =
            HANDLER.get_or_init(|| register_signal_handler(signal(), ignore).map_err(|error| error.errno()));
        registered.map_err(io::Error::from_raw_os_error)?;
        // SAFETY: takes nothing and always succeeds.
        Ok(Self { thread: unsafe { libc::pthread_self() }, flag })
    }
}

/// Being called at all is what the signal is for: it ends `KVM_RUN` with `EINTR`.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Kick for ThreadKick {
    fn kick(&self) {
        self.flag.set(1);
        // SAFETY: the thread has not ended (see the type), so its id is valid; the signal's handler does nothing.
        let result = unsafe { libc::pthread_kill(self.thread, signal()) };
        if result != 0 {
            tracing::error!(error = %io::Error::from_raw_os_error(result), "cannot signal a processor's thread");
        }
    }
}

//! Whether KVM on this host really runs guest code.
//!
//! That `/dev/kvm` opens proves little: in some cloud machines it belongs to a module that interprets an unmodified
//! guest instruction by instruction, a thousand times too slowly and without the newer instructions. So the probe
//! makes a virtual machine with one 64-bit processor, runs a few vector instructions in it (AVX, Advanced SIMD) and then a
//! counted loop, and looks at the results and at the processor time they took. The guest is the architecture's (`sys::probe`).
//!
//! The guest runs on a thread of its own under a time limit. To end a guest that does not come back the thread is
//! sent a signal that it blocks everywhere but inside `KVM_RUN` (`KVM_SET_SIGNAL_MASK`), so no signal handler of the
//! calling program is involved. Should even that not help, the thread is left behind and the caller still gets its
//! answer. Nothing is cached: a probe takes some milliseconds where KVM works and some hundred where it does not.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::sys::probe::{VECTOR, prepare, report};

/// How long the whole probe may take before it is called hung.
const WALL_TIME_MAX: Duration = Duration::from_secs(8);
/// How long the kick may take to bring the guest back.
const KICK_TIME_MAX: Duration = Duration::from_secs(1);
/// The loop takes 1 to 4 ms of processor time on hardware, 60 to 600 ms when KVM itself runs under a software
/// processor, which cannot tell the time that it had to wait for its turn, and 2 to 8 s when each instruction is interpreted.
const LOOP_TIME_MAX: Duration = Duration::from_secs(1);
/// Rounds of the counted loop in all.
pub(super) const LOOP_ROUNDS: u32 = 4_000_000;
/// Rounds between two looks at the clock.
pub(super) const SLICE_ROUNDS: u32 = 50_000;

/// The probe's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Usability {
    /// Guest code runs at full speed.
    Usable,
    /// It does not, or cannot be tried.
    Unusable {
        /// Why, as a sentence with the cure where there is one.
        reason: String,
    },
}

/// Finds out whether `/dev/kvm` can run a machine. Blocks, for at most about nine seconds.
pub fn probe() -> Usability {
    probe_device(Path::new("/dev/kvm"))
}

/// [`probe`] for a device somewhere else.
pub fn probe_device(device: &Path) -> Usability {
    match run_with_limit(device) {
        Ok(()) => Usability::Usable,
        Err(problem) => Usability::Unusable { reason: problem.to_string() },
    }
}

/// Why KVM is not usable. The texts go to the user as they are.
#[derive(Debug)]
pub(super) enum Problem {
    Missing,
    Permission { device: String },
    Open { device: String, source: io::Error },
    Version { version: i32 },
    Setup { step: &'static str, source: io::Error },
    Hung { limit: Duration },
    Interrupted,
    VectorFault,
    VectorEmulation,
    VectorResult { expected: u8, found: u8 },
    Slow { rounds: u32, spent: Duration },
    LoopResult { found: u8 },
    Exit { step: &'static str, exit: String },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(
                f,
                "there is no /dev/kvm: virtualization is switched off in the firmware, or this is a virtual machine \
                 without nested virtualization"
            ),
            Self::Permission { device } => write!(
                f,
                "no permission to open {device}: add yourself to group kvm (`sudo usermod -aG kvm $USER`) and log in \
                 again"
            ),
            Self::Open { device, source } => write!(f, "cannot open {device}: {source}"),
            Self::Version { version } => {
                write!(f, "KVM speaks version {version} of its interface, not {KVM_API_VERSION}")
            }
            Self::Setup { step, source } => write!(f, "KVM cannot {step}: {source}"),
            Self::Hung { limit } => {
                write!(f, "KVM did not come back from a few test instructions within {} s", limit.as_secs())
            }
            Self::Interrupted => {
                write!(f, "KVM was still running the test instructions when the time was up")
            }
            Self::VectorFault => {
                write!(
                    f,
                    "KVM opens, but a guest that executes an {VECTOR} instruction dies: it interprets instructions"
                )
            }
            Self::VectorEmulation => write!(
                f,
                "KVM opens, but interprets the guest's instructions instead of running them and knows no {VECTOR} \
                 instruction"
            ),
            Self::VectorResult { expected, found } => {
                write!(f, "KVM opens, but {VECTOR} instructions computed {found} instead of {expected}")
            }
            Self::Slow { rounds, spent } => write!(
                f,
                "KVM opens, but runs guest code too slowly (a loop reached {rounds} of {LOOP_ROUNDS} rounds in {} \
                 ms): it interprets instructions",
                spent.as_millis()
            ),
            Self::LoopResult { found } => {
                write!(f, "KVM opens, but a counted loop ended with {found} instead of 0")
            }
            Self::Exit { step, exit } => write!(f, "KVM opens, but {step} ended with {exit}"),
        }
    }
}

pub(super) fn setup(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Problem {
    move |error| Problem::Setup { step, source: io::Error::from_raw_os_error(error.errno()) }
}

/// Runs the guest on its own thread and waits for it with a limit.
fn run_with_limit(device: &Path) -> Result<(), Problem> {
    let kvm = open(device)?;
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            // The receiver is gone only if the caller has given up on this thread.
            drop(sender.send(run_guest(&kvm)));
        })
        .map_err(|source| Problem::Setup { step: "start a thread", source })?;
    let answer = match receiver.recv_timeout(WALL_TIME_MAX) {
        Ok(answer) => answer,
        Err(_) => {
            kick(&thread);
            match receiver.recv_timeout(KICK_TIME_MAX) {
                Ok(answer) => answer,
                // The thread is stuck in the kernel; joining it would hang this caller as well.
                Err(_) => return Err(Problem::Hung { limit: WALL_TIME_MAX }),
            }
        }
    };
    if thread.join().is_err() {
        return Err(Problem::Exit { step: "the probe", exit: "a panic".into() });
    }
    answer
}

fn open(device: &Path) -> Result<Kvm, Problem> {
    let name = device.display().to_string();
    let path = CString::new(device.as_os_str().as_bytes())
        .map_err(|error| Problem::Open { device: name.clone(), source: error.into() })?;
    let kvm = Kvm::new_with_path(path).map_err(|error| {
        let source = io::Error::from_raw_os_error(error.errno());
        match source.kind() {
            io::ErrorKind::NotFound => Problem::Missing,
            io::ErrorKind::PermissionDenied => Problem::Permission { device: name.clone() },
            _ => Problem::Open { device: name.clone(), source },
        }
    })?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => Ok(kvm),
        -1 => Err(Problem::Open { device: name, source: io::Error::last_os_error() }),
        version => Err(Problem::Version { version }),
    }
}

/// Interrupts `KVM_RUN` on the probe's thread.
fn kick(thread: &std::thread::JoinHandle<()>) {
    // SAFETY: the handle has been neither joined nor dropped, so its pthread id is valid. The signal is blocked in
    // that thread outside of KVM_RUN (`interruptible`), or the thread has not come that far, and its default action
    // is to be ignored: nothing of the process is disturbed.
    let result = unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK) };
    if result != 0 {
        tracing::debug!(result, "the probe's thread had already ended");
    }
}

/// Ignored by default, so that a stray one is harmless.
const KICK: libc::c_int = libc::SIGURG;

/// What the guest says.
pub(super) enum Report {
    /// 21 + 21 in a vector register.
    Vector(u8),
    /// A slice of the loop is over, with this remainder.
    Loop(u8),
    /// An instruction faulted.
    Fault,
}

const VECTOR_RESULT: u8 = 42;
const MEMORY_BYTES: usize = 2 * 1024 * 1024;

fn run_guest(kvm: &Kvm) -> Result<(), Problem> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .map_err(|error| Problem::Setup { step: "get guest memory", source: io::Error::other(error) })?;
    // `memory` is declared before the machine and so outlives it.
    let vm = kvm.create_vm().map_err(setup("create a virtual machine"))?;
    map_memory(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0).map_err(setup("create a processor"))?;
    let vector = prepare(kvm, &vm, &vcpu, &memory)?;
    interruptible(&vcpu)?;
    if vector {
        check_vector(&mut vcpu)?;
    }
    check_loop(&mut vcpu)
}

fn map_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Problem> {
    let address = memory
        .get_host_address(GuestAddress(0))
        .map_err(|error| Problem::Setup { step: "find guest memory", source: io::Error::other(error) })?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: the region is one mapping of MEMORY_BYTES bytes that `run_guest` keeps until the machine is gone, and
    // nothing in this process holds references into it.
    unsafe { vm.set_user_memory_region(region) }.map_err(setup("give memory to a virtual machine"))
}

/// `struct kvm_signal_mask` of linux/kvm.h with room for the kernel's 64-bit signal set.
#[repr(C)]
struct SignalMask {
    length: u32,
    set: [u8; 8],
}

/// Blocks [`KICK`] in this thread, except while it is inside `KVM_RUN`.
fn interruptible(vcpu: &VcpuFd) -> Result<(), Problem> {
    /// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`.
    const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;
    let failed = |source| Problem::Setup { step: "be interrupted", source };
    // SAFETY: an all-zero sigset_t is a valid place for sigemptyset to initialise, and both calls write only to it.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, KICK);
        set
    };
    // SAFETY: `set` is initialised; the old mask is not asked for. Only this thread's mask changes, and it ends soon.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    if result != 0 {
        return Err(failed(io::Error::from_raw_os_error(result)));
    }
    // Everything is blocked inside KVM_RUN but the kick.
    let set = !(1_u64 << (KICK - 1));
    let mask = SignalMask { length: 8, set: set.to_ne_bytes() };
    // SAFETY: the descriptor is a vCPU; the kernel reads `length` and then that many bytes, all inside `mask`.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
    if result < 0 { Err(failed(io::Error::last_os_error())) } else { Ok(()) }
}

fn check_vector(vcpu: &mut VcpuFd) -> Result<(), Problem> {
    match run(vcpu, "a vector instruction")? {
        Stop::Report(Report::Vector(VECTOR_RESULT)) => Ok(()),
        Stop::Report(Report::Vector(found)) => Err(Problem::VectorResult { expected: VECTOR_RESULT, found }),
        Stop::Report(Report::Fault) => Err(Problem::VectorFault),
        Stop::Report(Report::Loop(_)) => {
            Err(Problem::Exit { step: "a vector instruction", exit: "the report of the loop".into() })
        }
        Stop::Emulation => Err(Problem::VectorEmulation),
    }
}

fn check_loop(vcpu: &mut VcpuFd) -> Result<(), Problem> {
    const STEP: &str = "a counted loop";
    let failed = |exit: &str| Err(Problem::Exit { step: STEP, exit: exit.into() });
    let start = thread_time();
    let mut rounds = 0;
    while rounds < LOOP_ROUNDS {
        match run(vcpu, STEP)? {
            Stop::Report(Report::Loop(0)) => rounds += SLICE_ROUNDS,
            Stop::Report(Report::Loop(found)) => return Err(Problem::LoopResult { found }),
            Stop::Report(Report::Fault) => return failed("a fault"),
            Stop::Report(Report::Vector(_)) => return failed("the report of the vector instruction"),
            Stop::Emulation => return failed("an unknown instruction"),
        }
        let spent = thread_time().saturating_sub(start);
        if spent > LOOP_TIME_MAX || hopeless(rounds, spent) {
            return Err(Problem::Slow { rounds, spent });
        }
    }
    tracing::debug!(spent = ?thread_time().saturating_sub(start), "KVM runs guest code at full speed");
    Ok(())
}

/// Whether the whole loop would take several times as long as it may, judged once that can be told.
fn hopeless(rounds: u32, spent: Duration) -> bool {
    let rounds_in_limit = u128::from(LOOP_ROUNDS) * spent.as_micros() / LOOP_TIME_MAX.as_micros();
    spent > LOOP_TIME_MAX / 4 && u128::from(rounds) * 4 < rounds_in_limit
}

/// Processor time of this thread, guest time included: a busy host does not make KVM look slow.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// How the guest came back.
enum Stop {
    Report(Report),
    Emulation,
}

fn run(vcpu: &mut VcpuFd, step: &'static str) -> Result<Stop, Problem> {
    match vcpu.run() {
        Ok(VcpuExit::InternalError) => Ok(Stop::Emulation),
        Ok(exit) => match report(&exit) {
            Some(report) => Ok(Stop::Report(report)),
            None => Err(Problem::Exit { step, exit: format!("{exit:?}") }),
        },
        Err(error) if error.errno() == libc::EINTR => Err(Problem::Interrupted),
        Err(error) => {
            Err(Problem::Exit { step, exit: io::Error::from_raw_os_error(error.errno()).to_string() })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use super::*;

    fn reason(device: &Path) -> String {
        match probe_device(device) {
            Usability::Unusable { reason } => reason,
            Usability::Usable => panic!("{} is usable", device.display()),
        }
    }

    #[test]
    fn a_missing_device_is_named() {
        assert!(reason(Path::new("/nonexistent/kvm")).starts_with("there is no /dev/kvm"));
    }

    #[test]
    fn something_else_is_not_kvm() {
        let reason = reason(Path::new("/dev/null"));
        assert!(reason.starts_with("cannot open /dev/null: Inappropriate ioctl"), "{reason}");
    }

    #[test]
    fn missing_permission_tells_the_cure() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("kvm");
        std::fs::write(&device, b"").unwrap();
        std::fs::set_permissions(&device, PermissionsExt::from_mode(0o000)).unwrap();
        let reason = if rustix::process::geteuid().is_root() {
            // Nothing is forbidden to root.
            Problem::Permission { device: device.display().to_string() }.to_string()
        } else {
            reason(&device)
        };
        assert!(reason.contains("add yourself to group kvm"), "{reason}");
    }

    #[test]
    fn the_probe_always_answers_in_time() {
        let start = Instant::now();
        let answer = probe();
        let limit = WALL_TIME_MAX + KICK_TIME_MAX + Duration::from_secs(1);
        assert!(start.elapsed() < limit, "{answer:?} after {:?}", start.elapsed());
        if let Usability::Unusable { reason } = answer {
            assert!(!reason.is_empty() && !reason.ends_with('.'), "{reason}");
        }
    }

    #[test]
    fn only_a_far_too_slow_loop_is_given_up_early() {
        assert!(!hopeless(0, LOOP_TIME_MAX / 5));
        assert!(hopeless(LOOP_ROUNDS / 20, LOOP_TIME_MAX / 3));
        assert!(!hopeless(LOOP_ROUNDS / 4, LOOP_TIME_MAX / 3));
    }

    #[test]
    fn the_loop_is_whole_slices() {
        assert_eq!(LOOP_ROUNDS % SLICE_ROUNDS, 0);
    }
}

//! Whether KVM on this host really runs guest code.
//!
//! That `/dev/kvm` opens proves little: in some cloud machines it belongs to a module that interprets an unmodified
//! guest instruction by instruction, a thousand times too slowly and without the newer instructions. So the probe
//! makes a virtual machine with one 64-bit processor, runs a few AVX instructions in it and then a counted loop, and
//! looks at the results and at the processor time they took.
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

use kvm_bindings::{KVM_API_VERSION, kvm_segment, kvm_userspace_memory_region, kvm_xcr, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// How long the whole probe may take before it is called hung.
const WALL_TIME_MAX: Duration = Duration::from_secs(8);
/// How long the kick may take to bring the guest back.
const KICK_TIME_MAX: Duration = Duration::from_secs(1);
/// The loop takes 1 to 4 ms of processor time on hardware, 60 to 600 ms when KVM itself runs under a software
/// processor, which cannot tell the time that it had to wait for its turn, and 2 to 8 s when each instruction is interpreted.
const LOOP_TIME_MAX: Duration = Duration::from_secs(1);
/// Rounds of the counted loop in all.
const LOOP_ROUNDS: u32 = 4_000_000;
/// Rounds between two looks at the clock.
const SLICE_ROUNDS: u32 = 50_000;

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
enum Problem {
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
                    "KVM opens, but a guest that executes an AVX instruction dies: it interprets instructions"
                )
            }
            Self::VectorEmulation => write!(
                f,
                "KVM opens, but interprets the guest's instructions instead of running them and knows no AVX \
                 instruction"
            ),
            Self::VectorResult { expected, found } => {
                write!(f, "KVM opens, but AVX instructions computed {found} instead of {expected}")
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

fn setup(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Problem {
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

const PORT_VECTOR: u16 = 0x11;
const PORT_LOOP: u16 = 0x10;
const VECTOR_RESULT: u8 = 42;
/// The page tables: one of each level, the last with one 2 MiB page that maps the whole memory to itself.
const TABLES: GuestAddress = GuestAddress(0x1000);
const CODE: GuestAddress = GuestAddress(0x4000);
const MEMORY_BYTES: usize = 2 * 1024 * 1024;

/// 21 + 21 in a vector register, reported at [`PORT_VECTOR`].
const VECTOR_CODE: &[u8] = &[
    0xb8,
    21,
    0,
    0,
    0, // mov eax, 21
    0xc5,
    0xf9,
    0x6e,
    0xc8, // vmovd xmm1, eax
    0xc5,
    0xf1,
    0xfe,
    0xc9, // vpaddd xmm1, xmm1, xmm1
    0xc5,
    0xf9,
    0x7e,
    0xc8, // vmovd eax, xmm1
    0xc5,
    0xf8,
    0x77, // vzeroupper
    0xe6,
    PORT_VECTOR as u8, // out PORT_VECTOR, al
];

/// Counts down for ever, reporting the remainder at [`PORT_LOOP`] after each slice.
fn loop_code() -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, SLICE_ROUNDS
    code.extend(SLICE_ROUNDS.to_le_bytes());
    code.extend([
        0x48,
        0xff,
        0xc9, // dec rcx
        0x75,
        0xfb, // jnz to dec
        0x88,
        0xc8, // mov al, cl
        0xe6,
        PORT_LOOP as u8, // out PORT_LOOP, al
        0xeb,
        0xf0, // jmp to mov
    ]);
    code
}

fn run_guest(kvm: &Kvm) -> Result<(), Problem> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .map_err(|error| Problem::Setup { step: "get guest memory", source: io::Error::other(error) })?;
    // `memory` is declared before the machine and so outlives it.
    let vm = kvm.create_vm().map_err(setup("create a virtual machine"))?;
    map_memory(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0).map_err(setup("create a processor"))?;
    let vector = set_features(kvm, &vcpu)?;
    let mut code = if vector { VECTOR_CODE.to_vec() } else { Vec::new() };
    code.extend(loop_code());
    load(&memory, &code)
        .map_err(|error| Problem::Setup { step: "load the test", source: io::Error::other(error) })?;
    enter_long_mode(&vcpu)?;
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

/// Gives the processor what the host's offers; true if that includes AVX.
fn set_features(kvm: &Kvm, vcpu: &VcpuFd) -> Result<bool, Problem> {
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(setup("tell the processor features it supports"))?;
    vcpu.set_cpuid2(&cpuid).map_err(setup("set processor features"))?;
    const XSAVE: u32 = 1 << 26;
    const AVX: u32 = 1 << 28;
    let basic = cpuid.as_slice().iter().find(|entry| entry.function == 1);
    Ok(basic.is_some_and(|entry| entry.ecx & (XSAVE | AVX) == XSAVE | AVX))
}

fn load(memory: &GuestMemoryMmap, code: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let [level4, level3, level2] = [TABLES.0, TABLES.0 + 0x1000, TABLES.0 + 0x2000];
    memory.write_obj(level3 | PRESENT_WRITABLE, GuestAddress(level4))?;
    memory.write_obj(level2 | PRESENT_WRITABLE, GuestAddress(level3))?;
    memory.write_obj(LARGE | PRESENT_WRITABLE, GuestAddress(level2))?;
    memory.write_slice(code, CODE)
}

/// The state a 64-bit kernel runs in: flat segments, paging on, SSE and AVX enabled (Intel SDM vol. 3, §10.8.5).
fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), Problem> {
    let mut sregs = vcpu.get_sregs().map_err(setup("read processor registers"))?;
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x08, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: 0x10, type_: 0x3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    let avx = kvm_has_xsave(vcpu)?;
    sregs.cr3 = TABLES.0;
    // PAE, OSFXSR, OSXMMEXCPT, and OSXSAVE where there is XSAVE.
    sregs.cr4 = (1 << 5) | (1 << 9) | (1 << 10) | if avx { 1 << 18 } else { 0 };
    // PE, MP, ET, NE, WP, PG.
    sregs.cr0 = 1 | (1 << 1) | (1 << 4) | (1 << 5) | (1 << 16) | (1 << 31);
    // LME, LMA.
    sregs.efer = (1 << 8) | (1 << 10);
    vcpu.set_sregs(&sregs).map_err(setup("enter 64-bit mode"))?;
    if avx {
        // x87, SSE and AVX state.
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: 0b111 };
        vcpu.set_xcrs(&xcrs).map_err(setup("enable AVX"))?;
    }
    let mut regs = vcpu.get_regs().map_err(setup("read processor registers"))?;
    regs.rip = CODE.0;
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(setup("set processor registers"))
}

/// Whether the processor was given XSAVE and AVX.
fn kvm_has_xsave(vcpu: &VcpuFd) -> Result<bool, Problem> {
    let cpuid =
        vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(setup("read processor features"))?;
    let basic = cpuid.as_slice().iter().find(|entry| entry.function == 1);
    Ok(basic.is_some_and(|entry| entry.ecx & (1 << 26) != 0 && entry.ecx & (1 << 28) != 0))
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
    match run(vcpu, "an AVX instruction")? {
        Stop::Port(PORT_VECTOR, VECTOR_RESULT) => Ok(()),
        Stop::Port(PORT_VECTOR, found) => Err(Problem::VectorResult { expected: VECTOR_RESULT, found }),
        Stop::Port(port, _) => {
            Err(Problem::Exit { step: "an AVX instruction", exit: format!("a write to port {port:#x}") })
        }
        Stop::Fault => Err(Problem::VectorFault),
        Stop::Emulation => Err(Problem::VectorEmulation),
    }
}

fn check_loop(vcpu: &mut VcpuFd) -> Result<(), Problem> {
    let start = thread_time();
    let mut rounds = 0;
    while rounds < LOOP_ROUNDS {
        match run(vcpu, "a counted loop")? {
            Stop::Port(PORT_LOOP, 0) => rounds += SLICE_ROUNDS,
            Stop::Port(_, found) => return Err(Problem::LoopResult { found }),
            Stop::Fault => return Err(Problem::Exit { step: "a counted loop", exit: "a fault".into() }),
            Stop::Emulation => {
                return Err(Problem::Exit { step: "a counted loop", exit: "an unknown instruction".into() });
            }
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
    Port(u16, u8),
    Fault,
    Emulation,
}

fn run(vcpu: &mut VcpuFd, step: &'static str) -> Result<Stop, Problem> {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, &[value, ..])) => Ok(Stop::Port(port, value)),
        // Without an interrupt table every exception is a triple fault.
        Ok(VcpuExit::Shutdown) => Ok(Stop::Fault),
        Ok(VcpuExit::InternalError) => Ok(Stop::Emulation),
        Ok(exit) => Err(Problem::Exit { step, exit: format!("{exit:?}") }),
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
    fn the_loop_jumps_where_it_should() {
        let code = loop_code();
        assert_eq!(code.len(), 16);
        // `jnz` ends at 10 and goes back to `dec` at 5; `jmp` ends at 16 and goes back to `mov` at 0.
        assert_eq!(10 + i32::from(code[9] as i8), 5);
        assert_eq!(16 + i32::from(code[15] as i8), 0);
        assert_eq!(LOOP_ROUNDS % SLICE_ROUNDS, 0);
    }
}

//! Seccomp filters: a profile made into a program for the kernel, once.
//!
//! libseccomp takes as long for Docker's profile as everything else at a process's start together. So the program is kept
//! in a folder that all shims of an engine share, by the digest of its profile, and installed as it is by every process
//! that needs it. The folder begins empty with each engine; what is wrong with it only costs time.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use guest_runtime::sys::seccomp::{self, INSTRUCTION_LEN};
use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use rustix::fs::MemfdFlags;
use rustix::process::getpid;
use sha2::{Digest, Sha256};
use thiserror::Error;

/// What an `errno` action without a number answers.
const EPERM: u32 = rustix::io::Errno::PERM.raw_os_error().unsigned_abs();
/// A program is a few kilobytes; the kernel takes 4096 instructions.
const PROGRAM_LEN_MAX: usize = 4096 * INSTRUCTION_LEN;

/// Why a profile could not be made into a filter.
#[derive(Debug, Error)]
pub enum FilterError {
    #[error("the seccomp profile's {what} is not possible")]
    Profile {
        what: String,
        #[source]
        source: SeccompError,
    },
    #[error("cannot take over the seccomp filter")]
    Io(#[from] io::Error),
    #[error("cannot read the seccomp profile")]
    Json(#[from] serde_json::Error),
}

/// A filter, ready to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    program: Vec<u8>,
    flags: u32,
}

/// What keeps the processes of a container from some system calls.
#[derive(Debug)]
pub enum Confinement {
    /// Nothing does.
    None,
    Filter(Filter),
    /// A profile that asks somebody else about some calls: libcontainer's to install.
    Asking(Box<LinuxSeccomp>),
}

impl Confinement {
    /// By a profile, or none. See [`Filter::of`].
    pub fn of(profile: Option<LinuxSeccomp>, shared: Option<&Path>) -> Result<Self, FilterError> {
        Ok(match profile {
            None => Self::None,
            Some(profile) if asks(&profile) => Self::Asking(Box::new(profile)),
            Some(profile) => Self::Filter(Filter::of(&profile, shared)?),
        })
    }
}

impl Filter {
    /// The filter of a profile, from `shared` or, when it is not there, made and left there.
    pub fn of(profile: &LinuxSeccomp, shared: Option<&Path>) -> Result<Self, FilterError> {
        let flags = profile.flags().iter().flatten().fold(0, |flags, flag| flags | number(*flag));
        let Some(folder) = shared else { return Ok(Self { program: compile(profile)?, flags }) };
        let path = folder.join(name(profile)?);
        if let Some(program) = kept(&path) {
            return Ok(Self { program, flags });
        }
        let program = compile(profile)?;
        if let Err(error) = keep(&path, &program) {
            tracing::debug!(path = %path.display(), %error, "a seccomp filter is not kept");
        }
        Ok(Self { program, flags })
    }

    /// Puts it on the calling process.
    pub fn install(&self) -> io::Result<()> {
        seccomp::install(&self.program, self.flags)
    }
}

fn asks(profile: &LinuxSeccomp) -> bool {
    let mut actions = profile.syscalls().iter().flatten().map(|rule| rule.action());
    profile.default_action() == LinuxSeccompAction::ScmpActNotify
        || actions.any(|action| action == LinuxSeccompAction::ScmpActNotify)
}

/// The name of a profile's program. Another version of this program may make another one of the same profile.
fn name(profile: &LinuxSeccomp) -> Result<String, serde_json::Error> {
    let mut digest = Sha256::new();
    digest.update(env!("CARGO_PKG_VERSION"));
    digest.update(serde_json::to_vec(profile)?);
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn kept(path: &Path) -> Option<Vec<u8>> {
    let program = fs::read(path).ok()?;
    let plausible = !program.is_empty()
        && program.len() <= PROGRAM_LEN_MAX
        && program.len().is_multiple_of(INSTRUCTION_LEN);
    plausible.then_some(program)
}

/// Appears whole or not at all, whoever else does the same.
fn keep(path: &Path, program: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(getpid().to_string());
    fs::write(&temporary, program)?;
    fs::rename(&temporary, path)
}

fn compile(profile: &LinuxSeccomp) -> Result<Vec<u8>, FilterError> {
    let failed = |what: String| move |source| FilterError::Profile { what, source };
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut context = ScmpFilterContext::new(default).map_err(failed("default action".to_owned()))?;
    for architecture in profile.architectures().iter().flatten() {
        let added = context.add_arch(translate(*architecture));
        added.map_err(failed(format!("architecture {architecture:?}")))?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret());
        if action == default {
            continue;
        }
        let comparisons: Vec<_> = rule.args().iter().flatten().map(comparison).collect();
        let mut indexes = HashSet::new();
        let apart = !rule.args().iter().flatten().all(|argument| indexes.insert(argument.index()));
        for name in rule.names() {
            // A call that this library does not know is refused or allowed like all unknown ones.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            let mut add = |comparisons: &[ScmpArgCompare]| {
                let added = match comparisons {
                    [] => context.add_rule(action, call),
                    some => context.add_rule_conditional(action, call, some),
                };
                added.map(drop).map_err(failed(format!("rule for {name}")))
            };
            if apart {
                // One argument twice in one rule cannot be; runc makes a rule of each.
                comparisons.chunks(1).try_for_each(&mut add)?;
            } else {
                add(&comparisons)?;
            }
        }
    }
    let memory = rustix::fs::memfd_create("filter", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
    context.export_bpf(&memory).map_err(failed("set of rules".to_owned()))?;
    let mut memory = File::from(memory);
    let mut program = Vec::new();
    memory.seek(SeekFrom::Start(0))?;
    memory.read_to_end(&mut program)?;
    Ok(program)
}

fn action(action: LinuxSeccompAction, number: Option<u32>) -> ScmpAction {
    // The kernel takes 16 bits of it.
    let number = number.unwrap_or(EPERM) as u16;
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(number.into()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(number),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
    }
}

fn comparison(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let (value, second) = (argument.value(), argument.value_two().unwrap_or(0));
    let (operator, value) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // The first value is the mask.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
    };
    ScmpArgCompare::new(argument.index() as u32, operator, value)
}

/// `SECCOMP_FILTER_FLAG_*`.
fn number(flag: LinuxSeccompFilterFlag) -> u32 {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 1,
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => 2,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 4,
        // About asking somebody else.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    }
}

fn translate(architecture: Arch) -> ScmpArch {
    match architecture {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_runtime::defaults;

    struct Folder(std::path::PathBuf);

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn folder(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("shim-filter-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    #[test]
    fn a_filter_is_made_once_and_found_again() {
        let folder = folder("once");
        let profile = defaults::seccomp_profile(&defaults::capabilities());
        let made = Filter::of(&profile, Some(&folder.0)).unwrap();
        assert!(made.program.len() > 100 * INSTRUCTION_LEN && made.flags == 0);
        assert_eq!(made, Filter::of(&profile, None).unwrap());
        // What lies there is what is taken, and each profile has its own.
        let path = folder.0.join(name(&profile).unwrap());
        fs::write(&path, &made.program[..INSTRUCTION_LEN]).unwrap();
        assert_eq!(Filter::of(&profile, Some(&folder.0)).unwrap().program.len(), INSTRUCTION_LEN);
        let other = defaults::seccomp_profile(&defaults::all_capabilities());
        assert_ne!(Filter::of(&other, Some(&folder.0)).unwrap().program, made.program);
        // But nothing that cannot be a program.
        fs::write(&path, b"half").unwrap();
        assert_eq!(Filter::of(&profile, Some(&folder.0)).unwrap(), made);
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 2);
    }

    #[test]
    fn a_folder_that_is_not_there_costs_only_time() {
        let profile = defaults::seccomp_profile(&defaults::capabilities());
        let made = Filter::of(&profile, Some(Path::new("/nonexistent/filters"))).unwrap();
        assert_eq!(made, Filter::of(&profile, None).unwrap());
    }

    #[test]
    fn the_first_value_of_a_masked_comparison_is_the_mask() {
        let argument =
            defaults::seccomp::argument(0, LinuxSeccompOperator::ScmpCmpMaskedEq, 0xff00, Some(0x1200));
        let expected = ScmpArgCompare::new(0, ScmpCompareOp::MaskedEqual(0xff00), 0x1200);
        assert_eq!(format!("{:?}", comparison(&argument)), format!("{expected:?}"));
    }
}

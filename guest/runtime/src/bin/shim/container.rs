//! libcontainer, and what it needs corrected before it gets a spec.
//!
//! The spec goes through a copy of the bundle (`DIR/bundle/config.json`), in which
//!
//! - capabilities, limits and the out-of-memory score are what this process can grant, for otherwise the start fails;
//! - `noNewPrivileges: false` is left out, for libcontainer takes its mere presence as a reason to install the seccomp
//!   filter after the right to do so is gone;
//! - the seccomp profile is left out: its filter comes from [`filter`](crate::filter) and is installed by
//!   [`Program`], for which the process keeps CAP_SYS_ADMIN until then;
//! - of a profile that libcontainer must install itself, the two values of a masked comparison are exchanged, for
//!   libcontainer 0.7 hands them to libseccomp in the wrong order, and `clone` would be refused to everyone.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use guest_runtime::cgroup::{Cgroup, CgroupError, OomWatch};
use guest_runtime::defaults;
use guest_runtime::device_filter::{self, DeviceFilterError};
use guest_runtime::external::{External, ExternalError};
use guest_runtime::reap::{self, BUNDLE_DIR, RUNTIME_DIR, ReapError};
use guest_runtime::shim::record::{self, RecordError, STATE_FILE, StateRecord};
use guest_runtime::shim::{ConsoleSize, ErrorKind, ShimSpec, Stdin};
use guest_runtime::sys::{self, ProcessStamp};
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, LinuxNamespaceType, LinuxResources, LinuxSeccomp,
    LinuxSeccompOperator, Process, Spec,
};
use rustix::process::{getpid, set_child_subreaper};
use thiserror::Error;

use crate::apart::Apart;
use crate::enter::{Ends, Entry};
use crate::external;
use crate::filter::{Confinement, FilterError};
use crate::mount::{Propagation, ReadOnlyCgroups};
use crate::program::{Failure, Outcome, Program, Report, Seal};
use crate::streams::{ConsoleSocket, Pipes, Streams, Wiring, terminal_streams};
use crate::trace::{self, Events};

/// Why the runtime could not do something.
#[derive(Debug, Error)]
pub enum RuntimeError {
    #[error("{message}")]
    Program { kind: ErrorKind, message: String },
    #[error("cannot {step}: {reason}")]
    Runtime { step: &'static str, reason: String },
    #[error("cannot {step}")]
    Setup {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("invalid config.json: {reason}")]
    Spec { reason: String },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Devices(#[from] DeviceFilterError),
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error(transparent)]
    Reap(#[from] ReapError),
    #[error(transparent)]
    External(#[from] ExternalError),
}

impl RuntimeError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Program { kind, .. } => *kind,
            Self::External(error) => error.kind(),
            _ => ErrorKind::Other,
        }
    }
}

impl From<Failure> for RuntimeError {
    fn from(failure: Failure) -> Self {
        Self::Program { kind: failure.kind, message: failure.message }
    }
}

pub fn setup(step: &'static str) -> impl FnOnce(io::Error) -> RuntimeError {
    move |source| RuntimeError::Setup { step, source }
}

/// A process that has just been made.
pub struct Made {
    pub pid: i32,
    pub streams: Streams,
    pub outcome: Outcome,
}

/// What a process is given.
pub struct Wanted {
    pub terminal: bool,
    pub stdin: Stdin,
    pub size: Option<ConsoleSize>,
}

/// The container of one shim.
pub struct Runtime {
    dir: PathBuf,
    id: String,
    bundle: PathBuf,
    filters: Option<PathBuf>,
    mounts: Option<PathBuf>,
    grantable: Capabilities,
    events: Events,
    /// Makes the container instead of libcontainer.
    external: Option<External>,
    created: Option<Created>,
}

struct Created {
    /// Libcontainer's, if it made it.
    container: Option<Container>,
    cgroup: Cgroup,
    record: StateRecord,
    confinement: Confinement,
    private_pids: bool,
}

impl Runtime {
    pub fn new(dir: &Path, spec: &ShimSpec, events: Events) -> io::Result<Self> {
        if spec.runtime.is_some() {
            // What another runtime leaves behind when it ends becomes our child.
            set_child_subreaper(Some(getpid()))?;
        }
        Ok(Self {
            external: spec.runtime.as_ref().map(|runtime| External::new(runtime, &spec.container, dir)),
            dir: dir.to_owned(),
            id: spec.container.clone(),
            bundle: spec.bundle.clone(),
            filters: spec.filters.clone(),
            mounts: spec.mounts.clone(),
            grantable: defaults::grantable()?,
            events,
            created: None,
        })
    }

    /// Leaves the word of which process is the shim.
    pub fn announce(&self) -> Result<(), RuntimeError> {
        let shim = ProcessStamp::of_self().map_err(setup("read this process's start time"))?;
        let record =
            StateRecord { container: self.id.clone(), shim, init: None, cgroup: None, runtime: None };
        Ok(record::write(&self.dir, STATE_FILE, &record)?)
    }

    /// Makes the container. After a failure nothing of it is left.
    pub fn create(&mut self, wanted: &Wanted, foreign: &[RawFd]) -> Result<Made, RuntimeError> {
        let spec = self.load_spec()?;
        let mounts = self.mounts.as_ref().filter(|_| self.external.is_none());
        match mounts.and_then(|mounts| Apart::of(mounts, &self.dir, &spec)) {
            Some(apart) => apart
                .during(|| self.create_here(spec, wanted, foreign))
                .map_err(setup("make the container apart from the mounts of others"))?,
            None => self.create_here(spec, wanted, foreign),
        }
    }

    fn create_here(
        &mut self,
        mut spec: Spec,
        wanted: &Wanted,
        foreign: &[RawFd],
    ) -> Result<Made, RuntimeError> {
        let process = spec.process().clone().ok_or_else(|| invalid("it has no process"))?;
        let score = process.oom_score_adj();
        spec.set_process(Some(self.correct(process, wanted.terminal)?));
        let linux = spec.linux().as_ref().ok_or_else(|| invalid("it has no linux section"))?;
        let cgroup_path =
            linux.cgroups_path().clone().ok_or_else(|| invalid("it has no linux.cgroupsPath"))?;
        let cgroup = Cgroup::open(&cgroup_path)?;
        if cgroup.exists() {
            return Err(invalid(&format!("cgroup {} exists already", cgroup_path.display())));
        }
        let namespaces = linux.namespaces().iter().flatten();
        let private_pids =
            namespaces.into_iter().any(|one| one.typ() == LinuxNamespaceType::Pid && one.path().is_none());
        let (confinement, seal) = match &self.external {
            Some(_) => (Confinement::None, None),
            None => self.confine(&mut spec)?,
        };
        self.write_bundle(&spec)?;
        let shim = ProcessStamp::of_self().map_err(setup("read this process's start time"))?;
        let mut record = StateRecord {
            container: self.id.clone(),
            shim,
            init: None,
            cgroup: Some(cgroup_path),
            runtime: self.external.as_ref().map(|external| external.runtime().clone()),
        };
        record::write(&self.dir, STATE_FILE, &record)?;

        let made = match self.external.clone() {
            Some(external) => {
                let user = spec.process().as_ref().map(|process| process.user().uid()).unwrap_or_default();
                external::create(&external, &self.dir, wanted, user).map(|made| (None, made))
            }
            None => self.create_by_libcontainer(&spec, score, wanted, foreign, seal),
        };
        let made = made.and_then(|(container, made)| {
            record.init = Some(ProcessStamp::of(made.pid).map_err(setup("read init's start time"))?);
            record::write(&self.dir, STATE_FILE, &record)?;
            if container.is_some() {
                complete(&spec, &cgroup, made.pid)?;
            }
            Ok((container, made))
        });
        match made {
            Ok((container, made)) => {
                self.created = Some(Created { container, cgroup, record, confinement, private_pids });
                sys::trim_heap();
                Ok(made)
            }
            Err(error) => {
                // What failed first is what the user must read.
                let cleaned =
                    reap::release(&self.dir, &record).and_then(|()| reap::remove_runtime(&self.dir));
                if let Err(left) = cleaned {
                    crate::report(&left);
                }
                self.announce()?;
                Err(error)
            }
        }
    }

    /// Lets libcontainer make it.
    fn create_by_libcontainer(
        &mut self,
        spec: &Spec,
        score: Option<i32>,
        wanted: &Wanted,
        foreign: &[RawFd],
        seal: Option<Seal>,
    ) -> Result<(Option<Container>, Made), RuntimeError> {
        let before = fs::read_to_string("/proc/self/oom_score_adj").map_err(setup("read the oom score"))?;
        let built = self.build_init(spec, wanted, foreign, seal);
        if score.is_some() {
            // libcontainer gave the container's score to its parent, us, for the child to inherit.
            fs::write("/proc/self/oom_score_adj", before.trim()).map_err(setup("restore the oom score"))?;
        }
        let (container, made) = built?;
        Ok((Some(container), made))
    }

    fn load_spec(&self) -> Result<Spec, RuntimeError> {
        let path = self.bundle.join("config.json");
        let mut spec = Spec::load(&path).map_err(|error| RuntimeError::Runtime {
            step: "read the container's config.json",
            reason: format!("{}: {}", path.display(), trace::chain(&error)),
        })?;
        spec.canonicalize_rootfs(&self.bundle).map_err(|error| RuntimeError::Runtime {
            step: "find the root file system",
            reason: trace::chain(&error),
        })?;
        Ok(spec)
    }

    /// Takes the seccomp profile out of a spec, unless libcontainer must install it. What init needs to install it
    /// itself is put in.
    fn confine(&self, spec: &mut Spec) -> Result<(Confinement, Option<Seal>), RuntimeError> {
        let Some(mut linux) = spec.linux().clone() else { return Ok((Confinement::None, None)) };
        let confinement = Confinement::of(linux.seccomp().clone(), self.filters.as_deref())?;
        let seal = match &confinement {
            Confinement::None => None,
            Confinement::Asking(profile) => {
                linux.set_seccomp(Some(exchange_masks((**profile).clone())));
                None
            }
            Confinement::Filter(filter) => {
                linux.set_seccomp(None);
                let capabilities = spec.process_mut().as_mut().and_then(|process| self.lend(process));
                Some(Seal { filter: filter.clone(), capabilities })
            }
        };
        spec.set_linux(Some(linux));
        Ok((confinement, seal))
    }

    /// Gives a process CAP_SYS_ADMIN, where it could not install a filter without; answers what it shall have in the end.
    fn lend(&self, process: &mut Process) -> Option<LinuxCapabilities> {
        let wanted = process.capabilities().clone()?;
        let admin = Capability::SysAdmin;
        let has_it = wanted.effective().as_ref().is_some_and(|effective| effective.contains(&admin));
        if process.no_new_privileges() == Some(true) || has_it || !self.grantable.contains(&admin) {
            return None;
        }
        let mut lent = wanted.clone();
        let more = |set: &Option<Capabilities>| Some(set.iter().flatten().copied().chain([admin]).collect());
        lent.set_effective(more(wanted.effective()));
        lent.set_permitted(more(wanted.permitted()));
        process.set_capabilities(Some(lent));
        Some(wanted)
    }

    /// A process as libcontainer can start it.
    fn correct(&self, mut process: Process, terminal: bool) -> Result<Process, RuntimeError> {
        if process.args().iter().flatten().next().is_none() {
            return Err(RuntimeError::Program {
                kind: ErrorKind::Other,
                message: "no command specified".to_owned(),
            });
        }
        process.set_terminal(Some(terminal));
        if process.no_new_privileges() == Some(false) {
            process.set_no_new_privileges(None);
        }
        // Without any, libcontainer would leave all of ours.
        let mut capabilities =
            process.capabilities().clone().unwrap_or_else(|| defaults::sets(&Capabilities::new()));
        defaults::clamp_capabilities(&mut capabilities, &self.grantable);
        process.set_capabilities(Some(capabilities));
        if let Some(mut limits) = process.rlimits().clone() {
            defaults::clamp_rlimits(&mut limits, &self.grantable);
            process.set_rlimits(Some(limits));
        }
        if let Some(wanted) = process.oom_score_adj() {
            let score = defaults::clamp_oom_score_adjust(wanted, &self.grantable)
                .map_err(setup("read the oom score"))?;
            process.set_oom_score_adj(score);
        }
        Ok(process)
    }

    fn write_bundle(&self, spec: &Spec) -> Result<(), RuntimeError> {
        for name in [BUNDLE_DIR, RUNTIME_DIR] {
            fs::create_dir_all(self.dir.join(name)).map_err(setup("make the runtime's folders"))?;
        }
        Ok(record::write(&self.dir.join(BUNDLE_DIR), "config.json", spec)?)
    }

    fn build_init(
        &mut self,
        spec: &Spec,
        wanted: &Wanted,
        foreign: &[RawFd],
        seal: Option<Seal>,
    ) -> Result<(Container, Made), RuntimeError> {
        let user = spec.process().as_ref().map(|process| process.user().uid()).unwrap_or_default();
        let (program, outcome) = Program::new(wanted.size, foreign, seal)
            .map_err(setup("make a pipe for the program's outcome"))?;
        let (builder, wiring) = self.wire(program, wanted, user)?;
        self.events.clear();
        let built = builder
            .as_init(self.dir.join(BUNDLE_DIR))
            .with_systemd(false)
            .with_detach(true)
            .build()
            .map_err(|error| self.explain("create the container", &error, &outcome))?;
        let pid = built.pid().map(|pid| pid.as_raw()).ok_or_else(|| RuntimeError::Runtime {
            step: "create the container",
            reason: "the runtime did not say its process id".to_owned(),
        })?;
        // From here on init exists; the caller's clean-up kills it if this fails.
        let streams = wiring.take(user, wanted.size).map_err(setup("take the terminal"))?;
        Ok((built, Made { pid, streams, outcome }))
    }

    /// Lets init execute its program, and waits until it has.
    pub fn start(&mut self, outcome: Outcome) -> Result<(), RuntimeError> {
        let created = self.created.as_mut().ok_or_else(not_created)?;
        let Some(container) = &mut created.container else {
            return match &self.external {
                Some(external) => Ok(external.start()?),
                None => Err(not_created()),
            };
        };
        self.events.clear();
        container.start().map_err(|error| RuntimeError::Runtime {
            step: "start the container",
            reason: trace::chain(&error),
        })?;
        outcome.wait().map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// Makes and starts another process.
    pub fn exec(&mut self, process: &Process, wanted: &Wanted) -> Result<Made, RuntimeError> {
        let process = self.correct(process.clone(), wanted.terminal)?;
        let user = process.user().uid();
        let created = self.created.as_ref().ok_or_else(not_created)?;
        if let Some(external) = &self.external {
            return external::exec(external, &self.dir, &process, wanted);
        }
        let init = created.record.init.map_or(0, |init| init.pid);
        let entry =
            Entry { cgroup: &created.cgroup, init, process: &process, confinement: &created.confinement };
        let (report, outcome) = Report::new().map_err(setup("make a pipe for the program's outcome"))?;
        let run = |ends| entry.fork(ends, report).map_err(setup("run the process"));
        if wanted.terminal {
            let (near, far) = UnixStream::pair().map_err(setup("make a socket for the terminal"))?;
            let pid = run(Ends::Terminal(far.into()))?;
            return match terminal_streams(&near, user, wanted.size) {
                Ok(streams) => Ok(Made { pid, streams, outcome }),
                // The child says it better.
                Err(error) => {
                    Err(outcome.wait().map_or_else(|| setup("take the terminal")(error), Into::into))
                }
            };
        }
        let Pipes { stdin, stdout, stderr, streams } =
            Pipes::new(wanted.stdin, user).map_err(setup("make the process's pipes"))?;
        let pid = run(Ends::Pipes([stdin, stdout, stderr]))?;
        Ok(Made { pid, streams, outcome })
    }

    /// A builder with the container's ends of the streams, and ours.
    fn wire(
        &self,
        program: Program,
        wanted: &Wanted,
        user: u32,
    ) -> Result<(ContainerBuilder, Wiring), RuntimeError> {
        let runtime = self.dir.join(RUNTIME_DIR);
        let builder = ContainerBuilder::new(self.id.clone(), SyscallType::default())
            .validate_id()
            .and_then(|builder| builder.with_root_path(&runtime))
            .map_err(|error| RuntimeError::Runtime {
                step: "prepare the runtime",
                reason: trace::chain(&error),
            })?
            .with_executor(program);
        if wanted.terminal {
            let console = ConsoleSocket::listen(&runtime).map_err(setup("listen for the terminal"))?;
            let builder = builder.with_console_socket(Some(console.path()));
            return Ok((builder, Wiring::Terminal(console)));
        }
        let pipes = Pipes::new(wanted.stdin, user).map_err(setup("make the process's pipes"))?;
        let Pipes { stdin, stdout, stderr, streams } = pipes;
        let builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
        Ok((builder, Wiring::Pipes(streams)))
    }

    /// An error of libcontainer with what its children said.
    fn explain(&mut self, step: &'static str, error: &LibcontainerError, outcome: &Outcome) -> RuntimeError {
        if let Some(failure) = outcome.said() {
            return failure.into();
        }
        let reason = match self.events.cause() {
            Some(cause) => format!("{} ({cause})", trace::chain(error)),
            None => trace::chain(error),
        };
        RuntimeError::Runtime { step, reason }
    }

    /// Freezes or thaws.
    pub fn freeze(&self, frozen: bool) -> Result<(), RuntimeError> {
        let created = self.created.as_ref().ok_or_else(not_created)?;
        match &self.external {
            Some(external) => Ok(external.freeze(frozen)?),
            None => Ok(created.cgroup.freeze(frozen)?),
        }
    }

    /// Thaws what has been killed. Another runtime may have done so, and would complain if it were asked.
    pub fn thaw_dying(&self) -> Result<(), RuntimeError> {
        Ok(self.created.as_ref().ok_or_else(not_created)?.cgroup.freeze(false)?)
    }

    /// Changes limits.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), RuntimeError> {
        let created = self.created.as_ref().ok_or_else(not_created)?;
        match &self.external {
            Some(external) => external::update(external, &self.dir, resources),
            None => Ok(created.cgroup.update(resources)?),
        }
    }

    /// Has another runtime send init a signal. Whether there is one.
    pub fn signal_init(&self, signal: i32) -> Result<bool, RuntimeError> {
        match &self.external {
            Some(external) => external.kill(signal).map(|()| true).map_err(Into::into),
            None => Ok(false),
        }
    }

    /// Whether a process of the container was killed for want of memory.
    pub fn oom_killed(&self) -> bool {
        self.created.as_ref().is_some_and(|created| created.cgroup.oom_kills() > 0)
    }

    /// Watches for kills for want of memory; `None` where nobody counts them.
    pub fn watch_memory(&self) -> Result<Option<OomWatch>, RuntimeError> {
        let created = self.created.as_ref().ok_or_else(not_created)?;
        OomWatch::new(&created.cgroup).map_err(setup("watch the container's memory"))
    }

    /// Whether the end of init is, by the kernel's doing, the end of all.
    pub fn private_pids(&self) -> bool {
        self.created.as_ref().is_none_or(|created| created.private_pids)
    }

    /// Kills everything in the container.
    pub fn kill_all(&self) -> Result<(), RuntimeError> {
        match &self.created {
            Some(created) => Ok(created.cgroup.kill()?),
            None => Ok(()),
        }
    }

    /// Removes the cgroup and the runtime's state. Nothing of the container may be running.
    pub fn delete(&mut self) -> Result<(), RuntimeError> {
        if let Some(created) = &self.created {
            reap::release_from(&self.dir, &created.record, Some(&created.cgroup))?;
        }
        reap::remove_files(&self.dir)?;
        self.created = None;
        Ok(())
    }
}

/// What libcontainer leaves undone of a container that is not started yet.
fn complete(spec: &Spec, cgroup: &Cgroup, pid: i32) -> Result<(), RuntimeError> {
    if cgroup.pure_unified().is_none()
        && let Some(cgroups) = ReadOnlyCgroups::of(spec)
    {
        cgroups.apply(pid).map_err(setup("make the container's cgroups read-only"))?;
    }
    if let Some(propagation) = Propagation::of(spec) {
        propagation.apply(pid).map_err(setup("set how the container's mounts are passed on"))?;
    }
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|resources| *resources.memory());
    // libcontainer always leaves it on.
    if memory.is_some_and(|memory| memory.disable_oom_killer() == Some(true)) {
        cgroup.disable_oom_killer()?;
    }
    // libcontainer takes a limit of no swap for none at all.
    if memory.is_some_and(|memory| memory.limit() > Some(0) && memory.limit() == memory.swap()) {
        cgroup.forbid_swap()?;
    }
    let devices = resources.and_then(|resources| resources.devices().as_ref());
    if let (Some(folder), Some(rules)) = (cgroup.pure_unified(), devices) {
        let rules: Vec<_> = rules.iter().cloned().chain(defaults::device_rules().split_off(1)).collect();
        device_filter::attach(folder, &rules)?;
    }
    Ok(())
}

fn invalid(reason: &str) -> RuntimeError {
    RuntimeError::Spec { reason: reason.to_owned() }
}

fn not_created() -> RuntimeError {
    invalid("the container has not been created")
}

/// See the module's documentation.
fn exchange_masks(mut seccomp: LinuxSeccomp) -> LinuxSeccomp {
    let syscalls = seccomp.syscalls().clone().map(|mut syscalls| {
        for syscall in &mut syscalls {
            let Some(mut arguments) = syscall.args().clone() else { continue };
            for argument in &mut arguments {
                if argument.op() == LinuxSeccompOperator::ScmpCmpMaskedEq {
                    let (mask, value) = (argument.value(), argument.value_two().unwrap_or(0));
                    let index = argument.index();
                    *argument = defaults::seccomp::argument(index, argument.op(), value, Some(mask));
                }
            }
            syscall.set_args(Some(arguments));
        }
        syscalls
    });
    seccomp.set_syscalls(syscalls);
    seccomp
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_comparisons_are_handed_over_the_other_way_round() {
        let profile = exchange_masks(defaults::seccomp_profile(&defaults::capabilities()));
        let clone = profile.syscalls().iter().flatten().find(|rule| rule.names() == &["clone"]).unwrap();
        let argument = clone.args().as_ref().unwrap()[0];
        assert_eq!((argument.value(), argument.value_two()), (0, Some(0x7e02_0000)));
        let socket = profile.syscalls().iter().flatten().find(|rule| rule.names() == &["socket"]).unwrap();
        assert_eq!(socket.args().as_ref().unwrap()[0].value(), 40);
    }
}

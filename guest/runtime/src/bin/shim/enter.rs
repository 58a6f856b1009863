//! Running another process in the container: one fork, then the child goes in by itself.
//!
//! The order is runc's: control groups, session, limits, namespaces, terminal, descriptors, seccomp filter (before rights
//! are given up, or after when no new ones can be had), capabilities and user, folder, program. libcontainer could do it,
//! in several processes and five times the time. Whatever fails is told through the program's pipe.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use guest_runtime::cgroup::Cgroup;
use guest_runtime::defaults;
use guest_runtime::lookup;
use guest_runtime::shim::ErrorKind;
use guest_runtime::sys::{enter, exec};
use libcontainer::seccomp::initialize_seccomp;
use oci_spec::runtime::Process;
use rustix::fs::{Gid, Mode, Uid, fchown};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, PidfdFlags, Rlimit, chdir, pidfd_open, setrlimit, setsid, umask};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::thread::{
    CapabilitySet, ThreadNameSpaceType, clear_ambient_capability_set, configure_capability_in_ambient_set,
    move_into_thread_name_spaces, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::filter::Confinement;
use crate::program::{Failure, Report, kernel_set, kernel_sets, refused};

/// The child's end of its standard streams.
pub enum Ends {
    /// Input, output and errors.
    Pipes([OwnedFd; 3]),
    /// Make a terminal in the container, and send its master here.
    Terminal(OwnedFd),
}

/// What a child needs to go in.
pub struct Entry<'a> {
    pub cgroup: &'a Cgroup,
    pub init: i32,
    pub process: &'a Process,
    pub confinement: &'a Confinement,
}

impl Entry<'_> {
    /// Forks the child. What fails in it is told by `report`.
    pub fn fork(&self, ends: Ends, report: Report) -> io::Result<i32> {
        // That the container is gone is found below.
        let of_init = fs::read_to_string(format!("/proc/{}/cgroup", self.init)).unwrap_or_default();
        let groups = self.cgroup.doors(&of_init)?;
        let init = Pid::from_raw(self.init).ok_or(io::ErrorKind::NotFound)?;
        let init = pidfd_open(init, PidfdFlags::empty())?;
        let namespace = |path: String| OpenOptions::new().read(true).custom_flags(libc_cloexec()).open(path);
        let theirs = namespace(format!("/proc/{}/ns/pid", self.init))?;
        let own = namespace("/proc/self/ns/pid".to_owned())?;
        enter::fork_into(theirs.as_fd(), own.as_fd(), || {
            let failure = self.go_in(&groups, &init, &ends);
            report.tell(&failure);
            failure.kind.exit_code()
        })
    }

    /// In the child. Returns only with a failure.
    fn go_in(&self, groups: &[File], init: &OwnedFd, ends: &Ends) -> Failure {
        match self.try_go_in(groups, init, ends) {
            Err(failure) => failure,
            Ok(()) => self.execute(),
        }
    }

    fn try_go_in(&self, groups: &[File], init: &OwnedFd, ends: &Ends) -> Result<(), Failure> {
        let process = self.process;
        for group in groups {
            rustix::io::write(group, b"0").map_err(failed("join the container's cgroup"))?;
        }
        setsid().map_err(failed("begin a session"))?;
        if let Some(score) = process.oom_score_adj() {
            fs::write("/proc/self/oom_score_adj", score.to_string()).map_err(failed("set the oom score"))?;
        }
        for limit in process.rlimits().iter().flatten() {
            let value = Rlimit { current: finite(limit.soft()), maximum: finite(limit.hard()) };
            setrlimit(defaults::resource(limit.typ()), value).map_err(failed("set a limit"))?;
        }
        let namespaces = ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::NETWORK
            | ThreadNameSpaceType::CONTROL_GROUP;
        move_into_thread_name_spaces(init.as_fd(), namespaces)
            .map_err(failed("enter the container's namespaces"))?;
        let user = process.user();
        match ends {
            Ends::Pipes([stdin, stdout, stderr]) => take_streams(stdin, stdout, stderr)?,
            Ends::Terminal(socket) => {
                let slave = open_terminal(socket, user.uid()).map_err(failed("make a terminal"))?;
                rustix::process::ioctl_tiocsctty(&slave).map_err(failed("take the terminal"))?;
                take_streams(&slave, &slave, &slave)?;
            }
        }
        enter::close_others_at_execution().map_err(failed("let go of descriptors"))?;
        umask(Mode::from(user.umask().unwrap_or(0o022)));
        let no_new_privileges = process.no_new_privileges() == Some(true);
        if no_new_privileges {
            set_no_new_privs(true).map_err(failed("give up new privileges"))?;
        } else {
            self.confine()?;
        }
        self.become_user()?;
        chdir(process.cwd()).map_err(|error| Failure {
            kind: ErrorKind::NotFound,
            message: format!(
                "exec failed: unable to start container process: chdir to cwd ({:?}) set in config.json failed: {}",
                process.cwd().display().to_string(),
                lookup::words(error.raw_os_error())
            ),
        })?;
        if no_new_privileges { self.confine() } else { Ok(()) }
    }

    fn confine(&self) -> Result<(), Failure> {
        let failed = |error: &dyn std::error::Error| {
            other(format!("cannot install the seccomp filter: {}", crate::trace::chain(error)))
        };
        match self.confinement {
            Confinement::None => Ok(()),
            Confinement::Filter(filter) => filter.install().map_err(|error| failed(&error)),
            Confinement::Asking(profile) => {
                initialize_seccomp(profile).map(drop).map_err(|error| failed(&error))
            }
        }
    }

    fn become_user(&self) -> Result<(), Failure> {
        let failed = || failed("take on the user and its capabilities");
        let user = self.process.user();
        let wanted = self.process.capabilities().clone().unwrap_or_default();
        let bounding = kernel_set(wanted.bounding());
        for number in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if !bounding.contains(capability) {
                match remove_capability_from_bounding_set(capability) {
                    Ok(()) => {}
                    // Beyond the last one this kernel knows.
                    Err(rustix::io::Errno::INVAL) => break,
                    Err(error) => return Err(failed()(error)),
                }
            }
        }
        set_keep_capabilities(true).map_err(failed())?;
        let groups: Vec<Gid> =
            user.additional_gids().iter().flatten().map(|group| Gid::from_raw(*group)).collect();
        set_thread_groups(&groups).map_err(failed())?;
        let gid = Gid::from_raw(user.gid());
        set_thread_res_gid(gid, gid, gid).map_err(failed())?;
        let uid = Uid::from_raw(user.uid());
        set_thread_res_uid(uid, uid, uid).map_err(failed())?;
        set_keep_capabilities(false).map_err(failed())?;
        set_capabilities(None, kernel_sets(&wanted)).map_err(failed())?;
        clear_ambient_capability_set().map_err(failed())?;
        for capability in kernel_set(wanted.ambient()).iter() {
            configure_capability_in_ambient_set(capability, true).map_err(failed())?;
        }
        Ok(())
    }

    fn execute(&self) -> Failure {
        let mut environment = self.process.env().clone().unwrap_or_default();
        if !environment.iter().any(|entry| entry.starts_with("HOME=")) {
            // The container's own file: this is inside by now.
            let accounts = fs::read_to_string("/etc/passwd").unwrap_or_default();
            environment.push(format!("HOME={}", home(&accounts, self.process.user().uid())));
        }
        let arguments = self.process.args().clone().unwrap_or_default();
        let named = arguments.first().cloned().unwrap_or_default();
        let program = match lookup::find(&named, &environment) {
            Ok(program) => program,
            Err(error) => return Failure { kind: error.kind(), message: error.to_string() },
        };
        if let Err(error) = exec::reset_signals() {
            return other(format!("cannot reset signals: {error}"));
        }
        let error = exec::execute(&program, &arguments, &environment);
        refused(program, &error)
    }
}

/// The home folder of a user.
fn home(accounts: &str, uid: u32) -> &str {
    let found = accounts.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        (fields.next()?.parse() == Ok(uid)).then(|| fields.nth(2)).flatten()
    });
    found.filter(|home| !home.is_empty()).unwrap_or("/")
}

fn libc_cloexec() -> i32 {
    i32::try_from(rustix::fs::OFlags::CLOEXEC.bits()).unwrap_or(0)
}

fn finite(limit: u64) -> Option<u64> {
    (limit != u64::MAX).then_some(limit)
}

fn other(message: String) -> Failure {
    Failure { kind: ErrorKind::Other, message }
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| other(format!("cannot {step}: {}", error.into()))
}

fn take_streams(stdin: &OwnedFd, stdout: &OwnedFd, stderr: &OwnedFd) -> Result<(), Failure> {
    rustix::stdio::dup2_stdin(stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(stderr))
        .map_err(failed("connect the standard streams"))
}

/// Makes a terminal of the container's own, sends its master to the shim, and returns the other side.
fn open_terminal(socket: &OwnedFd, user: u32) -> io::Result<OwnedFd> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    if user != 0 {
        fchown(&slave, Some(Uid::from_raw(user)), None)?;
    }
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let masters = [master.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&masters));
    sendmsg(socket, &[io::IoSlice::new(b"t")], &mut control, SendFlags::NOSIGNAL)?;
    Ok(slave)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_found_by_number() {
        let accounts =
            "root:x:0:0:root:/root:/bin/sh\nnonsense\njoe:x:1000:1000::/home/joe:/bin/sh\nno:x:7:7:::\n";
        assert_eq!(
            [home(accounts, 0), home(accounts, 1000), home(accounts, 7), home(accounts, 8)],
            ["/root", "/home/joe", "/", "/"]
        );
    }
}

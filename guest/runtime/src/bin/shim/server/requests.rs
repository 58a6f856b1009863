//! What a client may ask for.

use std::collections::BTreeMap;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use guest_runtime::shim::{ConsoleSize, ErrorKind, ProcessId, Reply, Request, ShimState, Status, Stdin};
use guest_runtime::sys;
use oci_spec::runtime::{LinuxResources, Process as OciProcess};

use super::refusal::{conflict, name_of};
use super::{INIT, Refusal, Server};
use crate::client::{Attachment, Mode};
use crate::container::RuntimeError;
use crate::log::{LogFile, Stream};
use crate::process::Process;
use crate::program::Outcome;
use crate::report;

/// How long killed processes may take to end at `Delete`.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a shim stays after `Delete` for clients to read the last output.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(10);
/// Processes at a time, init included.
const PROCESSES_MAX: usize = 1024;

impl Server {
    /// `None` when the reply comes later.
    pub(super) fn execute(&mut self, client: usize, request: Request) -> Result<Option<Reply>, Refusal> {
        match request {
            Request::Create => self.create().map(Some),
            Request::Start { process } => self.start(&process).map(Some),
            Request::Kill { signal, process } => self.kill(signal, &process).map(|()| Some(Reply::Done)),
            Request::Resize { process, width, height } => {
                let index = self.find(&process)?;
                let size = ConsoleSize { width, height };
                let process = self.processes[index].as_mut().map(|process| process.resize(size));
                process
                    .transpose()
                    .map(|_| Some(Reply::Done))
                    .map_err(|source| Refusal::Io { step: "resize the terminal", source })
            }
            Request::CloseStdin { process } => {
                let index = self.find(&process)?;
                if let Some(process) = self.process(index) {
                    process.end_input();
                }
                Ok(Some(Reply::Done))
            }
            Request::Wait { process, ooms } => {
                let index = self.find(&process)?;
                if let Some(one) = self.clients[client].as_mut() {
                    one.ooms = ooms.filter(|_| index == INIT);
                }
                self.tell_ooms(client);
                if let Some(exit) = self.process(index).and_then(|process| process.exit.clone()) {
                    return Ok(Some(Reply::Exited(exit)));
                }
                self.set_mode(client, Mode::Waiting(index));
                Ok(None)
            }
            Request::Attach { process, stdin, stdout, stderr } => {
                let process = self.find(&process)?;
                self.attach(client, Attachment { process, stdin, outputs: [stdout, stderr] });
                Ok(None)
            }
            Request::Exec { id, process, terminal, stdin, console_size } => {
                self.prepare_exec(id, process, terminal, stdin, console_size).map(Some)
            }
            Request::State => Ok(Some(Reply::State(self.state()))),
            Request::Pause => self.freeze(true).map(|()| Some(Reply::Done)),
            Request::Resume => self.freeze(false).map(|()| Some(Reply::Done)),
            Request::Update { resources } => self.update(&resources).map(|()| Some(Reply::Done)),
            Request::Forget { id } => self.forget(id).map(|()| Some(Reply::Done)),
            Request::Delete => self.delete().map(|()| Some(Reply::Done)),
        }
    }

    pub(super) fn set_mode(&mut self, client: usize, mode: Mode) {
        if let Some(client) = self.clients[client].as_mut() {
            client.mode = mode;
        }
    }

    fn status(&self) -> Status {
        let Some(init) = &self.processes[INIT] else { return Status::Stopped };
        match (init.ended.is_some() || init.exit.is_some(), self.created, init.started, self.paused) {
            (true, ..) => Status::Stopped,
            (_, false, ..) => Status::Empty,
            (_, _, false, _) => Status::Created,
            (_, _, _, true) => Status::Paused,
            _ => Status::Running,
        }
    }

    fn state(&self) -> ShimState {
        let init = self.processes[INIT].as_ref();
        let execs: BTreeMap<_, _> = self
            .processes
            .iter()
            .flatten()
            .filter_map(|one| Some((one.id.clone()?, if one.is_alive() { one.pid } else { 0 })))
            .collect();
        ShimState {
            status: self.status(),
            pid: init.map_or(0, |init| init.pid),
            exit: init.and_then(|init| init.exit.clone()),
            execs,
            ooms: self.ooms,
        }
    }

    /// The container must be running to do something in it.
    fn require_running(&self) -> Result<(), Refusal> {
        let id = &self.spec.container;
        match self.status() {
            Status::Running => Ok(()),
            Status::Paused => {
                Err(conflict(format!("Container {id} is paused, unpause the container before exec")))
            }
            _ => Err(conflict(format!("container {id} is not running"))),
        }
    }

    fn create(&mut self) -> Result<Reply, Refusal> {
        if self.status() != Status::Empty {
            return Err(conflict(format!("container {} has already been created", self.spec.container)));
        }
        let log = LogFile::open(&self.spec.log).map_err(|source| Refusal::Log { source })?;
        let foreign = self.descriptors();
        let Some(init) = self.processes[INIT].as_mut() else { return Err(self.unknown()) };
        let made = self.runtime.create(&init.wanted(), &foreign);
        let adopted = made.map_err(Refusal::from).and_then(|made| {
            let pid = made.pid;
            init.log = log;
            init.adopt(made).map_err(|source| Refusal::Io { step: "watch the container's init", source })?;
            Ok(Reply::Created { pid })
        });
        self.created = adopted.is_ok();
        if self.created {
            // Without it the container runs as well, and says at its end whether it was for want of memory.
            self.memory = self.runtime.watch_memory().unwrap_or_else(|error| {
                report(&error);
                None
            });
        }
        if adopted.is_err() {
            // Children of a failed creation end by themselves or were killed; none of them is ours to know. Those still
            // ending are collected when they have.
            self.reap_children();
        }
        adopted
    }

    /// The sockets a child must not keep.
    fn descriptors(&self) -> Vec<RawFd> {
        let clients = self.clients.iter().flatten().map(|client| client.stream.as_raw_fd());
        clients.chain([self.listener.as_raw_fd()]).collect()
    }

    fn unknown(&self) -> Refusal {
        Refusal::State {
            kind: ErrorKind::NoProcess,
            message: format!("container {} has no such process", self.spec.container),
        }
    }

    fn start(&mut self, id: &ProcessId) -> Result<Reply, Refusal> {
        let index = self.find(id)?;
        let Some(process) = self.processes[index].as_mut() else { return Err(self.unknown()) };
        if process.started {
            let message =
                format!("{} of container {} has already been started", name_of(id), self.spec.container);
            return Err(conflict(message));
        }
        if index != INIT {
            self.require_running()?;
            return self.start_exec(index);
        }
        let Some(outcome) = process.outcome.take().filter(|_| process.is_alive()) else {
            return Err(conflict(format!("container {} is not created", self.spec.container)));
        };
        process.started = true;
        let pid = process.pid;
        match self.runtime.start(outcome) {
            Ok(()) => Ok(Reply::Started { pid }),
            Err(error) => {
                process.failed_code = Some(error.kind().exit_code());
                // It is about to end by itself; make sure.
                if let Some(handle) = &process.handle {
                    sys::kill(handle)
                        .map_err(|source| Refusal::Io { step: "end the failed init", source })?;
                }
                Err(error.into())
            }
        }
    }

    fn start_exec(&mut self, index: usize) -> Result<Reply, Refusal> {
        let Some(process) = self.processes[index].as_mut() else { return Err(self.unknown()) };
        process.started = true;
        let Some(description) = process.description.take() else { return Err(self.unknown()) };
        let result =
            self.runtime.exec(&description, &process.wanted()).map_err(Refusal::from).and_then(|made| {
                let pid = made.pid;
                process.adopt(made).map_err(|source| Refusal::Io { step: "watch the process", source })?;
                match process.outcome.take().and_then(Outcome::wait) {
                    Some(failure) => Err(RuntimeError::from(failure).into()),
                    None => Ok(Reply::Started { pid }),
                }
            });
        if let Err(refusal) = &result {
            let kind = match refusal {
                Refusal::Runtime(error) => error.kind(),
                _ => ErrorKind::Other,
            };
            process.streams = Default::default();
            process.end_with(kind.exit_code());
        }
        self.reap_children();
        result
    }

    fn kill(&mut self, signal: i32, id: &ProcessId) -> Result<(), Refusal> {
        let index = self.find(id)?;
        let not_running = || conflict(format!("container {} is not running", self.spec.container));
        let handle = self.processes[index].as_ref().and_then(|process| process.handle.as_ref());
        let handle = handle.ok_or_else(not_running)?;
        let failed = |source| Refusal::Io { step: "send the signal", source };
        let sent = match index {
            // Asked again afterwards: a failure to reach one that has just ended is none.
            INIT => match self.runtime.signal_init(signal) {
                Ok(true) => true,
                Ok(false) => sys::signal(handle, signal).map_err(failed)?,
                Err(_) if sys::has_ended(handle).map_err(failed)? => false,
                Err(error) => return Err(error.into()),
            },
            _ => sys::signal(handle, signal).map_err(failed)?,
        };
        if !sent {
            return Err(not_running());
        }
        if signal == rustix::process::Signal::KILL.as_raw() {
            if mem::take(&mut self.paused) {
                // On v1 a frozen process does not even die.
                self.runtime.thaw_dying()?;
            }
            if index == INIT && !self.runtime.private_pids() {
                self.runtime.kill_all()?;
            }
        }
        Ok(())
    }

    fn update(&self, resources: &LinuxResources) -> Result<(), Refusal> {
        match self.status() {
            Status::Running | Status::Paused | Status::Created => Ok(self.runtime.update(resources)?),
            _ => Err(conflict(format!("Container {} is not running", self.spec.container))),
        }
    }

    fn freeze(&mut self, frozen: bool) -> Result<(), Refusal> {
        let id = &self.spec.container;
        match (self.status(), frozen) {
            (Status::Running, true) | (Status::Paused, false) => {}
            (Status::Paused, true) => return Err(conflict(format!("Container {id} is already paused"))),
            (Status::Running, false) => return Err(conflict(format!("Container {id} is not paused"))),
            _ => return Err(conflict(format!("Container {id} is not running"))),
        }
        self.runtime.freeze(frozen)?;
        self.paused = frozen;
        Ok(())
    }

    fn prepare_exec(
        &mut self,
        id: String,
        description: Box<OciProcess>,
        terminal: bool,
        stdin: Stdin,
        size: Option<ConsoleSize>,
    ) -> Result<Reply, Refusal> {
        self.require_running()?;
        let id = Some(id);
        if self.find(&id).is_ok() {
            return Err(conflict(format!(
                "container {} already has a process {}",
                self.spec.container,
                name_of(&id)
            )));
        }
        let mut process = Process::new(id, terminal, stdin, size);
        process.description = Some(description);
        match self.processes.iter().position(Option::is_none) {
            Some(free) => self.processes[free] = Some(process),
            None if self.processes.len() < PROCESSES_MAX => self.processes.push(Some(process)),
            None => {
                return Err(conflict(format!(
                    "container {} has {PROCESSES_MAX} processes, the most a shim keeps",
                    self.spec.container
                )));
            }
        }
        Ok(Reply::Created { pid: 0 })
    }

    fn attach(&mut self, client: usize, attachment: Attachment) {
        self.answer(client, &Reply::Attached);
        let Some(one) = self.clients[client].as_mut() else { return };
        let early = mem::take(&mut one.input).into_rest();
        one.mode = Mode::Attached(attachment);
        let Some(process) = self.process(attachment.process) else { return };
        if attachment.stdin {
            process.feed(&early);
        }
        if process.exit.is_some() {
            self.set_mode(client, Mode::Closing);
        }
    }

    fn forget(&mut self, id: String) -> Result<(), Refusal> {
        let id = Some(id);
        let index = self.find(&id)?;
        let busy = self.processes[index].as_ref().is_some_and(|one| one.started && one.exit.is_none());
        if busy {
            return Err(conflict(format!(
                "{} of container {} is still running",
                name_of(&id),
                self.spec.container
            )));
        }
        self.processes[index] = None;
        for client in self.clients.iter_mut().flatten() {
            let watches = match client.mode {
                Mode::Attached(attachment) => attachment.process == index,
                Mode::Waiting(process) => process == index,
                _ => false,
            };
            if watches {
                client.mode = Mode::Closing;
            }
        }
        Ok(())
    }

    fn delete(&mut self) -> Result<(), Refusal> {
        if mem::take(&mut self.paused) {
            self.runtime.thaw_dying()?;
        }
        for handle in self.processes.iter().flatten().filter_map(|process| process.handle.as_ref()) {
            sys::kill(handle).map_err(|source| Refusal::Io { step: "end a process", source })?;
        }
        self.runtime.kill_all()?;
        let deadline = Instant::now() + END_TIMEOUT;
        while self.processes.iter().flatten().any(Process::is_alive) {
            self.reap_children();
            if Instant::now() > deadline {
                return Err(Refusal::Runtime(RuntimeError::Runtime {
                    step: "end the container",
                    reason: format!(
                        "its processes are still there {} s after SIGKILL",
                        END_TIMEOUT.as_secs()
                    ),
                }));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // What they wrote last is in the pipes; whoever else holds those does not count any more.
        for index in 0..self.processes.len() {
            for stream in Stream::BOTH {
                while self.pump_once(index, stream) {}
            }
            self.settle(index);
        }
        self.memory = None;
        self.runtime.delete()?;
        self.leave_at = Some(Instant::now() + FAREWELL_TIMEOUT);
        Ok(())
    }
}

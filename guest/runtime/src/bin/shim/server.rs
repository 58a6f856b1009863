//! The loop: descriptors in, what is ready done, nothing waited for but `poll`.
//!
//! Creating a container and executing a process are the only steps that take milliseconds; everything else is as long as
//! one read and one write. A client that does not read slows the process it watches down (its queue is bounded) and
//! nobody else.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use guest_runtime::cgroup::OomWatch;
use guest_runtime::shim::record::{self, EXIT_FILE};
use guest_runtime::shim::{
    ConsoleSize, ErrorKind, Exit, ProcessId, Reply, Request, ShimSpec, ShimState, Status, Stdin,
};
use guest_runtime::sys::{self, ChildEnds};
use jiff::Timestamp;
use oci_spec::runtime::{LinuxResources, Process as OciProcess};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::WaitOptions;
use thiserror::Error;

use crate::client::{Attachment, Client, Mode};
use crate::container::{Runtime, RuntimeError};
use crate::log::{LogFile, Stream};
use crate::process::Process;
use crate::program::Outcome;
use crate::report;
use crate::trace::Events;

/// Connections at a time. Each attach, wait and exec of the engine takes one.
const CLIENTS_MAX: usize = 256;
/// Processes at a time, init included.
const PROCESSES_MAX: usize = 1024;
/// What a client may leave unread before the process it watches has to wait.
const QUEUE_LEN_MAX: usize = 256 * 1024;
/// The same while the rest of an ended process's output drains: more than both its pipes can hold.
const DRAIN_QUEUE_LEN_MAX: usize = 4 * 1024 * 1024;
/// One read of output.
const READ_LEN: usize = 64 * 1024;
/// The header of a multiplexed frame.
const HEADER_LEN: usize = 8;
/// How long a shim stays after `Delete` for clients to read the last output.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long killed processes may take to end at `Delete`.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// The exit status of a process nobody knows one of.
const STATUS_UNKNOWN: i32 = 255;

const INIT: usize = 0;

#[derive(Debug, Error)]
pub enum ServerError {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot {step}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

/// A refusal on its way to becoming a reply.
#[derive(Debug, Error)]
enum Refusal {
    #[error("failed to initialize logging driver")]
    Log {
        #[source]
        source: io::Error,
    },
    #[error("{message}")]
    State { kind: ErrorKind, message: String },
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot {step}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        let kind = match &refusal {
            Refusal::State { kind, .. } => *kind,
            Refusal::Runtime(error) => error.kind(),
            Refusal::Io { .. } | Refusal::Log { .. } => ErrorKind::Other,
        };
        Self::Error { kind, message: crate::trace::chain(&refusal) }
    }
}

fn conflict(message: String) -> Refusal {
    Refusal::State { kind: ErrorKind::Conflict, message }
}

/// What a ready descriptor is for.
#[derive(Debug, Clone, Copy)]
enum Token {
    Listener,
    /// Some child has ended. `End` is one that this program knows, which also ends where no signal comes.
    Children,
    Client(usize),
    End,
    Memory,
    Input(usize),
    Output(usize, Stream),
}

/// The shim.
pub struct Server {
    dir: PathBuf,
    spec: ShimSpec,
    listener: UnixListener,
    children: ChildEnds,
    runtime: Runtime,
    created: bool,
    paused: bool,
    memory: Option<OomWatch>,
    ooms: u64,
    /// Slots; an index means the same process or client for its whole life. The first process is init.
    processes: Vec<Option<Process>>,
    clients: Vec<Option<Client>>,
    buffer: Vec<u8>,
    leave_at: Option<Instant>,
}

impl Server {
    pub fn new(
        dir: PathBuf,
        spec: ShimSpec,
        listener: UnixListener,
        events: Events,
    ) -> Result<Self, ServerError> {
        let io_error = |step| move |source| ServerError::Io { step, source };
        listener.set_nonblocking(true).map_err(io_error("prepare the socket"))?;
        let children = ChildEnds::new().map_err(io_error("watch for the ends of children"))?;
        let runtime =
            Runtime::new(&dir, &spec, events).map_err(io_error("read this process's capabilities"))?;
        runtime.announce()?;
        let init = Process::new(None, spec.terminal, spec.stdin, spec.console_size);
        Ok(Self {
            dir,
            spec,
            listener,
            children,
            runtime,
            created: false,
            paused: false,
            memory: None,
            ooms: 0,
            processes: vec![Some(init)],
            clients: Vec::new(),
            buffer: vec![0; HEADER_LEN + READ_LEN],
            leave_at: None,
        })
    }

    /// Serves until the container has been deleted and the last output has been read.
    pub fn run(mut self) -> Result<(), ServerError> {
        while !self.is_done() {
            let ready = self.wait_ready()?;
            for (token, flags) in ready {
                self.handle(token, flags);
            }
            self.settle_ended();
            self.close_finished();
        }
        for client in self.clients.drain(..).flatten() {
            client.close();
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.leave_at.is_some_and(|at| {
            Instant::now() >= at || self.clients.iter().flatten().all(|one| one.queued() == 0)
        })
    }

    // --- readiness -------------------------------------------------------------------------------------------------

    fn wait_ready(&self) -> Result<Vec<(Token, PollFlags)>, ServerError> {
        let mut tokens = Vec::new();
        let mut descriptors = Vec::new();
        tokens.push(Token::Children);
        descriptors.push(PollFd::new(&self.children, PollFlags::IN));
        if let Some(memory) = &self.memory {
            tokens.push(Token::Memory);
            descriptors.push(PollFd::new(memory, memory.flags()));
        }
        if self.leave_at.is_none() && self.clients.iter().flatten().count() < CLIENTS_MAX {
            tokens.push(Token::Listener);
            descriptors.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        for (index, client) in self.clients.iter().enumerate() {
            let Some(client) = client else { continue };
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, self.wants_input(client));
            flags.set(PollFlags::OUT, client.queued() > 0);
            // A connection that has hung up is always ready; look at it only when there is something to do.
            if !client.hung_up || flags.contains(PollFlags::IN) {
                tokens.push(Token::Client(index));
                descriptors.push(PollFd::new(&client.stream, flags));
            }
        }
        for (index, process) in self.processes.iter().enumerate() {
            let Some(process) = process else { continue };
            if let Some(handle) = &process.handle {
                tokens.push(Token::End);
                descriptors.push(PollFd::new(handle, PollFlags::IN));
            }
            if let Some(stdin) = process.streams.stdin.as_ref().filter(|_| process.has_input()) {
                tokens.push(Token::Input(index));
                descriptors.push(PollFd::new(stdin, PollFlags::OUT));
            }
            for stream in Stream::BOTH {
                if let Some(output) = &process.streams.outputs[stream.index()]
                    && self.may_read(index, process, stream)
                {
                    tokens.push(Token::Output(index, stream));
                    descriptors.push(PollFd::new(output, PollFlags::IN));
                }
            }
        }
        match poll(&mut descriptors, self.timeout().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(ServerError::Io { step: "wait for something to happen", source: error.into() });
            }
        }
        let ready =
            tokens.into_iter().zip(descriptors).map(|(token, descriptor)| (token, descriptor.revents()));
        Ok(ready.filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn wants_input(&self, client: &Client) -> bool {
        match client.mode {
            Mode::Control => !client.ended && self.leave_at.is_none(),
            Mode::Attached(attachment) => {
                let process = self.processes.get(attachment.process).and_then(Option::as_ref);
                attachment.stdin && !client.ended && process.is_some_and(Process::has_input_room)
            }
            Mode::Waiting(_) | Mode::Closing => false,
        }
    }

    /// Backpressure: a stream is read only as fast as its slowest watcher.
    fn may_read(&self, index: usize, process: &Process, stream: Stream) -> bool {
        let limit = if process.ended.is_some() { DRAIN_QUEUE_LEN_MAX } else { QUEUE_LEN_MAX };
        self.clients.iter().flatten().all(|client| !client.wants(index, stream) || client.queued() < limit)
    }

    fn timeout(&self) -> Option<Timespec> {
        let draining = self.processes.iter().flatten().filter(|process| process.exit.is_none());
        let deadlines = draining.filter_map(|process| process.ended).map(|ended| ended.drain_until);
        let next = deadlines.chain(self.leave_at).min()?;
        let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
    }

    fn handle(&mut self, token: Token, flags: PollFlags) {
        match token {
            Token::Listener => self.accept(),
            Token::Client(index) => self.serve(index, flags),
            Token::Children => {
                self.children.clear();
                self.reap_children();
            }
            Token::End => self.reap_children(),
            Token::Memory => self.out_of_memory(),
            Token::Input(index) => {
                if let Some(process) = self.process(index) {
                    process.flush_input();
                }
            }
            Token::Output(index, stream) => self.pump(index, stream),
        }
    }

    fn process(&mut self, index: usize) -> Option<&mut Process> {
        self.processes.get_mut(index)?.as_mut()
    }

    fn find(&self, id: &ProcessId) -> Result<usize, Refusal> {
        let position = self.processes.iter().position(|one| one.as_ref().is_some_and(|one| one.id == *id));
        position.ok_or_else(|| Refusal::State {
            kind: ErrorKind::NoProcess,
            message: format!("container {} has no process {}", self.spec.container, name_of(id)),
        })
    }

    // --- connections -----------------------------------------------------------------------------------------------

    fn accept(&mut self) {
        let client = match self.listener.accept() {
            Ok((stream, _)) => Client::new(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => Err(error),
        };
        match client {
            Ok(client) => match self.clients.iter().position(Option::is_none) {
                Some(free) => self.clients[free] = Some(client),
                None => self.clients.push(Some(client)),
            },
            Err(error) => report(&ServerError::Io { step: "accept a connection", source: error }),
        }
    }

    fn serve(&mut self, index: usize, flags: PollFlags) {
        let Some(client) = self.clients.get_mut(index).and_then(Option::as_mut) else { return };
        if flags.contains(PollFlags::OUT) && client.flush().is_err() {
            self.drop_client(index);
            return;
        }
        if flags.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            client.hung_up = true;
        }
        if flags.contains(PollFlags::IN) {
            self.read_client(index);
        }
        let finished =
            self.clients[index].as_ref().is_some_and(|client| client.hung_up && !self.wants_input(client));
        // With input still to come but no room for it, wait for the process to make some.
        let blocked = self.clients[index].as_ref().is_some_and(|client| {
            client.attachment().is_some_and(|attachment| attachment.stdin && !client.ended)
        });
        if finished && !blocked {
            self.drop_client(index);
        }
    }

    fn read_client(&mut self, index: usize) {
        let Some(client) = self.clients[index].as_mut() else { return };
        let read = client.stream.read(&mut self.buffer);
        match read {
            Ok(0) => self.client_ended(index),
            Ok(count) => match client.attachment() {
                Some(Attachment { process, .. }) => {
                    if let Some(process) = self.processes.get_mut(process).and_then(Option::as_mut) {
                        process.feed(&self.buffer[..count]);
                    }
                }
                None => {
                    client.input.extend(&self.buffer[..count]);
                    self.serve_requests(index);
                }
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => {
                self.client_ended(index);
                self.drop_client(index);
            }
        }
    }

    fn client_ended(&mut self, index: usize) {
        let Some(client) = self.clients[index].as_mut() else { return };
        client.ended = true;
        match client.mode {
            Mode::Attached(Attachment { process, stdin: true, .. }) => {
                if let Some(process) = self.process(process) {
                    process.feeder_left();
                }
            }
            // Replies already queued are still sent.
            Mode::Control => client.mode = Mode::Closing,
            _ => {}
        }
    }

    fn drop_client(&mut self, index: usize) {
        let Some(client) = self.clients[index].take() else { return };
        if let Some(attachment) = client.attachment()
            && attachment.stdin
            && !client.ended
            && let Some(process) = self.process(attachment.process)
        {
            process.feeder_left();
        }
        client.close();
    }

    fn close_finished(&mut self) {
        for index in 0..self.clients.len() {
            // One that has hung up reads no more, whatever is queued.
            let finished = self.clients[index]
                .as_ref()
                .is_some_and(|one| one.mode == Mode::Closing && (one.queued() == 0 || one.hung_up));
            if finished {
                self.drop_client(index);
            }
        }
    }

    /// Answers the requests a client has sent, up to one that must wait.
    fn serve_requests(&mut self, index: usize) {
        loop {
            let Some(client) = self.clients[index].as_mut() else { return };
            if client.mode != Mode::Control {
                return;
            }
            let request = match client.input.next_message::<Request>() {
                Ok(Some(request)) => request,
                Ok(None) => return,
                Err(error) => {
                    self.answer(
                        index,
                        &Reply::Error { kind: ErrorKind::Other, message: crate::trace::chain(&error) },
                    );
                    if let Some(client) = self.clients[index].as_mut() {
                        client.mode = Mode::Closing;
                    }
                    return;
                }
            };
            match self.execute(index, request) {
                Ok(Some(reply)) => self.answer(index, &reply),
                Ok(None) => {}
                Err(refusal) => self.answer(index, &refusal.into()),
            }
        }
    }

    fn answer(&mut self, index: usize, reply: &Reply) {
        let Some(client) = self.clients[index].as_mut() else { return };
        if let Err(error) = client.reply(reply) {
            report(&error);
            client.mode = Mode::Closing;
        }
    }

    // --- requests --------------------------------------------------------------------------------------------------

    /// `None` when the reply comes later.
    fn execute(&mut self, client: usize, request: Request) -> Result<Option<Reply>, Refusal> {
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

    fn set_mode(&mut self, client: usize, mode: Mode) {
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

    /// Init's own death for want of memory is told by its end too; this tells the others', and both at once.
    fn out_of_memory(&mut self) {
        let Some(memory) = &mut self.memory else { return };
        self.ooms = memory.take();
        for client in 0..self.clients.len() {
            self.tell_ooms(client);
        }
    }

    fn tell_ooms(&mut self, client: usize) {
        let count = self.ooms;
        let Some(one) = self.clients[client].as_mut() else { return };
        if one.ooms.is_some_and(|told| told < count) {
            one.ooms = Some(count);
            self.answer(client, &Reply::OutOfMemory { count });
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

    // --- output ----------------------------------------------------------------------------------------------------

    fn pump(&mut self, index: usize, stream: Stream) {
        self.pump_once(index, stream);
    }

    /// Reads once and passes it on: to the clients first, then to the log. Whether there may be more.
    fn pump_once(&mut self, index: usize, stream: Stream) -> bool {
        let mut buffer = mem::take(&mut self.buffer);
        let count = self.read_output(index, stream, &mut buffer[HEADER_LEN..]);
        let more = match count {
            Some(0) => {
                if let Some(process) = self.process(index) {
                    process.streams.outputs[stream.index()] = None;
                }
                false
            }
            Some(count) => {
                buffer[..HEADER_LEN].fill(0);
                buffer[0] = stream.number();
                buffer[4..HEADER_LEN].copy_from_slice(&(count as u32).to_be_bytes());
                self.pass_on(index, stream, &buffer[..HEADER_LEN + count]);
                true
            }
            None => false,
        };
        self.buffer = buffer;
        more
    }

    /// `Some(0)` at the end, `None` when there is nothing now.
    fn read_output(&mut self, index: usize, stream: Stream, buffer: &mut [u8]) -> Option<usize> {
        let output = self.process(index)?.streams.outputs[stream.index()].as_ref()?;
        match rustix::io::read(output, buffer) {
            Ok(count) => Some(count),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            // A terminal whose last user has gone gives EIO.
            Err(_) => Some(0),
        }
    }

    fn pass_on(&mut self, index: usize, stream: Stream, frame: &[u8]) {
        let Some(process) = self.processes[index].as_mut() else { return };
        let bytes = if process.terminal { &frame[HEADER_LEN..] } else { frame };
        for client in self.clients.iter_mut().flatten() {
            if client.wants(index, stream) && client.send(bytes).is_err() {
                client.mode = Mode::Closing;
            }
        }
        if let Some(log) = &mut process.log {
            let written = log.write(stream, &frame[HEADER_LEN..], Timestamp::now());
            // A full disk fails every write: say so when it begins.
            let failed_before = mem::replace(&mut process.log_fails, written.is_err());
            if let Err(error) = written
                && !failed_before
            {
                report(&ServerError::Io { step: "write the container's log", source: error });
            }
        }
    }

    // --- ends ------------------------------------------------------------------------------------------------------

    /// Collects every child that has ended: processes of the container, libcontainer's helpers, and those of either that
    /// failed before this program knew them. One left would keep the container's pid namespace, and its init, from ending.
    fn reap_children(&mut self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let pid = pid.as_raw_nonzero().get();
                    let mut alive = self.processes.iter_mut().flatten().filter(|one| one.is_alive());
                    if let Some(process) = alive.find(|one| one.pid == pid) {
                        process.end(status);
                    }
                }
                Err(rustix::io::Errno::CHILD) => {
                    // No child at all: whoever still counts as alive was collected by somebody else, as when this
                    // program was started with SIGCHLD ignored. The status is lost, the end is not.
                    let alive = self.processes.iter_mut().flatten().filter(|one| one.is_alive());
                    alive.for_each(|process| process.end_with(process.failed_code.unwrap_or(STATUS_UNKNOWN)));
                    break;
                }
                Ok(None) | Err(_) => break,
            }
        }
        let init_ended =
            self.processes[INIT].as_ref().is_some_and(|init| init.ended.is_some() && init.exit.is_none());
        if init_ended
            && !self.runtime.private_pids()
            && let Err(error) = self.runtime.kill_all()
        {
            report(&error);
        }
    }

    fn settle_ended(&mut self) {
        let now = Instant::now();
        for index in 0..self.processes.len() {
            let due = self.processes[index].as_ref().is_some_and(|process| {
                process.exit.is_none()
                    && process.ended.is_some_and(|ended| process.is_drained() || now >= ended.drain_until)
            });
            if due {
                self.settle(index);
            }
        }
    }

    /// Makes an end known, once.
    fn settle(&mut self, index: usize) {
        let oom_killed = index == INIT && self.runtime.oom_killed();
        if index == INIT {
            self.out_of_memory();
        }
        let Some(process) = self.processes[index].as_mut().filter(|process| process.exit.is_none()) else {
            return;
        };
        let Some(ended) = process.ended else { return };
        if let Some(log) = &mut process.log
            && let Err(error) = log.finish(ended.finished_at)
        {
            report(&ServerError::Io { step: "write the container's log", source: error });
        }
        let exit = Exit { code: ended.code, finished_at: ended.finished_at, oom_killed };
        process.exit = Some(exit.clone());
        process.release();
        if index == INIT {
            self.paused = false;
            if let Err(error) = record::write(&self.dir, EXIT_FILE, &exit) {
                report(&error);
            }
        }
        for client in 0..self.clients.len() {
            let Some(mode) = self.clients[client].as_ref().map(|client| client.mode) else { continue };
            match mode {
                Mode::Attached(attachment) if attachment.process == index => {
                    self.set_mode(client, Mode::Closing)
                }
                Mode::Waiting(process) if process == index => {
                    self.set_mode(client, Mode::Control);
                    if let Some(one) = self.clients[client].as_mut() {
                        one.ooms = None;
                    }
                    self.answer(client, &Reply::Exited(exit.clone()));
                    self.serve_requests(client);
                }
                _ => {}
            }
        }
        sys::trim_heap();
    }
}

fn name_of(id: &ProcessId) -> &str {
    id.as_deref().unwrap_or("init")
}

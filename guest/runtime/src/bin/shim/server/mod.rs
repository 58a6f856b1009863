//! The loop: descriptors in, what is ready done, nothing waited for but `poll`.
//!
//! Creating a container and executing a process are the only steps that take milliseconds; everything else is as long as
//! one read and one write. A client that does not read slows the process it watches down (its queue is bounded) and
//! nobody else.

mod connections;
mod ends;
mod output;
mod refusal;
mod requests;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use guest_runtime::cgroup::OomWatch;
use guest_runtime::shim::{ErrorKind, ProcessId, ShimSpec};
use guest_runtime::sys::ChildEnds;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use self::refusal::{Refusal, name_of};
use crate::client::{Client, Mode};
use crate::container::{Runtime, RuntimeError};
use crate::log::{READ_LEN, Stream};
use crate::process::Process;
use crate::trace::Events;

/// Connections at a time. Each attach, wait and exec of the engine takes one.
const CLIENTS_MAX: usize = 256;
/// What a client may leave unread before the process it watches has to wait.
const QUEUE_LEN_MAX: usize = 256 * 1024;
/// The same while the rest of an ended process's output drains: more than both its pipes can hold.
const DRAIN_QUEUE_LEN_MAX: usize = 4 * 1024 * 1024;
/// The header of a multiplexed frame.
const HEADER_LEN: usize = 8;

/// The slot of the first process.
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
}

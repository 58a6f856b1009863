//! The thread of one device: waits for kicks, the model's own events and the transport's commands, and runs the model.
//!
//! The thread owns the model and the running rings; the transport's side holds a [`Worker`] and sends commands that
//! are acknowledged, so that after `stop_queue` the thread is known not to touch the queue. Dropping the worker ends
//! the thread and waits for it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use tracing::error;

use crate::virtio::device::{DeviceError, DeviceKind, DeviceState, QueueResources, QueueState};
use crate::virtio::life::Life;
use crate::virtio::ring::Ring;

/// Tokens from here up belong to the worker: the waker, then one per queue. Those below belong to the model.
const FIRST_OWN_TOKEN: usize = WAKE.0 - MAX_QUEUES;
const WAKE: Token = Token(usize::MAX);
/// More queues than any model has.
const MAX_QUEUES: usize = 64;
/// Events taken per wait.
const EVENTS: usize = 256;

/// The running rings by queue index.
pub(crate) type Rings = [Option<Ring>];

/// What a device does, seen from its thread.
pub(crate) trait Model: Send + 'static {
    /// What others ask of the device, beside the transport's verbs.
    type Message: Send + 'static;

    /// Takes note of the features the driver accepted.
    fn ack_features(&mut self, features: u64);

    /// Takes note that a queue was kicked or has just started.
    fn kicked(&mut self, queue: usize);

    /// Takes note of an event on something the model registered.
    fn event(&mut self, event: &Event);

    /// Takes a message.
    fn message(&mut self, message: Self::Message);

    /// Works on what was noted; `true` when it stopped with work left, only to let others have a turn.
    fn run(&mut self, rings: &mut Rings) -> bool;

    /// Takes note that a queue is about to stop: chains that were taken and not yet handed back go back now, in the
    /// order that [`Ring::untake`] wants.
    fn stopping(&mut self, _index: usize, _ring: &mut Ring) {}

    /// What a saved machine keeps of the model, beside features, queues and configuration space; `Err` is why it cannot, as a
    /// clause. Called while no queue runs.
    fn save(&self) -> Result<Vec<u8>, String> {
        Ok(Vec::new())
    }

    /// Goes on from a saved state, before the first queue starts; `Err` is why it cannot, as a clause. Of configuration space
    /// only what is kept is taken over, after this.
    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        keeps_nothing(state)
    }

    /// When `run` must come at the latest even if nothing happens.
    fn deadline(&self) -> Option<Instant>;

    /// Forgets everything the driver did.
    fn reset(&mut self);
}

/// Refuses what a model that keeps nothing has not saved.
pub(crate) fn keeps_nothing(state: &DeviceState) -> Result<(), String> {
    match state.model.len() {
        0 => Ok(()),
        length => Err(format!("it keeps nothing of its own, and not {length} bytes")),
    }
}

enum Command<M> {
    AckFeatures(u64),
    Start { index: usize, resources: QueueResources, done: Sender<Result<(), DeviceError>> },
    Stop { index: usize, done: Sender<Option<QueueState>> },
    Reset { done: Sender<()> },
    Save { done: Sender<Result<Vec<u8>, String>> },
    Restore { state: DeviceState, done: Sender<Result<(), String>> },
    Message(M),
    End,
}

/// Sends messages to a device's thread from any thread.
pub(crate) struct Mailbox<M> {
    commands: Sender<Command<M>>,
    waker: Arc<Waker>,
}

impl<M> Clone for Mailbox<M> {
    fn clone(&self) -> Self {
        Self { commands: self.commands.clone(), waker: Arc::clone(&self.waker) }
    }
}

impl<M> Mailbox<M> {
    /// Sends a message; `Err` gives it back when the device's thread has ended.
    pub fn send(&self, message: M) -> Result<(), M> {
        self.command(Command::Message(message)).map_err(|command| match command {
            Command::Message(message) => message,
            _ => unreachable!("a refused command is the one that was sent"),
        })
    }

    fn command(&self, command: Command<M>) -> Result<(), Command<M>> {
        self.commands.send(command).map_err(|refused| refused.0)?;
        if let Err(error) = self.waker.wake() {
            error!(%error, "cannot wake a device's thread");
        }
        Ok(())
    }
}

/// The transport's hold on a device's thread.
pub(crate) struct Worker<M> {
    kind: DeviceKind,
    queues: usize,
    mailbox: Mailbox<M>,
    life: Life,
    thread: Option<JoinHandle<()>>,
}

impl<M: Send + 'static> Worker<M> {
    /// Starts the thread `name`, with the model that `build` makes from the registry of the thread's poll.
    pub fn spawn<T: Model<Message = M>>(
        kind: DeviceKind,
        name: &str,
        queues: usize,
        build: impl FnOnce(Registry) -> io::Result<T>,
    ) -> io::Result<Self> {
        assert!(queues <= MAX_QUEUES, "a device has at most {MAX_QUEUES} queues");
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let (sender, commands) = mpsc::channel();
        let model = build(poll.registry().try_clone()?)?;
        let rings = (0..queues).map(|_| None).collect();
        let looper = Loop { kind, poll, commands, model, rings };
        let life = Life::default();
        let inside = life.clone();
        let thread =
            thread::Builder::new().name(name.to_owned()).spawn(move || inside.live(|| looper.run()))?;
        Ok(Self { kind, queues, mailbox: Mailbox { commands: sender, waker }, life, thread: Some(thread) })
    }

    pub fn mailbox(&self) -> Mailbox<M> {
        self.mailbox.clone()
    }

    pub fn life(&self) -> Life {
        self.life.clone()
    }

    pub fn ack_features(&self, features: u64) {
        // A thread that has ended has nothing to negotiate; starting a queue reports it.
        let _ended = self.mailbox.command(Command::AckFeatures(features));
    }

    pub fn start_queue(&self, index: usize, resources: QueueResources) -> Result<(), DeviceError> {
        if index >= self.queues {
            return Err(DeviceError::NoSuchQueue { kind: self.kind, index, count: self.queues });
        }
        self.ask(|done| Command::Start { index, resources, done })
            .ok_or(DeviceError::Gone { kind: self.kind })?
    }

    pub fn stop_queue(&self, index: usize) -> Option<QueueState> {
        self.ask(|done| Command::Stop { index, done }).flatten()
    }

    pub fn reset(&self) {
        // A thread that has ended holds no state.
        let _ended = self.ask(|done| Command::Reset { done });
    }

    /// What the model keeps for [`Self::restore`].
    pub fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let kind = self.kind;
        let saved = self.ask(|done| Command::Save { done }).ok_or(DeviceError::Gone { kind })?;
        saved.map_err(|reason| DeviceError::Unsaved { kind, reason })
    }

    pub fn restore(&self, state: DeviceState) -> Result<(), DeviceError> {
        let kind = self.kind;
        let restored = self.ask(|done| Command::Restore { state, done }).ok_or(DeviceError::Gone { kind })?;
        restored.map_err(|reason| DeviceError::InvalidState { kind, reason })
    }

    /// Sends a command and waits for its answer; `None` when the thread has ended.
    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command<M>) -> Option<T> {
        let (done, answer) = mpsc::channel();
        self.mailbox.command(command(done)).ok()?;
        answer.recv().ok()
    }
}

impl<M> Drop for Worker<M> {
    fn drop(&mut self) {
        // Refused means it has ended already.
        let _ended = self.mailbox.command(Command::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!(device = %self.kind, "the device's thread panicked");
        }
    }
}

/// The thread's own half.
struct Loop<T: Model> {
    kind: DeviceKind,
    poll: Poll,
    commands: Receiver<Command<T::Message>>,
    model: T,
    rings: Vec<Option<Ring>>,
}

impl<T: Model> Loop<T> {
    fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        let mut more = false;
        loop {
            let timeout = match more {
                true => Some(Duration::ZERO),
                false => self.model.deadline().map(|at| at.saturating_duration_since(Instant::now())),
            };
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    error!(device = %self.kind, %error, "cannot wait for events; the device's thread ends");
                    return Err(error);
                }
                _ => {}
            }
            for event in &events {
                match event.token() {
                    WAKE => {
                        if self.obey().is_break() {
                            return Ok(());
                        }
                    }
                    Token(token) if token >= FIRST_OWN_TOKEN => self.kicked(token - FIRST_OWN_TOKEN),
                    _ => self.model.event(event),
                }
            }
            more = self.model.run(&mut self.rings);
        }
    }

    fn kicked(&mut self, index: usize) {
        // The kick is not read: the poll reports every write once (edge-triggered), whatever the counter says. That
        // saves a system call per kick, and a read could wait if the kick came from a queue just replaced.
        if self.rings.get(index).is_some_and(Option::is_some) {
            self.model.kicked(index);
        }
    }

    fn obey(&mut self) -> std::ops::ControlFlow<()> {
        while let Ok(command) = self.commands.try_recv() {
            // A transport that no longer waits for its answer has been dropped; the command is still right to obey.
            match command {
                Command::AckFeatures(features) => self.model.ack_features(features),
                Command::Start { index, resources, done } => {
                    let _unheard = done.send(self.start(index, resources));
                }
                Command::Stop { index, done } => {
                    let _unheard = done.send(self.stop(index));
                }
                Command::Reset { done } => {
                    for index in 0..self.rings.len() {
                        self.stop(index);
                    }
                    self.model.reset();
                    let _unheard = done.send(());
                }
                Command::Save { done } => {
                    let _unheard = done.send(self.model.save());
                }
                Command::Restore { state, done } => {
                    let _unheard = done.send(self.model.restore(&state));
                }
                Command::Message(message) => self.model.message(message),
                Command::End => return std::ops::ControlFlow::Break(()),
            }
        }
        std::ops::ControlFlow::Continue(())
    }

    fn start(&mut self, index: usize, resources: QueueResources) -> Result<(), DeviceError> {
        self.stop(index);
        let ring = Ring::new(self.kind, index, resources);
        if !ring.is_valid() {
            return Err(DeviceError::InvalidQueue { kind: self.kind, index });
        }
        self.poll
            .registry()
            .register(
                &mut SourceFd(&ring.kick().as_raw_fd()),
                Token(FIRST_OWN_TOKEN + index),
                Interest::READABLE,
            )
            .map_err(|source| DeviceError::Watch { kind: self.kind, index, source })?;
        self.rings[index] = Some(ring);
        self.model.kicked(index);
        Ok(())
    }

    fn stop(&mut self, index: usize) -> Option<QueueState> {
        let mut ring = self.rings.get_mut(index)?.take()?;
        self.model.stopping(index, &mut ring);
        ring.flush();
        if let Err(error) = self.poll.registry().deregister(&mut SourceFd(&ring.kick().as_raw_fd())) {
            error!(device = %self.kind, queue = index, %error, "cannot stop watching a kick");
        }
        Some(ring.state())
    }
}

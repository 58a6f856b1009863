//! The control session as a pure state machine, the same for both ends.
//!
//! It owns the greeting, the numbering of requests and their deadlines, the heartbeat, and the decision that the
//! peer is gone. It does not own a socket or a clock: the driver hands it the bytes that arrived
//! ([`Session::receive`]) and the time ([`Session::tick`]), writes out what [`Session::take_output`] gives, and acts
//! on [`Session::next_event`]. Times are durations since any fixed moment of a monotonic clock.
//!
//! # States
//!
//! ```text
//!            new: our hello is in the output
//!                      │
//!                      ▼
//!   ┌──────────── Greeting ────────────┐
//!   │ peer's hello,    │               │ anything but a hello; a hello of another version or of our own role;
//!   │ event Established│               │ no hello within GREETING_TIMEOUT; disconnected
//!   ▼                  │               ▼
//! Established ─────────┼──────────▶ Closed      (for good: a new connection is a new Session)
//!        a second hello; a frame that is too long or no message; an answer to a request never asked or already
//!        answered; a request number that does not rise; MISSED_MAX heartbeats without a sign of life;
//!        OUTPUT_MAX bytes that nobody took; disconnected
//! ```
//!
//! Entering `Closed` gives every open request its outcome. Output made before (our hello, above all) stays to be
//! taken, so that the driver can still tell the peer our version before it hangs up.
//!
//! # Requests
//!
//! Each [`Session::request`] has exactly one [`SessionEvent::Response`]: the peer's answer, or a failure of kind
//! [`FailureKind::Timeout`] or [`FailureKind::Closed`] that is made here. An answer that comes after the timeout is
//! dropped. The peer's requests come as [`SessionEvent::Request`] and are answered with [`Session::respond`], in any
//! order. Either end may ask: the daemon asks the agent, and the engine asks the daemon for leases.
//!
//! # Heartbeat
//!
//! After [`HEARTBEAT_INTERVAL`] without a byte from the guest the host sends a ping, and the guest a pong; the guest itself asks
//! only when it hears none for twice as long, so that an idle session wakes either end once. Silence is counted
//! in pings that were sent, not in time that passed: an end that was itself stopped for a minute (a suspended
//! laptop, a debugger) first sends its next ping and gives the peer time to answer it. For the same reason drivers
//! feed all bytes that have arrived before they call [`Session::tick`].
//!
//! # Newer peers
//!
//! Unknown fields are ignored, unknown kinds of messages and notices skipped, unknown requests answered with
//! [`FailureKind::Unsupported`] without troubling the driver, unknown answers turned into that failure.
//!
//! # Wire
//!
//! Frames as in [`crate::frame`], each one JSON object: `{"type": …, "id": …, "body": …}` with the types `hello`,
//! `request`, `response`, `failure`, `notice`, `ping` and `pong`.

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::frame::{self, Decoder, TooLong};
use crate::message::{Failure, FailureKind, Hello, Notice, Request, Response};

/// Silence after which the host asks for a sign of life.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);

/// Pings without any sign of life after which the peer counts as dead: half a minute with [`HEARTBEAT_INTERVAL`],
/// which a guest on a software CPU that is unpacking a large image still meets.
pub const MISSED_MAX: u32 = 5;

/// How long the peer may take for its hello.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(30);

/// Requests that may be open at once in each direction, counting those that timed out and may yet be answered.
pub const REQUESTS_MAX: usize = 256;

/// Bytes that may wait for [`Session::take_output`]. More means that the peer talks and does not listen.
pub const OUTPUT_MAX: usize = 4 * frame::LENGTH_MAX;

/// Which end of the session this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The daemon.
    Host,
    /// The agent, or the engine on its own session.
    Guest,
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Role::Host => "host",
            Role::Guest => "guest",
        })
    }
}

/// Where the session is in its life; see the module's diagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Our hello is sent, the peer's is awaited.
    Greeting,
    /// Both ends know each other.
    Established,
    /// It is over.
    Closed,
}

/// The number of a request, unique among those of one end of one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// What the driver is to act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// The peer has greeted us; requests and notices may be sent from now on.
    Established {
        /// Its greeting.
        hello: Hello,
    },
    /// The peer asks. Answer with [`Session::respond`].
    Request {
        /// The number to answer with.
        id: RequestId,
        /// What it asks.
        request: Request,
    },
    /// The one outcome of a request of ours.
    Response {
        /// The number that [`Session::request`] returned.
        id: RequestId,
        /// The outcome.
        result: Result<Response, Failure>,
    },
    /// The peer tells us something.
    Notice(Notice),
}

/// Why a session ended, or why it did not take a call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The peer speaks another version of the contract. Closes the session.
    #[error(
        "the {peer} speaks version {theirs} of the control protocol (`{program}`) and this program version {ours}: \
         stop the machine and start it again with programs and image of one release"
    )]
    Version {
        /// The peer's role.
        peer: Role,
        /// The peer's version.
        theirs: u32,
        /// Our version.
        ours: u32,
        /// What the peer says it is.
        program: String,
    },
    /// The peer plays the role that is ours. Closes the session.
    #[error("the peer of this control session claims to be the {0}, as we are")]
    SameRole(Role),
    /// The peer did not greet first. Closes the session.
    #[error("the control session began with a `{0}` instead of a hello")]
    NoHello(String),
    /// The peer greeted again. Closes the session.
    #[error("the peer of the control session greeted twice")]
    SecondHello,
    /// No hello came in time. Closes the session.
    #[error("the peer of the control session did not greet within {} s", .0.as_secs())]
    GreetingTimeout(Duration),
    /// A frame was too long. Closes the session when it was received; a frame of ours is just not sent.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// A frame holds no message. Closes the session.
    #[error("the control session received a malformed message: {0}")]
    Malformed(String),
    /// An answer to a request that was never asked. Closes the session.
    #[error("the peer of the control session answered request {0}, which was never asked")]
    UnknownResponse(RequestId),
    /// A second answer to one request. Closes the session.
    #[error("the peer of the control session answered request {0} twice")]
    DuplicateResponse(RequestId),
    /// A request number that does not rise. Closes the session.
    #[error("the peer of the control session reused request number {0}")]
    ReusedRequest(RequestId),
    /// The peer gives no sign of life. Closes the session.
    #[error("the {peer} has not answered for {} s", .silence.as_secs())]
    PeerDead {
        /// The peer's role.
        peer: Role,
        /// Since when.
        silence: Duration,
    },
    /// The peer does not read what we send. Closes the session.
    #[error("the peer of the control session does not read: {OUTPUT_MAX} bytes are waiting for it")]
    Overflow,
    /// The stream under the session ended.
    #[error("the control session was disconnected")]
    Disconnected,
    /// A request or a notice before the peer's hello. The session goes on.
    #[error("the control session is not established yet")]
    NotEstablished,
    /// Too many requests are open. The session goes on.
    #[error("{REQUESTS_MAX} requests are open in the control session already")]
    Busy,
    /// An answer to a request that the peer did not ask, or that has been answered. The session goes on.
    #[error("there is no open request {0} to answer in the control session")]
    NothingToAnswer(RequestId),
}

/// One end of a control session. See the [module](self).
#[derive(Debug)]
pub struct Session {
    role: Role,
    hello: Hello,
    state: Status,
    decoder: Decoder,
    output: Vec<u8>,
    events: VecDeque<SessionEvent>,
    /// When the peer was last heard, or last given a new chance to be.
    quiet_since: Duration,
    /// When the peer was last heard.
    heard: Duration,
    /// Pings sent since then.
    missed: u32,
    next_id: u64,
    /// Our requests that wait for their outcome, with their deadlines.
    open: BTreeMap<RequestId, Deadline>,
    /// Our requests that timed out and that the peer may yet answer.
    expired: BTreeSet<RequestId>,
    /// The peer's requests that we have not answered.
    asked: BTreeSet<RequestId>,
    /// The highest number of the peer's requests.
    asked_last: Option<RequestId>,
}

#[derive(Debug)]
enum Status {
    Greeting { until: Duration },
    Established,
    Closed(SessionError),
}

#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Duration,
    after: Duration,
}

/// One message as it is on the wire. The body is looked into only when the type is known.
#[derive(Deserialize)]
struct Incoming<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(default)]
    id: Option<u64>,
    #[serde(default, borrow)]
    body: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct Outgoing<'a, B> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a B>,
}

/// A hello with the role, which the session adds so that two hosts on one socket find out.
#[derive(Serialize, Deserialize)]
struct Greeting {
    role: Role,
    #[serde(flatten)]
    hello: Hello,
}

impl Request {
    /// How long the session waits for the answer, unless told otherwise by [`Session::request_within`].
    pub fn timeout(&self) -> Duration {
        match self {
            Request::SetClock { .. } | Request::Configure { .. } | Request::Info => Duration::from_secs(15),
            // The answer only says that it has begun; but a guest in trouble may be slow to say it.
            Request::PowerOff => Duration::from_secs(15),
            // Only as much as the kernel does at once; but a machine on a software processor has little at once.
            Request::UseProcessors { .. } => Duration::from_secs(60),
            // A file system grows by a word for each 128 MiB, written down with the next.
            Request::GrowDisk { .. } => Duration::from_secs(180),
            // Only binds sockets; a thousand of them take less.
            Request::Acquire { .. }
            | Request::Land { .. }
            | Request::Release { .. }
            | Request::Locate { .. }
            | Request::Reconcile { .. } => Duration::from_secs(30),
        }
    }
}

impl Session {
    /// A session whose hello is ready to be taken from the output.
    pub fn new(role: Role, hello: Hello, now: Duration) -> Self {
        let mut session = Self {
            role,
            hello: hello.clone(),
            state: Status::Greeting { until: now + GREETING_TIMEOUT },
            decoder: Decoder::new(),
            output: Vec::new(),
            events: VecDeque::new(),
            quiet_since: now,
            heard: now,
            missed: 0,
            next_id: 1,
            open: BTreeMap::new(),
            expired: BTreeSet::new(),
            asked: BTreeSet::new(),
            asked_last: None,
        };
        // A hello whose strings fill a frame is the caller's mistake; the session says so by being closed.
        if let Err(error) = session.send("hello", None, Some(&Greeting { role, hello })) {
            session.close(error);
        }
        session
    }

    /// Where the session is in its life.
    pub fn state(&self) -> State {
        match self.state {
            Status::Greeting { .. } => State::Greeting,
            Status::Established => State::Established,
            Status::Closed(_) => State::Closed,
        }
    }

    /// Takes bytes that arrived, in whatever pieces. Events may follow, also when this fails.
    ///
    /// Fails when the bytes end the session, and with the same error whenever it has ended already.
    pub fn receive(&mut self, bytes: &[u8], now: Duration) -> Result<(), SessionError> {
        self.check_open()?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.quiet_since = now;
        self.heard = now;
        self.missed = 0;
        // The decoder lends its frames; it is put back once they are dealt with.
        let mut decoder = std::mem::take(&mut self.decoder);
        decoder.push(bytes);
        let result = loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    if let Err(error) = self.receive_frame(frame) {
                        break Err(error);
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
        };
        self.decoder = decoder;
        result.map_err(|error| self.close(error))
    }

    /// Takes note of the time: sends a ping, lets requests time out, gives up a dead peer.
    ///
    /// Call it at [`Session::next_deadline`] or any time after, with all bytes received that have arrived. Fails
    /// when the time ends the session, and with the same error whenever it has ended already.
    pub fn tick(&mut self, now: Duration) -> Result<(), SessionError> {
        self.check_open()?;
        self.expire_requests(now);
        if let Status::Greeting { until } = self.state {
            return match now >= until {
                true => Err(self.close(SessionError::GreetingTimeout(GREETING_TIMEOUT))),
                false => Ok(()),
            };
        }
        if now < self.quiet_since + self.patience() {
            return Ok(());
        }
        if self.missed >= MISSED_MAX {
            let silence = now.saturating_sub(self.heard);
            return Err(self.close(SessionError::PeerDead { peer: self.role.peer(), silence }));
        }
        self.missed += 1;
        self.quiet_since = now;
        self.send::<()>("ping", None, None).map_err(|error| self.close(error))
    }

    /// Silence after which this end asks for a sign of life.
    fn patience(&self) -> Duration {
        match self.role {
            Role::Host => HEARTBEAT_INTERVAL,
            Role::Guest => HEARTBEAT_INTERVAL * 2,
        }
    }

    /// When [`Session::tick`] is to be called next; `None` once the session has ended.
    pub fn next_deadline(&self) -> Option<Duration> {
        let own = match self.state {
            Status::Greeting { until } => until,
            Status::Established => self.quiet_since + self.patience(),
            Status::Closed(_) => return None,
        };
        Some(self.open.values().map(|deadline| deadline.at).fold(own, Duration::min))
    }

    /// Tells the session that its stream has ended. Open requests get their outcome.
    pub fn disconnect(&mut self) {
        if self.check_open().is_ok() {
            self.close(SessionError::Disconnected);
        }
    }

    /// Why the session ended; `None` while it lives.
    pub fn error(&self) -> Option<&SessionError> {
        match &self.state {
            Status::Closed(error) => Some(error),
            _ => None,
        }
    }

    /// All bytes that are to be written to the stream, in order. They are gone from the session with this call.
    ///
    /// Take them when the last ones have been written, not before: what nobody takes is what [`OUTPUT_MAX`] counts.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The next thing to act on. Drain it after every call that takes bytes or time.
    pub fn next_event(&mut self) -> Option<SessionEvent> {
        self.events.pop_front()
    }

    /// Asks the peer, with the usual deadline of this kind of request ([`Request::timeout`]).
    ///
    /// The outcome comes as [`SessionEvent::Response`] with the number returned here. Fails, without such an event,
    /// when the session is not established or too many requests are open.
    pub fn request(&mut self, request: Request, now: Duration) -> Result<RequestId, SessionError> {
        let timeout = request.timeout();
        self.request_within(request, timeout, now)
    }

    /// Asks the peer and waits for `timeout`. Otherwise as [`Session::request`].
    pub fn request_within(
        &mut self,
        request: Request,
        timeout: Duration,
        now: Duration,
    ) -> Result<RequestId, SessionError> {
        self.check_established()?;
        if self.open.len() + self.expired.len() >= REQUESTS_MAX {
            return Err(SessionError::Busy);
        }
        let id = RequestId(self.next_id);
        self.send("request", Some(id), Some(&request))?;
        self.next_id += 1;
        self.open.insert(id, Deadline { at: now.saturating_add(timeout), after: timeout });
        Ok(id)
    }

    /// Answers a request of the peer.
    ///
    /// Fails when there is no such open request, or when the answer is too long for a frame; then the peer is told
    /// that instead.
    pub fn respond(&mut self, id: RequestId, result: Result<Response, Failure>) -> Result<(), SessionError> {
        self.check_established()?;
        if !self.asked.remove(&id) {
            return Err(SessionError::NothingToAnswer(id));
        }
        let sent = match result {
            Ok(response) => self.send("response", Some(id), Some(&response)),
            Err(failure) => self.send("failure", Some(id), Some(&failure)),
        };
        if let Err(SessionError::TooLong(error)) = sent {
            let failure = Failure::new(FailureKind::Failed, format!("the answer cannot be sent: {error}"));
            self.send("failure", Some(id), Some(&failure))?;
        }
        sent
    }

    /// Tells the peer something. Fails when the session is not established or the notice too long for a frame.
    pub fn notify(&mut self, notice: Notice) -> Result<(), SessionError> {
        self.check_established()?;
        self.send("notice", None, Some(&notice))
    }

    fn check_open(&self) -> Result<(), SessionError> {
        match &self.state {
            Status::Closed(error) => Err(error.clone()),
            _ => Ok(()),
        }
    }

    fn check_established(&self) -> Result<(), SessionError> {
        match &self.state {
            Status::Greeting { .. } => Err(SessionError::NotEstablished),
            Status::Established => Ok(()),
            Status::Closed(error) => Err(error.clone()),
        }
    }

    /// The only way into `Closed`. Gives the error back for the caller to return.
    fn close(&mut self, error: SessionError) -> SessionError {
        let failure = Failure::new(
            FailureKind::Closed,
            format!("the control session ended before the answer: {error}"),
        );
        self.state = Status::Closed(error.clone());
        self.asked.clear();
        self.expired.clear();
        for id in std::mem::take(&mut self.open).into_keys() {
            self.events.push_back(SessionEvent::Response { id, result: Err(failure.clone()) });
        }
        error
    }

    fn expire_requests(&mut self, now: Duration) {
        let due = self.open.extract_if(.., |_, deadline| deadline.at <= now);
        for (id, deadline) in due {
            self.expired.insert(id);
            let message = format!("no answer within {:.1} s", deadline.after.as_secs_f64());
            let result = Err(Failure::new(FailureKind::Timeout, message));
            self.events.push_back(SessionEvent::Response { id, result });
        }
    }

    fn receive_frame(&mut self, frame: &[u8]) -> Result<(), SessionError> {
        let incoming: Incoming<'_> = serde_json::from_slice(frame).map_err(malformed)?;
        match (&self.state, &*incoming.kind) {
            (Status::Greeting { .. }, "hello") => self.receive_hello(incoming.parse()?),
            (Status::Greeting { .. }, other) => Err(SessionError::NoHello(excerpt(other))),
            (_, "hello") => Err(SessionError::SecondHello),
            (_, "request") => self.receive_request(incoming.id()?, incoming.body),
            (_, "response") => {
                let unknown = || Failure::new(FailureKind::Unsupported, "the answer is of an unknown kind");
                let result = incoming.parse::<Response>().map_err(|_| unknown());
                self.receive_outcome(incoming.id()?, result)
            }
            (_, "failure") => self.receive_outcome(incoming.id()?, Err(incoming.parse()?)),
            (_, "notice") => {
                if let Ok(notice) = incoming.parse() {
                    self.events.push_back(SessionEvent::Notice(notice));
                }
                Ok(())
            }
            (_, "ping") => self.send::<()>("pong", None, None),
            // A pong has done its work by arriving; what a newer peer says beyond this contract is skipped.
            _ => Ok(()),
        }
    }

    fn receive_hello(&mut self, greeting: Greeting) -> Result<(), SessionError> {
        let Greeting { role, hello } = greeting;
        if role == self.role {
            return Err(SessionError::SameRole(role));
        }
        if hello.version != self.hello.version {
            return Err(SessionError::Version {
                peer: role,
                theirs: hello.version,
                ours: self.hello.version,
                program: excerpt(&hello.program),
            });
        }
        self.state = Status::Established;
        self.events.push_back(SessionEvent::Established { hello });
        Ok(())
    }

    fn receive_request(&mut self, id: RequestId, body: Option<&RawValue>) -> Result<(), SessionError> {
        if self.asked_last.is_some_and(|last| id <= last) {
            return Err(SessionError::ReusedRequest(id));
        }
        self.asked_last = Some(id);
        let refusal = match body.map(|body| serde_json::from_str(body.get())) {
            Some(Ok(request)) if self.asked.len() < REQUESTS_MAX => {
                self.asked.insert(id);
                self.events.push_back(SessionEvent::Request { id, request });
                return Ok(());
            }
            Some(Ok(_)) => {
                Failure::new(FailureKind::Busy, format!("{REQUESTS_MAX} requests are open already"))
            }
            _ => Failure::new(
                FailureKind::Unsupported,
                format!("the {} (`{}`) does not know this request", self.role, self.hello.program),
            ),
        };
        self.send("failure", Some(id), Some(&refusal))
    }

    fn receive_outcome(
        &mut self,
        id: RequestId,
        result: Result<Response, Failure>,
    ) -> Result<(), SessionError> {
        if self.open.remove(&id).is_some() {
            self.events.push_back(SessionEvent::Response { id, result });
            return Ok(());
        }
        match self.expired.remove(&id) {
            true => Ok(()),
            false if id.0 == 0 || id.0 >= self.next_id => Err(SessionError::UnknownResponse(id)),
            false => Err(SessionError::DuplicateResponse(id)),
        }
    }

    fn send<B: Serialize>(
        &mut self,
        kind: &'static str,
        id: Option<RequestId>,
        body: Option<&B>,
    ) -> Result<(), SessionError> {
        let message = Outgoing { kind, id: id.map(|id| id.0), body };
        let payload = serde_json::to_vec(&message).map_err(malformed)?;
        if self.output.len() + payload.len() > OUTPUT_MAX {
            return Err(self.close(SessionError::Overflow));
        }
        Ok(frame::encode(&payload, &mut self.output)?)
    }
}

impl Role {
    /// The other end.
    pub fn peer(self) -> Self {
        match self {
            Role::Host => Role::Guest,
            Role::Guest => Role::Host,
        }
    }
}

impl Incoming<'_> {
    fn id(&self) -> Result<RequestId, SessionError> {
        self.id
            .map(RequestId)
            .ok_or_else(|| SessionError::Malformed(format!("a `{}` without a number", self.kind)))
    }

    fn parse<T: for<'de> Deserialize<'de>>(&self) -> Result<T, SessionError> {
        let body = self.body.map_or("null", RawValue::get);
        serde_json::from_str(body).map_err(malformed)
    }
}

/// Takes foreign bytes through both roles: what the fuzz target calls. It asserts that each request has one
/// outcome; beyond that, that nothing panics and memory stays bounded.
///
/// The first byte chooses how the rest is delivered: bit 0 greets properly first, bit 1 makes each line of the rest
/// a frame (so that a mutated message reaches the parser), and without it the rest is the raw stream.
pub fn exercise(bytes: &[u8]) {
    let Some((mode, rest)) = bytes.split_first() else { return };
    for role in [Role::Host, Role::Guest] {
        let mut stream = Vec::new();
        if mode & 1 != 0 {
            let hello = Hello::new("peer", "boot");
            stream = Session::new(role.peer(), hello, Duration::ZERO).take_output();
        }
        match mode & 2 != 0 {
            // A line too long for a frame ends the exchange; what came before is still delivered.
            true => {
                let _longest =
                    rest.split(|byte| *byte == b'\n').try_for_each(|line| frame::encode(line, &mut stream));
            }
            false => stream.extend_from_slice(rest),
        }
        exercise_stream(role, &stream);
    }
}

fn exercise_stream(role: Role, stream: &[u8]) {
    let mut now = Duration::ZERO;
    let mut session = Session::new(role, Hello::new("exercise", ""), now);
    let mut open = BTreeSet::new();
    let mut rest = stream;
    let mut alive = true;
    while let (true, Some(&step)) = (alive, rest.first()) {
        let (piece, after) = rest.split_at((usize::from(step) + 1).min(rest.len()));
        rest = after;
        now += Duration::from_millis(u64::from(step) * 20);
        alive = session.receive(piece, now).is_ok() && session.tick(now).is_ok();
        if let Ok(id) = session.request_within(Request::Info, Duration::from_secs(1), now) {
            open.insert(id);
        }
        while let Some(event) = session.next_event() {
            match event {
                SessionEvent::Response { id, .. } => assert!(open.remove(&id), "a second outcome"),
                // Every other request is left open, as by a driver that is slow to answer.
                SessionEvent::Request { id, .. } if id.0 % 2 == 0 => {
                    alive &= session.respond(id, Ok(Response::Done)).is_ok();
                }
                _ => {}
            }
        }
        if step % 2 == 0 {
            session.take_output();
        }
    }
    session.disconnect();
    while let Some(event) = session.next_event() {
        if let SessionEvent::Response { id, .. } = event {
            assert!(open.remove(&id), "a second outcome");
        }
    }
    assert!(open.is_empty(), "a request without an outcome");
}

fn malformed(error: serde_json::Error) -> SessionError {
    SessionError::Malformed(error.to_string())
}

/// Foreign text for a message: not longer than a line, nothing a terminal would act on.
fn excerpt(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(60).collect()
}

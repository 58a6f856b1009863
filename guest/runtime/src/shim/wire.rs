//! Requests, replies and their framing: a little-endian `u32` length, then that many bytes of JSON.
//!
//! Replies come in the order of the requests of one connection; while a `Wait` is pending, the shim reads no further
//! request from that connection. The shim believes nothing it reads: a frame too long or not JSON ends the connection.

use std::collections::BTreeMap;

use jiff::Timestamp;
use oci_spec::runtime::{LinuxResources, Process};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use super::spec::{ConsoleSize, Stdin};

/// The longest frame body: a process with a large environment fits (the kernel's own limit for one is 2 MiB).
pub const FRAME_LEN_MAX: usize = 4 << 20;

/// Names a process of the container: `None` is init, `Some` the id given to [`Request::Exec`].
pub type ProcessId = Option<String>;

/// What the engine asks of a shim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Makes the container; init waits to be started. Reply: [`Reply::Created`]. On an error nothing is left behind,
    /// and `Create` may be asked again.
    Create,
    /// Starts init or an exec'd process. Reply: [`Reply::Started`], after the program has been executed.
    Start {
        /// Which process.
        #[serde(default)]
        process: ProcessId,
    },
    /// Sends a signal. SIGKILL to init ends every process of the container. Reply: [`Reply::Done`].
    Kill {
        /// The signal's number on this architecture.
        signal: i32,
        /// Which process.
        #[serde(default)]
        process: ProcessId,
    },
    /// Changes the terminal's size; remembered when the process has not started yet. Reply: [`Reply::Done`].
    Resize {
        /// Which process.
        #[serde(default)]
        process: ProcessId,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Closes the standard input once what was sent has been written. Reply: [`Reply::Done`].
    CloseStdin {
        /// Which process.
        #[serde(default)]
        process: ProcessId,
    },
    /// Reply: [`Reply::Exited`], once the process has ended and its output has drained (to the log and into the
    /// clients' buffers; a grandchild that keeps the pipe open delays it by at most
    /// two seconds). With `ooms`, of init, a [`Reply::OutOfMemory`] comes before it each time the kernel has killed in the
    /// container for want of memory more often than told.
    Wait {
        /// Which process.
        #[serde(default)]
        process: ProcessId,
        /// How often the caller knows that it has.
        #[serde(default)]
        ooms: Option<u64>,
    },
    /// Reply: [`Reply::Attached`]; every later byte is the stream's. Shim to engine: Docker's multiplexed frames, or raw
    /// bytes with a terminal. Engine to shim: standard input; shutting the write side ends it. The shim closes the
    /// connection when all output has been sent. Only output from now on is sent; attach before `Start` to see all.
    Attach {
        /// Which process.
        #[serde(default)]
        process: ProcessId,
        /// Forward what the engine sends to the standard input.
        #[serde(default)]
        stdin: bool,
        /// Send the standard output.
        #[serde(default)]
        stdout: bool,
        /// Send the standard error.
        #[serde(default)]
        stderr: bool,
    },
    /// Prepares another process in the running container; `Start` runs it. Reply: [`Reply::Created`] with pid 0.
    /// Errors of the program itself (not found, not executable) come from `Start`.
    Exec {
        /// A name no other process of this container has had.
        id: String,
        /// The whole process: nothing is taken over from the container's own.
        process: Box<Process>,
        /// Whether it gets a terminal.
        #[serde(default)]
        terminal: bool,
        /// What its standard input is.
        #[serde(default)]
        stdin: Stdin,
        /// The terminal's first size.
        #[serde(default)]
        console_size: Option<ConsoleSize>,
    },
    /// Reply: [`Reply::State`].
    State,
    /// Freezes all processes. Reply: [`Reply::Done`].
    Pause,
    /// Thaws all processes. Reply: [`Reply::Done`].
    Resume,
    /// Changes the limits of a running container. Reply: [`Reply::Done`].
    Update {
        /// The limits to set; others stay.
        resources: Box<LinuxResources>,
    },
    /// Forgets an exec'd process that has ended or never started. Reply: [`Reply::Done`].
    Forget {
        /// Its id.
        id: String,
    },
    /// Kills what still runs, removes the cgroup and the runtime's state. Reply: [`Reply::Done`]; then the shim ends.
    Delete,
}

/// What a shim answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// The process exists and waits to be started.
    Created {
        /// Its process id in the shim's namespace; 0 for an exec'd process, which is born at its start.
        pid: i32,
    },
    /// The process runs.
    Started {
        /// Its process id in the shim's namespace.
        pid: i32,
    },
    /// Done.
    Done,
    /// The connection is now a stream.
    Attached,
    /// The process has ended.
    Exited(Exit),
    /// The kernel has killed in the container for want of memory; another reply follows.
    OutOfMemory {
        /// How often by now.
        count: u64,
    },
    /// See [`ShimState`].
    State(ShimState),
    /// Refused or failed.
    Error {
        /// What the caller can do about it.
        kind: ErrorKind,
        /// A sentence in Docker's words, naming the step and the value.
        message: String,
    },
}

/// The end of a process. For init also the content of `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The exit code; 128 + the signal's number when a signal ended it.
    pub code: i32,
    /// When the shim saw it end.
    pub finished_at: Timestamp,
    /// Whether the kernel killed a process of the container for want of memory.
    #[serde(default)]
    pub oom_killed: bool,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The program (or its interpreter) is not there: Docker's 127.
    NotFound,
    /// The program is there and cannot be executed: Docker's 126.
    NotExecutable,
    /// The request does not fit the state: paused, stopped, already created, a second process of the same id.
    Conflict,
    /// No process has this id.
    NoProcess,
    /// Everything else: Docker's 125.
    Other,
}

impl ErrorKind {
    /// The exit code of `docker run` for a failure of this kind.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable => 126,
            Self::Conflict | Self::NoProcess | Self::Other => 125,
        }
    }
}

/// A snapshot of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimState {
    /// Where init is in its life.
    pub status: Status,
    /// Init's process id in the shim's namespace; 0 before `Create`.
    pub pid: i32,
    /// Init's end.
    pub exit: Option<Exit>,
    /// Exec'd processes by id: process ids of those that run, 0 for the others.
    #[serde(default)]
    pub execs: BTreeMap<String, i32>,
    /// How often the kernel has killed in the container for want of memory.
    #[serde(default)]
    pub ooms: u64,
}

/// Where a container's init is in its life: `Empty → Created → Running ⇄ Paused → Stopped`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Not created yet.
    Empty,
    /// Created, not started.
    Created,
    /// Started.
    Running,
    /// Frozen.
    Paused,
    /// Init has ended.
    Stopped,
}

/// Why a frame was refused.
#[derive(Debug, Error)]
pub enum FrameError {
    /// Longer than [`FRAME_LEN_MAX`].
    #[error("a frame of {len} bytes is longer than the limit of {FRAME_LEN_MAX}")]
    TooLong {
        /// The announced length.
        len: usize,
    },
    /// Not the expected JSON.
    #[error("a frame of {len} bytes does not hold a message of this protocol")]
    Content {
        /// The frame's length.
        len: usize,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// Encoding of one message; decoding is [`FrameBuffer`]'s.
pub struct Frame;

impl Frame {
    /// The message with its length in front.
    pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
        let mut bytes = vec![0; 4];
        serde_json::to_writer(&mut bytes, message)
            .map_err(|source| FrameError::Content { len: 0, source })?;
        let len = bytes.len() - 4;
        let prefix =
            u32::try_from(len).ok().filter(|_| len <= FRAME_LEN_MAX).ok_or(FrameError::TooLong { len })?;
        bytes[..4].copy_from_slice(&prefix.to_le_bytes());
        Ok(bytes)
    }

    /// The message of a frame body.
    pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
        serde_json::from_slice(body).map_err(|source| FrameError::Content { len: body.len(), source })
    }
}

/// Collects bytes as they come and gives whole messages back.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
}

impl FrameBuffer {
    /// Adds what was read.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, if all of it is here. After an error the stream has no further meaning.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some((prefix, rest)) = self.bytes.split_first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_le_bytes(*prefix) as usize;
        if len > FRAME_LEN_MAX {
            return Err(FrameError::TooLong { len });
        }
        let Some(body) = rest.get(..len) else { return Ok(None) };
        let message = Frame::decode(body);
        self.bytes.drain(..4 + len);
        message.map(Some)
    }

    /// What follows the last message: the first bytes of a stream.
    pub fn into_rest(self) -> Vec<u8> {
        self.bytes
    }
}

/// Feeds foreign bytes to the decoder of requests, in pieces of every size, as a hostile client would.
pub fn decode_requests(bytes: &[u8]) {
    let mut buffer = FrameBuffer::default();
    for (position, piece) in bytes.chunks(7).enumerate() {
        buffer.extend(piece);
        loop {
            match buffer.next_message::<Request>() {
                Ok(Some(request)) => {
                    let encoded = Frame::encode(&request).expect("what was decoded can be encoded");
                    assert!(encoded.len() > 4, "message at piece {position}");
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<Request> {
        let process = Some("exec-1".to_owned());
        vec![
            Request::Create,
            Request::Start { process: None },
            Request::Kill { signal: 15, process: process.clone() },
            Request::Resize { process: process.clone(), width: 80, height: 24 },
            Request::Attach { process, stdin: true, stdout: true, stderr: false },
            Request::Exec {
                id: "exec-2".into(),
                process: Box::default(),
                terminal: true,
                stdin: Stdin::Once,
                console_size: Some(ConsoleSize { width: 1, height: 2 }),
            },
            Request::Update { resources: Box::default() },
            Request::Delete,
        ]
    }

    #[test]
    fn messages_come_back_however_they_are_cut() {
        let bytes: Vec<u8> = samples().iter().flat_map(|request| Frame::encode(request).unwrap()).collect();
        for size in [1, 3, 4, 5, 64, bytes.len()] {
            let mut buffer = FrameBuffer::default();
            let mut received = Vec::new();
            for piece in bytes.chunks(size) {
                buffer.extend(piece);
                while let Some(request) = buffer.next_message::<Request>().unwrap() {
                    received.push(request);
                }
            }
            assert_eq!(received, samples());
        }
    }

    #[test]
    fn what_may_be_left_out_may_be_left_out() {
        let request: Request = Frame::decode(br#"{"request":"wait"}"#).unwrap();
        assert_eq!(request, Request::Wait { process: None, ooms: None });
        let reply: Reply =
            Frame::decode(br#"{"reply":"exited","code":3,"finished_at":"2026-01-02T03:04:05Z"}"#).unwrap();
        assert!(matches!(reply, Reply::Exited(Exit { code: 3, oom_killed: false, .. })));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_kept() {
        let mut buffer = FrameBuffer::default();
        buffer.extend(&u32::MAX.to_le_bytes());
        assert!(matches!(buffer.next_message::<Request>(), Err(FrameError::TooLong { len: 0xffff_ffff })));
    }

    #[test]
    fn what_follows_an_attach_is_the_streams() {
        let mut buffer = FrameBuffer::default();
        buffer.extend(&Frame::encode(&Request::State).unwrap());
        buffer.extend(b"typed ahead");
        assert_eq!(buffer.next_message::<Request>().unwrap(), Some(Request::State));
        assert_eq!(buffer.into_rest(), b"typed ahead");
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            decode_requests(&bytes);
            let mut framed = (bytes.len() as u32).to_le_bytes().to_vec();
            framed.extend(&bytes);
            decode_requests(&framed);
        }
    }
}

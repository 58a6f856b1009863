//! A blocking client of a shim, for tests, tools and anything without an event loop.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use thiserror::Error;

use super::wire::{ErrorKind, Exit, Frame, FrameBuffer, FrameError, ProcessId, Reply, Request, ShimState};
use super::{READY, SOCKET_FILE, socket};

/// Why a conversation failed.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// Nobody listens.
    #[error("cannot connect to the shim of {dir}")]
    Connect {
        /// The shim's folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The stream broke.
    #[error("the shim's connection broke")]
    Stream(#[from] io::Error),
    /// The shim closed the connection instead of answering.
    #[error("the shim closed the connection without an answer")]
    Closed,
    /// The shim sent something else than a reply.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The shim refused.
    #[error("{message}")]
    Refused {
        /// What the caller can do about it.
        kind: ErrorKind,
        /// The shim's sentence.
        message: String,
    },
    /// A reply that does not belong to the request.
    #[error("the shim answered {request} with {reply:?}")]
    Unexpected {
        /// What was asked.
        request: &'static str,
        /// What came back.
        reply: Box<Reply>,
    },
}

/// Why a shim did not start.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The program could not be run.
    #[error("cannot run {program}")]
    Spawn {
        /// Which program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended instead of listening.
    #[error("the shim did not start: {message}")]
    NotReady {
        /// What it said.
        message: String,
    },
}

/// Runs `program --dir dir` and waits until it listens. The child leaves the session; the caller reaps it when it ends.
pub fn launch(program: &Path, dir: &Path) -> Result<Child, LaunchError> {
    let failed = |source| LaunchError::Spawn { program: program.to_owned(), source };
    // Standard error is a file, not a pipe: it stays open for the shim's life.
    let errors_path = dir.join("shim.log");
    let errors = File::create(&errors_path).map_err(failed)?;
    let mut child = Command::new(program)
        .arg("--dir")
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .map_err(failed)?;
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(64).read_to_end(&mut said).map_err(failed)?;
    }
    if said == READY {
        return Ok(child);
    }
    child.wait().map_err(failed)?;
    let message = std::fs::read_to_string(&errors_path).map_err(failed)?.trim_end().to_owned();
    Err(LaunchError::NotReady { message })
}

/// One connection to a shim.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    buffer: FrameBuffer,
}

impl Connection {
    /// Connects to the shim of `dir`.
    pub fn open(dir: &Path) -> Result<Self, ConnectionError> {
        let stream = socket::connect(dir, SOCKET_FILE)
            .map_err(|source| ConnectionError::Connect { dir: dir.to_owned(), source })?;
        Ok(Self { stream, buffer: FrameBuffer::default() })
    }

    /// Bounds how long one reply may take; `None` waits for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    /// Sends a request and waits for its reply, whatever it is.
    pub fn call(&mut self, request: &Request) -> Result<Reply, ConnectionError> {
        self.stream.write_all(&Frame::encode(request)?)?;
        self.reply()
    }

    fn reply(&mut self) -> Result<Reply, ConnectionError> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(reply) = self.buffer.next_message()? {
                return Ok(reply);
            }
            match self.stream.read(&mut chunk)? {
                0 => return Err(ConnectionError::Closed),
                count => self.buffer.extend(&chunk[..count]),
            }
        }
    }

    fn expect<T>(
        &mut self,
        name: &'static str,
        request: &Request,
        pick: impl FnOnce(Reply) -> Result<T, Reply>,
    ) -> Result<T, ConnectionError> {
        match self.call(request)? {
            Reply::Error { kind, message } => Err(ConnectionError::Refused { kind, message }),
            reply => pick(reply)
                .map_err(|reply| ConnectionError::Unexpected { request: name, reply: Box::new(reply) }),
        }
    }

    /// [`Request::Create`]; init's process id.
    pub fn create(&mut self) -> Result<i32, ConnectionError> {
        self.expect("create", &Request::Create, |reply| match reply {
            Reply::Created { pid } => Ok(pid),
            other => Err(other),
        })
    }

    /// [`Request::Start`]; the process id.
    pub fn start(&mut self, process: ProcessId) -> Result<i32, ConnectionError> {
        self.expect("start", &Request::Start { process }, |reply| match reply {
            Reply::Started { pid } => Ok(pid),
            other => Err(other),
        })
    }

    /// [`Request::Wait`].
    pub fn wait(&mut self, process: ProcessId) -> Result<Exit, ConnectionError> {
        self.expect("wait", &Request::Wait { process, ooms: None }, |reply| match reply {
            Reply::Exited(exit) => Ok(exit),
            other => Err(other),
        })
    }

    /// [`Request::State`].
    pub fn state(&mut self) -> Result<ShimState, ConnectionError> {
        self.expect("state", &Request::State, |reply| match reply {
            Reply::State(state) => Ok(state),
            other => Err(other),
        })
    }

    /// Any request that is answered with [`Reply::Done`], or [`Request::Exec`].
    pub fn ask(&mut self, request: &Request) -> Result<(), ConnectionError> {
        self.expect("a request", request, |reply| match reply {
            Reply::Done | Reply::Created { .. } => Ok(()),
            other => Err(other),
        })
    }

    /// [`Request::Attach`]: turns the connection into a stream.
    pub fn attach(
        mut self,
        process: ProcessId,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    ) -> Result<AttachedStream, ConnectionError> {
        self.expect("attach", &Request::Attach { process, stdin, stdout, stderr }, |reply| match reply {
            Reply::Attached => Ok(()),
            other => Err(other),
        })?;
        Ok(AttachedStream { stream: self.stream, first: self.buffer.into_rest(), taken: 0 })
    }
}

/// A connection after `Attach`. Reading gives what the shim sends (multiplexed frames, or raw bytes with a terminal),
/// writing feeds the standard input.
#[derive(Debug)]
pub struct AttachedStream {
    stream: UnixStream,
    first: Vec<u8>,
    taken: usize,
}

impl AttachedStream {
    /// Ends the standard input; output keeps coming.
    pub fn close_stdin(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }

    /// A second handle, for a thread that writes while this one reads.
    pub fn writer(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Reads to the end and takes the multiplexed frames apart: what came on standard output and on standard error.
    pub fn read_split(&mut self) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut header = [0; 8];
        loop {
            match self.read(&mut header[..1])? {
                0 => return Ok((stdout, stderr)),
                _ => self.read_exact(&mut header[1..])?,
            }
            let len = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            let target = match header[0] {
                1 => &mut stdout,
                2 => &mut stderr,
                other => {
                    return Err(io::Error::other(format!("stream number {other} in a multiplexed frame")));
                }
            };
            let copied = Read::by_ref(self).take(u64::from(len)).read_to_end(target)?;
            if copied != len as usize {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl Read for AttachedStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.first[self.taken..];
        if rest.is_empty() {
            return self.stream.read(buffer);
        }
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        Ok(count)
    }
}

impl Write for AttachedStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for AttachedStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

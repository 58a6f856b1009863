//! Talking to a container's shim: the engine's end of `guest_runtime::shim`, over tokio.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use guest_runtime::shim::{
    ErrorKind, Exit, FRAME_LEN_MAX, Frame, ProcessId, READY, Reply, Request, SOCKET_FILE, ShimState,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Longest a shim may take for anything but waiting: it does milliseconds of work, on a machine that may be busy.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// A shim, by its folder. Every call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Shim {
    folder: PathBuf,
}

/// Why a shim did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    #[error("cannot run the shim `{program}`")]
    Spawn { program: PathBuf, source: std::io::Error },
    #[error("the shim did not start: {0}")]
    NotReady(String),
    #[error("the shim's connection broke")]
    Connection(#[source] std::io::Error),
    #[error("the shim sent nonsense: {0}")]
    Protocol(String),
    #[error("the shim did not answer `{what}` within {} s", ANSWER_DEADLINE.as_secs())]
    Deadline { what: &'static str },
    #[error("{message}")]
    Refused { kind: ErrorKind, message: String },
}

impl Shim {
    pub fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Runs the shim program and waits until it listens. The child is kept to be reaped when it ends.
    pub async fn launch(program: &Path, folder: &Path) -> Result<(Self, Child), ShimError> {
        let spawn = |source| ShimError::Spawn { program: program.to_owned(), source };
        // A file, not a pipe: it stays open for the shim's life, which may be longer than ours.
        let errors_path = folder.join("shim.log");
        let errors = File::create(&errors_path).map_err(spawn)?;
        let mut child = Command::new(program)
            .arg("--dir")
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(spawn)?;
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            let read = stdout.take(READY.len() as u64 + 1);
            let listening = timeout(ANSWER_DEADLINE, async {
                tokio::pin!(read);
                read.read_to_end(&mut said).await
            });
            if listening.await.is_err() {
                child.kill().await.map_err(spawn)?;
                return Err(ShimError::Deadline { what: "start" });
            }
        }
        if said == READY {
            return Ok((Self::at(folder), child));
        }
        // It may have closed its output and still run.
        child.kill().await.map_err(spawn)?;
        let message = tokio::fs::read_to_string(&errors_path).await.unwrap_or_default();
        Err(ShimError::NotReady(message.trim().to_owned()))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    async fn connect(&self) -> Result<UnixStream, ShimError> {
        // Through the folder's descriptor: a socket's path may have 107 bytes, ours may be longer.
        let folder = File::open(&self.folder).map_err(ShimError::Connection)?;
        let path = format!("/proc/self/fd/{}/{SOCKET_FILE}", std::os::fd::AsRawFd::as_raw_fd(&folder));
        UnixStream::connect(path).await.map_err(ShimError::Connection)
    }

    async fn exchange(&self, request: &Request) -> Result<(Reply, UnixStream), ShimError> {
        let mut stream = self.connect().await?;
        let frame = Frame::encode(request).map_err(|error| ShimError::Protocol(error.to_string()))?;
        stream.write_all(&frame).await.map_err(ShimError::Connection)?;
        Ok((read_reply(&mut stream).await?, stream))
    }

    async fn call(&self, what: &'static str, request: Request) -> Result<(Reply, UnixStream), ShimError> {
        timeout(ANSWER_DEADLINE, self.exchange(&request)).await.map_err(|_| ShimError::Deadline { what })?
    }

    pub async fn create(&self) -> Result<i32, ShimError> {
        match self.call("create", Request::Create).await?.0 {
            Reply::Created { pid } => Ok(pid),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn start(&self, process: ProcessId) -> Result<i32, ShimError> {
        match self.call("start", Request::Start { process }).await?.0 {
            Reply::Started { pid } => Ok(pid),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits for the end of a process, however long it takes.
    pub async fn wait(&self, process: ProcessId) -> Result<Exit, ShimError> {
        match self.exchange(&Request::Wait { process, ooms: None }).await?.0 {
            Reply::Exited(exit) => Ok(exit),
            other => Err(unexpected(&other)),
        }
    }

    /// The same for init; tells meanwhile each time that the kernel has killed for want of memory more often than `ooms`.
    pub async fn wait_for_init(&self, ooms: u64, tell: impl Fn(u64)) -> Result<Exit, ShimError> {
        let wait = Request::Wait { process: None, ooms: Some(ooms) };
        let (mut reply, mut stream) = self.exchange(&wait).await?;
        loop {
            match reply {
                Reply::Exited(exit) => return Ok(exit),
                Reply::OutOfMemory { count } => tell(count),
                other => return Err(unexpected(&other)),
            }
            reply = read_reply(&mut stream).await?;
        }
    }

    /// A stream of a process's output (frames, or raw bytes with a terminal) that takes its input.
    pub async fn attach(&self, process: ProcessId, streams: Streams) -> Result<UnixStream, ShimError> {
        let Streams { stdin, stdout, stderr } = streams;
        match self.call("attach", Request::Attach { process, stdin, stdout, stderr }).await? {
            (Reply::Attached, stream) => Ok(stream),
            (other, _) => Err(unexpected(&other)),
        }
    }

    pub async fn state(&self) -> Result<ShimState, ShimError> {
        match self.call("state", Request::State).await?.0 {
            Reply::State(state) => Ok(state),
            other => Err(unexpected(&other)),
        }
    }

    /// Any request that is answered by "done".
    pub async fn ask(&self, what: &'static str, request: Request) -> Result<(), ShimError> {
        match self.call(what, request).await?.0 {
            Reply::Done | Reply::Created { .. } => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn kill(&self, signal: i32, process: ProcessId) -> Result<(), ShimError> {
        self.ask("kill", Request::Kill { signal, process }).await
    }

    pub async fn resize(&self, process: ProcessId, width: u16, height: u16) -> Result<(), ShimError> {
        self.ask("resize", Request::Resize { process, width, height }).await
    }
}

async fn read_reply(stream: &mut UnixStream) -> Result<Reply, ShimError> {
    let length = stream.read_u32_le().await.map_err(ShimError::Connection)? as usize;
    if length > FRAME_LEN_MAX {
        return Err(ShimError::Protocol(format!("a frame of {length} bytes")));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.map_err(ShimError::Connection)?;
    match Frame::decode(&body).map_err(|error| ShimError::Protocol(error.to_string()))? {
        Reply::Error { kind, message } => Err(ShimError::Refused { kind, message }),
        reply => Ok(reply),
    }
}

/// Which streams a client wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

fn unexpected(reply: &Reply) -> ShimError {
    ShimError::Protocol(format!("an unexpected reply: {reply:?}"))
}

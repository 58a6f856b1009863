//! The daemon, as the command line sees it: found or started, asked over its control socket.

use anyhow::{Context, Result, anyhow, bail};
use host_api::{Home, Reply, Request};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, Lines};
use tokio::net::UnixStream;

/// How long a daemon that is just starting, or just ending, may take before it answers.
const DAEMON_TIME_MAX: Duration = Duration::from_secs(20);
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// A failure that the daemon reported, with what to do about it.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

pub(crate) struct Daemon {
    home: Home,
}

/// The lines of one answer.
pub(crate) struct Replies {
    lines: Lines<tokio::io::BufReader<UnixStream>>,
}

impl Daemon {
    pub(crate) fn of_user() -> Result<Self> {
        Ok(Self { home: Home::resolve(std::env::var_os("ENGINE_HOME"), std::env::var_os("HOME"))? })
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// Starts the daemon if nobody answers.
    pub(crate) async fn ensure(&self) -> Result<()> {
        if self.connect().await.is_ok() {
            return Ok(());
        }
        let until = Instant::now() + DAEMON_TIME_MAX;
        loop {
            match tokio::task::spawn_blocking(start_daemon).await?? {
                Started::Ready => return Ok(()),
                // Someone else's is starting, or the last one is about to end.
                Started::AlreadyRunning if self.connect().await.is_ok() => return Ok(()),
                Started::AlreadyRunning if Instant::now() >= until => bail!(
                    "the daemon holds its lock but has not answered on `{}` for {} s: see `{}`",
                    self.home.control_socket().display(),
                    DAEMON_TIME_MAX.as_secs(),
                    self.home.daemon_log().display()
                ),
                Started::AlreadyRunning => tokio::time::sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// Whether a daemon answers now.
    pub(crate) async fn is_running(&self) -> bool {
        self.connect().await.is_ok()
    }

    pub(crate) async fn ask(&self, request: &Request) -> Result<Replies> {
        let mut stream = self.connect().await?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await.context("the daemon does not take the request")?;
        Ok(Replies { lines: tokio::io::BufReader::new(stream).lines() })
    }

    async fn connect(&self) -> Result<UnixStream> {
        let socket = self.home.control_socket();
        UnixStream::connect(&socket)
            .await
            .with_context(|| format!("no daemon answers on `{}`", socket.display()))
    }
}

impl Replies {
    /// The next line; an error reply comes as a [`Refusal`].
    pub(crate) async fn next(&mut self) -> Result<Reply> {
        let line = self.lines.next_line().await.context("lost the daemon")?;
        let line = line.ok_or_else(|| anyhow!("the daemon ended before it answered"))?;
        match serde_json::from_str(&line).context("the daemon's answer is not understood")? {
            Reply::Error { message, hint } => Err(Refusal { message, hint }.into()),
            reply => Ok(reply),
        }
    }

    /// Waits until the daemon has hung up.
    pub(crate) async fn end(mut self) {
        // A daemon that is killed meanwhile has hung up too.
        while let Ok(Some(_)) = self.lines.next_line().await {}
    }
}

enum Started {
    Ready,
    AlreadyRunning,
}

/// Runs `engined --detached` in a session of its own and reads the one line it says.
fn start_daemon() -> Result<Started> {
    let program = daemon_program()?;
    let mut command = Command::new(&program);
    command
        .arg("--detached")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Its own process group: a Ctrl-C meant for this command is not meant for the daemon.
        .process_group(0);
    let mut child =
        command.spawn().with_context(|| format!("cannot start the daemon `{}`", program.display()))?;
    let mut line = String::new();
    let output = child.stdout.take().context("the daemon has no standard output")?;
    BufReader::new(output.take(64 * 1024))
        .read_line(&mut line)
        .context("cannot read what the daemon says")?;
    match line.trim_end() {
        "ready" => Ok(Started::Ready),
        "already running" => {
            child.wait()?;
            Ok(Started::AlreadyRunning)
        }
        said => {
            let status = child.wait()?;
            match said.strip_prefix("error: ") {
                Some(why) => bail!("the daemon cannot start: {why}"),
                None => bail!("the daemon ended at once ({status}): run `{}` to see why", program.display()),
            }
        }
    }
}

/// `engined` sits beside this program.
fn daemon_program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the folder of this program")?;
    let program = own.with_file_name("engined");
    if !program.is_file() {
        bail!("there is no `{}`: `engine` and `engined` belong in one folder", program.display());
    }
    Ok(program)
}

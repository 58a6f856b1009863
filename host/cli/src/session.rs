//! `Session`: one invocation's way to the engine. The machine is booted when a command first needs it.

use crate::control::{Daemon, Replies};
use crate::docker::Docker;
use crate::progress::Steps;
use anyhow::{Result, bail};
use host_api::{Reply, Request};
use std::path::PathBuf;
use std::time::Duration;

/// How often an engine that does not answer is asked for again.
const PING_TRIES_MAX: u32 = 20;
const PING_PAUSE: Duration = Duration::from_millis(250);

/// An error that ends this process with a code of its own.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) code: u8,
    error: anyhow::Error,
}

impl Failed {
    /// For `map_err`. An error that has its code already keeps it.
    pub(crate) fn code(code: u8) -> impl Fn(anyhow::Error) -> anyhow::Error {
        move |error| if error.is::<Self>() { error } else { Self { code, error }.into() }
    }

    /// The error that was given a code.
    pub(crate) fn inner(&self) -> &anyhow::Error {
        &self.error
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl std::error::Error for Failed {}

pub(crate) struct Session {
    /// The socket given with `--host`; nothing is started then.
    host: Option<PathBuf>,
}

impl Session {
    pub(crate) fn new(host: Option<&str>) -> Result<Self> {
        let host = match host {
            None | Some("") => None,
            Some(host) => match host.strip_prefix("unix://") {
                Some(path) if path.starts_with('/') => Some(PathBuf::from(path)),
                _ => bail!("unable to parse engine host `{host}`: give a socket as unix:///path"),
            },
        };
        Ok(Self { host })
    }

    /// The Docker API, booting the machine when it does not run.
    pub(crate) async fn docker(&self) -> Result<Docker> {
        if let Some(socket) = &self.host {
            return Ok(Docker::new(socket.clone()));
        }
        let daemon = Daemon::of_user()?;
        let docker = Docker::new(daemon.home().docker_socket());
        let mut tries = 0;
        loop {
            daemon.ensure().await?;
            watch(&daemon, &Request::Start).await?;
            // A machine or a daemon that is just dying may not have been seen to: ask before anything depends on it.
            match docker.ping().await {
                Ok(()) => return Ok(docker),
                Err(_) if tries < PING_TRIES_MAX => {
                    tries += 1;
                    tokio::time::sleep(PING_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The daemon, started when none runs.
    pub(crate) async fn daemon(&self) -> Result<Daemon> {
        if self.host.is_some() {
            bail!("this command is about the machine: it cannot be used with --host");
        }
        let daemon = Daemon::of_user()?;
        daemon.ensure().await?;
        Ok(daemon)
    }
}

/// Asks for something that takes a while and shows what is waited for.
pub(crate) async fn watch(daemon: &Daemon, request: &Request) -> Result<()> {
    answer(daemon, request).await.map(drop)
}

/// The same for something whose answer matters.
pub(crate) async fn answer(daemon: &Daemon, request: &Request) -> Result<Reply> {
    follow(&mut daemon.ask(request).await?).await
}

/// Ends the daemon, and waits until it takes no more requests: the next command starts another.
pub(crate) async fn shut_down(daemon: &Daemon) -> Result<()> {
    let mut replies = daemon.ask(&Request::Shutdown).await?;
    follow(&mut replies).await?;
    replies.end().await;
    Ok(())
}

async fn follow(replies: &mut Replies) -> Result<Reply> {
    let mut steps = Steps::new();
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    let result = loop {
        tokio::select! {
            reply = replies.next() => match reply {
                Ok(Reply::Progress { text }) => steps.begin(&text),
                Ok(Reply::Notice { text }) => steps.aside(&text),
                Ok(reply) => break Ok(reply),
                Err(error) => break Err(error),
            },
            _ = tick.tick() => steps.tick(),
        }
    };
    steps.end();
    result
}

//! The engine's process: started, watched, restarted.
//!
//! ```text
//!   Starting ──byte on the ready pipe──▶ Ready
//!      ▲  │                                │
//!      │  └───────── it ended ─────────────┤
//!      │                                   ▼
//!      └────── after the back-off ────── Failed
//!
//!   any of them ──stop──▶ TERM, then KILL after a time ──▶ return
//! ```
//!
//! Containers do not end with the engine: each hangs on a shim, which PID 1 inherits and leaves alone. The next engine
//! finds them again.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use guest_protocol::{EngineState, HostProxies};
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::log::Log;
use crate::power::{self, Haste, Orders};
use crate::process::{Child, Processes};
use crate::session::Told;
use crate::status::Publisher;
use crate::{machine, mounts, sys};

const PROGRAM: &str = "/usr/bin/guest-engine";
/// Where the user's settings are put for it, without the ending.
const SETTINGS: &str = "/run/engine-settings";

/// The pipe on which the engine says that it answers.
const READY_FD: i32 = 3;

/// [`share::CERTIFICATES`] in [`share::MOUNT`].
const REGISTRY_CERTIFICATES: &str = "/run/host/certs.d";

#[rustfmt::skip]
const ARGUMENTS: &[&str] = &[
    "--vsock", "2375",
    // For containers that speak to the engine.
    "--socket", "/run/engine.sock",
    "--data-root", "/var/lib/engine",
    "--run-root", "/run/engine",
    "--bundled-images", "/usr/share/engine/images",
    "--ready-fd", "3",
    "--stop-containers-on-exit",
    "--shim", "/usr/bin/shim",
    "--host-registry", "host.docker.internal",
    "--host-registry", "198.18.0.254",
    "--host-name", "host.docker.internal",
    "--registry-certificates", REGISTRY_CERTIFICATES,
];

/// An engine that lived this long was well: if it ends, the next one is started without much delay.
const WELL_AFTER: Duration = Duration::from_secs(30);

/// Lines of the engine's last words that are shown as the reason of its end.
const LAST_WORDS_MAX: usize = 300;

/// When to start the next engine. Pure: run times in, delays out.
#[derive(Debug)]
struct RestartPolicy {
    backoff: Backoff,
}

impl RestartPolicy {
    fn new() -> Self {
        Self { backoff: Backoff::new(Duration::from_millis(200), Duration::from_secs(10)) }
    }

    /// The delay before the next start, after an engine that lived for `lived`.
    fn ended(&mut self, lived: Duration) -> Duration {
        if lived >= WELL_AFTER {
            self.backoff.succeeded();
        }
        self.backoff.failed()
    }
}

/// The engine's command. `debug` has it explain itself at length; `told` is what the host has said.
pub fn command(debug: bool, told: Option<&Told>) -> Result<Command> {
    let mut command = Command::new(PROGRAM);
    if let Some(settings) = told.and_then(|told| told.settings.as_ref()) {
        // Only its ending is taken from the host: it tells the engine how to read it.
        let ending = if settings.name.ends_with(".json") { "json" } else { "toml" };
        let path = format!("{SETTINGS}.{ending}");
        std::fs::write(&path, &settings.text).with_context(|| format!("cannot write `{path}`"))?;
        command.args(["--config", &path]);
    }
    command
        .args(ARGUMENTS)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8");
    if let Some(HostProxies { http, https, exceptions }) = told.map(|told| &told.proxies) {
        for (name, value) in [("HTTP_PROXY", http), ("HTTPS_PROXY", https), ("NO_PROXY", exceptions)] {
            if !value.is_empty() {
                command.env(name, value);
            }
        }
    }
    if debug {
        command.env("RUST_LOG", "debug").env("RUST_BACKTRACE", "1");
    }
    sys::start_in_cgroup(&mut command, mounts::open_engine_cgroup()?);
    Ok(command)
}

/// What the engine's process needs from the agent.
#[derive(Clone)]
pub struct Supervisor {
    /// Starts it and learns of its end.
    pub processes: Processes,
    /// Takes what it prints.
    pub log: Log,
    /// Is told its state.
    pub status: Publisher,
    /// Makes the command that starts it: [`command`], but for tests.
    pub launch: Rc<dyn Fn() -> Result<Command>>,
}

/// One engine.
struct Running {
    child: Child,
    ready: pipe::Receiver,
    /// The last line it printed.
    last_words: Rc<RefCell<String>>,
}

impl Supervisor {
    /// Keeps the engine running until the machine is to be switched off; then ends it and returns.
    pub async fn run(self, mut orders: Orders) {
        let mut policy = RestartPolicy::new();
        loop {
            self.status.engine(EngineState::Starting);
            let began = Instant::now();
            let reason = match self.start() {
                Ok(running) => match self.watch(running, &mut orders).await {
                    Some(reason) => reason,
                    None => return,
                },
                Err(error) => format!("the engine could not be started: {error:#}"),
            };
            let delay = policy.ended(began.elapsed());
            warn!(reason, retry_in = ?delay, "the engine is down");
            let retry_in_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
            self.status.engine(EngineState::Failed { reason, retry_in_ms });
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                _ = power::ordered(&mut orders, Haste::Orderly) => return,
            }
        }
    }

    fn start(&self) -> Result<Running> {
        let (ready, ready_writer) = io::pipe()?;
        let (output, output_writer) = io::pipe()?;
        let mut command = (self.launch)()?;
        command.stdin(Stdio::null()).stdout(output_writer.try_clone()?).stderr(output_writer);
        let mapping = FdMapping { parent_fd: OwnedFd::from(ready_writer), child_fd: READY_FD };
        command.fd_mappings(vec![mapping])?;
        let child = self
            .processes
            .spawn(&mut command)
            .with_context(|| format!("cannot run {:?}", command.get_program()))?;
        info!(pid = child.pid.as_raw_nonzero(), uptime_ms = machine::uptime_ms(), "engine started");

        let last_words = Rc::new(RefCell::new(String::new()));
        let output = pipe::Receiver::from_owned_fd(OwnedFd::from(output))?;
        let keep = {
            let last_words = last_words.clone();
            move |line: &[u8]| {
                if !line.trim_ascii().is_empty() {
                    *last_words.borrow_mut() = excerpt(line);
                }
            }
        };
        // Ends with the last process that has the engine's output, which may be a shim that outlives it.
        tokio::task::spawn_local(self.log.clone().follow(output, keep));
        let ready = pipe::Receiver::from_owned_fd(OwnedFd::from(ready))?;
        Ok(Running { child, ready, last_words })
    }

    /// Watches one engine: `Some(reason)` when it ended by itself, `None` when it was stopped.
    async fn watch(&self, mut running: Running, orders: &mut Orders) -> Option<String> {
        let mut byte = [0];
        let mut awaiting = true;
        loop {
            tokio::select! {
                biased;
                exit = &mut running.child.exit => {
                    // Its last words may still be in the pipe.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    let how = exit.map_or_else(|_| "is gone".to_owned(), |exit| exit.to_string());
                    let words = running.last_words.borrow();
                    return Some(match words.is_empty() {
                        true => format!("the engine {how}"),
                        false => format!("the engine {how}: {words}"),
                    });
                }
                _ = power::ordered(orders, Haste::Orderly) => {
                    stop(running, orders).await;
                    return None;
                }
                said = running.ready.read(&mut byte), if awaiting => {
                    awaiting = false;
                    // Closed without a byte: it is about to end, or forgot to say so.
                    if matches!(said, Ok(1)) {
                        info!(uptime_ms = machine::uptime_ms(), "engine ready");
                        self.status.engine(EngineState::Ready);
                    }
                }
            }
        }
    }
}

async fn stop(mut running: Running, orders: &mut Orders) {
    for signal in [Signal::TERM, Signal::KILL] {
        if let Err(error) = running.child.signal(signal) {
            warn!(%error, ?signal, "cannot signal the engine");
        }
        let hastily = async {
            power::ordered(orders, Haste::Now).await;
            tokio::time::sleep(Haste::Now.engine_time_max()).await;
        };
        tokio::select! {
            exit = &mut running.child.exit => {
                let exit = exit.map(|exit| exit.to_string()).unwrap_or_default();
                return info!(exit, "engine stopped");
            }
            () = tokio::time::sleep(Haste::Orderly.engine_time_max()) => {}
            () = hastily => {}
        }
        warn!(?signal, "the engine did not end");
    }
}

/// A line for people: not too long, nothing that a terminal would act on.
fn excerpt(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    text.trim().chars().filter(|character| !character.is_control()).take(LAST_WORDS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::PowerSwitch;
    use crate::status::Status;
    use tokio::sync::watch;
    use tokio::task::LocalSet;

    #[test]
    fn the_engine_looks_for_certificates_where_the_host_shares_them() {
        use guest_protocol::share::{CERTIFICATES, MOUNT};
        assert_eq!(
            std::path::Path::new(MOUNT).join(CERTIFICATES),
            std::path::Path::new(REGISTRY_CERTIFICATES)
        );
    }

    #[test]
    fn an_engine_that_keeps_dying_is_started_ever_less_often() {
        let mut policy = RestartPolicy::new();
        let millis: Vec<_> = (0..8).map(|_| policy.ended(Duration::from_secs(1)).as_millis()).collect();
        assert_eq!(millis, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
    }

    #[test]
    fn an_engine_that_was_well_is_started_again_at_once() {
        let mut policy = RestartPolicy::new();
        for _ in 0..5 {
            policy.ended(Duration::ZERO);
        }
        assert_eq!(policy.ended(WELL_AFTER), Duration::from_millis(200));
        assert_eq!(policy.ended(Duration::ZERO), Duration::from_millis(400));
    }

    /// Runs a supervisor whose engine is a line of shell, and a test beside it.
    fn supervise<T>(
        script: &'static str,
        test: impl AsyncFnOnce(&mut watch::Receiver<Status>, PowerSwitch) -> T,
    ) -> T {
        let _children = crate::process::tests::CHILDREN.lock().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let processes = Processes::default();
            let collector = tokio::task::spawn_local(processes.clone().collect());
            let (status, power) = (Publisher::new(), PowerSwitch::new());
            let launch = Rc::new(move || {
                let mut command = Command::new("sh");
                command.args(["-c", script]);
                Ok(command)
            });
            let supervisor = Supervisor { processes, log: Log::default(), status: status.clone(), launch };
            let running = tokio::task::spawn_local(supervisor.run(power.orders()));
            let result = test(&mut status.watch(), power.clone()).await;
            power.press("the test is over", Haste::Now);
            running.await.unwrap();
            collector.abort();
            result
        })
    }

    async fn until(
        status: &mut watch::Receiver<Status>,
        wanted: impl Fn(&EngineState) -> bool,
    ) -> EngineState {
        let found = status.wait_for(|status| wanted(&status.engine));
        let found = tokio::time::timeout(Duration::from_secs(60), found).await.expect("the state in time");
        found.unwrap().engine.clone()
    }

    #[test]
    fn an_engine_is_ready_when_it_says_so_and_ends_when_told() {
        supervise("trap 'exit 0' TERM; echo x >&3; while :; do sleep 0.05; done", async |status, power| {
            until(status, |state| *state == EngineState::Ready).await;
            power.press("enough", Haste::Orderly);
        });
    }

    #[test]
    fn an_engine_that_dies_is_reported_with_its_last_words_and_started_again() {
        let failed =
            supervise("echo x >&3; sleep 0.1; echo 'error: no space' >&2; exit 4", async |status, _| {
                until(status, |state| *state == EngineState::Ready).await;
                let failed = until(status, |state| matches!(state, EngineState::Failed { .. })).await;
                until(status, |state| *state == EngineState::Ready).await;
                failed
            });
        let reason = "the engine ended with status 4: error: no space".to_owned();
        assert_eq!(failed, EngineState::Failed { reason, retry_in_ms: 200 });
    }

    #[test]
    fn an_engine_that_will_not_end_is_killed_in_haste() {
        let began = Instant::now();
        supervise("trap '' TERM; echo x >&3; while :; do sleep 0.05; done", async |status, power| {
            until(status, |state| *state == EngineState::Ready).await;
            power.press("the plug will be pulled", Haste::Now);
        });
        let took = began.elapsed();
        assert!(took >= Haste::Now.engine_time_max() && took < Haste::Orderly.engine_time_max(), "{took:?}");
    }

    #[test]
    fn last_words_fit_a_sentence() {
        assert_eq!(excerpt(b"  error: \x1b[31mno space\x1b[0m\r"), "error: [31mno space[0m");
        assert_eq!(excerpt(&vec![b'x'; 1000]).len(), LAST_WORDS_MAX);
        assert_eq!(excerpt(b"\xff"), "\u{fffd}");
    }
}

//! Health checks: what is to be run ([`Check`]), what its results mean ([`note`]), and the task that runs it
//! ([`Monitor`]).
//!
//! A container is `starting` until a check succeeds or too many in a row have failed. A failure within the start
//! period does not count while it is starting. The container's driver owns the state; a monitor lives as long as
//! the run is neither paused nor over. `moby/daemon/health.go` is where the rules come from.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use guest_api::container::{ContainerConfig, Healthcheck};
use guest_api::exec::ExecCreate;
use guest_api::frame::{HEADER_LENGTH, Header};
use guest_api::health::{Health, HealthResult, HealthStatus};
use guest_runtime::shim::{Request as ShimRequest, Stdin};
use jiff::Timestamp;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::process;
use super::record::Record;
use super::run::Context;
use super::shim::{Shim, ShimError, Streams};
use crate::failure::Failure;

/// Name of the [`Health`] of a run in its run folder.
const HEALTH_FILE: &str = "health.json";
/// Results kept.
const LOG_MAX: usize = 5;
/// Bytes of output kept of one check.
const OUTPUT_MAX: usize = 4096;
const INTERVAL_DEFAULT: Duration = Duration::from_secs(30);
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
const START_INTERVAL_DEFAULT: Duration = Duration::from_secs(5);
const RETRIES_DEFAULT: i64 = 3;
/// How long starting a check's process may take; it does not count as the check's own time.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Exit code of a check that could not be run or took too long.
const NO_RESULT: i64 = -1;
/// The shortest duration that can be asked for.
const DURATION_MIN_NANOS: i64 = 1_000_000;

/// A health check with its defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    command: Vec<String>,
    interval: Duration,
    timeout: Duration,
    start_period: Duration,
    start_interval: Duration,
    retries: i64,
}

impl Check {
    /// The check of a container; `None` without one, and when it was switched off.
    pub fn of(config: &ContainerConfig) -> Option<Self> {
        let check = config.healthcheck.as_ref()?;
        let (kind, words) = check.test.as_deref()?.split_first()?;
        let mut command = match kind.as_str() {
            "CMD" => Vec::new(),
            "CMD-SHELL" => match config.shell.as_deref() {
                Some(shell) if !shell.is_empty() => shell.to_vec(),
                _ => vec!["/bin/sh".to_owned(), "-c".to_owned()],
            },
            _ => return None,
        };
        command.extend_from_slice(words);
        let span = |nanos: i64, default: Duration| match u64::try_from(nanos) {
            Ok(nanos @ 1..) => Duration::from_nanos(nanos),
            _ => default,
        };
        Some(Self {
            command,
            interval: span(check.interval, INTERVAL_DEFAULT),
            timeout: span(check.timeout, TIMEOUT_DEFAULT),
            start_period: span(check.start_period, Duration::ZERO),
            start_interval: span(check.start_interval, START_INTERVAL_DEFAULT),
            retries: if check.retries > 0 { check.retries } else { RETRIES_DEFAULT },
        })
    }

    /// How long until the next check.
    fn pause(&self, status: HealthStatus, since_start: Duration) -> Duration {
        if since_start < self.start_period && status == HealthStatus::Starting {
            self.start_interval
        } else {
            self.interval
        }
    }
}

/// Refuses a check that dockerd refuses.
pub fn verify(check: &Healthcheck) -> Result<(), Failure> {
    for (name, nanos) in [
        ("Interval", check.interval),
        ("Timeout", check.timeout),
        ("StartPeriod", check.start_period),
        ("StartInterval", check.start_interval),
    ] {
        if nanos != 0 && nanos < DURATION_MIN_NANOS {
            return Err(Failure::invalid(format!("{name} in Healthcheck cannot be less than 1ms")));
        }
    }
    if check.retries < 0 {
        return Err(Failure::invalid("Retries in Healthcheck cannot be negative"));
    }
    Ok(())
}

/// What the user asked for over what the image says, member by member.
pub fn merge(user: Option<Healthcheck>, image: Option<&Healthcheck>) -> Option<Healthcheck> {
    let (mut user, image) = match (user, image) {
        (Some(user), Some(image)) => (user, image),
        (user, image) => return user.or_else(|| image.cloned()),
    };
    if user.test.as_ref().is_none_or(Vec::is_empty) {
        user.test.clone_from(&image.test);
    }
    for (own, theirs) in [
        (&mut user.interval, image.interval),
        (&mut user.timeout, image.timeout),
        (&mut user.start_period, image.start_period),
        (&mut user.start_interval, image.start_interval),
        (&mut user.retries, image.retries),
    ] {
        if *own == 0 {
            *own = theirs;
        }
    }
    Some(user)
}

/// Takes a result into account. `since_start`: from the container's start to the check's.
pub fn note(health: &mut Health, result: HealthResult, check: &Check, since_start: Duration) {
    let succeeded = result.exit_code == 0;
    health.log.push(result);
    let surplus = health.log.len().saturating_sub(LOG_MAX);
    health.log.drain(..surplus);
    if succeeded {
        health.failing_streak = 0;
        health.status = HealthStatus::Healthy;
        return;
    }
    if health.status == HealthStatus::Starting && since_start < check.start_period {
        return;
    }
    health.failing_streak += 1;
    if health.failing_streak >= check.retries {
        health.status = HealthStatus::Unhealthy;
    }
}

/// Runs a container's check again and again.
pub struct Monitor {
    results: mpsc::Receiver<(HealthResult, Duration)>,
    /// Ends with the monitor.
    _task: AbortOnDropHandle<()>,
}

impl Monitor {
    /// Begins. `status` is where the container's health is now.
    pub fn start(
        context: &Arc<Context>,
        record: &Record,
        shim: &Shim,
        started_at: Timestamp,
        check: Check,
    ) -> Self {
        let (sender, results) = mpsc::channel(1);
        let runner = Runner {
            context: context.clone(),
            record: Arc::new(record.clone()),
            shim: shim.clone(),
            started_at,
            check,
        };
        let status = record.last.health.as_ref().map(|health| health.status).unwrap_or_default();
        let task = AbortOnDropHandle::new(tokio::spawn(runner.run(status, sender)));
        Self { results, _task: task }
    }

    /// The next result, and how long after the container's start its check began.
    pub async fn next(&mut self) -> (HealthResult, Duration) {
        match self.results.recv().await {
            Some(result) => result,
            // It ends only with us.
            None => std::future::pending().await,
        }
    }
}

struct Runner {
    context: Arc<Context>,
    record: Arc<Record>,
    shim: Shim,
    started_at: Timestamp,
    check: Check,
}

impl Runner {
    fn since_start(&self) -> Duration {
        Duration::try_from(self.started_at.duration_until(Timestamp::now())).unwrap_or_default()
    }

    async fn run(self, status: HealthStatus, sender: mpsc::Sender<(HealthResult, Duration)>) {
        // Its own copy of the state, to know how soon to check again.
        let mut health = Health { status, ..Health::default() };
        loop {
            tokio::time::sleep(self.check.pause(health.status, self.since_start())).await;
            let since_start = self.since_start();
            let start = stamp();
            let (exit_code, output) = match self.probe().await {
                Ok(result) => result,
                Err(failure) => (NO_RESULT, failure.message),
            };
            let result = HealthResult { start, end: stamp(), exit_code, output };
            note(&mut health, result.clone(), &self.check, since_start);
            if sender.send((result, since_start)).await.is_err() {
                return;
            }
        }
    }

    fn event(&self, action: &str, id: &str, more: &[(&str, String)]) {
        let mut attributes = self.record.event_attributes();
        attributes.insert("execID".to_owned(), id.to_owned());
        attributes.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        self.context.events.publish("container", action, &self.record.id, attributes);
    }

    /// Runs the check once: its exit code and what it printed.
    async fn probe(&self) -> Result<(i64, String), Failure> {
        if self.check.command.is_empty() {
            return Err(Failure::broken(format!(
                "healthcheck for container {} has no command",
                self.record.id
            )));
        }
        let config = ExecCreate {
            cmd: Some(self.check.command.clone()),
            attach_stdout: true,
            attach_stderr: true,
            ..ExecCreate::default()
        };
        let id = hex::encode(rand::random::<[u8; 32]>());
        let words = crate::services::exec::told(&self.check.command);
        self.event(&format!("exec_create: {words}"), &id, &[]);
        let description = process::describe(&self.context, &self.record, &config).await?;
        let request = ShimRequest::Exec {
            id: id.clone(),
            process: Box::new(description),
            terminal: false,
            stdin: Stdin::None,
            console_size: None,
        };
        let mut guard = Guard(Some((self.shim.clone(), id.clone())));
        let process = Some(id.clone());
        self.event(&format!("exec_start: {words}"), &id, &[]);
        let starting = async {
            self.shim.ask("exec", request).await?;
            let streams = Streams { stdin: false, stdout: true, stderr: true };
            let stream = self.shim.attach(process.clone(), streams).await?;
            self.shim.start(process.clone()).await?;
            Ok::<_, ShimError>(stream)
        };
        let late =
            || Failure::broken(format!("timed out starting health check for container {}", self.record.id));
        let started = timeout(START_DEADLINE, starting).await.map_err(|_| late())?;
        let stream = match started {
            Ok(stream) => stream,
            Err(error) => {
                let (code, failure) = process::exec_failure(error);
                self.event("exec_die", &id, &[("exitCode", code.to_string())]);
                return Err(failure);
            }
        };
        let mut output = Output::default();
        let deadline = Instant::now() + self.check.timeout;
        let ended = async {
            output.read(stream).await;
            self.shim.wait(process.clone()).await
        };
        let ended = timeout_at(deadline, ended).await;
        let code = match ended {
            Ok(Ok(exit)) => {
                guard.0 = None;
                if let Err(error) = self.shim.ask("forget", ShimRequest::Forget { id: id.clone() }).await {
                    tracing::debug!(exec = &id[..12], %error, "the shim keeps an ended check");
                }
                exit.code
            }
            Ok(Err(error)) => return Err(super::run::shim_failure(error)),
            Err(_) => {
                if let Some((shim, id)) = guard.0.take() {
                    end(&shim, &id).await;
                }
                self.event("exec_die", &id, &[("exitCode", "137".to_owned())]);
                let limit = go_duration(self.check.timeout);
                let text = output.text();
                let separator = if text.is_empty() { "" } else { ": " };
                let message = format!("Health check exceeded timeout ({limit}){separator}{text}");
                return Ok((NO_RESULT, message));
            }
        };
        self.event("exec_die", &id, &[("exitCode", code.to_string())]);
        Ok((i64::from(code), output.text()))
    }
}

/// Ends a check's process when the monitor is dropped in the middle of it.
struct Guard(Option<(Shim, String)>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some((shim, id)) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { end(&shim, &id).await });
        }
    }
}

/// Kills a process run in a container and lets the shim forget it. One that has gone meanwhile is as good.
pub async fn end(shim: &Shim, id: &str) {
    let ending = async {
        match shim.kill(super::signal::SIGKILL, Some(id.to_owned())).await {
            Ok(()) => _ = shim.wait(Some(id.to_owned())).await?,
            Err(error) => tracing::debug!(exec = &id[..12], %error, "cannot kill a process"),
        }
        shim.ask("forget", ShimRequest::Forget { id: id.to_owned() }).await
    };
    match timeout(START_DEADLINE, ending).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(exec = &id[..12], %error, "the shim keeps a process"),
        Err(_) => tracing::warn!(exec = &id[..12], "a process does not end"),
    }
}

/// The first bytes of what a check printed.
#[derive(Default)]
struct Output {
    kept: Vec<u8>,
    cut: bool,
}

impl Output {
    /// Reads frames until their end; what is too much is read and dropped.
    async fn read(&mut self, mut stream: UnixStream) {
        let mut head = [0; HEADER_LENGTH];
        let mut chunk = vec![0; OUTPUT_MAX];
        // A shim that died has no more output.
        while stream.read_exact(&mut head).await.is_ok() {
            let mut left = Header::decode(head).map_or(0, |header| header.length as usize);
            while left > 0 {
                let want = left.min(chunk.len());
                let Ok(count @ 1..) = stream.read(&mut chunk[..want]).await else { return };
                left -= count;
                let room = OUTPUT_MAX - self.kept.len();
                self.kept.extend_from_slice(&chunk[..count.min(room)]);
                self.cut |= count > room;
            }
        }
    }

    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.kept);
        if self.cut { format!("{text}...") } else { text.into_owned() }
    }
}

fn stamp() -> String {
    format!("{:.9}", Timestamp::now())
}

/// A duration as Go prints it: `1m0s`, `1.5s`, `300ms`.
fn go_duration(span: Duration) -> String {
    let trim = |value: f64, unit: &str| format!("{value}{unit}");
    let seconds = span.as_secs();
    match seconds {
        0 if span.subsec_nanos() >= 1_000_000 => trim(span.as_secs_f64() * 1e3, "ms"),
        0 => format!("{}ns", span.subsec_nanos()),
        1..60 => trim(span.as_secs_f64(), "s"),
        60..3600 => format!(
            "{}m{}",
            seconds / 60,
            trim((span - Duration::from_secs(seconds / 60 * 60)).as_secs_f64(), "s")
        ),
        _ => format!("{}h{}m{}s", seconds / 3600, seconds / 60 % 60, seconds % 60),
    }
}

/// Keeps a run's health for the next engine. Only a convenience: without it the checks begin anew.
pub fn write(run_folder: &Path, health: &Health) {
    let written = serde_json::to_vec(health).map_err(std::io::Error::from).and_then(|bytes| {
        let temporary = run_folder.join("health.json.new");
        std::fs::write(&temporary, bytes)?;
        std::fs::rename(&temporary, run_folder.join(HEALTH_FILE))
    });
    if let Err(error) = written {
        tracing::warn!(folder = %run_folder.display(), %error, "cannot keep the container's health");
    }
}

/// What [`write()`] kept.
pub fn read(run_folder: &Path) -> Option<Health> {
    serde_json::from_slice(&std::fs::read(run_folder.join(HEALTH_FILE)).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(test: &[&str]) -> ContainerConfig {
        let test = test.iter().map(|word| (*word).to_owned()).collect();
        let healthcheck = Some(Healthcheck { test: Some(test), ..Healthcheck::default() });
        ContainerConfig { healthcheck, ..ContainerConfig::default() }
    }

    fn result(exit_code: i64) -> HealthResult {
        HealthResult { exit_code, ..HealthResult::default() }
    }

    #[test]
    fn all_forms_of_a_test_are_understood() {
        let command = |test: &[&str]| Check::of(&config(test)).map(|check| check.command);
        assert_eq!(command(&["CMD", "true", "x"]).unwrap(), ["true", "x"]);
        assert_eq!(command(&["CMD-SHELL", "exit 1"]).unwrap(), ["/bin/sh", "-c", "exit 1"]);
        assert_eq!(command(&["NONE"]), None);
        assert_eq!(command(&[]), None);
        let mut own_shell = config(&["CMD-SHELL", "x"]);
        own_shell.shell = Some(vec!["/bin/ash".into(), "-ec".into()]);
        assert_eq!(Check::of(&own_shell).unwrap().command, ["/bin/ash", "-ec", "x"]);
    }

    #[test]
    fn the_image_fills_in_what_the_user_left_out() {
        let image =
            Healthcheck { test: Some(vec!["CMD".into(), "a".into()]), retries: 7, ..Healthcheck::default() };
        let user = Healthcheck { interval: 5_000_000, ..Healthcheck::default() };
        let merged = merge(Some(user), Some(&image)).unwrap();
        assert_eq!((merged.test, merged.retries, merged.interval), (image.test.clone(), 7, 5_000_000));
        let off = Healthcheck { test: Some(vec!["NONE".into()]), ..Healthcheck::default() };
        assert_eq!(merge(Some(off.clone()), Some(&image)).unwrap().test, off.test);
        assert_eq!(merge(None, None), None);
    }

    #[test]
    fn durations_below_a_millisecond_are_refused() {
        let refusal = |check: Healthcheck| verify(&check).unwrap_err().message;
        assert_eq!(
            refusal(Healthcheck { interval: 5, ..Healthcheck::default() }),
            "Interval in Healthcheck cannot be less than 1ms"
        );
        assert!(refusal(Healthcheck { retries: -1, ..Healthcheck::default() }).starts_with("Retries"));
    }

    #[test]
    fn three_failures_in_a_row_are_too_many_and_a_success_heals() {
        let check = Check::of(&config(&["CMD", "x"])).unwrap();
        let mut health = Health::default();
        let late = Duration::from_secs(100);
        note(&mut health, result(1), &check, late);
        note(&mut health, result(1), &check, late);
        assert_eq!((health.status, health.failing_streak), (HealthStatus::Starting, 2));
        note(&mut health, result(1), &check, late);
        assert_eq!(health.status, HealthStatus::Unhealthy);
        note(&mut health, result(0), &check, late);
        assert_eq!((health.status, health.failing_streak), (HealthStatus::Healthy, 0));
    }

    #[test]
    fn failures_in_the_start_period_do_not_count_until_it_was_healthy() {
        let mut check = Check::of(&config(&["CMD", "x"])).unwrap();
        check.start_period = Duration::from_secs(10);
        check.retries = 1;
        let mut health = Health::default();
        note(&mut health, result(1), &check, Duration::from_secs(3));
        assert_eq!((health.status, health.failing_streak), (HealthStatus::Starting, 0));
        note(&mut health, result(0), &check, Duration::from_secs(4));
        note(&mut health, result(1), &check, Duration::from_secs(5));
        assert_eq!(health.status, HealthStatus::Unhealthy);
        assert_eq!(check.pause(HealthStatus::Starting, Duration::from_secs(1)), START_INTERVAL_DEFAULT);
        assert_eq!(check.pause(HealthStatus::Starting, Duration::from_secs(11)), INTERVAL_DEFAULT);
    }

    #[test]
    fn durations_read_as_gos() {
        let text = |millis| go_duration(Duration::from_millis(millis));
        assert_eq!([text(300), text(1500), text(30_000), text(60_000)], ["300ms", "1.5s", "30s", "1m0s"]);
    }

    proptest! {
        #[test]
        fn the_log_holds_the_last_five_and_the_streak_counts_failures(codes in proptest::collection::vec(-1_i64..2, 0..20)) {
            let check = Check::of(&config(&["CMD", "x"])).unwrap();
            let mut health = Health::default();
            for code in &codes {
                note(&mut health, result(*code), &check, Duration::from_secs(1));
            }
            let last: Vec<i64> = health.log.iter().map(|one| one.exit_code).collect();
            prop_assert_eq!(last.as_slice(), &codes[codes.len().saturating_sub(LOG_MAX)..]);
            let streak = codes.iter().rev().take_while(|code| **code != 0).count() as i64;
            prop_assert_eq!(health.failing_streak, streak);
        }
    }
}

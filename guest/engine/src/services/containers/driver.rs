//! One container's driver: the only task that changes its state.
//!
//! Requests come in a queue and are judged by [`super::table`]; the end of the container's process, the deadline of a
//! stop and the pause before a restart by policy arrive on the same loop. Readers never ask the driver: it publishes
//! a [`View`] after each change. It ends when the container has been removed, or when the service lets go of it (the
//! container itself then goes on: live restore).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use guest_api::ErrorKind;
use guest_runtime::shim::{Exit, ProcessId, Request as ShimRequest, Status};
use jiff::Timestamp;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::index::Index;
use super::record::{Live, Record, RunRecord, View};
use super::run::{self, Context};
use super::shim::{Shim, Streams};
use super::signal::{SIGKILL, SIGTERM};
use super::table::{self, Change, Phase, Request, Verdict};
use crate::failure::Failure;

/// How long a process may take to go after SIGKILL before its shim is killed too, and then before a stop gives up.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// First pause before a restart by policy; doubles up to the second.
const RESTART_PAUSE_MIN: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(60);
/// A run that lasted this long makes the next pause short again.
const RUN_IS_GOOD: Duration = Duration::from_secs(10);
/// Seconds between the stop signal and SIGKILL unless somebody says otherwise.
const STOP_TIMEOUT_SECONDS: i64 = 10;
/// How long taking a shim's state back may take at most when the engine starts.
const RESTORE_DEADLINE: Duration = Duration::from_secs(3);

/// Exit code of a container that ended with the machine, as dockerd gives it.
const LOST_EXIT_CODE: i32 = 255;

type Reply = oneshot::Sender<Result<(), Failure>>;

/// What somebody wants from the driver.
pub enum Command {
    Start {
        reply: Reply,
    },
    /// `timeout` in seconds; negative waits for ever.
    Stop {
        signal: Option<i32>,
        timeout: Option<i64>,
        reply: Reply,
    },
    Restart {
        signal: Option<i32>,
        timeout: Option<i64>,
        reply: Reply,
    },
    Kill {
        signal: i32,
        reply: Reply,
    },
    Pause {
        reply: Reply,
    },
    Unpause {
        reply: Reply,
    },
    Resize {
        width: u16,
        height: u16,
        reply: Reply,
    },
    Rename {
        name: String,
        reply: Reply,
    },
    Remove {
        force: bool,
        reply: Reply,
    },
    Attach {
        streams: Streams,
        reply: oneshot::Sender<Result<Attachment, Failure>>,
    },
}

/// What an attach gets.
pub enum Attachment {
    /// The container runs: connect to its shim.
    Now(Shim),
    /// It does not run yet: the stream comes with the next start, or never.
    Later(oneshot::Receiver<UnixStream>),
}

struct Run {
    shim: Shim,
    live: Live,
    /// Kept to be reaped; `None` when another engine started it.
    child: Option<Child>,
    /// Resolves once, with the end of the container's process; `None` when its shim died without telling.
    end: AbortOnDropHandle<Option<Exit>>,
}

struct Stopping {
    step: StopStep,
    /// When to take the next step.
    deadline: Option<Instant>,
    waiting: Vec<Reply>,
    /// Then start it again, and tell these.
    restart: Vec<Reply>,
    /// Then remove it, and tell these.
    remove: Vec<Reply>,
}

/// How hard a container is being stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StopStep {
    /// The stop signal was sent.
    Asked,
    /// SIGKILL was sent.
    Killed,
    /// Its shim was killed too, and everything in its cgroup.
    Reaped,
}

/// The driver of one container.
pub struct Driver {
    context: Arc<Context>,
    index: Arc<Index>,
    record: Record,
    phase: Phase,
    run: Option<Run>,
    stopping: Option<Stopping>,
    /// When to start again by policy.
    restart_at: Option<Instant>,
    restart_pause: Duration,
    pending: Vec<(Streams, oneshot::Sender<UnixStream>)>,
    runs_ended: u64,
    commands: mpsc::Receiver<Command>,
    views: watch::Sender<Arc<View>>,
}

impl Driver {
    /// A driver in the state `phase`, and what readers see first.
    pub fn new(
        context: Arc<Context>,
        index: Arc<Index>,
        record: Record,
        phase: Phase,
        commands: mpsc::Receiver<Command>,
    ) -> (Self, watch::Receiver<Arc<View>>) {
        let view =
            View { record: Arc::new(record.clone()), phase, live: None, runs_ended: 0, removed: false };
        let (views, watch) = watch::channel(Arc::new(view));
        let driver = Self {
            context,
            index,
            record,
            phase,
            run: None,
            stopping: None,
            restart_at: None,
            restart_pause: RESTART_PAUSE_MIN,
            pending: Vec::new(),
            runs_ended: 0,
            commands,
            views,
        };
        (driver, watch)
    }

    /// Drives until the container is removed or the service lets go.
    pub async fn drive(mut self) {
        while self.phase != Phase::Removing {
            let deadline = self.stopping.as_ref().and_then(|stopping| stopping.deadline).or(self.restart_at);
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.handle(command).await,
                    None => return,
                },
                exit = ended(&mut self.run) => self.process_ended(exit).await,
                () = sleep_until(deadline) => self.deadline_passed().await,
            }
        }
    }

    fn publish(&self) {
        self.views.send_replace(Arc::new(self.view(false)));
    }

    fn view(&self, removed: bool) -> View {
        View {
            record: Arc::new(self.record.clone()),
            phase: self.phase,
            live: self.run.as_ref().map(|run| run.live.clone()),
            runs_ended: self.runs_ended,
            removed,
        }
    }

    /// Takes a step of the table. A step that cannot be is our own mistake: it is logged and not taken.
    fn change(&mut self, change: Change) {
        match table::after(self.phase, change) {
            Some(next) => self.phase = next,
            None => {
                tracing::error!(container = self.record.short_id(), phase = ?self.phase, ?change, "impossible change");
            }
        }
    }

    fn event(&self, action: &str, more: &[(&str, String)]) {
        let mut attributes: BTreeMap<String, String> = self.record.event_attributes();
        attributes.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        self.context.events.publish("container", action, &self.record.id, attributes);
    }

    fn admit(&self, request: Request) -> Verdict {
        table::admit(self.phase, request, &self.record.id, &self.record.name)
    }

    async fn save(&self) -> Result<(), Failure> {
        self.context.save(&self.record).await
    }

    async fn handle(&mut self, command: Command) {
        match command {
            Command::Start { reply } => {
                let result = match self.admit(Request::Start) {
                    Verdict::Nothing if self.phase != Phase::Restarting => Err(Failure::not_modified()),
                    // Waiting to be started again: do it now.
                    Verdict::Go | Verdict::Nothing | Verdict::EndFirst => {
                        self.restart_pause = RESTART_PAUSE_MIN;
                        self.record.restarts = 0;
                        self.start().await
                    }
                    Verdict::Refuse(kind, text) => Err(Failure::new(kind, text)),
                };
                answer(reply, result);
            }
            Command::Stop { signal, timeout, reply } => match self.admit(Request::Stop) {
                Verdict::Go | Verdict::EndFirst => {
                    self.stop(signal, timeout, |stopping| stopping.waiting.push(reply)).await
                }
                Verdict::Nothing => answer(reply, Err(Failure::not_modified())),
                Verdict::Refuse(kind, text) => answer(reply, Err(Failure::new(kind, text))),
            },
            Command::Restart { signal, timeout, reply } => match self.admit(Request::Stop) {
                Verdict::Go | Verdict::EndFirst => {
                    self.stop(signal, timeout, |stopping| stopping.restart.push(reply)).await
                }
                Verdict::Nothing => {
                    let result = self.start().await;
                    if result.is_ok() {
                        self.event("restart", &[]);
                    }
                    answer(reply, result);
                }
                Verdict::Refuse(kind, text) => answer(reply, Err(Failure::new(kind, text))),
            },
            Command::Kill { signal, reply } => {
                let result = match self.admit(Request::Kill) {
                    Verdict::Refuse(kind, text) => Err(Failure::new(kind, text)),
                    _ => self.kill(signal).await,
                };
                answer(reply, result);
            }
            Command::Pause { reply } => {
                let result = self.freeze(Request::Pause, ShimRequest::Pause, Change::Paused, "pause").await;
                answer(reply, result);
            }
            Command::Unpause { reply } => {
                let result =
                    self.freeze(Request::Unpause, ShimRequest::Resume, Change::Unpaused, "unpause").await;
                answer(reply, result);
            }
            Command::Resize { width, height, reply } => {
                let result = match (self.admit(Request::Resize), &self.run) {
                    (Verdict::Refuse(kind, text), _) => Err(Failure::new(kind, text)),
                    (_, Some(run)) => run.shim.resize(None, width, height).await.map_err(run::shim_failure),
                    (_, None) => Err(Failure::conflict(guest_api::error::not_running(&self.record.id))),
                };
                answer(reply, result);
            }
            Command::Rename { name, reply } => {
                let result = match self.admit(Request::Rename) {
                    Verdict::Refuse(kind, text) => Err(Failure::new(kind, text)),
                    _ => self.rename(name).await,
                };
                answer(reply, result);
            }
            Command::Remove { force, reply } => match self.admit(Request::Remove { force }) {
                Verdict::Go | Verdict::Nothing => {
                    let result = self.remove().await;
                    answer(reply, result);
                }
                Verdict::EndFirst => {
                    self.stop(Some(SIGKILL), Some(0), |stopping| stopping.remove.push(reply)).await
                }
                Verdict::Refuse(kind, text) => answer(reply, Err(Failure::new(kind, text))),
            },
            Command::Attach { streams, reply } => {
                let result = match (self.admit(Request::Attach), &self.run) {
                    (Verdict::Refuse(kind, text), _) => Err(Failure::new(kind, text)),
                    (_, Some(run)) => Ok(Attachment::Now(run.shim.clone())),
                    (_, None) => {
                        self.pending.retain(|(_, client)| !client.is_closed());
                        let (sender, receiver) = oneshot::channel();
                        self.pending.push((streams, sender));
                        Ok(Attachment::Later(receiver))
                    }
                };
                if result.is_ok() {
                    self.event("attach", &[]);
                }
                // A client that has gone takes its place in the list with it, at the next look.
                let _ = reply.send(result);
            }
        }
    }

    async fn start(&mut self) -> Result<(), Failure> {
        self.restart_at = None;
        self.record.stopped_by_user = false;
        let pending = std::mem::take(&mut self.pending);
        match run::start(&self.context, &self.record, pending).await {
            Ok(started) => {
                self.record.last.started_at = Some(started.live.started_at);
                self.record.last.error.clear();
                self.adopt(started.shim, started.live, started.child);
                self.change(Change::Started);
                self.publish();
                if let Some(endpoint) = self.run.as_ref().and_then(|run| run.live.endpoint.clone()) {
                    self.network_event("connect", &endpoint.network);
                }
                self.event("start", &[]);
                // Whether it runs, its shim tells; this is only history, so nobody waits for it.
                self.context.save_later(&self.record).await
            }
            Err(failure) => {
                let code = run::exit_code_of_failure(&failure);
                self.record.last.exit_code = code;
                self.record.last.error.clone_from(&failure.message);
                if self.phase == Phase::Restarting {
                    self.change(Change::GaveUp);
                }
                self.publish();
                self.event("die", &[("exitCode", code.to_string())]);
                if self.record.host.auto_remove {
                    if let Err(also) = self.remove().await {
                        tracing::warn!(container = self.record.short_id(), error = %also, "cannot remove it");
                    }
                } else {
                    self.context.save_later(&self.record).await?;
                }
                Err(failure)
            }
        }
    }

    fn network_event(&self, action: &str, network: &str) {
        let attributes = [("container", self.record.id.as_str()), ("name", network), ("type", network)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()));
        let id = self.context.networks.network_id(network);
        self.context.events.publish("network", action, &id, attributes.into());
    }

    fn adopt(&mut self, shim: Shim, live: Live, child: Option<Child>) {
        let waiter = shim.clone();
        let end = AbortOnDropHandle::new(tokio::spawn(async move {
            match waiter.wait(ProcessId::None).await {
                Ok(exit) => Some(exit),
                Err(error) => {
                    tracing::warn!(shim = %waiter.folder().display(), %error, "lost a shim");
                    None
                }
            }
        }));
        self.run = Some(Run { shim, live, child, end });
    }

    /// Takes over a container that an earlier engine started. `Err` when it does not run any more: the caller lets
    /// [`Driver::clean_up`] do the rest.
    pub async fn restore(&mut self, run_record: &RunRecord) -> Result<(), ()> {
        let shim = Shim::at(&self.context.run_folder(&self.record.id));
        let (status, pid) = match timeout(RESTORE_DEADLINE, shim.state()).await {
            Ok(Ok(state)) => (state.status, state.pid),
            Ok(Err(_)) => return Err(()),
            // It lives but does not answer now. Killing its container for that would be worse than waiting for it.
            Err(_) => {
                tracing::warn!(container = self.record.short_id(), "its shim does not answer");
                (Status::Running, run::recorded_pid(&self.context, &self.record.id))
            }
        };
        let phase = match status {
            Status::Running => Phase::Running,
            Status::Paused => Phase::Paused,
            // Its end is told by the wait that follows.
            Status::Stopped => Phase::Running,
            // The engine died between making and starting it.
            Status::Empty | Status::Created => return Err(()),
        };
        let live = Live { pid, started_at: run_record.started_at, endpoint: run_record.endpoint.clone() };
        if let Some(endpoint) = &live.endpoint {
            self.context.networks.restore(&self.record.id, &self.record.name, endpoint);
        }
        self.record.last.started_at = Some(live.started_at);
        self.record.stopped_by_user = run_record.stopped_by_user;
        self.adopt(shim, live, None);
        self.phase = phase;
        self.publish();
        Ok(())
    }

    /// Cleans up after a run whose shim is gone, and takes over its exit status, if there is one. `lost`: it ran, and
    /// nothing of the run is left to ask. For the start of the engine, before anybody else knows the driver.
    pub async fn clean_up(&mut self, run_record: Option<RunRecord>, lost: bool) {
        let endpoint = run_record.as_ref().and_then(|run| run.endpoint.clone());
        let exit = run::tear_down(&self.context, &self.record, None, endpoint.as_ref()).await;
        if let Err(error) = run::remove_run_folder(&self.context, &self.record.id).await {
            tracing::warn!(container = self.record.short_id(), %error, "a run folder stays behind");
        }
        match run_record {
            Some(run_record) => {
                self.record.last.started_at = Some(run_record.started_at);
                self.record.stopped_by_user |= run_record.stopped_by_user;
                self.note_end(exit);
            }
            None if lost => {
                self.note_end(None);
                self.record.last.exit_code = LOST_EXIT_CODE;
            }
            None => return,
        }
        self.phase = Phase::Exited;
        self.publish();
        if let Err(error) = self.save().await {
            tracing::error!(container = self.record.short_id(), %error, "cannot keep how it ended");
        }
        self.event("die", &[("exitCode", self.record.last.exit_code.to_string())]);
    }

    /// What an engine does at its start with a container that is not running.
    pub async fn resume_policy(&mut self) {
        if self.record.host.auto_remove && self.record.last.started_at.is_some() {
            if let Err(error) = self.remove().await {
                tracing::warn!(container = self.record.short_id(), %error, "cannot remove it");
            }
            return;
        }
        let again = self.record.last.started_at.is_some()
            && match self.record.host.restart_policy.name.as_str() {
                "always" => true,
                "unless-stopped" => !self.record.stopped_by_user,
                "on-failure" => !self.record.stopped_by_user && self.record.last.exit_code != 0,
                _ => false,
            };
        if again && let Err(error) = self.start().await {
            tracing::warn!(container = self.record.short_id(), %error, "cannot start it by its restart policy");
        }
    }

    async fn stop(&mut self, signal: Option<i32>, seconds: Option<i64>, ask: impl FnOnce(&mut Stopping)) {
        self.mark_stopped_by_user();
        if let Some(stopping) = &mut self.stopping {
            // Somebody is at it already; the more impatient one wins.
            ask(stopping);
            let deadline = deadline(seconds.unwrap_or(STOP_TIMEOUT_SECONDS));
            if stopping.step == StopStep::Asked && deadline < stopping.deadline.or(deadline) {
                stopping.deadline = deadline;
            }
            return;
        }
        let seconds = seconds.or(self.record.config.stop_timeout).unwrap_or(STOP_TIMEOUT_SECONDS);
        let mut stopping = Stopping {
            step: StopStep::Asked,
            deadline: deadline(seconds),
            waiting: Vec::new(),
            restart: Vec::new(),
            remove: Vec::new(),
        };
        ask(&mut stopping);
        self.stopping = Some(stopping);
        if self.phase == Phase::Restarting {
            // Nothing runs: calling the restart off is all.
            self.restart_at = None;
            self.change(Change::GaveUp);
            self.runs_ended += 1;
            self.publish();
            self.stopped().await;
            return;
        }
        let signal = signal.unwrap_or_else(|| self.stop_signal());
        if signal == SIGKILL
            && let Some(stopping) = &mut self.stopping
        {
            // There is nothing harder to follow.
            stopping.step = StopStep::Killed;
            stopping.deadline = Some(Instant::now() + KILL_DEADLINE);
        }
        if self.phase == Phase::Paused
            && let Err(error) =
                self.freeze(Request::Unpause, ShimRequest::Resume, Change::Unpaused, "unpause").await
        {
            tracing::warn!(container = self.record.short_id(), %error, "cannot unpause it to stop it");
        }
        let signalled = if signal == SIGKILL { self.kill_now().await } else { self.signal(signal).await };
        if let Err(error) = signalled {
            tracing::warn!(container = self.record.short_id(), signal, %error, "cannot signal it");
            // Then harder, at once; or, if that was it, wait for what comes.
            if signal != SIGKILL {
                self.deadline_passed().await;
            }
        }
    }

    fn stop_signal(&self) -> i32 {
        super::signal::parse(&self.record.config.stop_signal).unwrap_or(SIGTERM)
    }

    /// A policy must not start it again, also not after a restart of the engine.
    fn mark_stopped_by_user(&mut self) {
        self.record.stopped_by_user = true;
        if let Some(run) = &self.run
            && let Err(error) = run::write_run_record(
                &self.context,
                &self.record,
                &RunRecord {
                    started_at: run.live.started_at,
                    endpoint: run.live.endpoint.clone(),
                    stopped_by_user: true,
                },
            )
        {
            tracing::warn!(container = self.record.short_id(), %error, "cannot note that it is to stop");
        }
    }

    async fn signal(&self, signal: i32) -> Result<(), Failure> {
        let Some(run) = &self.run else {
            return Err(Failure::conflict(guest_api::error::not_running(&self.record.id)));
        };
        run.shim.kill(signal, None).await.map_err(run::shim_failure)?;
        self.event("kill", &[("signal", signal.to_string())]);
        Ok(())
    }

    async fn kill(&mut self, signal: i32) -> Result<(), Failure> {
        if self.phase == Phase::Restarting {
            let (reply, answer) = oneshot::channel();
            self.stop(Some(signal), Some(0), |stopping| stopping.waiting.push(reply)).await;
            return answer.await.unwrap_or_else(|_| Err(Failure::broken("a stop was forgotten")));
        }
        if signal == SIGKILL || signal == self.stop_signal() {
            self.mark_stopped_by_user();
        }
        if signal == SIGKILL { self.kill_now().await } else { self.signal(signal).await }
    }

    /// SIGKILL through the shim, or without it when it does not answer.
    async fn kill_now(&self) -> Result<(), Failure> {
        match self.signal(SIGKILL).await {
            Err(failure) if failure.kind == ErrorKind::Internal => {
                let end = run::reap(&self.context, &self.record.id).await;
                self.event("kill", &[("signal", SIGKILL.to_string())]);
                end.map(drop)
            }
            other => other,
        }
    }

    async fn freeze(
        &mut self,
        request: Request,
        ask: ShimRequest,
        change: Change,
        action: &'static str,
    ) -> Result<(), Failure> {
        if let Verdict::Refuse(kind, text) = self.admit(request) {
            return Err(Failure::new(kind, text));
        }
        let Some(run) = &self.run else {
            return Err(Failure::conflict(guest_api::error::not_running(&self.record.id)));
        };
        run.shim.ask(action, ask).await.map_err(run::shim_failure)?;
        self.change(change);
        self.publish();
        self.event(action, &[]);
        Ok(())
    }

    async fn rename(&mut self, name: String) -> Result<(), Failure> {
        let old = std::mem::replace(&mut self.record.name, name);
        if let Err(failure) = self.save().await {
            self.record.name = old;
            return Err(failure);
        }
        self.context.networks.renamed(&self.record.id, &self.record.name);
        self.publish();
        self.event("rename", &[("oldName", format!("/{old}"))]);
        Ok(())
    }

    async fn deadline_passed(&mut self) {
        if let Some(stopping) = &mut self.stopping {
            let next = match stopping.step {
                StopStep::Asked => Some(StopStep::Killed),
                StopStep::Killed => Some(StopStep::Reaped),
                StopStep::Reaped => None,
            };
            let Some(next) = next else { return self.give_up_stopping() };
            stopping.step = next;
            stopping.deadline = Some(Instant::now() + KILL_DEADLINE);
            let result = if next == StopStep::Killed {
                self.kill_now().await
            } else {
                run::reap(&self.context, &self.record.id).await.map(drop)
            };
            if let Err(error) = result {
                tracing::warn!(container = self.record.short_id(), %error, "cannot kill it");
            }
            return;
        }
        if self.restart_at.take().is_some() {
            self.record.restarts += 1;
            if let Err(error) = self.start().await {
                tracing::warn!(container = self.record.short_id(), %error, "cannot restart it");
            }
        }
    }

    fn give_up_stopping(&mut self) {
        let text = format!(
            "could not kill container {}: it did not end within {} s of SIGKILL",
            self.record.id,
            2 * KILL_DEADLINE.as_secs()
        );
        let stopping = self.stopping.take();
        for reply in
            stopping.into_iter().flat_map(|it| it.waiting.into_iter().chain(it.restart).chain(it.remove))
        {
            answer(reply, Err(Failure::broken(&text)));
        }
    }

    /// The container's process has ended: everything of the run goes, then policies have their say.
    async fn process_ended(&mut self, exit: Option<Exit>) {
        let Some(run) = self.run.take() else { return };
        let told = run::tear_down(
            &self.context,
            &self.record,
            Some((&run.shim, run.child)),
            run.live.endpoint.as_ref(),
        )
        .await;
        self.note_end(exit.or(told));
        self.runs_ended += 1;
        let started = run.live.started_at;
        let last = &self.record.last;
        let duration =
            last.finished_at.map_or(0, |at| at.as_second().saturating_sub(started.as_second()).max(0));
        let attributes = [("exitCode", last.exit_code.to_string()), ("execDuration", duration.to_string())];
        if last.oom_killed {
            self.event("oom", &[]);
        }
        self.event("die", &attributes);
        if let Some(endpoint) = &run.live.endpoint {
            self.network_event("disconnect", &endpoint.network);
        }

        let again = self.stopping.is_none() && self.policy_says_again();
        self.change(Change::Ended { again });
        if again {
            if duration >= RUN_IS_GOOD.as_secs().cast_signed() {
                self.restart_pause = RESTART_PAUSE_MIN;
            }
            self.restart_at = Some(Instant::now() + self.restart_pause);
            self.restart_pause = (self.restart_pause * 2).min(RESTART_PAUSE_MAX);
        }
        if !self.record.host.auto_remove
            && let Err(error) = self.save().await
        {
            tracing::error!(container = self.record.short_id(), %error, "cannot keep how it ended");
        }
        if let Err(error) = run::remove_run_folder(&self.context, &self.record.id).await {
            tracing::warn!(container = self.record.short_id(), %error, "a run folder stays behind");
        }
        self.publish();
        self.stopped().await;
    }

    fn note_end(&mut self, exit: Option<Exit>) {
        let last = &mut self.record.last;
        match exit {
            Some(exit) => {
                last.exit_code = exit.code;
                last.finished_at = Some(exit.finished_at);
                last.oom_killed = exit.oom_killed;
            }
            // Nobody saw it end: its shim was killed, and the container with it.
            None => {
                last.exit_code = 128 + SIGKILL;
                last.finished_at = Some(Timestamp::now());
                last.oom_killed = false;
            }
        }
    }

    fn policy_says_again(&self) -> bool {
        let policy = &self.record.host.restart_policy;
        !self.record.stopped_by_user
            && match policy.name.as_str() {
                "always" | "unless-stopped" => true,
                "on-failure" => {
                    let tries = i64::from(self.record.restarts);
                    self.record.last.exit_code != 0
                        && (policy.maximum_retry_count == 0 || tries < policy.maximum_retry_count)
                }
                _ => false,
            }
    }

    /// It does not run any more: whoever waited for that goes on.
    async fn stopped(&mut self) {
        let stopping = self.stopping.take();
        let (mut waiting, mut restart, mut remove) = (Vec::new(), Vec::new(), Vec::new());
        if let Some(it) = stopping {
            (waiting, restart, remove) = (it.waiting, it.restart, it.remove);
            self.event("stop", &[]);
        }
        if self.phase == Phase::Restarting {
            return;
        }
        if !restart.is_empty() && remove.is_empty() {
            let result = self.start().await;
            if result.is_ok() {
                self.event("restart", &[]);
            }
            restart.into_iter().chain(waiting).for_each(|reply| answer(reply, result.clone()));
            return;
        }
        let result =
            if remove.is_empty() && !self.record.host.auto_remove { Ok(()) } else { self.remove().await };
        if let Err(error) = &result
            && remove.is_empty()
        {
            tracing::warn!(container = self.record.short_id(), %error, "cannot remove it");
        }
        let gone = Failure::conflict(format!("container {} is being removed", self.record.id));
        restart.into_iter().for_each(|reply| answer(reply, Err(gone.clone())));
        remove.into_iter().for_each(|reply| answer(reply, result.clone()));
        waiting.into_iter().for_each(|reply| answer(reply, Ok(())));
    }

    async fn remove(&mut self) -> Result<(), Failure> {
        self.restart_at = None;
        self.change(Change::RemovalBegan);
        self.publish();
        self.pending.clear();
        match run::remove(&self.context, &self.record).await {
            Ok(()) => {
                // Before anybody hears of it: then the name is free at once.
                self.index.forget(&self.record.id);
                self.event("destroy", &[]);
                self.views.send_replace(Arc::new(self.view(true)));
                Ok(())
            }
            Err(failure) => {
                self.change(Change::RemovalFailed);
                self.publish();
                Err(failure)
            }
        }
    }
}

fn answer(reply: Reply, result: Result<(), Failure>) {
    // A client may have gone; what it asked for was done all the same.
    let _ = reply.send(result);
}

fn deadline(seconds: i64) -> Option<Instant> {
    u64::try_from(seconds)
        .ok()
        .map(|seconds| Instant::now() + Duration::from_secs(seconds.min(u64::from(u32::MAX))))
}

async fn ended(run: &mut Option<Run>) -> Option<Exit> {
    match run {
        // The task waits and does nothing else; if it fails, nobody saw the end.
        Some(run) => (&mut run.end).await.unwrap_or(None),
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

//! One container's driver: the only task that changes its state.
//!
//! Requests come in a queue and are judged by [`super::table`]; the end of the container's process, the deadline of a
//! stop and the pause before a restart by policy arrive on the same loop. Readers never ask the driver: it publishes
//! a [`View`] after each change. It ends when the container has been removed, or when the service lets go of it (the
//! container itself then goes on: live restore).
//!
//! [`stop`] holds the stopping, [`restore`] the taking over at the engine's start.

mod restore;
mod stop;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use guest_api::HostConfig;
use guest_api::health::{Health, HealthResult, HealthStatus};
use guest_runtime::shim::{Exit, Request as ShimRequest};
use jiff::Timestamp;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::failure::Failure;
use crate::services::containers::health::{self, Check, Monitor};
use crate::services::containers::index::Index;
use crate::services::containers::network::{self, NetworkChange};
use crate::services::containers::record::{Live, Record, View};
use crate::services::containers::run::{self, Context};
use crate::services::containers::shim::{Shim, Streams};
use crate::services::containers::signal::SIGKILL;
use crate::services::containers::table::{self, Change, Phase, Request, Verdict};
use crate::services::containers::{spec, update};
use stop::{StopStep, Stopping};

/// How long a process may take to go after SIGKILL before its shim is killed too, and then before a stop gives up.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// First pause before a restart by policy; doubles up to the second.
const RESTART_PAUSE_MIN: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Events at a time for kills for want of memory: more say nothing more.
const OOM_EVENTS_MAX: u64 = 16;
/// A run that lasted this long makes the next pause short again.
const RUN_IS_GOOD: Duration = Duration::from_secs(10);

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
    /// Limits and restart policy.
    Update {
        changes: Box<HostConfig>,
        reply: Reply,
    },
    Network {
        change: NetworkChange,
        reply: Reply,
    },
    Remove {
        force: bool,
        volumes: bool,
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
    /// How often the kernel has killed in it for want of memory, and for how many of these there were events.
    ooms: watch::Receiver<u64>,
    ooms_told: u64,
    /// Checks its health, unless it is paused.
    monitor: Option<Monitor>,
}

/// What happens to a run by itself.
enum Happened {
    OutOfMemory,
    Ended(Option<Exit>),
    Checked(HealthResult, Duration),
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
                happened = happened(&mut self.run) => match happened {
                    Happened::Ended(exit) => self.process_ended(exit).await,
                    Happened::OutOfMemory => self.tell_ooms(),
                    Happened::Checked(result, since_start) => self.checked(result, since_start),
                },
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
            Command::Kill { signal, reply } => match self.admit(Request::Kill) {
                Verdict::Refuse(kind, text) => answer(reply, Err(Failure::new(kind, text))),
                _ => self.kill(signal, reply).await,
            },
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
                if result.is_ok() {
                    self.event("resize", &[("height", height.to_string()), ("width", width.to_string())]);
                }
                answer(reply, result);
            }
            Command::Rename { name, reply } => {
                let result = match self.admit(Request::Rename) {
                    Verdict::Refuse(kind, text) => Err(Failure::new(kind, text)),
                    _ => self.rename(name).await,
                };
                answer(reply, result);
            }
            Command::Update { changes, reply } => {
                let result = match self.admit(Request::Update) {
                    Verdict::Refuse(kind, text) => Err(Failure::new(kind, text)),
                    _ => self.update(&changes).await,
                };
                answer(reply, result);
            }
            Command::Network { change, reply } => {
                let result = self.change_network(change).await;
                answer(reply, result);
            }
            Command::Remove { force, volumes, reply } => match self.admit(Request::Remove { force }) {
                Verdict::Go | Verdict::Nothing => {
                    let result = self.remove(volumes).await;
                    answer(reply, result);
                }
                Verdict::EndFirst => {
                    self.stop(Some(SIGKILL), Some(0), |stopping| {
                        stopping.remove.push(reply);
                        stopping.remove_volumes |= volumes;
                    })
                    .await
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
                network::settle(&self.context, &mut self.record);
                self.adopt(started.shim, started.live, started.child, 0);
                self.change(Change::Started);
                self.record.last.health = Check::of(&self.record.config).map(|_| {
                    let log = self.record.last.health.take().unwrap_or_default().log;
                    Health { log, ..Health::default() }
                });
                self.watch_health(true);
                self.publish();
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
                    if let Err(also) = self.remove(true).await {
                        tracing::warn!(container = self.record.short_id(), error = %also, "cannot remove it");
                    }
                } else {
                    self.context.save_later(&self.record).await?;
                }
                Err(failure)
            }
        }
    }

    /// `ooms`: how often the kernel has killed in it for want of memory, as was told before.
    fn adopt(&mut self, shim: Shim, live: Live, child: Option<Child>, ooms: u64) {
        let waiter = shim.clone();
        let (counts, counted) = watch::channel(ooms);
        let end = AbortOnDropHandle::new(tokio::spawn(async move {
            let tell = |count| {
                counts.send_replace(count);
            };
            match waiter.wait_for_init(ooms, tell).await {
                Ok(exit) => Some(exit),
                Err(error) => {
                    tracing::warn!(shim = %waiter.folder().display(), %error, "lost a shim");
                    None
                }
            }
        }));
        self.run = Some(Run { shim, live, child, end, ooms: counted, ooms_told: ooms, monitor: None });
    }

    /// An event for each time that there was none for.
    fn tell_ooms(&mut self) {
        let Some(run) = &mut self.run else { return };
        let (told, count) = (run.ooms_told, *run.ooms.borrow_and_update());
        run.ooms_told = count;
        for _ in told..count.min(told + OOM_EVENTS_MAX) {
            self.event("oom", &[]);
        }
    }

    /// Checks the health of what runs from now on; or, when it is paused, does not.
    fn watch_health(&mut self, watch: bool) {
        let Some(run) = &mut self.run else { return };
        let Some(check) = Check::of(&self.record.config) else { return };
        if watch {
            let health = self.record.last.health.get_or_insert_default();
            health::write(&self.context.run_folder(&self.record.id), health);
            let (context, started_at) = (&self.context, run.live.started_at);
            run.monitor = Some(Monitor::start(context, &self.record, &run.shim, started_at, check));
        } else {
            run.monitor = None;
            self.unwatched();
        }
    }

    /// dockerd calls a container unhealthy that nobody checks any more.
    fn unwatched(&mut self) {
        if let Some(health) = &mut self.record.last.health {
            health.status = HealthStatus::Unhealthy;
        }
    }

    /// A check of its health has been made.
    fn checked(&mut self, result: HealthResult, since_start: Duration) {
        let Some(check) = Check::of(&self.record.config) else { return };
        let health = self.record.last.health.get_or_insert_default();
        let before = health.status;
        health::note(health, result, &check, since_start);
        let now = health.status;
        health::write(&self.context.run_folder(&self.record.id), health);
        self.publish();
        if now != before {
            self.event(&format!("health_status: {}", now.word()), &[]);
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
        self.watch_health(change == Change::Unpaused);
        self.publish();
        self.event(action, &[]);
        Ok(())
    }

    async fn update(&mut self, changes: &HostConfig) -> Result<(), Failure> {
        let id = self.record.id.clone();
        let failed = |failure: Failure| {
            Failure::new(failure.kind, format!("Cannot update container {id}: {}", failure.message))
        };
        let merged = update::merge(&self.record.host, changes).map_err(failed)?;
        if let Some(run) = &self.run {
            let resources = Box::new(spec::changes(changes, &merged)?);
            run.shim
                .ask("update", ShimRequest::Update { resources })
                .await
                .map_err(run::shim_failure)
                .map_err(failed)?;
        }
        let before = std::mem::replace(&mut self.record.host, merged);
        if let Err(failure) = self.save().await {
            self.record.host = before;
            return Err(failed(failure));
        }
        self.publish();
        self.event("update", &[]);
        Ok(())
    }

    async fn change_network(&mut self, change: NetworkChange) -> Result<(), Failure> {
        if matches!(self.phase, Phase::Removing | Phase::Dead) {
            return Err(Failure::broken(format!(
                "Container {} is marked for removal and cannot be connected or disconnected to the network",
                self.record.id
            )));
        }
        network::change(&self.context, &mut self.record, self.run.is_some(), change).await?;
        self.publish();
        self.save().await
    }

    async fn rename(&mut self, name: String) -> Result<(), Failure> {
        let old = std::mem::replace(&mut self.record.name, name);
        if let Err(failure) = self.save().await {
            self.record.name = old;
            return Err(failure);
        }
        self.context.networks.renamed(&self.record);
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

    /// The container's process has ended: everything of the run goes, then policies have their say.
    async fn process_ended(&mut self, exit: Option<Exit>) {
        self.tell_ooms();
        let oom_told = self.run.as_ref().is_some_and(|run| run.ooms_told > 0);
        let Some(run) = self.run.take() else { return };
        let places = self.context.networks.places(&self.record.id);
        let told = run::tear_down(&self.context, &self.record, Some((&run.shim, run.child))).await;
        guest_fault::point("stop.after-teardown");
        self.note_end(exit.or(told));
        self.unwatched();
        self.runs_ended += 1;
        let started = run.live.started_at;
        let last = &self.record.last;
        let duration =
            last.finished_at.map_or(0, |at| at.as_second().saturating_sub(started.as_second()).max(0));
        let attributes = [("exitCode", last.exit_code.to_string()), ("execDuration", duration.to_string())];
        if last.oom_killed && !oom_told {
            self.event("oom", &[]);
        }
        self.event("die", &attributes);
        self.context.networks.tell_disconnected(&self.record, &places);

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

    /// With `volumes` those go too that were made for it without a name.
    async fn remove(&mut self, volumes: bool) -> Result<(), Failure> {
        self.restart_at = None;
        self.change(Change::RemovalBegan);
        self.publish();
        self.pending.clear();
        match run::remove(&self.context, &self.record, volumes).await {
            Ok(()) => {
                // Before anybody hears of it: then the name is free at once.
                self.index.forget(&self.record.id);
                self.event("destroy", &[]);
                self.views.send_replace(Arc::new(self.view(true)));
                Ok(())
            }
            Err(failure) => {
                self.change(Change::RemovalFailed);
                self.record.last.error.clone_from(&failure.message);
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

async fn happened(run: &mut Option<Run>) -> Happened {
    let Some(run) = run else { return std::future::pending().await };
    let checked = async {
        match &mut run.monitor {
            Some(monitor) => monitor.next().await,
            None => std::future::pending().await,
        }
    };
    let counted = async {
        if run.ooms.changed().await.is_err() {
            // Nobody counts any more: it is about to end.
            std::future::pending().await
        }
    };
    tokio::select! {
        // The task waits and does nothing else; if it fails, nobody saw the end.
        exit = &mut run.end => Happened::Ended(exit.unwrap_or(None)),
        () = counted => Happened::OutOfMemory,
        (result, since_start) = checked => Happened::Checked(result, since_start),
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

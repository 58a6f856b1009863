//! Stopping: the signal, then SIGKILL, then its shim and its cgroup; and what was to follow the end.

use std::time::Duration;

use guest_api::ErrorKind;
use guest_runtime::shim::Request as ShimRequest;
use tokio::time::Instant;

use super::{Driver, KILL_DEADLINE, Reply, answer};
use crate::failure::Failure;
use crate::services::containers::record::RunRecord;
use crate::services::containers::run;
use crate::services::containers::signal::{self, SIGKILL, SIGTERM};
use crate::services::containers::table::{Change, Phase, Request};

/// A container that is being stopped, and who waits for what.
pub(super) struct Stopping {
    pub(super) step: StopStep,
    /// When to take the next step.
    pub(super) deadline: Option<Instant>,
    pub(super) waiting: Vec<Reply>,
    /// These killed it and wait for the end; to them it is not a stop.
    pub(super) killed: Vec<Reply>,
    /// Then start it again, and tell these.
    pub(super) restart: Vec<Reply>,
    /// Then remove it, and tell these.
    pub(super) remove: Vec<Reply>,
    /// With the volumes that were made for it without a name.
    pub(super) remove_volumes: bool,
}

/// How hard a container is being stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopStep {
    /// The stop signal was sent.
    Asked,
    /// SIGKILL was sent.
    Killed,
    /// Its shim was killed too, and everything in its cgroup.
    Reaped,
}

impl Driver {
    pub(super) async fn stop(
        &mut self,
        signal: Option<i32>,
        seconds: Option<i64>,
        ask: impl FnOnce(&mut Stopping),
    ) {
        self.mark_stopped_by_user();
        if let Some(stopping) = &mut self.stopping {
            // Somebody is at it already; the more impatient one wins.
            ask(stopping);
            let deadline = deadline(seconds.unwrap_or(self.context.defaults.stop_timeout_seconds));
            if stopping.step == StopStep::Asked && deadline < stopping.deadline.or(deadline) {
                stopping.deadline = deadline;
            }
            return;
        }
        let seconds =
            seconds.or(self.record.config.stop_timeout).unwrap_or(self.context.defaults.stop_timeout_seconds);
        let mut stopping = Stopping {
            step: StopStep::Asked,
            deadline: deadline(seconds),
            waiting: Vec::new(),
            killed: Vec::new(),
            restart: Vec::new(),
            remove: Vec::new(),
            remove_volumes: false,
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
        signal::parse(&self.record.config.stop_signal).unwrap_or(SIGTERM)
    }

    /// A policy must not start it again, also not after a restart of the engine.
    fn mark_stopped_by_user(&mut self) {
        self.record.stopped_by_user = true;
        if let Some(run) = &self.run
            && let Err(error) = run::write_run_record(
                &self.context,
                &self.record,
                &RunRecord { started_at: run.live.started_at, stopped_by_user: true },
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
        guest_fault::point("stop.after-signal");
        self.event("kill", &[("signal", signal.to_string())]);
        Ok(())
    }

    /// Sends a signal. SIGKILL is answered when the container has ended.
    pub(super) async fn kill(&mut self, signal: i32, reply: Reply) {
        if signal == SIGKILL || self.phase == Phase::Restarting {
            return self.stop(Some(SIGKILL), Some(0), |stopping| stopping.killed.push(reply)).await;
        }
        // dockerd takes any signal for a stop when the container does not say which one is.
        let stops = self.record.config.stop_signal.is_empty() || signal == self.stop_signal();
        if stops {
            self.mark_stopped_by_user();
        }
        let mut result = self.signal(signal).await;
        if result.is_ok() && stops && self.phase == Phase::Paused {
            result = self.freeze(Request::Unpause, ShimRequest::Resume, Change::Unpaused, "unpause").await;
        }
        answer(reply, result);
    }

    /// SIGKILL through the shim, or without it when it does not answer.
    pub(super) async fn kill_now(&self) -> Result<(), Failure> {
        match self.signal(SIGKILL).await {
            Err(failure) if failure.kind == ErrorKind::Internal => {
                let end = run::reap(&self.context, &self.record.id).await;
                self.event("kill", &[("signal", SIGKILL.to_string())]);
                end.map(drop)
            }
            other => other,
        }
    }

    pub(super) fn give_up_stopping(&mut self) {
        let text = format!(
            "could not kill container {}: it did not end within {} s of SIGKILL",
            self.record.id,
            2 * KILL_DEADLINE.as_secs()
        );
        let stopping = self.stopping.take();
        for reply in stopping
            .into_iter()
            .flat_map(|it| it.waiting.into_iter().chain(it.killed).chain(it.restart).chain(it.remove))
        {
            answer(reply, Err(Failure::broken(&text)));
        }
    }

    /// It does not run any more: whoever waited for that goes on.
    pub(super) async fn stopped(&mut self) {
        let stopping = self.stopping.take();
        let (mut waiting, mut restart, mut remove) = (Vec::new(), Vec::new(), Vec::new());
        let mut volumes = self.record.host.auto_remove;
        if let Some(it) = stopping {
            (waiting, restart, remove) = (it.waiting, it.restart, it.remove);
            volumes |= it.remove_volumes;
            if !waiting.is_empty() || !restart.is_empty() {
                self.event("stop", &[]);
            }
            waiting.extend(it.killed);
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
        let result = if remove.is_empty() && !self.record.host.auto_remove {
            Ok(())
        } else {
            self.remove(volumes).await
        };
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
}

fn deadline(seconds: i64) -> Option<Instant> {
    u64::try_from(seconds)
        .ok()
        .map(|seconds| Instant::now() + Duration::from_secs(seconds.min(u64::from(u32::MAX))))
}

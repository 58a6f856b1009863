//! Taking over, at the engine's start, what an earlier engine left of a container.

use std::time::Duration;

use guest_runtime::shim::{Request as ShimRequest, Status};
use tokio::time::timeout;

use super::Driver;
use crate::services::containers::commit::PAUSED_FOR_COMMIT;
use crate::services::containers::health::{self, Check};
use crate::services::containers::record::{Live, RunRecord};
use crate::services::containers::run;
use crate::services::containers::shim::Shim;
use crate::services::containers::table::Phase;

/// How long taking a shim's state back may take at most when the engine starts.
const RESTORE_DEADLINE: Duration = Duration::from_secs(3);

/// Exit code of a container that ended with the machine, as dockerd gives it.
const LOST_EXIT_CODE: i32 = 255;

impl Driver {
    /// Takes over a container that an earlier engine started. `Err` when it does not run any more: the caller lets
    /// [`Driver::clean_up`] do the rest.
    pub async fn restore(&mut self, run_record: &RunRecord) -> Result<(), ()> {
        let shim = Shim::at(&self.context.run_folder(&self.record.id));
        let (status, pid, ooms) = match timeout(RESTORE_DEADLINE, shim.state()).await {
            Ok(Ok(state)) => (state.status, state.pid, state.ooms),
            Ok(Err(_)) => return Err(()),
            // It lives but does not answer now. Killing its container for that would be worse than waiting for it.
            Err(_) => {
                tracing::warn!(container = self.record.short_id(), "its shim does not answer");
                (Status::Running, run::recorded_pid(&self.context, &self.record.id), 0)
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
        let live = Live { pid, started_at: run_record.started_at };
        self.context.networks.restore(&self.record);
        match self.context.networks.settle(&mut self.record).await {
            Ok(false) => {}
            Ok(true) => {
                if let Err(error) = self.save().await {
                    tracing::error!(container = self.record.short_id(), %error, "cannot keep its networks");
                }
            }
            Err(error) => {
                tracing::warn!(container = self.record.short_id(), %error, "its networks are at odds")
            }
        }
        self.record.last.started_at = Some(live.started_at);
        self.record.stopped_by_user = run_record.stopped_by_user;
        self.record.last.health = Check::of(&self.record.config)
            .map(|_| health::read(&self.context.run_folder(&self.record.id)).unwrap_or_default());
        let note = self.context.run_folder(&self.record.id).join(PAUSED_FOR_COMMIT);
        let phase = match phase {
            Phase::Paused if note.exists() => {
                let unpaused = shim.ask("unpause", ShimRequest::Resume).await;
                match unpaused.map(|()| std::fs::remove_file(&note)) {
                    Ok(Ok(())) => Phase::Running,
                    Ok(Err(error)) => {
                        tracing::warn!(container = self.record.short_id(), %error, "a note stays behind");
                        Phase::Running
                    }
                    Err(error) => {
                        tracing::warn!(container = self.record.short_id(), %error, "it stays paused");
                        Phase::Paused
                    }
                }
            }
            phase => phase,
        };
        self.adopt(shim, live, None, ooms);
        self.phase = phase;
        if phase == Phase::Running {
            self.watch_health(true);
        }
        self.publish();
        Ok(())
    }

    /// Cleans up after a run whose shim is gone, and takes over its exit status, if there is one. `lost`: it ran, and
    /// nothing of the run is left to ask. For the start of the engine, before anybody else knows the driver.
    pub async fn clean_up(&mut self, run_record: Option<RunRecord>, lost: bool) {
        let exit = run::tear_down(&self.context, &self.record, None).await;
        if let Err(error) = run::remove_run_folder(&self.context, &self.record.id).await {
            tracing::warn!(container = self.record.short_id(), %error, "a run folder stays behind");
        }
        match run_record {
            Some(run_record) => {
                self.unwatched();
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
            if let Err(error) = self.remove(true).await {
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
}

//! What a running container does and uses: `top` and `stats`.

use std::time::Duration;

use guest_api::ErrorKind;
use guest_api::container::Top;
use guest_api::stats::{CpuStats, Stats};
use guest_runtime::cgroup::Cgroup;
use guest_runtime::shim::{STATE_FILE, StateRecord, record};
use tokio::sync::mpsc;

use super::inspect::NEVER;
use super::record::View;
use super::service::Containers;
use super::stats::{self, Sampler};
use super::table::{Phase, Request, Verdict, admit};
use super::top::{self, Layout};
use crate::failure::Failure;

/// Time between samples.
const PERIOD: Duration = Duration::from_secs(1);

/// How `stats` is to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsMode {
    /// Samples until the client goes.
    Stream,
    /// One sample, with the CPU time of another a second before it.
    Once,
    /// One sample at once.
    OneShot,
}

impl Containers {
    /// The control group of a container that runs.
    fn cgroup(&self, view: &View) -> Result<Cgroup, Failure> {
        let id = &view.record.id;
        let not_running = || Failure::conflict(guest_api::error::not_running(id));
        let state = record::read::<StateRecord>(&self.context().run_folder(id), STATE_FILE)
            .map_err(|error| Failure::internal("cannot read the container's state", &error))?;
        let path = state.and_then(|state| state.cgroup).ok_or_else(not_running)?;
        Cgroup::open(&path).map_err(|error| Failure::internal("cannot find the container's cgroup", &error))
    }

    /// Its processes, as `ps` with these words shows them.
    pub async fn top(&self, wanted: &str, words: &str) -> Result<Top, Failure> {
        let layout = Layout::parse(if words.is_empty() { "-ef" } else { words })?;
        let view = self.view(wanted)?;
        if view.phase == Phase::Restarting {
            return Err(Failure::conflict(format!(
                "Container {} is restarting, wait until the container is running",
                view.record.id
            )));
        }
        if let Verdict::Refuse(kind, text) =
            admit(view.phase, Request::Resize, &view.record.id, &view.record.name)
        {
            return Err(Failure::new(kind, text));
        }
        let cgroup = self.cgroup(&view)?;
        let listed = tokio::task::spawn_blocking(move || top::list(&cgroup.processes(), &layout)).await;
        let listed = listed.map_err(|error| Failure::internal("listing the processes failed", &error))?;
        let attributes = view.record.event_attributes();
        self.context().events.publish("container", "top", &view.record.id, attributes);
        Ok(listed)
    }

    /// Samples of what it uses.
    pub async fn stats(&self, wanted: &str, mode: StatsMode) -> Result<mpsc::Receiver<Stats>, Failure> {
        let mut views = self.watch(wanted)?;
        let (output, samples) = mpsc::channel(1);
        let service = self.clone();
        self.spawn(async move {
            let mut before: Option<(String, CpuStats)> = None;
            loop {
                let view = views.borrow_and_update().clone();
                if view.removed {
                    return;
                }
                let mut sample = match service.sample(&view).await {
                    Ok(sample) => sample,
                    Err(error) => {
                        tracing::warn!(container = view.record.short_id(), %error, "no sample");
                        return;
                    }
                };
                let live = sample.read != NEVER;
                let first = before.is_none();
                let own = (sample.read.clone(), sample.cpu_stats.clone());
                if mode != StatsMode::OneShot
                    && let Some((read, cpu)) = before.replace(own)
                {
                    (sample.preread, sample.precpu_stats) = (read, cpu);
                }
                // The first of two only says what the second is counted from.
                let only_counted_from = mode == StatsMode::Once && first && live;
                if !only_counted_from && (output.send(sample).await.is_err() || mode != StatsMode::Stream) {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(PERIOD) => {}
                    () = output.closed() => return,
                }
            }
        });
        Ok(samples)
    }

    async fn sample(&self, view: &View) -> Result<Stats, Failure> {
        let record = &view.record;
        let empty = || Ok(stats::empty(&record.id, &record.name));
        let Some(live) = &view.live else { return empty() };
        let cgroup = match self.cgroup(view) {
            Err(failure) if failure.kind == ErrorKind::Conflict => return empty(),
            other => other?,
        };
        let own_network = !matches!(record.host.network_mode.as_str(), "host" | "none");
        let sampler = Sampler {
            id: record.id.clone(),
            name: record.name.clone(),
            cgroup,
            network_of: own_network.then_some(live.pid),
        };
        let sample = tokio::task::spawn_blocking(move || sampler.sample()).await;
        sample.map_err(|error| Failure::internal("reading the container's usage failed", &error))
    }
}

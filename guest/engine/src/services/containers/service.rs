//! The container service: makes containers, finds them, hands requests to their drivers, and takes over at its start
//! those that an earlier engine left running.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use guest_api::container::WaitError;
use guest_api::{
    ApiVersion, ContainerConfig, ContainerCreate, ContainerCreated, ContainerInspect, ContainerSummary,
    HostConfig, WaitResult,
};
use guest_images::{Image, ImageConfig, InUse, Platform};
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::driver::{Attachment, Command, Driver};
use super::index::{Handle, Index};
use super::list::{self, ListQuery};
use super::log::{LogQuery, LogReader};
use super::network::NetworkChange;
use super::record::{LastRun, Record, View};
use super::run::{self, Context};
use super::shim::Streams;
use super::table::Phase;
use super::{create, follow, inspect, logging, mounts, names, peers, runtime};
use crate::failure::Failure;
use crate::host::Place;
use crate::services::prune::Turn;
use crate::store;

/// Requests one driver may have waiting; more make their senders wait.
const COMMANDS_WAITING: usize = 64;
/// Batches of a log that may wait for a slow client.
const LOG_BATCHES_WAITING: usize = 4;
/// How long containers have to stop when the engine ends with them.
const SHUTDOWN_STOP_SECONDS: i64 = 8;
const SHUTDOWN_GRACE: Duration = Duration::from_secs(4);

/// What a `wait` waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaitCondition {
    #[default]
    NotRunning,
    NextExit,
    Removed,
}

/// The query of a removal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoveQuery {
    pub force: bool,
    /// Volumes that were made for it without a name too.
    pub volumes: bool,
}

/// The container service. Cheap to clone.
#[derive(Clone)]
pub struct Containers {
    context: Arc<Context>,
    index: Arc<Index>,
    tasks: TaskTracker,
    prune_turn: Arc<Turn>,
}

impl Containers {
    /// Takes over what an earlier engine left: containers that run go on, leavings of others go.
    pub async fn open(context: Arc<Context>, tasks: TaskTracker) -> anyhow::Result<Self> {
        let index = context.index.clone();
        let service = Self { context, index, tasks, prune_turn: Arc::default() };
        // Logs, environments and root file systems are the engine's user's alone.
        for folder in [&service.context.data, &service.context.run] {
            make_private(folder)?;
        }
        super::archive::tree::sweep(&service.context)?;
        begin_empty(&service.context.filters())?;
        let records: Vec<Record> =
            service.context.store.all(store::CONTAINERS)?.into_iter().map(|(_, record)| record).collect();
        let known: BTreeSet<String> = records.iter().map(|record| record.id.clone()).collect();
        tracing::info!(containers = known.len(), "containers found");
        service.sweep_unknown(&known).await?;

        let mut restored = tokio::task::JoinSet::new();
        for record in records {
            restored.spawn(restore(service.context.clone(), service.index.clone(), record));
        }
        let mut drivers = Vec::new();
        while let Some(driver) = restored.join_next().await {
            drivers.push(driver?);
        }
        let live: Vec<String> = service
            .index
            .all()
            .iter()
            .map(Handle::view)
            .filter(|view| view.live.is_some())
            .map(|view| view.record.id.clone())
            .collect();
        // Before any container is started: then every other network is a leaving.
        for failure in service.context.networks.sweep(&live).await {
            tracing::warn!(error = %failure, "left behind");
        }
        mounts::restore(&service.context, &service.views()).await;
        for (mut driver, live) in drivers {
            service.tasks.spawn(async move {
                if !live {
                    driver.resume_policy().await;
                }
                driver.drive().await;
            });
        }
        Ok(service)
    }

    /// Removes folders and writable layers of containers that have no record: an engine was killed while it made or
    /// removed them.
    async fn sweep_unknown(&self, known: &BTreeSet<String>) -> anyhow::Result<()> {
        let short: BTreeSet<&str> = known.iter().map(|id| &id[..12]).collect();
        for name in folder_names(&self.context.run)?.into_iter().filter(|name| !short.contains(name.as_str()))
        {
            if name.len() != 12 {
                continue;
            }
            let swept = async {
                run::reap(&self.context, &name).await?;
                let (snapshotter, target) = (self.context.snapshotter(), self.context.rootfs(&name));
                let key = name.clone();
                run::blocking(move || snapshotter.unmount(&key, &target)).await?;
                run::remove_run_folder(&self.context, &name).await
            };
            if let Err(error) = swept.await {
                tracing::warn!(container = name, %error, "left behind");
            }
        }
        let snapshotter = self.context.snapshotter();
        let snapshots = run::blocking(move || snapshotter.list()).await?;
        let keys: Vec<String> = snapshots.into_iter().map(|snapshot| snapshot.key).collect();
        mounts::sweep_snapshots(&self.context, &keys, known).await;
        let ids = keys.into_iter().chain(folder_names(&self.context.data)?);
        let unknown: BTreeSet<String> = ids.filter(|id| id.len() == 64 && !known.contains(id)).collect();
        for id in unknown {
            match run::remove_leavings(&self.context, &id).await {
                Ok(()) => {
                    tracing::info!(container = &id[..12], "half made or removed: its leavings are gone")
                }
                Err(error) => tracing::warn!(container = &id[..12], %error, "left behind"),
            }
        }
        Ok(())
    }

    /// Makes a container.
    pub async fn create(
        &self,
        name: Option<&str>,
        version: ApiVersion,
        mut create: ContainerCreate,
        platform: Option<&Platform>,
    ) -> Result<ContainerCreated, Failure> {
        let name = name.filter(|name| !name.is_empty()).map(names::check).transpose()?;
        let capacity = &self.context.capacity;
        create::fill_settings(&mut create, &self.context.defaults);
        let (quirks, more) = mounts::adapt(&mut create.host_config, version)?;
        let mut warnings = create::check(&mut create, capacity)?;
        warnings.extend(more);
        runtime::choose(&create.host_config.runtime, &self.context.defaults)?;
        peers::resolve(&self.index, &mut create.host_config)?;
        let wanted = create.config.image.clone();
        let image = self
            .context
            .images
            .resolve(&wanted)
            .await
            .map_err(|error| crate::services::images::failure(&error))?;
        warnings.extend(create::platform(&wanted, &platform_of(&image), platform)?);
        let id = self.index.new_id();
        let image_config: ContainerConfig = crate::services::images::container_config(&image);
        let mut resolved = create::resolve(create, &image_config, &id, capacity)?;
        self.context.networks.check(&resolved.networks)?;
        super::network::resolve_links(&self.context.index, &mut resolved.host.links)?;
        let data_root = self.context.data_root();
        let sources = mounts::sources(&self.context, &resolved.host).await?;
        let mounts = mounts::wanted(
            &resolved.config,
            &resolved.host,
            quirks,
            data_root,
            |source| sources.get(source).is_some_and(Place::is_missing),
            |other| Ok(self.view(other)?.record.mounts.clone()),
        )?;
        let name = self.index.reserve_name(name, &id)?;
        let mut record = Record {
            id: id.clone(),
            name: name.clone(),
            created: Timestamp::now(),
            image_id: image.id.to_string(),
            config: resolved.config,
            host: resolved.host,
            mounts: Vec::new(),
            networks: Some(resolved.networks),
            last: LastRun::default(),
            stopped_by_user: false,
            restarts: 0,
        };
        let made = self.make(&mut record, mounts, image.chain()).await;
        if let Err(failure) = made {
            self.index.release_name(&name, &id);
            return Err(failure);
        }
        self.context.events.publish("container", "create", &id, record.event_attributes());
        let (driver, handle) = new_driver(&self.context, &self.index, record, Phase::Created);
        self.index.insert(&id, handle);
        self.tasks.spawn(driver.drive());
        Ok(ContainerCreated { id, warnings })
    }

    /// Volumes, writable layer and record; on failure nothing of it is left.
    async fn make(
        &self,
        record: &mut Record,
        wanted: Vec<mounts::Wanted>,
        chain: Option<guest_images::ChainId>,
    ) -> Result<(), Failure> {
        let held = mounts::take(&self.context, &record.id, wanted).await?;
        record.mounts.clone_from(&held.points);
        let made = async {
            let (snapshotter, key) = (self.context.snapshotter(), record.id.clone());
            run::blocking(move || snapshotter.prepare(&key, chain)).await?;
            guest_fault::point("create.after-snapshot");
            mounts::populate(&self.context, record).await?;
            // The record last: a crash before it leaves a snapshot without an owner, which the next engine sweeps.
            self.context.save(record).await
        }
        .await;
        guest_fault::point("create.after-record");
        let Err(failure) = made else { return Ok(()) };
        if let Err(also) = run::remove(&self.context, record, true).await {
            tracing::warn!(container = record.short_id(), error = %also, "left behind");
        }
        mounts::give_back(&self.context, &record.id, &held).await;
        Err(failure)
    }

    fn find(&self, wanted: &str) -> Result<Handle, Failure> {
        self.index.find(wanted)
    }

    /// What was published last about a container.
    pub fn view(&self, wanted: &str) -> Result<Arc<View>, Failure> {
        Ok(self.find(wanted)?.view())
    }

    /// Owns tasks that outlive the request they were made for.
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// What is published about a container from now on.
    pub(super) fn watch(&self, wanted: &str) -> Result<watch::Receiver<Arc<View>>, Failure> {
        Ok(self.find(wanted)?.views)
    }

    /// Runs something that the engine waits for at its end.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(work);
    }

    pub(super) fn prune_turn(&self) -> &Turn {
        &self.prune_turn
    }

    /// All views.
    pub fn views(&self) -> Vec<View> {
        self.index.all().iter().map(|handle| View::clone(&handle.view())).collect()
    }

    async fn ask<T>(
        &self,
        wanted: &str,
        command: impl FnOnce(oneshot::Sender<Result<T, Failure>>) -> Command,
    ) -> Result<T, Failure> {
        let handle = self.find(wanted)?;
        let (reply, answer) = oneshot::channel();
        // A driver that has gone took its container with it.
        let gone = || Failure::not_found(guest_api::error::no_such_container(wanted));
        handle.commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub async fn start(&self, wanted: &str) -> Result<(), Failure> {
        self.ask(wanted, |reply| Command::Start { reply }).await
    }

    pub async fn stop(&self, wanted: &str, signal: Option<i32>, timeout: Option<i64>) -> Result<(), Failure> {
        self.ask(wanted, |reply| Command::Stop { signal, timeout, reply }).await
    }

    pub async fn restart(
        &self,
        wanted: &str,
        signal: Option<i32>,
        timeout: Option<i64>,
    ) -> Result<(), Failure> {
        self.ask(wanted, |reply| Command::Restart { signal, timeout, reply }).await
    }

    pub async fn kill(&self, wanted: &str, signal: i32) -> Result<(), Failure> {
        self.ask(wanted, |reply| Command::Kill { signal, reply }).await
    }

    /// Changes limits and the restart policy. What cannot be enforced is left out; the words for the user come back.
    pub async fn update(&self, wanted: &str, mut changes: HostConfig) -> Result<Vec<String>, Failure> {
        let warnings = create::check_update(&mut changes, &self.context.capacity)?;
        self.ask(wanted, |reply| Command::Update { changes: Box::new(changes), reply }).await?;
        Ok(warnings)
    }

    pub async fn pause(&self, wanted: &str) -> Result<(), Failure> {
        self.ask(wanted, |reply| Command::Pause { reply }).await
    }

    pub async fn unpause(&self, wanted: &str) -> Result<(), Failure> {
        self.ask(wanted, |reply| Command::Unpause { reply }).await
    }

    pub async fn resize(&self, wanted: &str, width: u16, height: u16) -> Result<(), Failure> {
        self.ask(wanted, |reply| Command::Resize { width, height, reply }).await
    }

    pub async fn remove(&self, wanted: &str, query: RemoveQuery) -> Result<(), Failure> {
        let RemoveQuery { force, volumes } = query;
        self.ask(wanted, |reply| Command::Remove { force, volumes, reply }).await
    }

    pub async fn rename(&self, wanted: &str, name: &str) -> Result<(), Failure> {
        let view = self.view(wanted)?;
        if name.is_empty() {
            return Err(Failure::invalid("Neither old nor new names may be empty"));
        }
        // dockerd has put the slash before it by then.
        let shown = format!("/{}", name.trim_start_matches('/'));
        let name = names::check(&shown).map_err(|failure| Failure {
            message: format!("Error when allocating new name: {}", failure.message),
            ..failure
        })?;
        let (id, old) = (view.record.id.clone(), view.record.name.clone());
        if name == old {
            return Err(Failure::invalid("Renaming a container with the same name as its current name"));
        }
        self.index.reserve_name(Some(name), &id)?;
        let result = self.ask(&id, |reply| Command::Rename { name: name.to_owned(), reply }).await;
        self.index.release_name(if result.is_ok() { &old } else { name }, &id);
        result
    }

    /// Takes a link away: `parent/alias`.
    pub async fn unlink(&self, name: &str) -> Result<(), Failure> {
        let (parent, alias) = name.trim_start_matches('/').split_once('/').ok_or_else(|| {
            Failure::invalid("Conflict, cannot remove the default link name of the container")
        })?;
        self.change_network(parent, NetworkChange::Unlink { alias: alias.to_owned() }).await
    }

    /// Joins a network, or leaves one.
    pub async fn change_network(&self, wanted: &str, change: NetworkChange) -> Result<(), Failure> {
        self.ask(wanted, |reply| Command::Network { change, reply }).await
    }

    pub async fn attach(&self, wanted: &str, streams: Streams) -> Result<Attachment, Failure> {
        self.ask(wanted, |reply| Command::Attach { streams, reply }).await
    }

    /// Waits; the future is independent of the service and safe to drop.
    pub fn wait(
        &self,
        wanted: &str,
        condition: WaitCondition,
    ) -> Result<impl Future<Output = Result<WaitResult, Failure>> + use<>, Failure> {
        let mut views = self.find(wanted)?.views;
        // What "next" counts from is the moment of asking.
        let first = views.borrow_and_update().clone();
        Ok(async move {
            let met = |view: &View| match condition {
                // One that cannot be removed says why.
                WaitCondition::Removed => view.removed || view.phase == Phase::Dead,
                WaitCondition::NextExit => view.runs_ended > first.runs_ended || view.removed,
                WaitCondition::NotRunning => {
                    view.runs_ended > first.runs_ended
                        || view.removed
                        || !(view.phase.is_live() || view.phase == Phase::Restarting)
                }
            };
            let Ok(view) = views.wait_for(|view| met(view)).await else {
                return Err(Failure::broken("the engine is ending"));
            };
            let last = &view.record.last;
            // Once it is gone, why it did not start does not matter any more.
            let error = Some(last.error.clone()).filter(|text| !text.is_empty() && !view.removed);
            Ok(WaitResult {
                status_code: i64::from(last.exit_code),
                error: error.map(|message| WaitError { message }),
            })
        })
    }

    /// The lines of `ps`. `ancestor` tells whether an image is, or stands on, the one named.
    pub fn list(
        &self,
        query: &ListQuery,
        ancestor: impl Fn(&Record, &str) -> bool,
    ) -> Result<Vec<ContainerSummary>, Failure> {
        let now = Timestamp::now();
        let mut views = self.views();
        if let Some(names) = query.filters.get("network") {
            views.retain(|view| self.context.networks.is_on_any(view, names));
        }
        let published = list::ports(&query.filters, "publish")?;
        if !published.is_empty() {
            views.retain(|view| self.context.networks.publishes_any(view, &published));
        }
        let chosen = list::select(views, query, ancestor)?;
        Ok(chosen.iter().map(|view| list::summary(view, &self.context.networks, now)).collect())
    }

    /// Everything about one container.
    pub fn inspect(
        &self,
        wanted: &str,
        execs: impl FnOnce(&str) -> Vec<String>,
    ) -> Result<ContainerInspect, Failure> {
        let view = self.view(wanted)?;
        Ok(inspect::inspect(&self.context, &view, execs(&view.record.id)))
    }

    /// The log as a stream of batches.
    pub fn logs(
        &self,
        wanted: &str,
        query: LogQuery,
    ) -> Result<mpsc::Receiver<std::io::Result<Bytes>>, Failure> {
        let handle = self.find(wanted)?;
        let view = handle.view();
        let id = &view.record.id;
        let folder = self.context.data_folder(id);
        let Some((path, format)) = logging::readable(&folder, &view.record) else {
            return Err(Failure::not_implemented("configured logging driver does not support reading"));
        };
        if !query.stdout && !query.stderr {
            return Err(Failure::invalid("Bad parameters: you must choose at least one stream"));
        }
        let folder = path.parent().map_or(folder, Path::to_owned);
        let following = (query.follow && view.live.is_some() && folder.exists()).then_some(handle.views);
        let reader = LogReader::open(&path, format, query, view.record.config.tty)
            .map_err(|error| Failure::internal("cannot open the container's log", &error))?;
        let (output, batches) = mpsc::channel(LOG_BATCHES_WAITING);
        self.tasks.spawn(follow::send(reader, folder, following, output));
        Ok(batches)
    }

    /// Bytes a container has written into its layer.
    pub async fn written_bytes(&self, wanted: &str) -> Result<i64, Failure> {
        let (snapshotter, id) = (self.context.snapshotter(), self.view(wanted)?.record.id.clone());
        let usage = run::blocking(move || snapshotter.usage(&id)).await?;
        Ok(i64::try_from(usage.content_bytes).unwrap_or(i64::MAX))
    }

    /// The containers made from an image.
    pub fn using_image(&self, image_id: &str) -> Vec<InUse> {
        let views = self.views();
        let using = views.iter().filter(|view| view.record.image_id == image_id);
        using.map(|view| InUse { container: view.record.id.clone(), running: view.phase.is_live() }).collect()
    }

    /// Lets go of every driver; with `stop`, ends the containers first, all at once. Each gets the seconds it was made
    /// with, `seconds_max` at most; negative is no bound.
    pub async fn shut_down(&self, stop: bool, seconds_max: Option<i64>) {
        if stop {
            let most = seconds_max.unwrap_or(SHUTDOWN_STOP_SECONDS);
            let usual = self.context.defaults.stop_timeout_seconds;
            let stops = self.index.all().into_iter().filter(|handle| {
                let phase = handle.view().phase;
                phase.is_live() || phase == Phase::Restarting
            });
            let mut stopping = tokio::task::JoinSet::new();
            for handle in stops {
                stopping.spawn(async move {
                    let own = handle.view().record.config.stop_timeout.unwrap_or(usual);
                    let seconds = if own < 0 || (0..own).contains(&most) { most } else { own };
                    let (reply, answer) = oneshot::channel();
                    let command = Command::Stop { signal: None, timeout: Some(seconds), reply };
                    if handle.commands.send(command).await.is_ok() {
                        // A refusal means it has ended by itself.
                        let _ = answer.await;
                    }
                });
            }
            let all = async { while stopping.join_next().await.is_some() {} };
            match u64::try_from(most) {
                Ok(seconds) => {
                    let deadline = Duration::from_secs(seconds) + SHUTDOWN_GRACE;
                    if timeout(deadline, all).await.is_err() {
                        tracing::warn!("containers did not stop within {} s", deadline.as_secs());
                    }
                }
                Err(_) => all.await,
            }
        }
        self.index.clear();
    }
}

fn platform_of(image: &Image) -> Platform {
    let ImageConfig { os, architecture, variant, .. } = &image.config;
    Platform { os: os.clone(), architecture: architecture.clone(), variant: variant.clone() }
}

fn new_driver(context: &Arc<Context>, index: &Arc<Index>, record: Record, phase: Phase) -> (Driver, Handle) {
    let (commands, queue) = mpsc::channel(COMMANDS_WAITING);
    let (driver, views) = Driver::new(context.clone(), index.clone(), record, phase, queue);
    (driver, Handle { commands, views })
}

/// A driver for a record that was stored; and whether the container runs.
async fn restore(context: Arc<Context>, index: Arc<Index>, record: Record) -> (Driver, bool) {
    let (id, name) = (record.id.clone(), record.name.clone());
    let run_folder = context.run_folder(&id);
    let run_record = run::read_run_record(&run_folder);
    let ran = record.last.started_at.is_some();
    let phase = if ran { Phase::Exited } else { Phase::Created };
    // Told as running by its last record, but not by its end: the machine stopped underneath.
    let lost = run_record.is_none() && record.last.started_at > record.last.finished_at;
    let (mut driver, handle) = new_driver(&context, &index, record, phase);
    let mut live = false;
    if let Some(run_record) = &run_record {
        live = driver.restore(run_record).await.is_ok();
    }
    if !live && (run_folder.exists() || lost) {
        driver.clean_up(run_record, lost).await;
    }
    if index.reserve_name(Some(&name), &id).is_err() {
        tracing::error!(container = &id[..12], name, "two containers have one name");
    }
    index.insert(&id, handle);
    (driver, live)
}

fn make_private(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
}

/// For what may be of another version of this program, or half written when the power went.
fn begin_empty(folder: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => make_private(folder),
    }
}

fn folder_names(folder: &Path) -> std::io::Result<Vec<String>> {
    std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

//! What it takes to make a container run, and to take it down again: mounts, network, files, spec, shim.
//!
//! Starting is a plan whose steps leave their reverses; a failure at any step leaves nothing behind. Everything that
//! exists only while a container runs is below its run folder or named after its id, so that an engine that finds the
//! leavings of a killed one can remove them without a record of them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use guest_api::ErrorKind;
use guest_images::{Images, Snapshotter};
use guest_runtime::shim::{
    ConsoleSize, ErrorKind as ShimErrorKind, Exit, Request as ShimRequest, SPEC_FILE, STATE_FILE, ShimSpec,
    StateRecord, Stdin,
};
use guest_volumes::make_folders;
use jiff::Timestamp;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::capacity::Capacity;
use super::index::Index;
use super::peers::{self, Shared};
use super::record::{Live, Record, RunRecord};
use super::shim::{Shim, ShimError, Streams};
use super::spec::{self, Devices, NetworkNamespace};
use super::{logging, mounts, network, rootfs, runtime, user};
use crate::config::ContainerDefaults;
use crate::failure::Failure;
use crate::host::Shares;
use crate::plan::Undo;
use crate::services::events::Events;
use crate::services::networks::{Attached, Networks};
use crate::services::volumes::Volumes;
use crate::store::{self, Store};

/// Name of the [`RunRecord`] in a run folder.
const RUN_FILE: &str = "run.json";
/// Where the root file system is mounted, in a run folder.
const ROOTFS: &str = "rootfs";
/// The bundle handed to the shim, in a run folder.
const BUNDLE: &str = "oci";
/// How long a shim whose container has ended may take to clean up before we do it.
const DELETE_DEADLINE: Duration = Duration::from_secs(10);
/// The host, for containers in the machine: our NAT passes this address on to the host's loopback.
const MACHINE_HOST: std::net::Ipv4Addr = std::net::Ipv4Addr::new(198, 18, 0, 254);

/// What every driver shares.
pub struct Context {
    pub store: Store,
    pub images: Images,
    pub networks: Arc<Networks>,
    pub volumes: Arc<Volumes>,
    pub events: Events,
    /// Where the sources of binds are.
    pub shares: Shares,
    pub shim: PathBuf,
    /// On a Linux host, not in our machine.
    pub native: bool,
    /// What the settings give a container that says nothing itself.
    pub defaults: ContainerDefaults,
    /// `<data root>/containers`.
    pub data: PathBuf,
    /// `<run root>/containers`.
    pub run: PathBuf,
    /// The mount below which all mounts of containers are, if they are below one.
    pub mounts: Option<PathBuf>,
    /// What this engine can grant.
    pub capacity: Capacity,
    pub index: Arc<Index>,
}

impl Context {
    /// Where everything that lasts is.
    pub fn data_root(&self) -> &Path {
        self.data.parent().unwrap_or(&self.data)
    }

    pub fn data_folder(&self, id: &str) -> PathBuf {
        self.data.join(id)
    }

    /// Named after the short id: shorter paths, and ids are made so that these differ.
    pub fn run_folder(&self, id: &str) -> PathBuf {
        self.run.join(&id[..12])
    }

    /// Where shims leave the seccomp filters that they made, for each other.
    pub fn filters(&self) -> PathBuf {
        self.run.with_file_name("filters")
    }

    pub fn rootfs(&self, id: &str) -> PathBuf {
        self.run_folder(id).join(ROOTFS)
    }

    pub fn snapshotter(&self) -> Snapshotter {
        self.images.snapshotter().clone()
    }

    /// What `host-gateway` stands for: one address, or one of each family.
    pub(super) fn host_gateways(&self) -> Vec<std::net::IpAddr> {
        match self.networks.host_gateways() {
            [] if self.native => vec![self.networks.gateway().into()],
            [] => vec![MACHINE_HOST.into()],
            given => given.to_vec(),
        }
    }

    pub async fn save(&self, record: &Record) -> Result<(), Failure> {
        let saved = self.store.put(store::CONTAINERS, &record.id, record).await;
        saved.map_err(|error| Failure::internal("cannot keep the container's record", &error))
    }

    /// Queues a write that nobody waits for; a failure of the store shows at the next one that is.
    pub async fn save_later(&self, record: &Record) -> Result<(), Failure> {
        let queued = self.store.put_later(store::CONTAINERS, &record.id, record).await;
        queued.map(drop).map_err(|error| Failure::internal("cannot keep the container's record", &error))
    }
}

/// A container that runs now.
pub struct Started {
    pub shim: Shim,
    pub live: Live,
    pub child: Option<Child>,
}

/// Starts a container. Clients that attached before get their streams before its first byte of output.
pub async fn start(
    context: &Arc<Context>,
    record: &Record,
    pending: Vec<(Streams, oneshot::Sender<UnixStream>)>,
) -> Result<Started, Failure> {
    let mut undo = Undo::default();
    match start_steps(context, record, pending, &mut undo).await {
        Ok(started) => {
            undo.commit();
            Ok(started)
        }
        Err(failure) => {
            for error in undo.unwind().await {
                tracing::warn!(container = record.short_id(), error = format!("{error:#}"), "left behind");
            }
            Err(failure)
        }
    }
}

async fn start_steps(
    context: &Arc<Context>,
    record: &Record,
    pending: Vec<(Streams, oneshot::Sender<UnixStream>)>,
    undo: &mut Undo,
) -> Result<Started, Failure> {
    let run_folder = context.run_folder(&record.id);
    clear_run_folder(context, record).await?;
    let io = |what: &str, error: &std::io::Error| Failure::internal(what, error);
    tokio::fs::create_dir_all(run_folder.join(BUNDLE))
        .await
        .map_err(|error| io("cannot make the container's run folder", &error))?;
    undo.push("remove the run folder", {
        let (context, id) = (context.clone(), record.id.clone());
        move || async move { Ok(remove_run_folder(&context, &id).await?) }
    });

    let shared = peers::find(context, record)?;
    peers::mount_shm(context, record)?;

    // The two slow ones at once. Both reverses are recorded before a failure of either is looked at.
    let (mounted, attached) =
        tokio::join!(mount_rootfs(context, &record.id), context.networks.attach(record));
    if mounted.is_ok() {
        undo.push("unmount the root file system", {
            let (context, id) = (context.clone(), record.id.clone());
            move || async move { Ok(unmount_rootfs(&context, &id).await?) }
        });
    }
    if attached.is_ok() {
        undo.push("remove the network", {
            let (context, record) = (context.clone(), record.clone());
            move || async move { Ok(network::leave(&context, &record).await?) }
        });
    }
    mounted?;
    guest_fault::point("start.after-mount");
    let attached = attached?;

    let ready = mounts::make_ready(context, record, undo).await?;
    let temporary = ready.temporary;
    let prepared = {
        let (context, record) = (context.clone(), record.clone());
        tokio::task::spawn_blocking(move || prepare_files(&context, &record, &ready, &attached, &shared))
    };
    prepared.await.map_err(|error| Failure::internal("preparing the container failed", &error))??;

    guest_fault::point("start.after-files");
    let (shim, child) = Shim::launch(&context.shim, &run_folder)
        .await
        .map_err(|error| Failure::internal("cannot start the container's shim", &error))?;
    // Whoever ends the plan takes the child: its reverse, or the driver.
    let child = Arc::new(Mutex::new(Some(child)));
    undo.push("end the shim", {
        let (context, id, child) = (context.clone(), record.id.clone(), child.clone());
        move || async move {
            reap(&context, &id).await?;
            if let Some(mut child) = take(&child) {
                child.wait().await.context("cannot wait for the shim")?;
            }
            Ok(())
        }
    });
    guest_fault::point("start.after-shim");
    let pid = shim.create().await.map_err(create_failure)?;
    guest_fault::point("start.after-create");
    if temporary {
        // The container has mounts of its own now.
        let cleared = tokio::task::spawn_blocking(move || mounts::clear(&run_folder)).await;
        cleared
            .map_err(|error| Failure::internal("clearing up after the start failed", &error))?
            .map_err(|error| io("cannot unmount what was mounted for the start", &error))?;
    }
    for (streams, client) in pending {
        if client.is_closed() {
            continue;
        }
        let stream = shim.attach(None, streams).await.map_err(shim_failure)?;
        // Gone meanwhile: its stream closes.
        let _ = client.send(stream);
    }
    let started_at = Timestamp::now();
    let run_record = RunRecord { started_at, stopped_by_user: false };
    write_run_record(context, record, &run_record)?;
    guest_fault::point("start.after-record");
    shim.start(None).await.map_err(create_failure)?;
    guest_fault::point("start.after-start");
    Ok(Started { shim, live: Live { pid, started_at }, child: take(&child) })
}

fn take(child: &Mutex<Option<Child>>) -> Option<Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner).take()
}

async fn mount_rootfs(context: &Arc<Context>, id: &str) -> Result<(), Failure> {
    let (snapshotter, id, target) = (context.snapshotter(), id.to_owned(), context.rootfs(id));
    blocking(move || snapshotter.mount(&id, &target)).await
}

async fn unmount_rootfs(context: &Arc<Context>, id: &str) -> Result<(), Failure> {
    let (snapshotter, target, folder) = (context.snapshotter(), context.rootfs(id), context.run_folder(id));
    let id = id.to_owned();
    blocking(move || {
        let unmounted = snapshotter.unmount(&id, &target);
        if let Err(error) = peers::unmount_shm(&folder) {
            tracing::warn!(folder = %folder.display(), %error, "shared memory stays mounted");
        }
        unmounted
    })
    .await
}

/// Runs a call of the image store that blocks.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> guest_images::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let result = tokio::task::spawn_blocking(work).await;
    result
        .map_err(|error| Failure::internal("the image store failed", &error))?
        .map_err(|error| crate::services::images::failure(&error))
}

/// Writes everything the shim reads, and prepares the mounted root file system.
fn prepare_files(
    context: &Context,
    record: &Record,
    mounts: &mounts::Ready,
    attached: &Attached,
    shared: &Shared,
) -> Result<(), Failure> {
    let rootfs = context.rootfs(&record.id);
    let data = context.data_folder(&record.id);
    let run_folder = context.run_folder(&record.id);
    let io = |what: &'static str| move |error: std::io::Error| Failure::internal(what, &error);

    let passwd =
        rootfs::read_text(&rootfs, "/etc/passwd").map_err(io("cannot read the image's /etc/passwd"))?;
    let group = rootfs::read_text(&rootfs, "/etc/group").map_err(io("cannot read the image's /etc/group"))?;
    let extra_groups = record.host.group_add.as_deref().unwrap_or_default();
    let user = user::resolve(&record.config.user, extra_groups, &passwd, &group)?;
    if !record.config.working_dir.is_empty() {
        rootfs::open(&rootfs)
            .and_then(|root| make_folders(root, Path::new(&record.config.working_dir)))
            .map_err(io("cannot make the working directory"))?;
    }
    std::fs::create_dir_all(&data).map_err(io("cannot make the container's folder"))?;
    let mut record = network::named(record, attached);
    let files = network::write_files(context, &record, attached)?;
    let linked = network::link_environment(context, &record)?;
    record.config.env.get_or_insert_default().splice(0..0, linked);
    let record = &record;

    let devices = Devices::look_up(&record.host)?;
    let network = attached.namespace.clone().map_or(NetworkNamespace::Host, NetworkNamespace::Path);
    let spec = spec::build(&spec::Input {
        record,
        user: &user,
        rootfs: &rootfs,
        files: &files,
        network: &network,
        mounts,
        grantable: &context.capacity.grantable,
        defaults: &context.defaults,
        devices: &devices,
        peers: shared.peers,
        shm: shared.shm.as_deref(),
        init: &context.shim,
    })?;
    write_json(&run_folder.join(BUNDLE).join("config.json"), &spec)?;
    write_json(&run_folder.join(SPEC_FILE), &shim_spec(context, record)?)
}

fn shim_spec(context: &Context, record: &Record) -> Result<ShimSpec, Failure> {
    let stdin = match (record.config.open_stdin, record.config.stdin_once) {
        (false, _) => Stdin::None,
        (true, false) => Stdin::Open,
        (true, true) => Stdin::Once,
    };
    let [height, width] = record.host.console_size;
    Ok(ShimSpec {
        container: record.id.clone(),
        bundle: context.run_folder(&record.id).join(BUNDLE),
        terminal: record.config.tty,
        stdin,
        log: logging::plan(&context.data_folder(&record.id), record)?,
        console_size: (height > 0 && width > 0).then_some(ConsoleSize { width, height }),
        filters: Some(context.filters()),
        mounts: context.mounts.clone(),
        runtime: runtime::choose(&record.host.runtime, &context.defaults)?,
    })
}

fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<(), Failure> {
    let failed = |error: &(dyn std::error::Error + 'static)| {
        Failure::internal(format!("cannot write `{}`", path.display()), error)
    };
    let bytes = serde_json::to_vec(value).map_err(|error| failed(&error))?;
    std::fs::write(path, bytes).map_err(|error| failed(&error))
}

/// Writes what a restarted engine has to know, so that it appears whole or not at all.
pub fn write_run_record(context: &Context, record: &Record, run: &RunRecord) -> Result<(), Failure> {
    let folder = context.run_folder(&record.id);
    let temporary = folder.join("run.json.new");
    write_json(&temporary, run)?;
    std::fs::rename(&temporary, folder.join(RUN_FILE))
        .map_err(|error| Failure::internal("cannot write the container's run record", &error))
}

/// The run record in a run folder; `None` when the container was never started there.
pub fn read_run_record(folder: &Path) -> Option<RunRecord> {
    let bytes = std::fs::read(folder.join(RUN_FILE)).ok()?;
    serde_json::from_slice(&bytes)
        .inspect_err(
            |error| tracing::warn!(folder = %folder.display(), %error, "the run record cannot be understood"),
        )
        .ok()
}

/// The process id in a shim's own record; 0 when there is none.
pub fn recorded_pid(context: &Context, id: &str) -> i32 {
    let state = guest_runtime::shim::record::read::<StateRecord>(&context.run_folder(id), STATE_FILE);
    state.ok().flatten().and_then(|state| state.init).map_or(0, |init| init.pid)
}

/// Takes down a run whose process has ended, or whose shim has died: shim, mounts, network. Goes on past failures and
/// logs them; what is named after the container is found again at the next start. Returns the exit status that only
/// the run folder knew.
pub async fn tear_down(
    context: &Arc<Context>,
    record: &Record,
    shim: Option<(&Shim, Option<Child>)>,
) -> Option<Exit> {
    let warn = |what: &str, error: &dyn std::fmt::Display| {
        tracing::warn!(container = record.short_id(), %error, "{what}");
    };
    let end_shim = async {
        let mut exit = None;
        let deleted = match &shim {
            Some((shim, _)) => timeout(DELETE_DEADLINE, shim.ask("delete", ShimRequest::Delete))
                .await
                .is_ok_and(|result| result.is_ok()),
            None => false,
        };
        if !deleted {
            match reap(context, &record.id).await {
                Ok(told) => exit = told,
                Err(error) => warn("the container's processes stay behind", &error),
            }
        }
        if let Some((_, Some(mut child))) = shim {
            match timeout(DELETE_DEADLINE, child.wait()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => warn("cannot wait for the shim", &error),
                Err(error) => warn("the shim does not end", &error),
            }
        }
        guest_fault::point("stop.after-shim");
        if let Err(error) = unmount_rootfs(context, &record.id).await {
            warn("the root file system stays mounted", &error);
        }
        mounts::end(context, record).await;
        exit
    };
    let (exit, detached) = tokio::join!(end_shim, context.networks.detach(&record.id));
    if let Err(error) = detached {
        warn("the network stays behind", &error);
    }
    exit
}

/// Ends a shim that does not answer, and its container with it.
pub async fn reap(context: &Arc<Context>, id: &str) -> Result<Option<Exit>, Failure> {
    let folder = context.run_folder(id);
    if !folder.exists() {
        return Ok(None);
    }
    tokio::task::spawn_blocking(move || guest_runtime::reap(&folder))
        .await
        .map_err(|error| Failure::internal("cleaning up after the shim failed", &error))?
        .map_err(|error| Failure::internal("cannot clean up after the shim", &error))
}

/// Removes what an earlier run left in the run folder.
async fn clear_run_folder(context: &Arc<Context>, record: &Record) -> Result<(), Failure> {
    if context.run_folder(&record.id).exists() {
        reap(context, &record.id).await?;
        unmount_rootfs(context, &record.id).await?;
        remove_run_folder(context, &record.id).await?;
    }
    Ok(())
}

/// Removes the run folder. Refuses while a root file system is mounted in it: removing would empty the container.
pub async fn remove_run_folder(context: &Arc<Context>, id: &str) -> Result<(), Failure> {
    let folder = context.run_folder(id);
    let work = move || {
        peers::unmount_shm(&folder)?;
        mounts::clear(&folder)?;
        let rootfs = folder.join(ROOTFS);
        match std::fs::remove_dir(&rootfs) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    };
    let result = tokio::task::spawn_blocking(work).await;
    result
        .map_err(|error| Failure::internal("removing the run folder failed", &error))?
        .map_err(|error| Failure::internal("cannot remove the container's run folder", &error))
}

/// Removes everything of a container that does not run; with `volumes`, also those that were made for it without a name.
/// Done again, it completes what was interrupted.
pub async fn remove(context: &Arc<Context>, record: &Record, volumes: bool) -> Result<(), Failure> {
    clear_run_folder(context, record).await?;
    guest_fault::point("remove.after-run");
    if !volumes {
        mounts::keep_volumes(context, record).await?;
    }
    // The record first: a crash after it leaves a snapshot without an owner, which the next engine sweeps; the other
    // way round it would leave a container that cannot be started.
    let removed = context.store.remove(store::CONTAINERS, &record.id).await;
    removed.map_err(|error| Failure::internal("cannot remove the container's record", &error))?;
    guest_fault::point("remove.after-record");
    remove_leavings(context, &record.id).await?;
    guest_fault::point("remove.after-snapshot");
    mounts::release(context, record, volumes).await;
    // It may have been the last to stand on the layers of an image that is gone.
    let collected = context.images.collect_orphans(&record.image_id).await;
    collected.map_err(|error| crate::services::images::failure(&error))
}

/// Removes the writable layer and the folder of a container without a record.
pub async fn remove_leavings(context: &Arc<Context>, id: &str) -> Result<(), Failure> {
    let (snapshotter, key) = (context.snapshotter(), id.to_owned());
    blocking(move || snapshotter.remove(&key)).await?;
    match tokio::fs::remove_dir_all(context.data_folder(id)).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::internal("cannot remove the container's folder", &error))
        }
        _ => Ok(()),
    }
}

/// A failure of making or starting a container, in dockerd's words.
fn create_failure(error: ShimError) -> Failure {
    match error {
        ShimError::Refused { kind, message } => {
            let text = runtime_text(&message);
            match kind {
                // The client's mistake: 400, and the client looks into the text for its exit code.
                ShimErrorKind::NotFound | ShimErrorKind::NotExecutable => Failure::invalid(text),
                _ => Failure::broken(text),
            }
        }
        other => shim_failure(other),
    }
}

/// The shim's sentence as a message of the runtime, whether or not it speaks as one already.
pub fn runtime_text(message: &str) -> String {
    let text = if message.contains("OCI runtime") {
        message.to_owned()
    } else {
        format!("OCI runtime create failed: {message}")
    };
    let text = text.trim_end_matches(": unknown");
    if message.starts_with("failed to initialize logging driver") {
        return format!("failed to create task for container: {message}");
    }
    let prefix = "failed to create task for container: failed to create shim task: ";
    if text.starts_with(prefix) { format!("{text}: unknown") } else { format!("{prefix}{text}: unknown") }
}

/// A failure of any other request to a shim.
pub fn shim_failure(error: ShimError) -> Failure {
    match error {
        ShimError::Refused { kind: ShimErrorKind::Conflict | ShimErrorKind::NoProcess, message } => {
            Failure::conflict(message)
        }
        other => Failure::internal("the container's shim failed", &other),
    }
}

/// The exit code of a container that could not be started, as the client would derive it from the text.
pub fn exit_code_of_failure(failure: &Failure) -> i32 {
    let message = failure.message.to_lowercase();
    let has = |text: &str| message.contains(text);
    match () {
        () if has("executable file not found")
            || has("no such file or directory")
            || has("not a directory") =>
        {
            127
        }
        () if failure.kind == ErrorKind::Invalid && has("oci runtime") => 126,
        () => 128,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_the_runtime_read_as_dockerds() {
        let message = "exec: \"nope\": executable file not found in $PATH";
        let failure =
            create_failure(ShimError::Refused { kind: ShimErrorKind::NotFound, message: message.to_owned() });
        assert_eq!(failure.kind, ErrorKind::Invalid);
        assert_eq!(
            failure.message,
            "failed to create task for container: failed to create shim task: OCI runtime create failed: exec: \
             \"nope\": executable file not found in $PATH: unknown"
        );
        assert_eq!(exit_code_of_failure(&failure), 127);
        assert_eq!(runtime_text(&failure.message), failure.message);
    }

    #[test]
    fn other_refusals_are_conflicts_or_our_own() {
        let refused = |kind| shim_failure(ShimError::Refused { kind, message: "no".into() }).kind;
        assert_eq!(refused(ShimErrorKind::Conflict), ErrorKind::Conflict);
        assert_eq!(refused(ShimErrorKind::Other), ErrorKind::Internal);
        assert_eq!(exit_code_of_failure(&Failure::broken("x")), 128);
    }
}

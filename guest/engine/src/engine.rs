//! The composition root: builds the services, serves until told to end, and ends cleanly.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use guest_images::{Images, Options, Proxies};
use guest_protocol::port;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Settings;
use crate::host::{self, Changes, HostLeases, Shares};
use crate::http::{Listeners, Services, bind_unix};
use crate::run_root::RunRoot;
use crate::services::containers::{Capacity, Containers, Context};
use crate::services::events::Events;
use crate::services::exec::Execs;
use crate::services::images::ImagesService;
use crate::services::networks::Networks;
use crate::services::system::System;
use crate::services::volumes::Volumes;
use crate::store::{self, Store};

/// How long open connections may take to finish once we are told to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// Runs the engine until SIGTERM or SIGINT. `ready` gets one byte once the API answers.
pub async fn run(settings: Settings, ready: Option<OwnedFd>) -> anyhow::Result<()> {
    let settings = Arc::new(settings);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // First of all, so that a second engine ends here and touches nothing of the first one's.
    let outside = settings.vsock.map(|_| HostLeases::new());
    let (outside, keeper) = outside.unzip();
    let (services, tasks, run_root) = open(&settings, outside).await?;
    services.networks.republish_all();
    let listeners = Listeners {
        unix: settings
            .socket
            .as_ref()
            .map(|path| anyhow::Ok((bind_unix(path)?, path.clone())))
            .transpose()?,
        vsock: settings.vsock.map(Listeners::bind_vsock).transpose()?,
    };
    let stop = CancellationToken::new();
    if let Some(keeper) = keeper {
        let (networks, connections) = (services.networks.clone(), Listeners::bind_vsock(port::FORWARD)?);
        tasks.spawn(host::serve(connections, networks.clone(), tasks.clone(), stop.clone()));
        keeper.start(move || networks.held_outside(), stop.clone());
    }
    let serving = tokio::spawn(listeners.serve(services.clone(), tasks.clone(), stop.clone()));
    if let Some(ready) = ready {
        File::from(ready).write_all(b"\n").context("cannot tell that the API answers")?;
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), data_root = %settings.data_root.display(), "the API answers");

    // The bridge and the firewall take some milliseconds: not the first container's.
    let networks = services.networks.clone();
    tasks.spawn(async move {
        networks.raise_early().await;
        networks.resume().await;
    });
    tasks.spawn(services.networks.clone().follow_listeners(stop.clone()));

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!(stop_containers = settings.stop_containers_on_exit, "ending");
    stop.cancel();
    serving.await.context("the listener failed")?;
    services.containers.shut_down(settings.stop_containers_on_exit, settings.shutdown_timeout_seconds).await;
    tasks.close();
    if tokio::time::timeout(DRAIN_DEADLINE, tasks.wait()).await.is_err() {
        tracing::debug!(tasks = tasks.len(), "open connections are cut");
    }
    run_root.close();
    Ok(())
}

async fn open(
    settings: &Arc<Settings>,
    outside: Option<HostLeases>,
) -> anyhow::Result<(Arc<Services>, TaskTracker, RunRoot)> {
    std::fs::create_dir_all(&settings.data_root)
        .with_context(|| format!("cannot make the folder `{}`", settings.data_root.display()))?;
    let store = Store::open(&settings.data_root.join("engine.redb"))?;
    // After the store, which an engine that runs already would not have let us open.
    let run_root = RunRoot::open(&settings.run_root)?;
    let engine_id = engine_id(&store).await?;
    let images = {
        let (root, database) = (settings.data_root.join("images"), store.database());
        let options = image_options(settings);
        tokio::task::spawn_blocking(move || Images::open(&root, database, options)).await??
    };
    for problem in images.problems() {
        tracing::warn!(problem, "image store");
    }
    let events = Events::default();
    let networks = Arc::new(Networks::open(
        settings.bridge.clone(),
        settings.networks.clone(),
        &settings.run_root,
        &engine_id,
        store.clone(),
        events.clone(),
        outside.clone(),
    )?);
    let tasks = TaskTracker::new();
    let volumes = {
        let (store, events, data_root) = (store.clone(), events.clone(), settings.data_root.clone());
        Arc::new(tokio::task::spawn_blocking(move || Volumes::open(store, events, &data_root)).await??)
    };
    let context = Context {
        store,
        volumes: volumes.clone(),
        images: images.clone(),
        networks: networks.clone(),
        events: events.clone(),
        shares: Shares {
            changes: match &outside {
                Some(_) => Changes::start().context("cannot start a thread")?,
                None => Changes::default(),
            },
            outside,
            socket: settings.socket.clone(),
            data_root: settings.data_root.clone(),
        },
        shim: settings.shim.clone(),
        native: settings.native,
        defaults: settings.containers.clone(),
        data: settings.data_root.join("containers"),
        run: settings.run_root.join("containers"),
        mounts: run_root.mount(),
        capacity: Capacity::detect().context("cannot tell what this engine can grant")?,
        index: Arc::default(),
    };
    let containers = Arc::new(Containers::open(Arc::new(context), tasks.clone()).await?);
    let images = ImagesService::new(images, events.clone());
    let execs = Execs::new(containers.clone(), tasks.clone());
    execs.restore().await;
    let system = System {
        settings: settings.clone(),
        engine_id,
        containers: containers.clone(),
        images: images.clone(),
        volumes: volumes.clone(),
        events: events.clone(),
    };
    let services =
        Services { containers, images, execs, events, networks, system, volumes, tasks: tasks.clone() };
    Ok((Arc::new(services), tasks, run_root))
}

/// How images are kept and fetched.
fn image_options(settings: &Settings) -> Options {
    let (usual, transfers) = (Options::default(), &settings.transfers);
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    let proxies = Proxies {
        http: given(&transfers.proxies.http_proxy),
        https: given(&transfers.proxies.https_proxy),
        exceptions: given(&transfers.proxies.no_proxy),
    };
    Options {
        insecure_registries: settings.insecure_registries.clone(),
        mirrors: settings.registry_mirrors.clone(),
        bundled: settings.bundled_images.clone(),
        certificates: Some(settings.registry_certificates.clone()),
        proxies,
        concurrent_downloads: transfers.downloads,
        concurrent_uploads: transfers.uploads,
        download_attempts: u32::try_from(transfers.attempts).unwrap_or(u32::MAX),
        ..usual
    }
}

/// The id of this data root, made on first use.
async fn engine_id(store: &Store) -> anyhow::Result<String> {
    const KEY: &str = "id";
    if let Some(id) = store.get::<String>(store::ENGINE, KEY)? {
        return Ok(id);
    }
    let hex = hex::encode(rand::random::<[u8; 16]>());
    let id = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    store.put(store::ENGINE, KEY, &id).await?;
    Ok(id)
}

//! The volumes and images of a container: taken when it is made, given back when it is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest_api::{ErrorKind, HostConfig};
use guest_volumes::{clean, make_folders, open_within};
use rustix::fs::OFlags;

use super::super::record::{Record, View};
use super::super::run::{Context, blocking};
use super::point::{MountKind, MountPoint};
use super::temporary;
use super::wanted::Wanted;
use crate::failure::Failure;
use crate::host::Place;

/// What was taken for a new container.
#[derive(Debug, Default)]
pub struct Held {
    pub points: Vec<MountPoint>,
    /// Volumes that were not there before.
    pub new: Vec<String>,
}

/// The snapshot of an image mount; named after the container, so that a leaving is known as one.
fn snapshot_key(id: &str, number: usize) -> String {
    format!("{id}{SNAPSHOT_MARK}{number}")
}

const SNAPSHOT_MARK: &str = "-mount-";

/// Removes snapshots of image mounts whose container is unknown: it never came to be, or has gone.
pub async fn sweep_snapshots(context: &Arc<Context>, keys: &[String], known: &BTreeSet<String>) {
    let orphans = keys
        .iter()
        .filter(|key| key.split_once(SNAPSHOT_MARK).is_some_and(|(container, _)| !known.contains(container)));
    for key in orphans {
        let (snapshotter, orphan) = (context.snapshotter(), key.clone());
        if let Err(error) = blocking(move || snapshotter.remove(&orphan)).await {
            tracing::warn!(snapshot = key, %error, "left behind");
        }
    }
}

/// Where the sources of binds in the long form are: a missing one is an error before anything is made.
pub async fn sources(context: &Context, host: &HostConfig) -> Result<BTreeMap<PathBuf, Place>, Failure> {
    let mut sources = BTreeMap::new();
    for mount in host.mounts.iter().flatten().filter(|mount| mount.kind == "bind") {
        let source = PathBuf::from(clean(&mount.source));
        if source.is_absolute() && !sources.contains_key(&source) {
            let place = context.shares.find(&source, false).await?;
            sources.insert(source, place);
        }
    }
    Ok(sources)
}

/// Makes or finds the volumes, and takes images. On failure everything is as before.
pub async fn take(context: &Arc<Context>, id: &str, wanted: Vec<Wanted>) -> Result<Held, Failure> {
    let mut held = Held::default();
    for (number, wanted) in wanted.into_iter().enumerate() {
        if let Err(failure) = take_one(context, id, number, wanted, &mut held).await {
            give_back(context, id, &held).await;
            return Err(failure);
        }
    }
    Ok(held)
}

async fn take_one(
    context: &Arc<Context>,
    id: &str,
    number: usize,
    wanted: Wanted,
    held: &mut Held,
) -> Result<(), Failure> {
    let Wanted { mut point, create } = wanted;
    match (point.kind, create) {
        (MountKind::Volume, Some(create)) => {
            let taken = context.volumes.take(create.into_create(&point.name), Some(id)).await?;
            if taken.is_new {
                held.new.push(taken.record.name.clone());
            }
            point.name.clone_from(&taken.record.name);
            point.source = taken.mountpoint;
        }
        (MountKind::Volume, None) => context.volumes.join(&point.name, id).await?,
        (MountKind::Image, _) => {
            let image = context.images.resolve(&point.name).await;
            let image = image.map_err(|error| crate::services::images::failure(&error))?;
            let key = snapshot_key(id, number);
            let (snapshotter, chain, made) = (context.snapshotter(), image.chain(), key.clone());
            blocking(move || snapshotter.prepare(&made, chain)).await?;
            point.source = temporary::place(&context.run_folder(id), number);
            point.snapshot = key;
        }
        (MountKind::Bind, _) => {
            let place = context.shares.find(&point.source, false).await?.path()?;
            point.place = Some(place).filter(|place| *place != point.source);
        }
        (MountKind::Tmpfs, _) => {}
    }
    held.points.push(point);
    Ok(())
}

/// Takes back a [`take`] whose container did not come to be.
pub async fn give_back(context: &Arc<Context>, id: &str, held: &Held) {
    let_go(context, id, &held.points).await;
    for name in &held.new {
        remove_volume(context, id, name).await;
    }
}

async fn let_go(context: &Arc<Context>, id: &str, points: &[MountPoint]) {
    for point in points.iter().filter(|point| point.is_volume()) {
        context.volumes.release(&point.name, id);
    }
    for point in points.iter().filter(|point| point.kind == MountKind::Image) {
        let (snapshotter, key) = (context.snapshotter(), point.snapshot.clone());
        if let Err(error) = blocking(move || snapshotter.remove(&key)).await {
            tracing::warn!(container = &id[..12], image = point.name, %error, "left behind");
        }
    }
}

async fn remove_volume(context: &Arc<Context>, id: &str, name: &str) {
    match context.volumes.remove(name, true).await {
        // Another container has it too.
        Err(failure) if failure.kind == ErrorKind::Conflict => {}
        Err(error) => tracing::warn!(container = &id[..12], volume = name, %error, "left behind"),
        Ok(()) => {}
    }
}

/// Before the record of a container goes: volumes that are to stay are its own no more, or the next engine would take them
/// for leavings.
pub async fn keep_volumes(context: &Arc<Context>, record: &Record) -> Result<(), Failure> {
    for point in record.mounts.iter().filter(|point| point.is_volume() && point.anonymous) {
        context.volumes.disown(&point.name, &record.id).await?;
    }
    Ok(())
}

/// After the record of a container has gone: gives back what it had. With `volumes`, those that were made for it without a
/// name go too, unless somebody else has them.
pub async fn release(context: &Arc<Context>, record: &Record, volumes: bool) {
    let_go(context, &record.id, &record.mounts).await;
    for point in record.mounts.iter().filter(|point| volumes && point.is_volume() && point.anonymous) {
        remove_volume(context, &record.id, &point.name).await;
    }
}

/// When the engine starts: who has which volume, for whom it is mounted, and who hears what changes in binds. What nobody has any more goes.
pub async fn restore(context: &Arc<Context>, views: &[View]) {
    for view in views {
        for point in view.record.mounts.iter().filter(|point| point.is_volume()) {
            context.volumes.note_user(&point.name, Some(&view.record.id));
            if view.live.is_some() {
                context.volumes.note_mounted(&point.name, &view.record.id);
            }
        }
        if view.live.is_some() {
            let places = view.record.mounts.iter().filter_map(|point| point.place.as_ref());
            places.for_each(|place| context.shares.changes.bound(&view.record.id, place));
        }
    }
    let known = views.iter().map(|view| view.record.id.clone()).collect();
    context.volumes.sweep(&known).await;
}

/// Fills empty volumes with what the image has in their places. The container's snapshot is there, and not mounted.
pub async fn populate(context: &Arc<Context>, record: &Record) -> Result<(), Failure> {
    let wanted: Vec<&MountPoint> =
        record.mounts.iter().filter(|point| point.is_volume() && point.copy).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let (snapshotter, id) = (context.snapshotter(), record.id.clone());
    let scratch = context.run_folder(&record.id).join(temporary::FOLDER);
    let root = Arc::new(blocking(move || snapshotter.open_root(&id, &scratch)).await?);
    let io = |what: &'static str| move |error: std::io::Error| Failure::internal(what, &error);
    if !record.config.working_dir.is_empty() {
        // It may lie in a volume: then it is part of what that is filled with.
        let (root, path) = (root.clone(), PathBuf::from(&record.config.working_dir));
        let made = tokio::task::spawn_blocking(move || make_folders(&*root, &path)).await;
        made.map_err(|error| Failure::internal("preparing the container failed", &error))?
            .map_err(io("cannot make the working directory"))?;
    }
    for point in wanted {
        let Some(source) = folder_in(&root, &point.destination).map_err(|kind| match kind {
            NotAFolder::File if point.anonymous => Failure::invalid(format!(
                "cannot mount volume over existing file, file exists {}",
                point.destination.display()
            )),
            NotAFolder::File => {
                Failure::invalid(format!("source {} is not directory", point.destination.display()))
            }
            NotAFolder::Other(error) => {
                Failure::internal(format!("cannot open {} in the image", point.destination.display()), &error)
            }
        })?
        else {
            continue;
        };
        context.volumes.fill(&point.name, &record.id, source).await?;
    }
    Ok(())
}

enum NotAFolder {
    File,
    Other(std::io::Error),
}

/// A folder in the root file system, as a process in it would find it; `None` when there is nothing.
fn folder_in(root: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>, NotAFolder> {
    match open_within(root, path, OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(folder) => Ok(Some(folder)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Err(NotAFolder::File),
        Err(error) => Err(NotAFolder::Other(error)),
    }
}

//! Containers whose namespaces another joins (`--pid`, `--ipc container:x`).

use std::path::{Path, PathBuf};

use guest_api::HostConfig;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::index::Index;
use super::record::{Record, View};
use super::run::Context;
use super::spec::Peers;
use super::table::Phase;
use crate::failure::Failure;

/// Where the memory that containers share is mounted, in a run folder.
const SHM: &str = "shm";

/// The container in `container:x`.
fn named(mode: &str) -> Option<&str> {
    mode.strip_prefix("container:")
}

/// Replaces names by ids, which stay when a container is renamed. All of them must be there.
pub fn resolve(index: &Index, host: &mut HostConfig) -> Result<(), Failure> {
    for mode in [&mut host.pid_mode, &mut host.ipc_mode] {
        if let Some(name) = named(mode) {
            let view = index.find(name).map_err(|failure| Failure::invalid(failure.message))?.view();
            *mode = format!("container:{}", view.record.id);
        }
    }
    Ok(())
}

/// What a container that starts now gets from others, or shares with them.
#[derive(Debug, Default)]
pub struct Shared {
    pub peers: Peers,
    /// What is mounted on its /dev/shm.
    pub shm: Option<PathBuf>,
}

/// Finds the processes to join. Their containers must run.
pub fn find(context: &Context, record: &Record) -> Result<Shared, Failure> {
    let mut shared = Shared::default();
    if let Some(name) = named(&record.host.network_mode) {
        // That it runs is checked when the network is joined.
        context.index.find(name)?;
    }
    if let Some(name) = named(&record.host.pid_mode) {
        shared.peers.pid = Some(running(&context.index, name, "PID")?.1);
    }
    if let Some(name) = named(&record.host.ipc_mode) {
        let (view, pid) = running(&context.index, name, "IPC")?;
        shared.peers.ipc = Some(pid);
        shared.shm = Some(donor_shm(context, &view)?);
    } else if record.host.ipc_mode == "shareable" {
        shared.shm = Some(context.run_folder(&record.id).join(SHM));
    }
    Ok(shared)
}

fn running(index: &Index, name: &str, kind: &str) -> Result<(std::sync::Arc<View>, i32), Failure> {
    let join = |reason: &str| format!("failed to join {kind} namespace: {reason}");
    let view = index.find(name).map_err(|failure| Failure::invalid(join(&failure.message)))?.view();
    match (&view.live, view.phase) {
        (_, Phase::Restarting) => Err(Failure::conflict(join(&format!(
            "Container {name} is restarting, wait until the container is running"
        )))),
        (Some(live), _) => {
            let pid = live.pid;
            Ok((view, pid))
        }
        (None, _) => Err(Failure::conflict(join(&guest_api::error::not_running(name)))),
    }
}

/// The shared memory of a container that lets others use it.
fn donor_shm(context: &Context, donor: &View) -> Result<PathBuf, Failure> {
    let id = &donor.record.id;
    match donor.record.host.ipc_mode.as_str() {
        "host" => Ok(PathBuf::from("/dev/shm")),
        "shareable" => Ok(context.run_folder(id).join(SHM)),
        mode => match named(mode) {
            Some(other) => donor_shm(context, &context.index.find(other)?.view()),
            None => Err(Failure::invalid(format!(
                "failed to join IPC namespace: container {id}: non-shareable IPC (hint: use IpcMode:shareable for the \
                 donor container)"
            ))),
        },
    }
}

/// Mounts the memory that a container shares, if it does.
pub fn mount_shm(context: &Context, record: &Record) -> Result<(), Failure> {
    if record.host.ipc_mode != "shareable" {
        return Ok(());
    }
    let folder = context.run_folder(&record.id).join(SHM);
    let failed =
        |error: &std::io::Error| Failure::internal("cannot mount the container's shared memory", error);
    std::fs::create_dir_all(&folder).map_err(|error| failed(&error))?;
    let options = format!("mode=1777,size={}", record.host.shm_size);
    let options = std::ffi::CString::new(options).map_err(|error| failed(&error.into()))?;
    let flags = MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV;
    mount("shm", &folder, "tmpfs", flags, Some(options.as_c_str())).map_err(|error| failed(&error.into()))
}

/// Lets go of it. Containers that joined keep theirs.
pub fn unmount_shm(run_folder: &Path) -> std::io::Result<()> {
    let folder = run_folder.join(SHM);
    if !folder.exists() {
        return Ok(());
    }
    match unmount(&folder, UnmountFlags::DETACH) {
        // Not mounted, or already gone.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

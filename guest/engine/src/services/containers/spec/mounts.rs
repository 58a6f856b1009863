//! Everything mounted into a container.

use std::path::{Path, PathBuf};

use guest_runtime::defaults;
use oci_spec::runtime::Mount;

use super::{Input, process, security};
use crate::failure::Failure;

/// All mounts, in the order they are made.
pub fn mounts(input: &Input<'_>) -> Result<Vec<Mount>, Failure> {
    let Input { record, .. } = input;
    let host = &record.host;
    let shm_size = u64::try_from(host.shm_size).unwrap_or(defaults::SHM_SIZE_BYTES);
    let mut mounts =
        if host.privileged { defaults::privileged_mounts(shm_size) } else { defaults::mounts(shm_size) };
    match host.ipc_mode.as_str() {
        "host" => {
            for place in ["/dev/shm", "/dev/mqueue"] {
                mounts.retain(|mount| mount.destination() != Path::new(place));
                mounts.push(mount(
                    place,
                    "bind",
                    place,
                    words(&["rbind", "rprivate", "nosuid", "noexec", "nodev"]),
                ));
            }
        }
        mode if mode == "shareable" || mode.starts_with("container:") => {
            mounts.retain(|mount| mount.destination() != Path::new("/dev/shm"));
            if let Some(shm) = input.shm {
                mounts.push(mount("/dev/shm", "bind", shm, words(&["rbind", "rprivate"])));
            }
        }
        "none" => mounts.retain(|mount| mount.destination() != Path::new("/dev/shm")),
        _ => {}
    }
    let own = |name: &str| {
        let options = if host.readonly_rootfs {
            words(&["rbind", "rprivate", "ro"])
        } else {
            words(&["rbind", "rprivate"])
        };
        mount(format!("/etc/{name}"), "bind", input.files.join(name), options)
    };
    let mut further = vec![own("resolv.conf"), own("hostname"), own("hosts")];
    for ready in &input.mounts.mounts {
        // A user's own file wins over the engine's.
        further.retain(|mount| mount.destination() != &ready.destination);
        let (kind, source) = match &ready.source {
            Some(source) => ("bind", source.as_path()),
            None => ("tmpfs", Path::new("tmpfs")),
        };
        further.push(mount(&ready.destination, kind, source, ready.options.clone()));
    }
    // One's own `/dev` comes without what would lie in ours.
    if further.iter().any(|mount| mount.destination() == Path::new("/dev")) {
        mounts.retain(|mount| !mount.destination().starts_with("/dev"));
    }
    for (source, target) in &input.devices.elsewhere {
        further.push(mount(target, "bind", source, words(&["bind", "rprivate"])));
    }
    if process::has_init(input) {
        further.push(mount(process::INIT_PATH, "bind", input.init, words(&["bind", "ro"])));
    }
    // What lies in another's place has to come after it.
    further.sort_by_key(|mount| mount.destination().components().count());
    // A user's mount replaces a default one (`/dev/shm`, say).
    mounts.retain(|mount| !further.iter().any(|other| other.destination() == mount.destination()));
    if host.readonly_rootfs {
        let writable = ["/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"].map(Path::new);
        for mount in &mut mounts {
            if !writable.contains(&mount.destination().as_path()) {
                set_writable(mount, false);
            }
        }
    }
    let writable_cgroups = security(host)?.writable_cgroups.unwrap_or(host.privileged);
    for mount in &mut mounts {
        match mount.destination().to_str() {
            Some("/sys") if host.privileged => set_writable(mount, true),
            Some("/sys/fs/cgroup") if mount.typ().as_deref() == Some("cgroup") => {
                set_writable(mount, writable_cgroups)
            }
            _ => {}
        }
    }
    mounts.extend(further);
    Ok(mounts)
}

fn mount(
    destination: impl Into<PathBuf>,
    kind: &str,
    source: impl Into<PathBuf>,
    options: Vec<String>,
) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options));
    mount
}

fn set_writable(mount: &mut Mount, writable: bool) {
    let mut options: Vec<String> =
        mount.options().iter().flatten().filter(|option| *option != "ro").cloned().collect();
    if !writable {
        options.push("ro".to_owned());
    }
    mount.set_options(Some(options));
}

fn words(options: &[&str]) -> Vec<String> {
    options.iter().map(|option| (*option).to_owned()).collect()
}

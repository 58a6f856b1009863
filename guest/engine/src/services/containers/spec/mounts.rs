//! Everything mounted into a container.

use std::path::{Path, PathBuf};

use guest_runtime::defaults;
use oci_spec::runtime::Mount;

use super::super::record::Record;
use super::Input;
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
    for bind in &record.binds {
        let mut options = vec!["rbind".to_owned(), bind.propagation.clone()];
        if bind.read_only {
            options.push("ro".to_owned());
        }
        // A user's own file wins over the engine's.
        further.retain(|mount| mount.destination() != &bind.destination);
        further.push(mount(&bind.destination, "bind", &bind.source, options));
    }
    for (destination, options) in host.tmpfs.iter().flatten() {
        let given = options.split(',').filter(|option| !option.is_empty()).map(str::to_owned);
        let options = words(&["nosuid", "nodev", "noexec"]).into_iter().chain(given).collect();
        further.push(mount(destination, "tmpfs", "tmpfs", options));
    }
    // What lies in another's place has to come after it.
    further.sort_by_key(|mount| mount.destination().components().count());
    // A user's mount replaces a default one (`/dev/shm`, say).
    mounts.retain(|mount| !further.iter().any(|other| other.destination() == mount.destination()));
    mounts.extend(further);
    Ok(mounts)
}

/// A mount that passes events on needs a root that does.
pub fn rootfs_propagation(record: &Record) -> Option<String> {
    let asks = |word: &str| record.binds.iter().any(|bind| bind.propagation.ends_with(word));
    match () {
        () if asks("shared") => Some("shared".to_owned()),
        () if asks("slave") => Some("slave".to_owned()),
        () => None,
    }
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

fn words(options: &[&str]) -> Vec<String> {
    options.iter().map(|option| (*option).to_owned()).collect()
}

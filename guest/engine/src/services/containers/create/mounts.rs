//! What a container asks to have mounted: binds and tmpfs, their places checked.

use std::path::{Component, Path, PathBuf};

use guest_api::{ContainerConfig, HostConfig};

use super::super::record::Bind;
use super::unsupported;
use crate::failure::Failure;

/// Refuses what is not offered yet.
pub fn refuse_unsupported(config: &ContainerConfig, host: &HostConfig) -> Result<(), Failure> {
    if config.volumes.as_ref().is_some_and(|volumes| !volumes.is_empty()) {
        return Err(unsupported("anonymous volumes (Volumes)"));
    }
    if host.volumes_from.as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(unsupported("volumes of other containers (VolumesFrom)"));
    }
    if host.mounts.as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(unsupported("mounts in the long form (Mounts)"));
    }
    Ok(())
}

/// The binds of a container, none of which has another's place.
pub fn resolve(host: &HostConfig) -> Result<Vec<Bind>, Failure> {
    for destination in host.tmpfs.iter().flat_map(|mounts| mounts.keys()) {
        destination_path(destination)?;
    }
    let mut binds = Vec::new();
    for text in host.binds.iter().flatten() {
        binds.push(parse_bind(text)?);
    }
    let destinations: Vec<&Path> = binds
        .iter()
        .map(|bind| bind.destination.as_path())
        .chain(host.tmpfs.iter().flat_map(|mounts| mounts.keys().map(Path::new)))
        .collect();
    for (index, destination) in destinations.iter().enumerate() {
        if destinations[..index].contains(destination) {
            return Err(Failure::invalid(format!("Duplicate mount point: {}", destination.display())));
        }
    }
    Ok(binds)
}

/// `/source:/destination[:options]`.
fn parse_bind(text: &str) -> Result<Bind, Failure> {
    let invalid = || Failure::invalid(format!("invalid volume specification: '{text}'"));
    let mut parts = text.split(':');
    let (source, destination, mode) = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(_), None, ..) => return Err(unsupported("anonymous volumes (Binds)")),
        (Some(source), Some(destination), mode, None) => (source, destination, mode.unwrap_or_default()),
        _ => return Err(invalid()),
    };
    if source.is_empty() {
        return Err(invalid());
    }
    if !source.starts_with('/') {
        return Err(unsupported(&format!("named volumes (Binds: `{source}`)")));
    }
    let (mut read_only, mut propagation) = (false, "rprivate".to_owned());
    for option in mode.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => read_only = true,
            // SELinux labels and volume copying have nothing to act on here.
            "rw" | "z" | "Z" | "nocopy" | "cached" | "delegated" | "consistent" => {}
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" => {
                option.clone_into(&mut propagation)
            }
            _ => return Err(Failure::invalid(format!("invalid mode: {mode}"))),
        }
    }
    Ok(Bind {
        source: absolute(source)?,
        destination: destination_path(destination)?,
        read_only,
        mode: mode.to_owned(),
        propagation,
    })
}

/// The path without `.`, `..` and doubled slashes.
fn absolute(text: &str) -> Result<PathBuf, Failure> {
    let mut path = PathBuf::from("/");
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => _ = path.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if !text.starts_with('/') {
        return Err(Failure::invalid(format!(
            "invalid mount config: invalid mount path: '{text}' mount path must be absolute"
        )));
    }
    Ok(path)
}

/// The same for a place in the container, which must not be its root.
fn destination_path(text: &str) -> Result<PathBuf, Failure> {
    let path = absolute(text)?;
    if path == Path::new("/") {
        return Err(Failure::invalid(format!(
            "invalid volume specification: '{text}': destination can't be '/'"
        )));
    }
    Ok(path)
}

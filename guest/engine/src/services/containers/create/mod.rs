//! From what a client asked for to what a container is: the image's settings merged under the user's, everything
//! checked. Pure but for one question, whether a bind's source exists, which the caller answers.
//!
//! A setting that would change what the container does and that this engine cannot honour is refused with a sentence
//! naming it; one that changes nothing is kept and shown again by inspect. Each module owns the settings of one subject.

mod config;
mod defaults;
mod host;
mod life;
mod limits;
mod merge;
mod network;
mod platform;
#[cfg(test)]
mod tests;
mod version;

use std::collections::BTreeMap;

use guest_api::network::EndpointSettings;
use guest_api::{ContainerConfig, ContainerCreate, HostConfig};

pub use self::defaults::fill_settings;
pub use self::platform::check as platform;
pub use self::version::for_version;
use super::capacity::Capacity;
use crate::failure::Failure;

/// A checked request.
#[derive(Debug)]
pub struct Resolved {
    pub config: ContainerConfig,
    pub host: HostConfig,
    pub networks: BTreeMap<String, EndpointSettings>,
}

/// Judges what the user asked for, before anybody looks for the image. What cannot be enforced is taken out; the words
/// for the user come back.
pub fn check(create: &mut ContainerCreate, capacity: &Capacity) -> Result<Vec<String>, Failure> {
    let ContainerCreate { config, host_config, .. } = create;
    config::check(config)?;
    let warnings = host::check(config, host_config, capacity)?;
    network::check(config, host_config)?;
    life::check(config, host_config)?;
    Ok(warnings)
}

/// Judges an update of limits and restart policy.
pub fn check_update(changes: &mut HostConfig, capacity: &Capacity) -> Result<Vec<String>, Failure> {
    life::restart_policy(changes)?;
    limits::check(changes, capacity, limits::Purpose::Update)
}

/// Merges what has been checked with the image's settings. `id` is the new container's id.
pub fn resolve(
    create: ContainerCreate,
    image: &ContainerConfig,
    id: &str,
    capacity: &Capacity,
) -> Result<Resolved, Failure> {
    let ContainerCreate { mut config, mut host_config, networking_config } = create;
    merge::merge(&mut config, image);
    config::check(&mut config)?;
    if config.entrypoint.as_deref() == Some(&[String::new()]) {
        config.entrypoint = None;
    }
    if config.entrypoint.as_ref().is_none_or(Vec::is_empty) && config.cmd.as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure::invalid("no command specified"));
    }
    let networks = network::resolve(&mut config, &mut host_config, networking_config.endpoints_config)?;
    if config.hostname.is_empty() && !host_config.network_mode.starts_with("container:") {
        config.hostname =
            if host_config.network_mode == "host" { capacity.host_name.clone() } else { id[..12].to_owned() };
    }
    host::fill_defaults(&mut host_config, capacity);
    Ok(Resolved { config, host: host_config, networks })
}

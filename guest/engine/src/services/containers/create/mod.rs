//! From what a client asked for to what a container is: the image's settings merged under the user's, everything
//! checked. Pure but for one question, whether a bind's source exists, which the caller answers.
//!
//! A setting that would change what the container does and that this engine cannot honour is refused with a sentence
//! naming it; one that changes nothing is kept and shown again by inspect. Each module owns the settings of one subject.

mod config;
mod defaults;
mod host;
mod life;
mod merge;
mod mounts;
mod network;
#[cfg(test)]
mod tests;

use guest_api::{ContainerConfig, ContainerCreate, HostConfig};

pub use self::defaults::fill_settings;
pub use self::life::log_options;
use super::record::Bind;
use crate::failure::Failure;

/// A checked request.
#[derive(Debug)]
pub struct Resolved {
    pub config: ContainerConfig,
    pub host: HostConfig,
    pub binds: Vec<Bind>,
    pub warnings: Vec<String>,
}

/// Merges and checks. `image` is the image's own settings, `id` the new container's id.
pub fn resolve(create: ContainerCreate, image: &ContainerConfig, id: &str) -> Result<Resolved, Failure> {
    let ContainerCreate { mut config, mut host_config, networking_config } = create;
    // The user's own settings: an image's volumes and health check are kept, not yet followed.
    mounts::refuse_unsupported(&config, &host_config)?;
    life::refuse_unsupported(&host_config)?;
    merge::merge(&mut config, image);
    if config.entrypoint.as_deref() == Some(&[String::new()]) {
        config.entrypoint = None;
    }
    if config.entrypoint.as_ref().is_none_or(Vec::is_empty) && config.cmd.as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure::invalid("no command specified"));
    }
    config::check(&config)?;
    network::resolve(&mut config, &mut host_config, &networking_config.endpoints_config)?;
    if config.hostname.is_empty() && host_config.network_mode != "host" && host_config.uts_mode != "host" {
        config.hostname = id[..12].to_owned();
    }
    host::refuse_unsupported(&host_config)?;
    host::check(&host_config)?;
    network::check(&host_config)?;
    life::check(&config, &host_config)?;
    let binds = mounts::resolve(&host_config)?;
    host::fill_defaults(&mut host_config);
    Ok(Resolved { config, host: host_config, binds, warnings: Vec::new() })
}

fn unsupported(what: &str) -> Failure {
    Failure::invalid(format!("{what}: not supported by this version of the engine"))
}

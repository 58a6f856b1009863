//! The image's settings under the user's, by Docker's rules.

use std::collections::BTreeSet;

use guest_api::ContainerConfig;

use crate::services::containers::health;

/// Puts the image's settings under the user's, by Docker's rules.
pub fn merge(config: &mut ContainerConfig, image: &ContainerConfig) {
    if config.user.is_empty() {
        config.user.clone_from(&image.user);
    }
    if let Some(ports) = &image.exposed_ports
        && !ports.is_empty()
    {
        let all = config.exposed_ports.get_or_insert_default();
        ports.iter().for_each(|(port, value)| _ = all.entry(port.clone()).or_insert(*value));
    }
    let given = config.env.get_or_insert_default();
    let names: BTreeSet<String> = given.iter().map(|entry| env_name(entry).to_owned()).collect();
    given.extend(image.env.iter().flatten().filter(|entry| !names.contains(env_name(entry))).cloned());
    for (key, value) in &image.labels {
        config.labels.entry(key.clone()).or_insert_with(|| value.clone());
    }
    // An empty list counts as nothing for the command, but as "none at all" for the entry point.
    if config.entrypoint.as_ref().is_none_or(Vec::is_empty) {
        if config.cmd.as_ref().is_none_or(Vec::is_empty) && config.entrypoint.is_none() {
            config.cmd.clone_from(&image.cmd);
        }
        if config.entrypoint.is_none() {
            config.entrypoint.clone_from(&image.entrypoint);
        }
    }
    if config.working_dir.is_empty() {
        config.working_dir.clone_from(&image.working_dir);
    }
    if config.stop_signal.is_empty() {
        config.stop_signal.clone_from(&image.stop_signal);
    }
    config.stop_timeout = config.stop_timeout.or(image.stop_timeout);
    if let Some(volumes) = image.volumes.as_ref().filter(|volumes| !volumes.is_empty()) {
        config.volumes.get_or_insert_default().extend(volumes.clone());
    }
    if config.shell.is_none() {
        config.shell.clone_from(&image.shell);
    }
    config.healthcheck = health::merge(config.healthcheck.take(), image.healthcheck.as_ref());
}

/// The name in `NAME=value`.
pub fn env_name(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(name, _)| name)
}

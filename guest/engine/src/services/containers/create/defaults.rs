//! What the engine's settings give a container that says nothing itself.

use guest_api::ContainerCreate;
use guest_api::container::Ulimit;

use crate::config::ContainerDefaults;

/// Puts the settings where the request is silent. Everything is checked afterwards, like the request's own.
pub fn fill_settings(create: &mut ContainerCreate, defaults: &ContainerDefaults) {
    let host = &mut create.host_config;
    if host.log_config.kind.is_empty() {
        host.log_config.kind.clone_from(&defaults.log_driver);
    }
    // Options belong to a driver: those of the settings to the settings' own.
    if host.log_config.kind == defaults.log_driver {
        for (name, value) in &defaults.log_options {
            host.log_config.config.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    for limit in &defaults.ulimits {
        let given = host.ulimits.get_or_insert_default();
        if given.iter().all(|other| other.name != limit.name) {
            given.push(Ulimit { name: limit.name.clone(), soft: limit.soft, hard: limit.hard });
        }
    }
    if host.shm_size == 0 {
        host.shm_size = defaults.shm_size_bytes;
    }
    if host.ipc_mode.is_empty() {
        host.ipc_mode.clone_from(&defaults.ipc_mode);
    }
    if host.runtime.is_empty() {
        host.runtime.clone_from(&defaults.default_runtime);
    }
    if let Some(mode) = &defaults.cgroup_namespace
        && host.cgroupns_mode.is_empty()
        && !host.privileged
    {
        host.cgroupns_mode.clone_from(mode);
    }
}

//! The system service: facts about this engine and the machine it runs on.

use std::collections::BTreeMap;
use std::sync::Arc;

use guest_api::system::{
    Component, IndexConfig, Info, Platform, Plugins, RegistryConfig, Runtime, Swarm, Version,
};
use guest_api::version::{NEWEST, OLDEST};
use jiff::Timestamp;

use crate::config::Settings;
use crate::failure::Failure;
use crate::services::containers::{Containers, Phase};
use crate::services::events::Events;
use crate::services::images::ImagesService;

/// Docker Hub, as clients know it.
const PUBLIC_INDEX: &str = "https://index.docker.io/v1/";

/// The system service.
pub struct System {
    pub settings: Arc<Settings>,
    /// Stable for a data root.
    pub engine_id: String,
    pub containers: Arc<Containers>,
    pub images: ImagesService,
    pub events: Events,
}

impl System {
    pub fn version(&self) -> Version {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let details = [
            ("ApiVersion", NEWEST.to_string()),
            ("Arch", go_architecture().to_owned()),
            ("KernelVersion", kernel.clone()),
            ("MinAPIVersion", OLDEST.to_string()),
            ("Os", "linux".to_owned()),
        ];
        Version {
            platform: Platform { name: "engine".to_owned() },
            components: vec![Component {
                name: "Engine".to_owned(),
                version: version.clone(),
                details: details.map(|(key, value)| (key.to_owned(), value)).into(),
            }],
            version,
            api_version: NEWEST.to_string(),
            min_api_version: OLDEST.to_string(),
            os: "linux".to_owned(),
            arch: go_architecture().to_owned(),
            kernel_version: kernel,
            ..Version::default()
        }
    }

    pub async fn info(&self) -> Result<Info, Failure> {
        let views = self.containers.views();
        let count =
            |wanted: &[Phase]| views.iter().filter(|view| wanted.contains(&view.phase)).count() as i64;
        let images =
            self.images.store().list().await.map_err(|error| crate::services::images::failure(&error))?;
        let uname = rustix::system::uname();
        let release = os_release(&std::fs::read_to_string("/etc/os-release").unwrap_or_default());
        let cgroup_v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let runtime = Runtime { path: self.settings.shim.display().to_string() };
        let mut index_configs: BTreeMap<String, IndexConfig> = self
            .settings
            .insecure_registries
            .iter()
            .map(|name| (name.clone(), IndexConfig { name: name.clone(), ..IndexConfig::default() }))
            .collect();
        let public = IndexConfig {
            name: "docker.io".to_owned(),
            secure: true,
            official: true,
            ..IndexConfig::default()
        };
        index_configs.insert("docker.io".to_owned(), public);
        Ok(Info {
            id: self.engine_id.clone(),
            containers: views.len() as i64,
            containers_running: count(&[Phase::Running, Phase::Restarting]),
            containers_paused: count(&[Phase::Paused]),
            containers_stopped: count(&[Phase::Created, Phase::Exited, Phase::Dead, Phase::Removing]),
            images: images.len() as i64,
            driver: "overlay2".to_owned(),
            driver_status: vec![["Native Overlay Diff".to_owned(), "true".to_owned()]],
            plugins: Plugins {
                volume: vec!["local".to_owned()],
                network: vec!["bridge".to_owned(), "host".to_owned(), "null".to_owned()],
                authorization: None,
                log: vec!["json-file".to_owned(), "none".to_owned()],
            },
            memory_limit: true,
            swap_limit: true,
            cpu_cfs_period: true,
            cpu_cfs_quota: true,
            cpu_shares: true,
            cpu_set: true,
            pids_limit: true,
            ipv4_forwarding: std::fs::read("/proc/sys/net/ipv4/ip_forward")
                .is_ok_and(|text| text.starts_with(b"1")),
            n_fd: std::fs::read_dir("/proc/self/fd").map_or(-1, |entries| entries.count() as i64),
            n_goroutines: tokio::runtime::Handle::current().metrics().num_alive_tasks() as i64,
            system_time: format!("{:.9}", Timestamp::now()),
            logging_driver: "json-file".to_owned(),
            cgroup_driver: "cgroupfs".to_owned(),
            cgroup_version: if cgroup_v2 { "2" } else { "1" }.to_owned(),
            n_events_listener: self.events.listeners() as i64,
            kernel_version: uname.release().to_string_lossy().into_owned(),
            operating_system: release.get("PRETTY_NAME").cloned().unwrap_or_else(|| "engine".to_owned()),
            os_version: release.get("VERSION_ID").cloned().unwrap_or_default(),
            os_type: "linux".to_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            index_server_address: PUBLIC_INDEX.to_owned(),
            registry_config: RegistryConfig {
                insecure_registry_cidrs: vec!["::1/128".to_owned(), "127.0.0.0/8".to_owned()],
                index_configs,
                mirrors: self.settings.registry_mirrors.clone(),
            },
            ncpu: std::thread::available_parallelism().map_or(1, |count| count.get() as i64),
            mem_total: memory_total(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()),
            docker_root_dir: self.settings.data_root.display().to_string(),
            name: uname.nodename().to_string_lossy().into_owned(),
            labels: self.settings.labels.clone(),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
            // The name clients put into `--runtime`; what runs is our shim.
            runtimes: [("runc".to_owned(), runtime)].into(),
            default_runtime: "runc".to_owned(),
            swarm: Swarm { local_node_state: "inactive".to_owned(), ..Swarm::default() },
            live_restore_enabled: !self.settings.stop_containers_on_exit,
            security_options: vec!["name=seccomp,profile=builtin".to_owned(), "name=cgroupns".to_owned()],
            warnings: Some(self.images.store().problems().to_vec()).filter(|problems| !problems.is_empty()),
            ..Info::default()
        })
    }
}

/// Go's name of this machine's architecture.
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn os_release(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned()))
        .collect()
}

/// Bytes of memory in `/proc/meminfo`.
fn memory_total(text: &str) -> i64 {
    let kibibytes = text.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()
    });
    kibibytes.map_or(0, |kibibytes| kibibytes.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_own_files_are_read() {
        let release =
            os_release("NAME=\"Debian\"\nVERSION_ID=\"12\"\nPRETTY_NAME=\"Debian GNU/Linux 12\"\nbroken\n");
        assert_eq!(release["PRETTY_NAME"], "Debian GNU/Linux 12");
        assert_eq!(memory_total("MemTotal:       16384 kB\nMemFree: 1 kB\n"), 16384 * 1024);
        assert_eq!(memory_total(""), 0);
    }
}

//! `/info`: the engine, its settings, and what the kernel lets it do.

use std::collections::BTreeMap;
use std::path::Path;

use guest_api::system::{
    AddressPool, Commit, FirewallBackend, IndexConfig, Info, Plugins, RegistryConfig, Runtime, Swarm,
};
use jiff::Timestamp;

use super::System;
use super::cgroups::Cgroups;
use crate::config::{Seccomp, Settings};
use crate::failure::Failure;
use crate::services::containers::Phase;

/// Docker Hub, as clients know it.
const PUBLIC_INDEX: &str = "https://index.docker.io/v1/";

impl System {
    pub async fn info(&self) -> Result<Info, Failure> {
        let views = self.containers.views();
        let count =
            |wanted: &[Phase]| views.iter().filter(|view| wanted.contains(&view.phase)).count() as i64;
        let images =
            self.images.store().list().await.map_err(|error| crate::services::images::failure(&error))?;
        let uname = rustix::system::uname();
        let release = os_release(&std::fs::read_to_string("/etc/os-release").unwrap_or_default());
        let cgroups = Cgroups::probe(Path::new("/sys/fs/cgroup"));
        let forwarding =
            std::fs::read("/proc/sys/net/ipv4/ip_forward").is_ok_and(|text| text.starts_with(b"1"));
        let settings = &self.settings;
        let defaults = &settings.containers;
        let proxies = &settings.transfers.proxies;
        let mut warnings = self.images.store().problems().to_vec();
        warnings.extend(settings.warnings.iter().map(|warning| format!("WARNING: {warning}")));
        warnings.extend(cgroups.warnings());
        if !forwarding {
            warnings.push("WARNING: IPv4 forwarding is disabled".to_owned());
        }
        Ok(Info {
            id: self.engine_id.clone(),
            containers: views.len() as i64,
            containers_running: count(&[Phase::Running, Phase::Restarting]),
            containers_paused: count(&[Phase::Paused]),
            containers_stopped: count(&[Phase::Created, Phase::Exited, Phase::Dead, Phase::Removing]),
            images: images.len() as i64,
            driver: "overlay2".to_owned(),
            driver_status: driver_status(&settings.data_root),
            plugins: Plugins {
                volume: vec!["local".to_owned()],
                network: vec!["bridge".to_owned(), "host".to_owned(), "null".to_owned()],
                authorization: None,
                log: vec!["json-file".to_owned()],
            },
            memory_limit: cgroups.memory,
            swap_limit: cgroups.swap,
            kernel_memory_tcp: cgroups.kernel_memory_tcp,
            cpu_cfs_period: cgroups.cpu_quota,
            cpu_cfs_quota: cgroups.cpu_quota,
            cpu_shares: cgroups.cpu_shares,
            cpu_set: cgroups.cpu_set,
            pids_limit: cgroups.pids,
            ipv4_forwarding: forwarding,
            debug: settings.log_level == Some("debug"),
            n_fd: std::fs::read_dir("/proc/self/fd").map_or(-1, |entries| entries.count() as i64),
            oom_kill_disable: cgroups.oom_kill_disable,
            n_goroutines: tokio::runtime::Handle::current().metrics().num_alive_tasks() as i64,
            system_time: format!("{:.9}", Timestamp::now()),
            logging_driver: defaults.log_driver.clone(),
            cgroup_driver: "cgroupfs".to_owned(),
            cgroup_version: if cgroups.unified { "2" } else { "1" }.to_owned(),
            n_events_listener: self.events.listeners() as i64,
            kernel_version: uname.release().to_string_lossy().into_owned(),
            operating_system: release.get("PRETTY_NAME").cloned().unwrap_or_else(|| "engine".to_owned()),
            os_version: release.get("VERSION_ID").cloned().unwrap_or_default(),
            os_type: "linux".to_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            index_server_address: PUBLIC_INDEX.to_owned(),
            registry_config: registries(settings),
            ncpu: std::thread::available_parallelism().map_or(1, |count| count.get() as i64),
            mem_total: memory_total(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()),
            docker_root_dir: settings.data_root.display().to_string(),
            http_proxy: masked(&proxies.http_proxy),
            https_proxy: masked(&proxies.https_proxy),
            no_proxy: proxies.no_proxy.clone(),
            name: uname.nodename().to_string_lossy().into_owned(),
            labels: settings.labels.clone(),
            experimental_build: settings.experimental,
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtimes: runtimes(settings),
            default_runtime: defaults.default_runtime.clone(),
            swarm: Swarm { local_node_state: "inactive".to_owned(), ..Swarm::default() },
            live_restore_enabled: !settings.stop_containers_on_exit,
            init_binary: "docker-init".to_owned(),
            containerd_commit: no_commit(),
            runc_commit: no_commit(),
            init_commit: no_commit(),
            security_options: security_options(settings),
            firewall_backend: FirewallBackend { driver: "nftables".to_owned() },
            default_address_pools: settings
                .networks
                .pools
                .iter()
                .map(|pool| AddressPool { base: pool.base.to_string(), size: pool.size.into() })
                .collect(),
            warnings: Some(warnings).filter(|warnings| !warnings.is_empty()),
            ..Info::default()
        })
    }
}

/// We are one program, without containerd, runc and tini.
fn no_commit() -> Commit {
    Commit { id: "N/A".to_owned() }
}

fn driver_status(data_root: &Path) -> Vec<[String; 2]> {
    let pair = |name: &str, value: &str| [name.to_owned(), value.to_owned()];
    let mut status = Vec::new();
    if let Ok(file_system) = rustix::fs::statfs(data_root) {
        status.push(pair("Backing Filesystem", file_system_name(file_system.f_type)));
    }
    status.push(pair("Supports d_type", "true"));
    status.push(pair("Using metacopy", "false"));
    status.push(pair("Native Overlay Diff", "true"));
    status.push(pair("userxattr", "false"));
    status
}

/// Docker's name for a kind of file system, by its magic number.
fn file_system_name(magic: i64) -> &'static str {
    match magic {
        0xef53 => "extfs",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlayfs",
        0x2fc1_2fc1 => "zfs",
        0xf2f5_2010 => "f2fs",
        _ => "<unknown>",
    }
}

fn runtimes(settings: &Settings) -> BTreeMap<String, Runtime> {
    // The names clients put into `--runtime`; what runs is our shim.
    let own = Runtime { path: settings.shim.display().to_string(), arguments: Vec::new() };
    let others = settings.containers.runtimes.iter().map(|(name, runtime)| {
        (name.clone(), Runtime { path: runtime.path.clone(), arguments: runtime.arguments.clone() })
    });
    others.chain([("runc".to_owned(), own)]).collect()
}

fn security_options(settings: &Settings) -> Vec<String> {
    let seccomp = match &settings.containers.seccomp {
        Seccomp::Builtin => "builtin".to_owned(),
        Seccomp::Unconfined => "unconfined".to_owned(),
        Seccomp::Profile(path) => path.display().to_string(),
    };
    let mut options = vec![format!("name=seccomp,profile={seccomp}"), "name=cgroupns".to_owned()];
    if settings.containers.no_new_privileges {
        options.push("name=no-new-privileges".to_owned());
    }
    options
}

fn registries(settings: &Settings) -> RegistryConfig {
    let (networks, names): (Vec<&String>, Vec<&String>) =
        settings.insecure_registries.iter().partition(|name| name.parse::<ipnet::IpNet>().is_ok());
    let mut cidrs: Vec<String> = networks.into_iter().cloned().collect();
    for own in ["::1/128", "127.0.0.0/8"] {
        if !cidrs.iter().any(|given| given == own) {
            cidrs.push(own.to_owned());
        }
    }
    let mut index_configs: BTreeMap<String, IndexConfig> = names
        .into_iter()
        .map(|name| (name.clone(), IndexConfig { name: name.clone(), ..IndexConfig::default() }))
        .collect();
    // dockerd ends them with a slash.
    let mirrors: Vec<String> =
        settings.registry_mirrors.iter().map(|url| format!("{}/", url.trim_end_matches('/'))).collect();
    let public =
        IndexConfig { name: "docker.io".to_owned(), mirrors: mirrors.clone(), secure: true, official: true };
    index_configs.insert("docker.io".to_owned(), public);
    RegistryConfig { insecure_registry_cidrs: cidrs, index_configs, mirrors }
}

/// The address of a proxy without the name and password in it, as dockerd shows it.
fn masked(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest[..end].rfind('@') {
        Some(at) => format!("{scheme}://xxxxx:xxxxx@{}", &rest[at + 1..]),
        None => url.to_owned(),
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
    fn credentials_of_a_proxy_are_not_shown() {
        assert_eq!(masked("http://me:secret@p:3128/x"), "http://xxxxx:xxxxx@p:3128/x");
        assert_eq!(masked("http://p:3128/a@b"), "http://p:3128/a@b");
        assert_eq!(masked(""), "");
    }

    #[test]
    fn the_systems_own_files_are_read() {
        let release =
            os_release("NAME=\"Debian\"\nVERSION_ID=\"12\"\nPRETTY_NAME=\"Debian GNU/Linux 12\"\nbroken\n");
        assert_eq!(release["PRETTY_NAME"], "Debian GNU/Linux 12");
        assert_eq!(memory_total("MemTotal:       16384 kB\nMemFree: 1 kB\n"), 16384 * 1024);
        assert_eq!(memory_total(""), 0);
    }
}

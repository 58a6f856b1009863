//! `Settings`: what the user may change about the machine. Environment over file over default.

use anyhow::{Context, Result, bail};
use guest_protocol::{EngineSettings, HostProxies};
use host_vmm::BackendChoice;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use tracing::warn;

/// The machine's size and how it is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) disk_gib: u64,
    pub(crate) backend: BackendChoice,
    pub(crate) shares: ShareSettings,
}

/// Which folders of the host containers may bind.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShareSettings {
    /// The user's home folder and the folder for temporary files.
    #[serde(default = "yes")]
    pub(crate) defaults: bool,
    /// Others, by absolute path.
    #[serde(default)]
    pub(crate) paths: Vec<PathBuf>,
}

impl Default for ShareSettings {
    fn default() -> Self {
        Self { defaults: true, paths: Vec::new() }
    }
}

fn yes() -> bool {
    true
}

/// The settings file, `settings.toml` in the home folder.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SettingsFile {
    /// Format version.
    version: Option<u32>,
    #[serde(default)]
    machine: MachineSection,
    #[serde(default)]
    shares: ShareSettings,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineSection {
    cpus: Option<u32>,
    memory_mib: Option<u32>,
    disk_gib: Option<u64>,
    backend: Option<String>,
}

/// The engine's own settings: whichever of the two files is there. What is in it is the engine's business.
pub(crate) fn engine_settings(files: &[PathBuf; 2]) -> Result<Option<EngineSettings>> {
    let mut found = None;
    for file in files {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot read `{}`", file.display())),
        };
        if text.len() > EngineSettings::BYTES_MAX {
            bail!(
                "the engine's settings `{}` have {} bytes; {} is the most",
                file.display(),
                text.len(),
                EngineSettings::BYTES_MAX
            );
        }
        if found.is_some() {
            bail!(
                "there are two settings files for the engine, `{}` and `{}`: keep one",
                files[0].display(),
                files[1].display()
            );
        }
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        found = Some(EngineSettings { name, text });
    }
    Ok(found)
}

/// The proxies that `environment` names, in capitals or not.
pub(crate) fn proxies(environment: impl Fn(&str) -> Option<String>) -> HostProxies {
    let read = |name: &str| {
        let value = [name.to_owned(), name.to_ascii_lowercase()]
            .iter()
            .find_map(|name| environment(name).filter(|value| !value.is_empty()))
            .unwrap_or_default();
        if value.len() > HostProxies::BYTES_MAX {
            warn!(name, bytes = value.len(), "too long for the engine to follow");
            return String::new();
        }
        value
    };
    HostProxies { http: read("HTTP_PROXY"), https: read("HTTPS_PROXY"), exceptions: read("NO_PROXY") }
}

/// What the host has, as far as the defaults depend on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostSize {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u64,
}

impl HostSize {
    pub(crate) fn read() -> Self {
        let cpus =
            std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
        let info = rustix::system::sysinfo();
        let bytes = info.totalram.saturating_mul(u64::from(info.mem_unit));
        Self { cpus, memory_mib: bytes >> 20 }
    }
}

impl Settings {
    /// Reads `file` if it is there and applies `ENGINE_MACHINE_*` from `environment` over it.
    pub(crate) fn load(
        file: &Path,
        environment: impl Fn(&str) -> Option<String>,
        host: HostSize,
    ) -> Result<Self> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("cannot read `{}`", file.display())),
        };
        Self::resolve(&text, environment, host)
            .with_context(|| format!("cannot use the settings in `{}`", file.display()))
    }

    fn resolve(text: &str, environment: impl Fn(&str) -> Option<String>, host: HostSize) -> Result<Self> {
        let file: SettingsFile = toml::from_str(text)?;
        if let Some(version @ (0 | 2..)) = file.version {
            bail!("it has version {version}, and this program reads version 1");
        }
        if let Some(path) = file.shares.paths.iter().find(|path| !path.is_absolute()) {
            bail!("the shared folder `{}` is not an absolute path", path.display());
        }
        let number = |name: &str, from_file: Option<u64>, default: u64| match environment(name) {
            Some(value) => {
                value.parse().with_context(|| format!("`{name}` is `{value}`, which is not a number"))
            }
            None => Ok(from_file.unwrap_or(default)),
        };
        let machine = file.machine;
        let cpus = number("ENGINE_MACHINE_CPUS", machine.cpus.map(u64::from), host.cpus.clamp(1, 8).into())?;
        let memory = (host.memory_mib / 4).clamp(1024, 8192);
        let backend = match environment("ENGINE_MACHINE_BACKEND").or(machine.backend) {
            Some(name) => backend_named(&name)?,
            None => BackendChoice::Auto,
        };
        Ok(Self {
            cpus: u32::try_from(cpus)
                .ok()
                .filter(|cpus| *cpus > 0)
                .with_context(|| format!("{cpus} CPUs are not possible"))?,
            memory_mib: u32::try_from(number(
                "ENGINE_MACHINE_MEMORY_MIB",
                machine.memory_mib.map(u64::from),
                memory,
            )?)
            .context("that much memory is not possible")?,
            disk_gib: number("ENGINE_MACHINE_DISK_GIB", machine.disk_gib, 64)?,
            backend,
            shares: file.shares,
        })
    }
}

fn backend_named(name: &str) -> Result<BackendChoice> {
    let value = serde_json::Value::String(name.to_owned());
    serde_json::from_value(value)
        .with_context(|| format!("there is no back end `{name}`: use auto, kvm or qemu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostSize = HostSize { cpus: 4, memory_mib: 16384 };

    fn resolve(text: &str, environment: &[(&str, &str)]) -> Result<Settings> {
        let find = |name: &str| {
            environment.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        Settings::resolve(text, find, HOST)
    }

    #[test]
    fn the_engines_settings_are_one_file_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let files = ["engine.toml", "daemon.json"].map(|name| folder.path().join(name));
        assert_eq!(engine_settings(&files).unwrap(), None);
        std::fs::write(&files[1], "{}").unwrap();
        let settings = EngineSettings { name: "daemon.json".into(), text: "{}".into() };
        assert_eq!(engine_settings(&files).unwrap(), Some(settings));
        std::fs::write(&files[0], "").unwrap();
        assert!(engine_settings(&files).unwrap_err().to_string().contains("keep one"));
        std::fs::remove_file(&files[1]).unwrap();
        std::fs::write(&files[0], "#".repeat(EngineSettings::BYTES_MAX + 1)).unwrap();
        assert!(engine_settings(&files).unwrap_err().to_string().contains("is the most"));
    }

    #[test]
    fn the_environments_proxies_are_read_however_written() {
        let environment = |name: &str| match name {
            "HTTP_PROXY" => Some(String::new()),
            "http_proxy" => Some("http://p:1".to_owned()),
            "HTTPS_PROXY" => Some("http://p:2".to_owned()),
            "https_proxy" => Some("http://p:3".to_owned()),
            "NO_PROXY" => Some("x".repeat(HostProxies::BYTES_MAX + 1)),
            _ => None,
        };
        let expected =
            HostProxies { http: "http://p:1".into(), https: "http://p:2".into(), ..Default::default() };
        assert_eq!(proxies(environment), expected);
    }

    #[test]
    fn defaults_follow_the_host() {
        let settings = resolve("", &[]).unwrap();
        assert_eq!(
            settings,
            Settings {
                cpus: 4,
                memory_mib: 4096,
                disk_gib: 64,
                backend: BackendChoice::Auto,
                shares: ShareSettings::default()
            }
        );
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let file = "version = 1\n[machine]\ncpus = 3\nmemory_mib = 2000";
        let settings = resolve(file, &[("ENGINE_MACHINE_CPUS", "1")]).unwrap();
        assert_eq!((settings.cpus, settings.memory_mib), (1, 2000));
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text, environment| format!("{:#}", resolve(text, environment).unwrap_err());
        assert!(error("[machine]\ncpu = 3", &[]).contains("unknown field `cpu`"));
        assert!(error("version = 2", &[]).contains("version 2"));
        assert!(error("", &[("ENGINE_MACHINE_CPUS", "many")]).contains("`many`"));
        assert!(error("", &[("ENGINE_MACHINE_CPUS", "0")]).contains("0 CPUs"));
        assert!(error("", &[("ENGINE_MACHINE_BACKEND", "xen")]).contains("xen"));
        assert!(error("[shares]\npaths = [\"src\"]", &[]).contains("`src` is not an absolute path"));
    }

    #[test]
    fn shared_folders_are_the_defaults_and_what_is_added() {
        let shares = |text| resolve(text, &[]).unwrap().shares;
        assert_eq!(shares(""), ShareSettings { defaults: true, paths: Vec::new() });
        let added = ShareSettings { defaults: true, paths: vec!["/srv".into()] };
        assert_eq!(shares("[shares]\npaths = [\"/srv\"]"), added);
        assert!(!shares("[shares]\ndefaults = false").defaults);
    }
}

//! `Settings`: what the user may change about the machine. Environment over file over default.

use anyhow::{Context, Result, bail};
use guest_protocol::{EngineSettings, HostProxies};
use host_api::MachineSettings;
use host_vmm::BackendChoice;
use host_vmm::spec::check_size;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use toml_edit::{DocumentMut, value};
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
        Self::resolve(&read(file)?, environment, host)
            .with_context(|| format!("cannot use the settings in `{}`", file.display()))
    }

    /// Writes `file` with `changes` in it, comments and other settings staying, beside it, to be kept or not. A machine
    /// that cannot be, or a disk smaller than `disk_bytes`, is refused and nothing written. The environment is not asked:
    /// what it says may be gone tomorrow.
    pub(crate) fn prepare(
        file: &Path,
        changes: &MachineSettings,
        host: HostSize,
        disk_bytes: u64,
    ) -> Result<Change> {
        let text = changed(&read(file)?, changes)
            .with_context(|| format!("cannot change the settings in `{}`", file.display()))?;
        let settings = Self::resolve(&text, |_| None, host)?;
        let wanted = settings.disk_gib.checked_mul(1 << 30).context("a disk of that size is not possible")?;
        check_size(settings.cpus, settings.memory_mib, wanted)?;
        if wanted < disk_bytes {
            bail!(
                "the disk has {} GiB and never shrinks: `engine machine rm` begins anew, with an empty one",
                disk_bytes >> 30
            );
        }
        let change = Change { file: file.to_owned(), written: file.with_extension("toml.new"), settings };
        std::fs::write(&change.written, text)
            .with_context(|| format!("cannot write `{}`", change.written.display()))?;
        Ok(change)
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
        let [cpus_variable, memory_variable, disk_variable, backend_variable] = VARIABLES;
        let cpus = number(cpus_variable, machine.cpus.map(u64::from), host.cpus.clamp(1, 8).into())?;
        let memory = (host.memory_mib / 4).clamp(1024, 8192);
        let backend = match environment(backend_variable).or(machine.backend) {
            Some(name) => backend_named(&name)?,
            None => BackendChoice::Auto,
        };
        Ok(Self {
            cpus: u32::try_from(cpus)
                .ok()
                .filter(|cpus| *cpus > 0)
                .with_context(|| format!("{cpus} CPUs are not possible"))?,
            memory_mib: u32::try_from(number(memory_variable, machine.memory_mib.map(u64::from), memory)?)
                .context("that much memory is not possible")?,
            disk_gib: number(disk_variable, machine.disk_gib, 64)?,
            backend,
            shares: file.shares,
        })
    }
}

/// Settings that are written but do not hold yet. Dropped, they never will.
pub(crate) struct Change {
    file: PathBuf,
    written: PathBuf,
    settings: Settings,
}

impl Change {
    /// Makes them hold; returns them.
    pub(crate) fn keep(self) -> Result<Settings> {
        std::fs::rename(&self.written, &self.file)
            .with_context(|| format!("cannot write `{}`", self.file.display()))?;
        Ok(self.settings.clone())
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        // Not there when they were kept.
        let _kept = std::fs::remove_file(&self.written);
    }
}

/// The variables that win over the settings file.
pub(crate) const VARIABLES: [&str; 4] =
    ["ENGINE_MACHINE_CPUS", "ENGINE_MACHINE_MEMORY_MIB", "ENGINE_MACHINE_DISK_GIB", "ENGINE_MACHINE_BACKEND"];

/// The settings file; one that is not there says nothing.
fn read(file: &Path) -> Result<String> {
    match std::fs::read_to_string(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("cannot read `{}`", file.display())),
    }
}

/// The text of a settings file with changes in it.
fn changed(text: &str, changes: &MachineSettings) -> Result<String> {
    let mut document: DocumentMut = text.parse()?;
    if document.is_empty() {
        document["version"] = value(1);
    }
    let machine = document.entry("machine").or_insert(toml_edit::table());
    let table = machine.as_table_like_mut().context("`machine` is not a section")?;
    let disk_gib =
        changes.disk_gib.map(i64::try_from).transpose().context("a disk of that size is not possible")?;
    let numbers = [
        ("cpus", changes.cpus.map(i64::from)),
        ("memory_mib", changes.memory_mib.map(i64::from)),
        ("disk_gib", disk_gib),
    ];
    for (name, number) in numbers {
        if let Some(number) = number {
            table.insert(name, value(number));
        }
    }
    if let Some(backend) = &changes.backend {
        table.insert("backend", value(backend));
    }
    Ok(document.to_string())
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
    fn what_is_set_is_kept_and_the_rest_stays() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.toml");
        let change = |changes: MachineSettings, disk_bytes| {
            Settings::prepare(&file, &changes, HOST, disk_bytes).and_then(Change::keep)
        };
        let settings = change(MachineSettings { cpus: Some(3), ..Default::default() }, 0).unwrap();
        assert_eq!((settings.cpus, settings.disk_gib), (3, 64));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "version = 1\n\n[machine]\ncpus = 3\n");
        let text = "# mine\n[machine]\ncpus = 2 # enough\n[shares]\npaths = [\"/srv\"]\n";
        std::fs::write(&file, text).unwrap();
        let changes = MachineSettings {
            memory_mib: Some(2048),
            disk_gib: Some(100),
            backend: Some("qemu".into()),
            ..Default::default()
        };
        let settings = change(changes, 64 << 30).unwrap();
        assert_eq!((settings.cpus, settings.memory_mib, settings.backend), (2, 2048, BackendChoice::Qemu));
        let kept = std::fs::read_to_string(&file).unwrap();
        assert!(kept.starts_with("# mine\n[machine]\ncpus = 2 # enough\nmemory_mib = 2048"), "{kept}");
        assert!(kept.contains("[shares]\npaths = [\"/srv\"]"), "{kept}");
    }

    #[test]
    fn what_cannot_be_set_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.toml");
        let mistakes = [
            (MachineSettings { cpus: Some(0), ..Default::default() }, "0 CPUs"),
            (MachineSettings { cpus: Some(1000), ..Default::default() }, "between 1 and 64"),
            (MachineSettings { memory_mib: Some(1), ..Default::default() }, "too little"),
            (MachineSettings { memory_mib: Some(u32::MAX), ..Default::default() }, "more than this host has"),
            (MachineSettings { disk_gib: Some(1), ..Default::default() }, "never shrinks"),
            (MachineSettings { disk_gib: Some(u64::MAX), ..Default::default() }, "not possible"),
            (MachineSettings { backend: Some("xen".into()), ..Default::default() }, "xen"),
        ];
        for (changes, part) in mistakes {
            let prepared = Settings::prepare(&file, &changes, HOST, 64 << 30);
            let error = format!("{:#}", prepared.err().expect("it cannot be set"));
            assert!(error.contains(part), "{error}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
        std::fs::write(&file, "machine = 3").unwrap();
        let Err(error) = Settings::prepare(&file, &MachineSettings::default(), HOST, 0) else {
            panic!("there is no place for it")
        };
        assert!(format!("{error:#}").contains("`machine` is not a section"), "{error:#}");
    }

    #[test]
    fn what_is_prepared_and_not_kept_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.toml");
        let prepare = |disk_gib| {
            let changes = MachineSettings { disk_gib: Some(disk_gib), ..Default::default() };
            Settings::prepare(&file, &changes, HOST, 0).unwrap()
        };
        drop(prepare(100));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(prepare(200).keep().unwrap().disk_gib, 200);
        let change = prepare(300);
        assert!(std::fs::read_to_string(&file).unwrap().contains("disk_gib = 200"));
        drop(change);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
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

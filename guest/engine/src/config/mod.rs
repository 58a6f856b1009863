//! Settings: what was typed ([`Flags`]), what the file says ([`File`]), and what it means ([`Settings`]).
//!
//! A setting comes from a flag or from the file, never from both; else it has its default. In native mode everything
//! not named lives under the data root, so that any number of engines run side by side on one computer.

mod bridge;
mod defaults;
mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Parser;
use guest_images::Proxies;
use ipnet::Ipv4Net;

pub use bridge::BridgeChoice;
pub use defaults::{ContainerDefaults, NetworkDefaults, STOCK_RUNTIME, Seccomp, Transfers};
pub use file::AddressPool;
pub use file::File;
#[cfg(test)]
pub use file::Runtime;

use file::Format;

/// The Docker-compatible server.
#[derive(Debug, Default, Parser)]
#[command(
    name = "guest-engine",
    version,
    after_help = "`guest-engine fsck --data-root FOLDER` checks a data root that no engine uses; see its --help."
)]
pub struct Flags {
    /// Run on a Linux host, everything private to --socket and --data-root
    #[arg(long)]
    pub native: bool,
    /// Listen on this unix socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Listen on this vsock port, for the host only
    #[arg(long, value_name = "PORT")]
    pub vsock: Option<u32>,
    /// Where images and containers are kept
    #[arg(long, value_name = "FOLDER")]
    pub data_root: Option<PathBuf>,
    /// Where what ends with a reboot is kept [default: <data root>/run]
    #[arg(long, value_name = "FOLDER")]
    pub run_root: Option<PathBuf>,
    /// Settings: an engine.toml, or a daemon.json as dockerd reads it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Image archives that are found before any registry
    #[arg(long, value_name = "FOLDER")]
    pub bundled_images: Option<PathBuf>,
    /// Write one byte to this descriptor once the API answers
    #[arg(long, value_name = "FD")]
    pub ready_fd: Option<i32>,
    /// Stop containers when told to end
    #[arg(long)]
    pub stop_containers_on_exit: bool,
    /// The container shim [default: beside this program]
    #[arg(long, value_name = "PROGRAM")]
    pub shim: Option<PathBuf>,
    /// Reach this registry without TLS if need be; may be repeated
    #[arg(long, value_name = "HOST[:PORT]")]
    pub insecure_registry: Vec<String>,
    /// The same for a name of the host, which no settings replace; may be repeated
    #[arg(long, value_name = "HOST")]
    pub host_registry: Vec<String>,
    /// How the computer around the machine is reached: a proxy on its loopback is meant to be found there
    #[arg(long, value_name = "HOST")]
    pub host_name: Option<String>,
    /// Mirror of the public registry; may be repeated
    #[arg(long, value_name = "URL")]
    pub registry_mirror: Vec<String>,
    /// Folder with a folder for each registry that has certificates of its own [default: `certs.d` beside the settings file]
    #[arg(long, value_name = "FOLDER")]
    pub registry_certificates: Option<PathBuf>,
    /// Name of the default bridge
    #[arg(long, value_name = "NAME")]
    pub bridge: Option<String>,
    /// Address and prefix length of the default bridge
    #[arg(long, value_name = "ADDRESS/LENGTH")]
    pub bip: Option<Ipv4Net>,
}

/// What everything means.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub native: bool,
    pub socket: Option<PathBuf>,
    pub vsock: Option<u32>,
    pub data_root: PathBuf,
    pub run_root: PathBuf,
    pub bundled_images: Option<PathBuf>,
    pub ready_fd: Option<i32>,
    /// End containers with the engine; else they go on and the next engine finds them.
    pub stop_containers_on_exit: bool,
    /// Seconds that containers get to stop then; negative: as long as they need.
    pub shutdown_timeout_seconds: Option<i64>,
    pub shim: PathBuf,
    pub insecure_registries: Vec<String>,
    pub registry_mirrors: Vec<String>,
    /// A folder for each registry that has certificates of its own: that of the flag, else `certs.d` beside the settings file, else
    /// below the data root.
    pub registry_certificates: PathBuf,
    pub transfers: Transfers,
    /// Labels of this engine, shown by `info`.
    pub labels: Vec<String>,
    /// Shown by `info` and `ping`; changes nothing else.
    pub experimental: bool,
    /// How much to say: a filter of `tracing`.
    pub log_level: Option<&'static str>,
    pub bridge: BridgeChoice,
    pub networks: NetworkDefaults,
    pub containers: ContainerDefaults,
    /// What the user should know about these settings.
    pub warnings: Vec<String>,
}

impl Settings {
    /// Reads the file, if any, and puts everything together.
    pub fn resolve(flags: Flags) -> anyhow::Result<Self> {
        let Some(path) = flags.config.clone() else { return Self::merge(flags, File::default()) };
        let bytes = std::fs::read(&path)
            .with_context(|| format!("cannot read the settings file `{}`", path.display()))?;
        let format = Format::of(path.extension().and_then(|extension| extension.to_str()), &bytes);
        let refused = || format!("the settings file `{}` is not valid", path.display());
        let file = file::parse(&bytes, format).with_context(refused)?;
        Self::merge(flags, file).with_context(refused)
    }

    fn merge(flags: Flags, file: File) -> anyhow::Result<Self> {
        let twice = given_twice(&flags, &file.given);
        if !twice.is_empty() {
            bail!(
                "the following directives are specified both as a flag and in the configuration file: {}",
                twice.join(", ")
            );
        }
        let socket = match flags.socket {
            Some(path) => Some(path),
            None => socket_of(&file.hosts)?,
        };
        if socket.is_none() && flags.vsock.is_none() {
            bail!("nowhere to listen: give --socket PATH or --vsock PORT");
        }
        if !flags.native && socket.is_some() && flags.vsock.is_none() {
            bail!("--socket without --vsock runs on the host: say so with --native");
        }
        let Some(data_root) = flags.data_root.or(file.data_root.clone()) else {
            bail!("nowhere to keep images and containers: give --data-root FOLDER");
        };
        let data_root = std::path::absolute(data_root).context("cannot tell the current folder")?;
        let beside =
            || Some(flags.config.as_ref()?.parent()?.join("certs.d")).filter(|folder| folder.is_dir());
        let registry_certificates = match flags.registry_certificates.or_else(beside) {
            Some(folder) => std::path::absolute(folder).context("cannot tell the current folder")?,
            None => data_root.join("certs.d"),
        };
        let run_root = match flags.run_root.or(file.exec_root.clone()) {
            Some(path) => std::path::absolute(path).context("cannot tell the current folder")?,
            None => data_root.join("run"),
        };
        let shim = match flags.shim {
            Some(path) => std::path::absolute(path).context("cannot tell the current folder")?,
            None => std::env::current_exe()
                .context("cannot tell where this program is; name the shim with --shim")?
                .with_file_name("shim"),
        };
        let bridge = BridgeChoice::new(
            flags.native,
            &data_root,
            flags.bridge.or(file.bridge.clone()),
            flags.bip.or(file.bip),
            file.mtu,
        )?;
        Ok(Self {
            native: flags.native,
            socket,
            vsock: flags.vsock,
            run_root,
            bundled_images: flags.bundled_images,
            ready_fd: flags.ready_fd,
            stop_containers_on_exit: flags.stop_containers_on_exit || file.live_restore == Some(false),
            shutdown_timeout_seconds: file.shutdown_timeout,
            shim,
            insecure_registries: [
                either(flags.insecure_registry, &file.insecure_registries),
                flags.host_registry,
            ]
            .concat(),
            registry_mirrors: either(flags.registry_mirror, &file.registry_mirrors),
            registry_certificates,
            transfers: Transfers::new(&file)?.on(&Proxies::from_environment(), flags.host_name.as_deref()),
            labels: labels(&file.labels)?,
            experimental: file.experimental,
            log_level: log_level(&file)?,
            networks: NetworkDefaults::new(&file, bridge.candidates.first().filter(|_| bridge.fixed))?,
            containers: ContainerDefaults::new(&file, &data_root)?,
            warnings: file.without_effect,
            data_root,
            bridge,
        })
    }
}

/// Of two lists one is empty: a setting comes from one place.
fn either(flag: Vec<String>, file: &[String]) -> Vec<String> {
    if flag.is_empty() { file.to_vec() } else { flag }
}

/// Keys that a flag names as well, in dockerd's words.
fn given_twice(flags: &Flags, file: &BTreeMap<String, String>) -> Vec<String> {
    let list = |values: &[String]| (!values.is_empty()).then(|| format!("[{}]", values.join(" ")));
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let flags = [
        ("bip", flags.bip.map(|address| address.to_string())),
        ("bridge", flags.bridge.clone()),
        ("data-root", path(&flags.data_root)),
        ("exec-root", path(&flags.run_root)),
        ("hosts", flags.socket.as_ref().map(|path| format!("[unix://{}]", path.display()))),
        ("insecure-registries", list(&flags.insecure_registry)),
        ("registry-mirrors", list(&flags.registry_mirror)),
    ];
    let both = flags.into_iter().filter_map(|(key, flag)| Some((key, flag?, file.get(key)?)));
    both.map(|(key, flag, file)| format!("{key}: (from flag: {flag}, from file: {file})")).collect()
}

/// The one unix socket among the places to listen.
fn socket_of(hosts: &[String]) -> anyhow::Result<Option<PathBuf>> {
    let [host, rest @ ..] = hosts else { return Ok(None) };
    if !rest.is_empty() {
        bail!("`hosts`: the engine listens in one place, and {} are named", hosts.len());
    }
    match host.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok(Some(Path::new(path).to_owned())),
        _ => bail!("`hosts`: `{host}` is not offered: the engine listens on a unix socket, `unix:///PATH`"),
    }
}

/// The labels, each `key=value`, no key with two values. In dockerd's words.
fn labels(labels: &[String]) -> anyhow::Result<Vec<String>> {
    let mut by_key: BTreeMap<&str, &str> = BTreeMap::new();
    for label in labels {
        let Some((key, value)) = label.split_once('=') else { bail!("bad attribute format: {label}") };
        if let Some(other) = by_key.insert(key, value).filter(|other| *other != value) {
            bail!("conflict labels for {key}={value} and {key}={other}");
        }
    }
    Ok(by_key.into_iter().map(|(key, value)| format!("{key}={value}")).collect())
}

fn log_level(file: &File) -> anyhow::Result<Option<&'static str>> {
    if file.debug == Some(true) {
        return Ok(Some("debug"));
    }
    Ok(match file.log_level.as_deref() {
        None | Some("") => None,
        Some("trace") => Some("trace"),
        Some("debug") => Some("debug"),
        Some("info") => Some("info"),
        Some("warn") => Some("warn"),
        Some("error" | "fatal" | "panic") => Some("error"),
        Some(other) => bail!("invalid logging level: {other}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(words: &[&str]) -> Flags {
        Flags::try_parse_from(["guest-engine"].iter().chain(words)).unwrap()
    }

    fn file(text: &str) -> File {
        file::parse(text.as_bytes(), Format::Json).unwrap()
    }

    const NATIVE: &[&str] = &["--native", "--socket", "/s", "--data-root", "/d"];

    fn merged(more: &[&str], text: &str) -> anyhow::Result<Settings> {
        Settings::merge(flags(&[NATIVE, more].concat()), file(text))
    }

    fn refused(more: &[&str], text: &str) -> String {
        merged(more, text).unwrap_err().to_string()
    }

    #[test]
    fn two_native_engines_get_different_bridges() {
        let settings = |root: &str| {
            Settings::merge(flags(&["--native", "--socket", "/s", "--data-root", root]), File::default())
                .unwrap()
        };
        let (a, b) = (settings("/var/a"), settings("/var/b"));
        assert_ne!(a.bridge.name, b.bridge.name);
        assert_ne!(a.bridge.firewall_table, b.bridge.firewall_table);
        assert_ne!(a.bridge.candidates[0], b.bridge.candidates[0]);
        assert!(a.bridge.name.len() <= 15);
        assert_eq!(a.bridge.candidates.len(), 31);
        assert_eq!(a.run_root, Path::new("/var/a/run"));
    }

    #[test]
    fn in_the_machine_the_bridge_is_dockers() {
        let settings =
            Settings::merge(flags(&["--vsock", "2375", "--data-root", "/d"]), File::default()).unwrap();
        assert_eq!(settings.bridge.candidates[0], "172.17.0.1/16".parse().unwrap());
        assert_eq!(settings.bridge.name, "engine0");
    }

    #[test]
    fn flags_and_the_file_add_up() {
        let text =
            r#"{"bridge": "b0", "mtu": 1400, "insecure-registries": ["r:5000"], "live-restore": false}"#;
        let settings = merged(&["--bip", "10.8.0.1/24", "--registry-mirror", "https://m"], text).unwrap();
        assert_eq!(settings.bridge.candidates, ["10.8.0.1/24".parse().unwrap()]);
        assert!(settings.bridge.fixed && settings.stop_containers_on_exit);
        assert_eq!((settings.bridge.name.as_str(), settings.bridge.mtu), ("b0", 1400));
        assert_eq!(settings.insecure_registries, ["r:5000"]);
        assert_eq!(settings.registry_mirrors, ["https://m"]);
    }

    #[test]
    fn a_setting_given_twice_is_refused_in_dockerds_words() {
        let text = r#"{"bip": "10.9.0.1/24", "registry-mirrors": ["https://a", "https://b"]}"#;
        assert_eq!(
            refused(&["--bip", "10.8.0.1/24", "--registry-mirror", "https://m"], text),
            "the following directives are specified both as a flag and in the configuration file: bip: (from flag: \
             10.8.0.1/24, from file: 10.9.0.1/24), registry-mirrors: (from flag: [https://m], from file: [https://a \
             https://b])"
        );
    }

    #[test]
    fn the_file_may_say_where_everything_is() {
        let text = r#"{"hosts": ["unix:///run/s"], "data-root": "/data", "exec-root": "/run/e"}"#;
        let settings = Settings::merge(flags(&["--native"]), file(text)).unwrap();
        assert_eq!(settings.socket.as_deref(), Some(Path::new("/run/s")));
        assert_eq!((settings.data_root, settings.run_root), ("/data".into(), "/run/e".into()));
        let tcp = Settings::merge(flags(&["--native"]), file(r#"{"hosts": ["tcp://0.0.0.0:2375"]}"#));
        assert!(tcp.unwrap_err().to_string().contains("tcp://0.0.0.0:2375"));
    }

    #[test]
    fn senseless_settings_are_refused_with_a_sentence() {
        let refuse = |words: &[&str]| Settings::merge(flags(words), File::default()).unwrap_err().to_string();
        assert!(refuse(&["--data-root", "/d"]).contains("--socket PATH"));
        assert!(refuse(&["--data-root", "/d", "--socket", "/s"]).contains("--native"));
        assert!(refuse(&["--native", "--socket", "/s"]).contains("--data-root FOLDER"));
        assert!(refused(&["--bip", "10.0.0.0/24"], "{}").contains("10.0.0.0/24"));
        assert_eq!(refused(&[], r#"{"labels": ["a"]}"#), "bad attribute format: a");
        assert!(refused(&[], r#"{"labels": ["a=1", "a=2"]}"#).starts_with("conflict labels for a="));
        assert_eq!(refused(&[], r#"{"log-level": "loud"}"#), "invalid logging level: loud");
    }
}

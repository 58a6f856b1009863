//! Settings: what was typed ([`Flags`]), what the file says ([`File`]), and what it means ([`Settings`]).
//!
//! Order: flag, file, default. In native mode everything not named lives under the data root, so that any number of
//! engines run side by side on one computer.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Parser;
use ipnet::Ipv4Net;
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Largest packet on a bridge.
const MTU: u32 = 1500;

/// The Docker-compatible server.
#[derive(Debug, Default, Parser)]
#[command(name = "guest-engine", version)]
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
    pub data_root: PathBuf,
    /// Where what ends with a reboot is kept [default: <data root>/run]
    #[arg(long, value_name = "FOLDER")]
    pub run_root: Option<PathBuf>,
    /// Settings, as TOML
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
    /// Mirror of the public registry; may be repeated
    #[arg(long, value_name = "URL")]
    pub registry_mirror: Vec<String>,
    /// Name of the default bridge
    #[arg(long, value_name = "NAME")]
    pub bridge: Option<String>,
    /// Address and prefix length of the default bridge
    #[arg(long, value_name = "ADDRESS/LENGTH")]
    pub bip: Option<Ipv4Net>,
}

/// The settings file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// Registries reached without TLS.
    pub insecure_registries: Vec<String>,
    /// Mirrors of the public registry.
    pub registry_mirrors: Vec<String>,
    /// Name of the default bridge.
    pub bridge: Option<String>,
    /// Address and prefix length of the default bridge.
    pub bip: Option<Ipv4Net>,
    /// Labels of this engine, shown by `info`.
    pub labels: Vec<String>,
}

/// What everything means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub native: bool,
    pub socket: Option<PathBuf>,
    pub vsock: Option<u32>,
    pub data_root: PathBuf,
    pub run_root: PathBuf,
    pub bundled_images: Option<PathBuf>,
    pub ready_fd: Option<i32>,
    pub stop_containers_on_exit: bool,
    pub shim: PathBuf,
    pub insecure_registries: Vec<String>,
    pub registry_mirrors: Vec<String>,
    pub labels: Vec<String>,
    pub bridge: BridgeChoice,
}

/// The default bridge before the host's routes are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeChoice {
    pub name: String,
    /// Name of our table in nftables.
    pub firewall_table: String,
    /// Gateway address and prefix length, best first. One that overlaps a route of the host is passed over, except
    /// when it was asked for.
    pub candidates: Vec<Ipv4Net>,
    /// The user named the address.
    pub fixed: bool,
    pub mtu: u32,
    /// Make it at start.
    pub early: bool,
}

impl Settings {
    /// Reads the file, if any, and puts everything together.
    pub fn resolve(flags: Flags) -> anyhow::Result<Self> {
        let file = match &flags.config {
            None => File::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the settings file `{}`", path.display()))?;
                toml::from_str(&text)
                    .with_context(|| format!("the settings file `{}` is not valid", path.display()))?
            }
        };
        Self::merge(flags, file)
    }

    fn merge(flags: Flags, file: File) -> anyhow::Result<Self> {
        if flags.socket.is_none() && flags.vsock.is_none() {
            bail!("nowhere to listen: give --socket PATH or --vsock PORT");
        }
        if !flags.native && flags.socket.is_some() && flags.vsock.is_none() {
            bail!("--socket without --vsock runs on the host: say so with --native");
        }
        let data_root = std::path::absolute(&flags.data_root).context("cannot tell the current folder")?;
        let run_root = match flags.run_root {
            Some(path) => std::path::absolute(path).context("cannot tell the current folder")?,
            None => data_root.join("run"),
        };
        let shim = match flags.shim {
            Some(path) => std::path::absolute(path).context("cannot tell the current folder")?,
            None => std::env::current_exe()
                .context("cannot tell where this program is; name the shim with --shim")?
                .with_file_name("shim"),
        };
        let bridge =
            bridge_choice(flags.native, &data_root, flags.bridge.or(file.bridge), flags.bip.or(file.bip))?;
        let mut insecure_registries = flags.insecure_registry;
        insecure_registries.extend(file.insecure_registries);
        let mut registry_mirrors = flags.registry_mirror;
        registry_mirrors.extend(file.registry_mirrors);
        Ok(Self {
            native: flags.native,
            socket: flags.socket,
            vsock: flags.vsock,
            data_root,
            run_root,
            bundled_images: flags.bundled_images,
            ready_fd: flags.ready_fd,
            stop_containers_on_exit: flags.stop_containers_on_exit,
            shim,
            insecure_registries,
            registry_mirrors,
            labels: file.labels,
            bridge,
        })
    }
}

fn bridge_choice(
    native: bool,
    data_root: &Path,
    name: Option<String>,
    address: Option<Ipv4Net>,
) -> anyhow::Result<BridgeChoice> {
    if let Some(address) = address
        && (address.addr() == address.network() || address.prefix_len() > 30)
    {
        bail!(
            "--bip {address}: give the bridge's own address in a subnet of at least four, such as 172.17.0.1/16"
        );
    }
    let hash = Sha256::digest(data_root.as_os_str().as_encoded_bytes());
    let own = if native { format!("eng-{}", hex::encode(&hash[..4])) } else { "engine0".to_owned() };
    let pools = default_pools();
    let first = if native { usize::from(u16::from_be_bytes([hash[4], hash[5]])) % pools.len() } else { 0 };
    let candidates = match address {
        Some(address) => vec![address],
        None => pools.iter().cycle().skip(first).take(pools.len()).copied().collect(),
    };
    Ok(BridgeChoice {
        firewall_table: if native { own.replace('-', "_") } else { "engine".to_owned() },
        name: name.unwrap_or(own),
        candidates,
        fixed: address.is_some(),
        mtu: MTU,
        early: !native,
    })
}

/// Docker's pools for bridges, each as the gateway's address: 172.17–31.0.1/16, then 192.168.0–240.1/20.
fn default_pools() -> Vec<Ipv4Net> {
    let large = (17..=31).map(|second| Ipv4Net::new_assert(Ipv4Addr::new(172, second, 0, 1), 16));
    let small = (0..16).map(|third| Ipv4Net::new_assert(Ipv4Addr::new(192, 168, third * 16, 1), 20));
    large.chain(small).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(words: &[&str]) -> Flags {
        Flags::try_parse_from(["guest-engine"].iter().chain(words)).unwrap()
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
    fn flags_win_over_the_file_and_lists_add_up() {
        let file: File =
            toml::from_str("bridge = \"b0\"\nbip = \"10.9.0.1/24\"\ninsecure-registries = [\"r:5000\"]")
                .unwrap();
        let words = [
            "--native",
            "--socket",
            "/s",
            "--data-root",
            "/d",
            "--bip",
            "10.8.0.1/24",
            "--insecure-registry",
            "x",
        ];
        let settings = Settings::merge(flags(&words), file).unwrap();
        assert_eq!(settings.bridge.candidates, ["10.8.0.1/24".parse().unwrap()]);
        assert!(settings.bridge.fixed);
        assert_eq!(settings.bridge.name, "b0");
        assert_eq!(settings.insecure_registries, ["x", "r:5000"]);
    }

    #[test]
    fn senseless_settings_are_refused_with_a_sentence() {
        let refuse = |words: &[&str]| Settings::merge(flags(words), File::default()).unwrap_err().to_string();
        assert!(refuse(&["--data-root", "/d"]).contains("--socket PATH"));
        assert!(refuse(&["--data-root", "/d", "--socket", "/s"]).contains("--native"));
        let words = ["--native", "--data-root", "/d", "--socket", "/s", "--bip", "10.0.0.0/24"];
        assert!(refuse(&words).contains("10.0.0.0/24"));
        assert!(toml::from_str::<File>("unknown = 1").is_err());
    }
}

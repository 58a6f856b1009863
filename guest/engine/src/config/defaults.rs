//! What containers, networks and transfers get when nobody says otherwise.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use ipnet::Ipv4Net;

use super::file::{AddressPool, File, Proxies, Runtime, Ulimit};

/// Where `default-runtime` is set to when it is not: our own shim, by the name that clients use.
pub const STOCK_RUNTIME: &str = "runc";
/// Bytes of /dev/shm.
const SHM_SIZE: i64 = 64 << 20;
/// Seconds from the stop signal to SIGKILL.
const STOP_TIMEOUT_SECONDS: i64 = 10;

/// How images are fetched and sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfers {
    /// Layers fetched at a time, over all pulls.
    pub downloads: usize,
    /// Layers sent at a time, over all pushes.
    pub uploads: usize,
    /// How often the download of a layer is tried.
    pub attempts: usize,
    /// Empty where there is none.
    pub proxies: Proxies,
}

impl Transfers {
    pub(super) fn new(file: &File) -> anyhow::Result<Self> {
        let count = |given: Option<i64>, default: usize, what: &str| match given {
            None | Some(0) => Ok(default),
            Some(number) => usize::try_from(number).with_context(|| format!("invalid {what}: {number}")),
        };
        Ok(Self {
            downloads: count(file.max_concurrent_downloads, 3, "max concurrent downloads")?,
            uploads: count(file.max_concurrent_uploads, 5, "max concurrent uploads")?,
            attempts: count(file.max_download_attempts, 5, "max download attempts")?,
            proxies: file.proxies.clone(),
        })
    }

    /// With the environment's proxies where the file names none. A proxy on loopback is one of the computer around this
    /// machine, if it has a `host` name for that.
    pub(super) fn on(mut self, environment: &guest_images::Proxies, host: Option<&str>) -> Self {
        let Proxies { http_proxy, https_proxy, no_proxy } = &mut self.proxies;
        let open = [
            (&mut *http_proxy, &environment.http),
            (&mut *https_proxy, &environment.https),
            (no_proxy, &environment.exceptions),
        ];
        for (given, usual) in open {
            if given.is_empty() {
                *given = usual.clone().unwrap_or_default();
            }
        }
        if let Some(host) = host {
            for proxy in [http_proxy, https_proxy] {
                *proxy = off_loopback(proxy, host);
            }
        }
        self
    }
}

/// A proxy's address with `host` in the place of a loopback address or name.
fn off_loopback(address: &str, host: &str) -> String {
    let start = address.find("://").map_or(0, |at| at + 3);
    let end = address[start..].find(['/', '?', '#']).map_or(address.len(), |at| start + at);
    let start = address[start..end].rfind('@').map_or(start, |at| start + at + 1);
    let authority = &address[start..end];
    let name = match authority.find(']') {
        Some(bracket) => &authority[..=bracket],
        None => authority.split(':').next().unwrap_or_default(),
    };
    let is_loopback = name.eq_ignore_ascii_case("localhost")
        || name.trim_matches(['[', ']']).parse().is_ok_and(|address: IpAddr| address.is_loopback());
    if !is_loopback {
        return address.to_owned();
    }
    format!("{}{host}{}", &address[..start], &address[start + name.len()..])
}

/// What a new network gets, and more about the default one.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkDefaults {
    /// Where networks without a subnet take one from; empty: Docker's own ranges.
    pub pools: Vec<AddressPool>,
    /// Options of new networks, by driver.
    pub options: BTreeMap<String, BTreeMap<String, String>>,
    /// Part of the default network's subnet that containers get addresses from.
    pub fixed_range: Option<Ipv4Net>,
    /// Gateway of containers on the default network, where that is not the bridge.
    pub gateway: Option<Ipv4Addr>,
    /// Containers on the default network reach each other.
    pub between_containers: bool,
    /// Packets that leave the default network's subnet get the host's address.
    pub masquerade: bool,
    /// Address that ports are published on when a container names none.
    pub publish_on: IpAddr,
    /// What `host-gateway` in extra hosts means; empty: the default bridge's address.
    pub host_gateway: Vec<IpAddr>,
    /// Name servers of containers that name none; empty: the host's.
    pub dns: Vec<IpAddr>,
    /// Options for asking them, of containers that name none.
    pub dns_options: Vec<String>,
}

impl NetworkDefaults {
    /// `subnet` is the default bridge's, if the user named it.
    pub(super) fn new(file: &File, subnet: Option<&Ipv4Net>) -> anyhow::Result<Self> {
        for pool in &file.default_address_pools {
            let (base, size) = (pool.base, pool.size);
            if base.trunc() != base {
                bail!("`default-address-pools`: {base} is not a network; {} is", base.trunc());
            }
            if size < base.prefix_len() || size > base.max_prefix_len() {
                bail!("`default-address-pools`: subnets of size {size} do not fit into {base}");
            }
        }
        if let (Some(range), Some(subnet)) = (file.fixed_cidr, subnet)
            && !subnet.trunc().contains(&range.trunc())
        {
            bail!("`fixed-cidr`: {range} is not inside the default network's subnet {}", subnet.trunc());
        }
        if let (Some(gateway), Some(subnet)) = (file.default_gateway, subnet)
            && !subnet.trunc().contains(&gateway)
        {
            bail!(
                "`default-gateway`: {gateway} is not inside the default network's subnet {}",
                subnet.trunc()
            );
        }
        if let (Some(gateway), None) = (file.default_gateway, subnet) {
            bail!("`default-gateway`: {gateway} needs a subnet around it: say which with `bip`");
        }
        Ok(Self {
            pools: file.default_address_pools.clone(),
            options: file.default_network_opts.clone(),
            fixed_range: file.fixed_cidr.map(|range| range.trunc()),
            gateway: file.default_gateway,
            between_containers: file.icc.unwrap_or(true),
            masquerade: file.ip_masq.unwrap_or(true),
            publish_on: file.ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            host_gateway: file.host_gateway_ips.clone(),
            dns: file.dns.clone(),
            dns_options: file.dns_opts.clone(),
        })
    }
}

/// What a new container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerDefaults {
    pub log_driver: String,
    pub log_options: BTreeMap<String, String>,
    pub ulimits: Vec<Ulimit>,
    pub dns: Vec<IpAddr>,
    pub dns_options: Vec<String>,
    pub dns_search: Vec<String>,
    pub shm_size_bytes: i64,
    /// `private` or `shareable`.
    pub ipc_mode: String,
    /// `private` or `host`; `None`: by the version of cgroups.
    pub cgroup_namespace: Option<String>,
    pub cgroup_parent: Option<String>,
    /// Run an init program as PID 1.
    pub init: bool,
    pub no_new_privileges: bool,
    pub seccomp: Seccomp,
    pub stop_timeout_seconds: i64,
    /// By name, without our own.
    pub runtimes: BTreeMap<String, Runtime>,
    pub default_runtime: String,
}

/// The system calls that containers may make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seccomp {
    /// Our profile.
    Builtin,
    /// All.
    Unconfined,
    /// A profile of the user's.
    Profile(PathBuf),
}

impl ContainerDefaults {
    pub(super) fn new(file: &File, data_root: &Path) -> anyhow::Result<Self> {
        let choice = |key: &str, given: &Option<String>, allowed: [&str; 2]| match given.as_deref() {
            None | Some("") => Ok(None),
            Some(text) if allowed.contains(&text) => Ok(Some(text.to_owned())),
            Some(text) => bail!("`{key}`: `{text}` is not one of {} and {}", allowed[0], allowed[1]),
        };
        let seccomp = match file.seccomp_profile.as_deref() {
            None | Some("" | "builtin") => Seccomp::Builtin,
            Some("unconfined") => Seccomp::Unconfined,
            Some(path) => Seccomp::Profile(data_root.join(path)),
        };
        if let Some(seconds) = file.default_stop_timeout.filter(|seconds| *seconds < 0) {
            bail!("`default-stop-timeout`: {seconds} is negative");
        }
        Ok(Self {
            log_driver: file
                .log_driver
                .clone()
                .filter(|driver| !driver.is_empty())
                .unwrap_or("json-file".into()),
            log_options: file.log_opts.clone(),
            ulimits: ulimits(&file.default_ulimits)?,
            dns: file.dns.clone(),
            dns_options: file.dns_opts.clone(),
            dns_search: file.dns_search.clone(),
            shm_size_bytes: file.default_shm_size.filter(|size| *size > 0).unwrap_or(SHM_SIZE),
            ipc_mode: choice("default-ipc-mode", &file.default_ipc_mode, ["private", "shareable"])?
                .unwrap_or("private".into()),
            cgroup_namespace: choice(
                "default-cgroupns-mode",
                &file.default_cgroupns_mode,
                ["private", "host"],
            )?,
            cgroup_parent: file.cgroup_parent.clone().filter(|parent| !parent.is_empty()),
            init: file.init.unwrap_or(false),
            no_new_privileges: file.no_new_privileges.unwrap_or(false),
            seccomp,
            stop_timeout_seconds: file.default_stop_timeout.unwrap_or(STOP_TIMEOUT_SECONDS),
            default_runtime: default_runtime(file)?,
            runtimes: runtimes(&file.runtimes)?,
        })
    }
}

#[cfg(test)]
impl Default for ContainerDefaults {
    fn default() -> Self {
        Self::new(&File::default(), Path::new("/")).expect("what nobody set is valid")
    }
}

fn ulimits(given: &BTreeMap<String, Ulimit>) -> anyhow::Result<Vec<Ulimit>> {
    let limits = given.iter().map(|(key, limit)| {
        let name = if limit.name.is_empty() { key.clone() } else { limit.name.clone() };
        let (soft, hard) = (limit.soft, limit.hard);
        if hard != -1 && (soft == -1 || soft > hard) {
            bail!("`default-ulimits`: {name}: the soft limit {soft} is above the hard limit {hard}");
        }
        Ok(Ulimit { name, soft, hard })
    });
    limits.collect()
}

/// A path is meant from the current folder, which is not the shim's; a name is looked for where programs are.
fn runtimes(given: &BTreeMap<String, Runtime>) -> anyhow::Result<BTreeMap<String, Runtime>> {
    let absolute = |(name, runtime): (&String, &Runtime)| {
        let mut runtime = runtime.clone();
        if runtime.path.contains('/') {
            let path = std::path::absolute(&runtime.path).context("cannot tell the current folder")?;
            runtime.path = path.display().to_string();
        }
        Ok((name.clone(), runtime))
    };
    given.iter().map(absolute).collect()
}

fn default_runtime(file: &File) -> anyhow::Result<String> {
    for (name, runtime) in &file.runtimes {
        if name == STOCK_RUNTIME {
            bail!("runtime name '{STOCK_RUNTIME}' is reserved");
        }
        if runtime.path.is_empty() {
            bail!(
                "`runtimes`: {name}: a `path` to the program is needed; other kinds of runtimes are not offered"
            );
        }
    }
    match file.default_runtime.as_deref() {
        None | Some("") => Ok(STOCK_RUNTIME.to_owned()),
        Some(name) if name == STOCK_RUNTIME || file.runtimes.contains_key(name) => Ok(name.to_owned()),
        Some(name) => bail!("specified default runtime '{name}' does not exist"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::{Format, parse};
    use super::*;

    fn file(text: &str) -> File {
        parse(text.as_bytes(), Format::Json).unwrap()
    }

    fn containers(text: &str) -> Result<ContainerDefaults, String> {
        ContainerDefaults::new(&file(text), Path::new("/d")).map_err(|error| error.to_string())
    }

    #[test]
    fn without_a_file_everything_is_dockers_default() {
        let defaults = containers("{}").unwrap();
        assert_eq!((defaults.log_driver.as_str(), defaults.shm_size_bytes), ("json-file", 64 << 20));
        assert_eq!((defaults.stop_timeout_seconds, defaults.default_runtime.as_str()), (10, "runc"));
        let transfers = Transfers::new(&File::default()).unwrap();
        assert_eq!((transfers.downloads, transfers.uploads, transfers.attempts), (3, 5, 5));
    }

    #[test]
    fn proxies_come_from_the_file_then_from_the_environment() {
        let environment = guest_images::Proxies {
            http: Some("http://env:1".to_owned()),
            https: Some("http://127.0.0.1:2".to_owned()),
            exceptions: Some("a.example".to_owned()),
        };
        let file = file(r#"{"proxies": {"http-proxy": "http://localhost:3128"}}"#);
        let here = Transfers::new(&file).unwrap().on(&environment, None).proxies;
        assert_eq!(here.http_proxy, "http://localhost:3128");
        assert_eq!((here.https_proxy.as_str(), here.no_proxy.as_str()), ("http://127.0.0.1:2", "a.example"));
        let around = Transfers::new(&file).unwrap().on(&environment, Some("around")).proxies;
        assert_eq!(around.http_proxy, "http://around:3128");
        assert_eq!(around.https_proxy, "http://around:2");
    }

    #[test]
    fn only_a_proxy_on_loopback_is_looked_for_around_the_machine() {
        for (address, expected) in [
            ("http://me:pass@localhost:3128/x", "http://me:pass@around:3128/x"),
            ("127.9.9.9:3128", "around:3128"),
            ("https://[::1]:3128", "https://around:3128"),
            ("http://LOCALHOST", "http://around"),
            ("http://localhost.example:3128", "http://localhost.example:3128"),
            ("http://p:3128/@localhost", "http://p:3128/@localhost"),
            ("", ""),
        ] {
            assert_eq!(off_loopback(address, "around"), expected);
        }
    }

    #[test]
    fn limits_and_runtimes_are_checked() {
        let limits =
            containers(r#"{"default-ulimits": {"nofile": {"Hard": 2, "Soft": 1}}}"#).unwrap().ulimits;
        assert_eq!(limits, [Ulimit { name: "nofile".into(), soft: 1, hard: 2 }]);
        let above = containers(r#"{"default-ulimits": {"nofile": {"Hard": 1, "Soft": 2}}}"#);
        assert!(above.unwrap_err().contains("nofile"));
        assert!(containers(r#"{"runtimes": {"runc": {"path": "x"}}}"#).unwrap_err().contains("reserved"));
        assert!(containers(r#"{"default-runtime": "kata"}"#).unwrap_err().contains("'kata' does not exist"));
        assert!(containers(r#"{"default-ipc-mode": "host"}"#).unwrap_err().contains("shareable"));
        let crun =
            containers(r#"{"runtimes": {"crun": {"path": "crun"}}, "default-runtime": "crun"}"#).unwrap();
        assert_eq!(crun.default_runtime, "crun");
        assert!(Transfers::new(&file(r#"{"max-concurrent-downloads": -1}"#)).is_err());
    }

    #[test]
    fn pools_and_ranges_have_to_fit() {
        let networks = |text: &str| {
            let subnet = "10.1.0.1/16".parse().unwrap();
            NetworkDefaults::new(&file(text), Some(&subnet)).map_err(|error| error.to_string())
        };
        let pool = |base: &str, size: u8| {
            networks(&format!(r#"{{"default-address-pools": [{{"base": "{base}", "size": {size}}}]}}"#))
        };
        assert_eq!(pool("172.30.0.0/16", 24).unwrap().pools.len(), 1);
        assert!(pool("172.30.0.1/16", 24).unwrap_err().contains("172.30.0.0/16"));
        assert!(pool("172.30.0.0/16", 8).unwrap_err().contains("size 8"));
        assert!(networks(r#"{"fixed-cidr": "10.2.0.0/24"}"#).unwrap_err().contains("10.2.0.0/24"));
        assert!(networks(r#"{"fixed-cidr": "10.1.2.0/24"}"#).is_ok());
        assert!(networks(r#"{"default-gateway": "10.2.0.1"}"#).unwrap_err().contains("10.1.0.0/16"));
        assert!(networks(r#"{"default-gateway": "10.1.0.7"}"#).is_ok());
        let alone = NetworkDefaults::new(&file(r#"{"default-gateway": "10.1.0.7"}"#), None);
        assert!(alone.unwrap_err().to_string().contains("`bip`"));
    }
}

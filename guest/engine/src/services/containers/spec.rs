//! From a container's record to the OCI spec its shim gets: a pure function, and the same for the process of an exec.
//!
//! The rules are moby's (`daemon/oci_linux.go`). What this process cannot grant (capabilities, limits) is left out
//! rather than making the start fail: see [`guest_runtime::defaults`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use guest_api::HostConfig;
use guest_api::exec::ExecCreate;
use guest_runtime::defaults;
use oci_spec::runtime::{
    BoxBuilder, Capabilities, Capability, Linux, LinuxCpu, LinuxDevice, LinuxMemory, LinuxNamespace,
    LinuxNamespaceType, LinuxPids, LinuxResources, LinuxSeccomp, Mount, PosixRlimit, PosixRlimitBuilder,
    PosixRlimitType, Process, Root, Spec,
};

use super::record::Record;
use super::user::User;
use crate::failure::Failure;

/// `PATH` when nobody sets one.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Our cgroups are below this one in every hierarchy.
const CGROUP_PARENT: &str = "/engine";
/// Length of a scheduling period, in microseconds, when only a share of CPUs is given.
const CPU_PERIOD_MICROSECONDS: i64 = 100_000;

/// The network namespace of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkNamespace {
    Path(PathBuf),
    Host,
}

/// Everything a spec is made of.
pub struct Input<'a> {
    pub record: &'a Record,
    pub user: &'a User,
    /// The mounted root file system.
    pub rootfs: &'a Path,
    /// The folder holding `hosts`, `hostname` and `resolv.conf`.
    pub files: &'a Path,
    pub network: &'a NetworkNamespace,
    /// What this process can grant.
    pub grantable: &'a Capabilities,
    /// Every device of the host, for a privileged container.
    pub host_devices: &'a [LinuxDevice],
}

/// The whole spec.
pub fn build(input: &Input<'_>) -> Result<Spec, Failure> {
    let Input { record, .. } = input;
    let host = &record.host;
    let mut root = Root::default();
    root.set_path(input.rootfs.to_owned()).set_readonly(Some(host.readonly_rootfs));
    let mut spec = Spec::default();
    spec.set_version("1.0.2".to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts(input)?))
        .set_process(Some(init_process(input)?))
        .set_hostname(
            Some(record.config.hostname.clone()).filter(|name| !name.is_empty() && host.uts_mode != "host"),
        )
        .set_domainname(
            Some(record.config.domainname.clone()).filter(|name| !name.is_empty() && host.uts_mode != "host"),
        )
        .set_annotations(Some(host.annotations.clone().into_iter().collect::<HashMap<_, _>>()))
        .set_linux(Some(linux(input)?));
    Ok(spec)
}

fn init_process(input: &Input<'_>) -> Result<Process, Failure> {
    let Input { record, .. } = input;
    let (config, host) = (&record.config, &record.host);
    let mut process = base_process(host, input.user, input.grantable, host.privileged)?;
    let [height, width] = host.console_size;
    if config.tty && height > 0 && width > 0 {
        process.set_console_size(Some(console_box(height, width)?));
    }
    let oom =
        defaults::clamp_oom_score_adjust(i32::try_from(host.oom_score_adj).unwrap_or(0), input.grantable)
            .map_err(|error| {
                Failure::internal("cannot read the out-of-memory score of this process", &error)
            })?;
    process
        .set_terminal(Some(config.tty))
        .set_args(Some(record.command()))
        .set_env(Some(environment(record, &[], config.tty, &input.user.home)))
        .set_cwd(working_dir(&config.working_dir))
        .set_oom_score_adj(oom);
    Ok(process)
}

/// The process of an exec in a running container.
pub fn exec_process(
    record: &Record,
    exec: &ExecCreate,
    user: &User,
    grantable: &Capabilities,
) -> Result<Process, Failure> {
    let privileged = exec.privileged || record.host.privileged;
    let mut process = base_process(&record.host, user, grantable, privileged)?;
    if let Some([height, width]) = exec.console_size.filter(|_| exec.tty) {
        process.set_console_size(Some(console_box(height, width)?));
    }
    let folder = if exec.working_dir.is_empty() { &record.config.working_dir } else { &exec.working_dir };
    process
        .set_terminal(Some(exec.tty))
        .set_args(exec.cmd.clone())
        .set_env(Some(environment(record, exec.env.as_deref().unwrap_or_default(), exec.tty, &user.home)))
        .set_cwd(working_dir(folder));
    Ok(process)
}

fn base_process(
    host: &HostConfig,
    user: &User,
    grantable: &Capabilities,
    privileged: bool,
) -> Result<Process, Failure> {
    let mut granted = if privileged { defaults::all_capabilities() } else { capabilities(host)? };
    granted.retain(|capability| grantable.contains(capability));
    let mut sets = defaults::sets(&granted);
    if user.uid != 0 {
        // execve would drop them anyway; runc shows the same sets.
        sets.set_effective(Some(Capabilities::new())).set_permitted(Some(Capabilities::new()));
    }
    let mut limits = rlimits(host)?;
    defaults::clamp_rlimits(&mut limits, grantable);
    let mut oci_user = oci_spec::runtime::User::default();
    oci_user.set_uid(user.uid).set_gid(user.gid).set_additional_gids(Some(additional_groups(user)));
    let mut process = Process::default();
    process
        .set_user(oci_user)
        .set_capabilities(Some(sets))
        .set_rlimits(Some(limits).filter(|limits| !limits.is_empty()))
        .set_no_new_privileges(Some(security(host)?.no_new_privileges))
        .set_apparmor_profile(None)
        .set_selinux_label(None);
    Ok(process)
}

/// The primary group is among the supplementary ones, as with Docker (CVE-2022-36109).
fn additional_groups(user: &User) -> Vec<u32> {
    let mut groups = vec![user.gid];
    groups.extend(&user.additional);
    groups
}

fn console_box(height: u16, width: u16) -> Result<oci_spec::runtime::Box, Failure> {
    let built = BoxBuilder::default().height(height).width(width).build();
    built.map_err(|error| Failure::internal("cannot describe the terminal", &error))
}

fn working_dir(configured: &str) -> PathBuf {
    if configured.is_empty() { PathBuf::from("/") } else { PathBuf::from(configured) }
}

/// The engine's variables, then the container's, then `extra`; the last of a name wins, in the place of the first.
fn environment(record: &Record, extra: &[String], tty: bool, home: &str) -> Vec<String> {
    let mut result = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={}", record.config.hostname)];
    if record.config.hostname.is_empty() {
        result.pop();
    }
    if tty {
        result.push("TERM=xterm".to_owned());
    }
    for entry in record.config.env.iter().flatten().chain(extra) {
        let name = entry.split_once('=').map_or(entry.as_str(), |(name, _)| name);
        let position =
            result.iter().position(|known| known.split_once('=').is_some_and(|(other, _)| other == name));
        match (position, entry.contains('=')) {
            (Some(position), true) => result[position].clone_from(entry),
            // A name alone removes.
            (Some(position), false) => _ = result.remove(position),
            (None, true) => result.push(entry.clone()),
            (None, false) => {}
        }
    }
    if !result.iter().any(|entry| entry.starts_with("HOME=")) {
        result.push(format!("HOME={home}"));
    }
    result
}

/// The container's capabilities: the default ones, plus those added, minus those dropped.
pub fn capabilities(host: &HostConfig) -> Result<Capabilities, Failure> {
    let (add, drop) = (list(host.cap_add.as_deref()), list(host.cap_drop.as_deref()));
    let is_all = |name: &&String| name.eq_ignore_ascii_case("ALL");
    let mut set = match (add.iter().any(|name| is_all(&name)), drop.iter().any(|name| is_all(&name))) {
        (true, _) => defaults::all_capabilities(),
        (false, true) => Capabilities::new(),
        (false, false) => defaults::capabilities(),
    };
    for name in drop.iter().filter(|name| !is_all(name)) {
        set.remove(&capability(name)?);
    }
    for name in add.iter().filter(|name| !is_all(name)) {
        set.insert(capability(name)?);
    }
    Ok(set)
}

fn list(given: Option<&[String]>) -> &[String] {
    given.unwrap_or_default()
}

fn capability(name: &str) -> Result<Capability, Failure> {
    let upper = name.to_ascii_uppercase();
    upper
        .strip_prefix("CAP_")
        .unwrap_or(&upper)
        .parse()
        .map_err(|_| Failure::invalid(format!("invalid capability: unknown capability: \"{name}\"")))
}

/// What `SecurityOpt` asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Security {
    pub seccomp: bool,
    pub no_new_privileges: bool,
}

pub fn security(host: &HostConfig) -> Result<Security, Failure> {
    let mut security = Security { seccomp: !host.privileged, no_new_privileges: false };
    for option in list(host.security_opt.as_deref()) {
        match option.as_str() {
            "no-new-privileges" | "no-new-privileges=true" | "no-new-privileges:true" => {
                security.no_new_privileges = true;
            }
            "no-new-privileges=false" | "no-new-privileges:false" => security.no_new_privileges = false,
            "seccomp=unconfined" | "seccomp:unconfined" => security.seccomp = false,
            "seccomp=builtin" => {}
            // There is no AppArmor and no SELinux to confine it.
            "apparmor=unconfined" | "apparmor:unconfined" | "label=disable" | "label:disable" => {}
            _ => {
                // A seccomp profile is the whole file: name the option, do not repeat it all.
                let shown: String = option.chars().take(80).collect();
                return Err(Failure::invalid(format!(
                    "this SecurityOpt (`{shown}`): not supported by this version of the engine"
                )));
            }
        }
    }
    Ok(security)
}

/// `Ulimits` in the kernel's terms.
pub fn rlimits(host: &HostConfig) -> Result<Vec<PosixRlimit>, Failure> {
    let unlimited = |value: i64| u64::try_from(value).unwrap_or(u64::MAX);
    host.ulimits
        .iter()
        .flatten()
        .map(|limit| {
            let kind: PosixRlimitType = format!("RLIMIT_{}", limit.name.to_ascii_uppercase())
                .parse()
                .map_err(|_| Failure::invalid(format!("invalid ulimit type: {}", limit.name)))?;
            if limit.hard != -1 && (limit.soft == -1 || limit.soft > limit.hard) {
                return Err(Failure::invalid(format!(
                    "ulimit soft limit must be less than or equal to hard limit: {} > {}",
                    limit.soft, limit.hard
                )));
            }
            let built = PosixRlimitBuilder::default()
                .typ(kind)
                .soft(unlimited(limit.soft))
                .hard(unlimited(limit.hard))
                .build();
            built.map_err(|error| Failure::internal("cannot describe a limit", &error))
        })
        .collect()
}

fn mount(
    destination: impl Into<PathBuf>,
    kind: &str,
    source: impl Into<PathBuf>,
    options: Vec<String>,
) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options));
    mount
}

fn words(options: &[&str]) -> Vec<String> {
    options.iter().map(|option| (*option).to_owned()).collect()
}

fn mounts(input: &Input<'_>) -> Result<Vec<Mount>, Failure> {
    let Input { record, .. } = input;
    let host = &record.host;
    let shm_size = u64::try_from(host.shm_size).unwrap_or(defaults::SHM_SIZE_BYTES);
    let mut mounts =
        if host.privileged { defaults::privileged_mounts(shm_size) } else { defaults::mounts(shm_size) };
    match host.ipc_mode.as_str() {
        "host" => {
            for place in ["/dev/shm", "/dev/mqueue"] {
                mounts.retain(|mount| mount.destination() != Path::new(place));
                mounts.push(mount(
                    place,
                    "bind",
                    place,
                    words(&["rbind", "rprivate", "nosuid", "noexec", "nodev"]),
                ));
            }
        }
        "none" => mounts.retain(|mount| mount.destination() != Path::new("/dev/shm")),
        _ => {}
    }
    let own = |name: &str| {
        let options = if host.readonly_rootfs {
            words(&["rbind", "rprivate", "ro"])
        } else {
            words(&["rbind", "rprivate"])
        };
        mount(format!("/etc/{name}"), "bind", input.files.join(name), options)
    };
    let mut further = vec![own("resolv.conf"), own("hostname"), own("hosts")];
    for bind in &record.binds {
        let mut options = vec!["rbind".to_owned(), bind.propagation.clone()];
        if bind.read_only {
            options.push("ro".to_owned());
        }
        // A user's own file wins over the engine's.
        further.retain(|mount| mount.destination() != &bind.destination);
        further.push(mount(&bind.destination, "bind", &bind.source, options));
    }
    for (destination, options) in host.tmpfs.iter().flatten() {
        let given = options.split(',').filter(|option| !option.is_empty()).map(str::to_owned);
        let options = words(&["nosuid", "nodev", "noexec"]).into_iter().chain(given).collect();
        further.push(mount(destination, "tmpfs", "tmpfs", options));
    }
    // What lies in another's place has to come after it.
    further.sort_by_key(|mount| mount.destination().components().count());
    // A user's mount replaces a default one (`/dev/shm`, say).
    mounts.retain(|mount| !further.iter().any(|other| other.destination() == mount.destination()));
    mounts.extend(further);
    Ok(mounts)
}

fn linux(input: &Input<'_>) -> Result<Linux, Failure> {
    let Input { record, .. } = input;
    let host = &record.host;
    let mut linux = Linux::default();
    linux
        .set_cgroups_path(Some(Path::new(CGROUP_PARENT).join(&record.id)))
        .set_namespaces(Some(namespaces(host, input.network)))
        .set_resources(Some(resources(host)))
        .set_sysctl(host.sysctls.clone().map(|settings| settings.into_iter().collect()))
        .set_seccomp(seccomp(input)?)
        .set_masked_paths(Some(host.masked_paths.clone().unwrap_or_default()))
        .set_readonly_paths(Some(host.readonly_paths.clone().unwrap_or_default()))
        .set_rootfs_propagation(rootfs_propagation(record))
        .set_devices(Some(if host.privileged { input.host_devices.to_vec() } else { defaults::devices() }));
    Ok(linux)
}

/// A mount that passes events on needs a root that does.
fn rootfs_propagation(record: &Record) -> Option<String> {
    let asks = |word: &str| record.binds.iter().any(|bind| bind.propagation.ends_with(word));
    match () {
        () if asks("shared") => Some("shared".to_owned()),
        () if asks("slave") => Some("slave".to_owned()),
        () => None,
    }
}

fn seccomp(input: &Input<'_>) -> Result<Option<LinuxSeccomp>, Failure> {
    let host = &input.record.host;
    if !security(host)?.seccomp {
        return Ok(None);
    }
    Ok(Some(defaults::seccomp_profile(&capabilities(host)?)))
}

fn namespaces(host: &HostConfig, network: &NetworkNamespace) -> Vec<LinuxNamespace> {
    let namespace = |kind, path: Option<PathBuf>| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind).set_path(path);
        namespace
    };
    let mut namespaces = vec![namespace(LinuxNamespaceType::Mount, None)];
    if let NetworkNamespace::Path(path) = network {
        namespaces.push(namespace(LinuxNamespaceType::Network, Some(path.clone())));
    }
    for (mode, kind) in [
        (&host.uts_mode, LinuxNamespaceType::Uts),
        (&host.pid_mode, LinuxNamespaceType::Pid),
        (&host.ipc_mode, LinuxNamespaceType::Ipc),
        (&host.cgroupns_mode, LinuxNamespaceType::Cgroup),
    ] {
        if mode != "host" {
            namespaces.push(namespace(kind, None));
        }
    }
    namespaces
}

fn resources(host: &HostConfig) -> LinuxResources {
    let mut resources = LinuxResources::default();
    resources.set_devices(Some(if host.privileged {
        defaults::privileged_device_rules()
    } else {
        defaults::device_rules()
    }));
    if host.memory != 0 || host.memory_reservation != 0 || host.memory_swap != 0 {
        let some = |value: i64| Some(value).filter(|value| *value != 0);
        let mut memory = LinuxMemory::default();
        memory
            .set_limit(some(host.memory))
            .set_reservation(some(host.memory_reservation))
            .set_swap(some(host.memory_swap));
        resources.set_memory(Some(memory));
    }
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let text = |value: &str| Some(value.to_owned()).filter(|value| !value.is_empty());
    let (period, quota) = if host.nano_cpus > 0 {
        (
            positive(CPU_PERIOD_MICROSECONDS),
            Some(host.nano_cpus.saturating_mul(CPU_PERIOD_MICROSECONDS) / 1_000_000_000),
        )
    } else {
        (positive(host.cpu_period), Some(host.cpu_quota).filter(|quota| *quota != 0))
    };
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive(host.cpu_shares))
        .set_period(period)
        .set_quota(quota)
        .set_cpus(text(&host.cpuset_cpus))
        .set_mems(text(&host.cpuset_mems));
    if cpu != LinuxCpu::default() {
        resources.set_cpu(Some(cpu));
    }
    if let Some(limit) = host.pids_limit.filter(|limit| *limit > 0) {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    resources
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::record::{Bind, tests::record};
    use super::*;

    /// The spec of the test record with these host settings, as JSON.
    fn built(change: impl FnOnce(&mut Record)) -> Value {
        let mut record = record();
        record.host.masked_paths = Some(vec!["/proc/kcore".into()]);
        record.host.cgroupns_mode = "private".into();
        record.host.shm_size = 64 << 20;
        change(&mut record);
        let spec = build(&Input {
            record: &record,
            user: &User { uid: 0, gid: 0, additional: vec![10], home: "/root".into() },
            rootfs: Path::new("/run/c/rootfs"),
            files: Path::new("/data/c"),
            network: &NetworkNamespace::Path("/run/netns/c".into()),
            grantable: &defaults::all_capabilities(),
            host_devices: &[],
        })
        .unwrap();
        serde_json::to_value(spec).unwrap()
    }

    fn destinations(spec: &Value) -> Vec<&str> {
        spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| mount["destination"].as_str().unwrap())
            .collect()
    }

    fn namespaces_of(spec: &Value) -> Vec<&str> {
        spec["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["type"].as_str().unwrap())
            .collect()
    }

    #[test]
    fn a_plain_container() {
        let spec = built(|record| {
            record.config.hostname = "web".into();
            record.config.env = Some(vec!["A=1".into()]);
        });
        assert_eq!(spec["root"], json!({"path": "/run/c/rootfs", "readonly": false}));
        assert_eq!(spec["hostname"], "web");
        assert_eq!(spec["process"]["args"], json!(["sleep", "1"]));
        assert_eq!(spec["process"]["cwd"], "/");
        assert_eq!(spec["process"]["env"], json!([DEFAULT_PATH, "HOSTNAME=web", "A=1", "HOME=/root"]));
        assert_eq!(spec["process"]["user"]["additionalGids"], json!([0, 10]));
        assert_eq!(spec["process"]["noNewPrivileges"], false);
        assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
        assert_eq!(namespaces_of(&spec), ["mount", "network", "uts", "pid", "ipc", "cgroup"]);
        assert_eq!(spec["linux"]["namespaces"][1]["path"], "/run/netns/c");
        assert_eq!(spec["linux"]["cgroupsPath"], format!("/engine/{}", "3f2a9c1d77e04b5c".repeat(4)));
        assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/kcore"]));
        assert!(spec["linux"]["seccomp"].is_object());
        assert_eq!(
            destinations(&spec),
            [
                "/proc",
                "/dev",
                "/dev/pts",
                "/sys",
                "/sys/fs/cgroup",
                "/dev/mqueue",
                "/dev/shm",
                "/etc/resolv.conf",
                "/etc/hostname",
                "/etc/hosts"
            ]
        );
    }

    #[test]
    fn a_privileged_container_is_confined_by_nothing() {
        let spec = built(|record| {
            record.host.privileged = true;
            record.host.masked_paths = None;
        });
        assert!(spec["linux"].get("seccomp").is_none_or(Value::is_null));
        assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 41);
        assert_eq!(spec["linux"]["maskedPaths"], json!([]));
        assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], true);
    }

    #[test]
    fn namespaces_of_the_host_are_not_made() {
        let spec = built(|record| {
            record.host.pid_mode = "host".into();
            record.host.ipc_mode = "host".into();
            record.host.uts_mode = "host".into();
            record.host.cgroupns_mode = "host".into();
        });
        assert_eq!(namespaces_of(&spec), ["mount", "network"]);
        assert!(spec.get("hostname").is_none_or(Value::is_null));
    }

    #[test]
    fn mounts_come_after_what_they_lie_in_and_replace_ours() {
        let bind = |source: &str, destination: &str, read_only| Bind {
            source: source.into(),
            destination: destination.into(),
            read_only,
            mode: String::new(),
            propagation: "rprivate".into(),
        };
        let spec = built(|record| {
            record.binds = vec![
                bind("/a", "/srv/deep/er", true),
                bind("/b", "/srv", false),
                bind("/h", "/etc/hosts", false),
            ];
            record.host.tmpfs = Some([("/dev/shm".to_owned(), "size=1m".to_owned())].into());
        });
        let order = destinations(&spec);
        let place = |wanted: &str| order.iter().position(|found| *found == wanted).unwrap();
        assert!(place("/srv") < place("/srv/deep/er"));
        assert_eq!(order.iter().filter(|found| **found == "/dev/shm").count(), 1);
        assert_eq!(order.iter().filter(|found| **found == "/etc/hosts").count(), 1);
        let mounts = spec["mounts"].as_array().unwrap();
        assert_eq!(mounts[place("/etc/hosts")]["source"], "/h");
        assert_eq!(mounts[place("/srv/deep/er")]["options"], json!(["rbind", "rprivate", "ro"]));
        assert_eq!(mounts[place("/dev/shm")]["options"], json!(["nosuid", "nodev", "noexec", "size=1m"]));
    }

    #[test]
    fn limits_become_resources() {
        let spec = built(|record| {
            record.host.memory = 64 << 20;
            record.host.memory_swap = 128 << 20;
            record.host.nano_cpus = 1_500_000_000;
            record.host.pids_limit = Some(50);
        });
        let resources = &spec["linux"]["resources"];
        assert_eq!(resources["memory"]["limit"], 64 << 20);
        assert_eq!(resources["memory"]["swap"], 128 << 20);
        assert_eq!(
            (&resources["cpu"]["quota"], &resources["cpu"]["period"]),
            (&json!(150_000), &json!(100_000))
        );
        assert_eq!(resources["pids"]["limit"], 50);
        let plain = built(|_| {});
        assert!(plain["linux"]["resources"].get("memory").is_none_or(Value::is_null));
        assert!(plain["linux"]["resources"].get("cpu").is_none_or(Value::is_null));
    }

    #[test]
    fn capabilities_are_added_and_dropped() {
        let set = |add: &[&str], drop: &[&str]| {
            let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
            capabilities(&HostConfig { cap_add: list(add), cap_drop: list(drop), ..HostConfig::default() })
                .unwrap()
        };
        assert_eq!(set(&["ALL"], &[]).len(), 41);
        assert_eq!(set(&["all"], &["SYS_ADMIN"]).len(), 40);
        assert_eq!(set(&["NET_ADMIN"], &["ALL"]), [Capability::NetAdmin].into());
        assert!(set(&["cap_net_admin"], &[]).contains(&Capability::NetAdmin));
        assert!(!set(&[], &["CAP_CHOWN"]).contains(&Capability::Chown));
    }

    #[test]
    fn security_options_are_read() {
        let read = |options: &[&str], privileged| {
            let list = Some(options.iter().map(|option| (*option).to_owned()).collect());
            security(&HostConfig { security_opt: list, privileged, ..HostConfig::default() })
        };
        assert_eq!(read(&[], false), Ok(Security { seccomp: true, no_new_privileges: false }));
        assert_eq!(
            read(&["seccomp=unconfined", "no-new-privileges"], false),
            Ok(Security { seccomp: false, no_new_privileges: true })
        );
        assert!(!read(&[], true).unwrap().seccomp);
        assert!(read(&["seccomp={}"], false).unwrap_err().message.contains("seccomp={}"));
    }

    #[test]
    fn an_exec_takes_the_containers_environment_and_its_own_over_it() {
        let mut record = record();
        record.config.env = Some(vec!["A=1".into(), "B=2".into()]);
        record.config.working_dir = "/srv".into();
        let exec = ExecCreate {
            tty: true,
            console_size: Some([24, 80]),
            env: Some(vec!["A=9".into(), "B".into(), "PATH=/x".into()]),
            cmd: Some(vec!["sh".into()]),
            ..ExecCreate::default()
        };
        let user = User { uid: 33, gid: 34, additional: vec![], home: "/var/www".into() };
        let process = exec_process(&record, &exec, &user, &defaults::all_capabilities()).unwrap();
        let json = serde_json::to_value(process).unwrap();
        assert_eq!(json["env"], json!(["PATH=/x", "TERM=xterm", "A=9", "HOME=/var/www"]));
        assert_eq!(json["cwd"], "/srv");
        assert_eq!(json["consoleSize"], json!({"height": 24, "width": 80}));
        assert_eq!(json["user"]["uid"], 33);
        assert_eq!(json["capabilities"]["effective"], json!([]));
    }
}

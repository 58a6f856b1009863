//! From a container's record to the OCI spec its shim gets: a pure function, and the same for the process of an exec.
//!
//! The rules are moby's (`daemon/oci_linux.go`). What this process cannot grant (capabilities, limits) is left out
//! rather than making the start fail: see [`guest_runtime::defaults`].
mod devices;
mod limits;
mod mounts;
mod namespaces;
mod process;
mod security;
mod sysctl;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Capabilities, Linux, Root, Spec};

pub use self::devices::{Devices, rules as device_rules};
pub use self::limits::{changes, rlimits};
pub use self::namespaces::{NetworkNamespace, Peers};
pub use self::process::exec_process;
pub use self::security::{capabilities, security};
use super::mounts::Ready;
use super::record::Record;
use super::user::User;
use crate::config::ContainerDefaults;
use crate::failure::Failure;

/// Our cgroups are below this one in every hierarchy.
const CGROUP_PARENT: &str = "/engine";

/// Everything a spec is made of.
pub struct Input<'a> {
    pub record: &'a Record,
    pub user: &'a User,
    /// The mounted root file system.
    pub rootfs: &'a Path,
    /// The folder holding `hosts`, `hostname` and `resolv.conf`.
    pub files: &'a Path,
    pub network: &'a NetworkNamespace,
    /// What the user has mounted into it.
    pub mounts: &'a Ready,
    /// What this process can grant.
    pub grantable: &'a Capabilities,
    /// What the engine's settings say where the container says nothing.
    pub defaults: &'a ContainerDefaults,
    /// What it gets of the host's devices.
    pub devices: &'a Devices,
    /// Whose namespaces it shares.
    pub peers: Peers,
    /// What is mounted on /dev/shm when others share it.
    pub shm: Option<&'a Path>,
    /// The program that is `docker-init` inside.
    pub init: &'a Path,
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
        .set_mounts(Some(mounts::mounts(input)?))
        .set_process(Some(process::init_process(input)?))
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

/// The container's cgroup, from the root of every hierarchy.
pub fn cgroup_path(record: &Record, settings: &ContainerDefaults) -> PathBuf {
    let own = Some(record.host.cgroup_parent.as_str()).filter(|parent| !parent.is_empty());
    let parent = own.or(settings.cgroup_parent.as_deref()).unwrap_or(CGROUP_PARENT);
    let mut path = PathBuf::from("/");
    for component in Path::new(parent).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => _ = path.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    path.join(&record.id)
}

fn linux(input: &Input<'_>) -> Result<Linux, Failure> {
    let Input { record, .. } = input;
    let host = &record.host;
    let own_network = !(host.network_mode == "host" || host.network_mode.starts_with("container:"));
    let sysctls = sysctl::settings(host, own_network, |name| {
        Path::new("/proc/sys").join(name.replace('.', "/")).exists()
    })?;
    let mut linux = Linux::default();
    linux
        .set_cgroups_path(Some(cgroup_path(record, input.defaults)))
        .set_namespaces(Some(namespaces::namespaces(host, input.network, input.peers)))
        .set_resources(Some(limits::resources(host, input.devices)?))
        .set_sysctl(sysctls)
        .set_seccomp(security::seccomp(input)?)
        .set_masked_paths(Some(host.masked_paths.clone().unwrap_or_default()))
        .set_readonly_paths(Some(host.readonly_paths.clone().unwrap_or_default()))
        .set_rootfs_propagation(input.mounts.rootfs_propagation.clone())
        .set_devices(Some(input.devices.nodes.clone()));
    Ok(linux)
}

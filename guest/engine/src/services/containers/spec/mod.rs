//! From a container's record to the OCI spec its shim gets: a pure function, and the same for the process of an exec.
//!
//! The rules are moby's (`daemon/oci_linux.go`). What this process cannot grant (capabilities, limits) is left out
//! rather than making the start fail: see [`guest_runtime::defaults`].
mod limits;
mod mounts;
mod namespaces;
mod process;
mod security;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;

use guest_runtime::defaults;
use oci_spec::runtime::{Capabilities, Linux, LinuxDevice, Root, Spec};

pub use self::limits::rlimits;
pub use self::namespaces::NetworkNamespace;
pub use self::process::exec_process;
pub use self::security::{capabilities, security};
use super::record::Record;
use super::user::User;
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

fn linux(input: &Input<'_>) -> Result<Linux, Failure> {
    let Input { record, .. } = input;
    let host = &record.host;
    let mut linux = Linux::default();
    linux
        .set_cgroups_path(Some(Path::new(CGROUP_PARENT).join(&record.id)))
        .set_namespaces(Some(namespaces::namespaces(host, input.network)))
        .set_resources(Some(limits::resources(host)))
        .set_sysctl(host.sysctls.clone().map(|settings| settings.into_iter().collect()))
        .set_seccomp(security::seccomp(input)?)
        .set_masked_paths(Some(host.masked_paths.clone().unwrap_or_default()))
        .set_readonly_paths(Some(host.readonly_paths.clone().unwrap_or_default()))
        .set_rootfs_propagation(mounts::rootfs_propagation(record))
        .set_devices(Some(if host.privileged { input.host_devices.to_vec() } else { defaults::devices() }));
    Ok(linux)
}

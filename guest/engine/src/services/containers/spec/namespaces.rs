//! Which namespaces a container gets of its own, and which it shares.

use std::path::PathBuf;

use guest_api::HostConfig;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

/// The network namespace of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkNamespace {
    Path(PathBuf),
    Host,
}

/// The namespaces to make or join; one not named is the engine's own.
pub fn namespaces(host: &HostConfig, network: &NetworkNamespace) -> Vec<LinuxNamespace> {
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

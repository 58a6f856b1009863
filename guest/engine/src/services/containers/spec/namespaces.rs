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

/// Processes of other containers whose namespaces this one joins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    pub ipc: Option<i32>,
    pub pid: Option<i32>,
}

/// The namespaces to make or join; one not named is the engine's own.
pub fn namespaces(host: &HostConfig, network: &NetworkNamespace, peers: Peers) -> Vec<LinuxNamespace> {
    let namespace = |kind, path: Option<PathBuf>| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind).set_path(path);
        namespace
    };
    let mut namespaces = vec![namespace(LinuxNamespaceType::Mount, None)];
    if let NetworkNamespace::Path(path) = network {
        namespaces.push(namespace(LinuxNamespaceType::Network, Some(path.clone())));
    }
    let of_peer =
        |peer: Option<i32>, name: &str| peer.map(|pid| PathBuf::from(format!("/proc/{pid}/ns/{name}")));
    for (mode, kind, path) in [
        (&host.uts_mode, LinuxNamespaceType::Uts, None),
        (&host.pid_mode, LinuxNamespaceType::Pid, of_peer(peers.pid, "pid")),
        (&host.ipc_mode, LinuxNamespaceType::Ipc, of_peer(peers.ipc, "ipc")),
        (&host.cgroupns_mode, LinuxNamespaceType::Cgroup, None),
    ] {
        if mode != "host" {
            namespaces.push(namespace(kind, path));
        }
    }
    namespaces
}

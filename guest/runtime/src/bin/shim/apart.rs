//! A place for making a container where the mounts of others are not.
//!
//! Each container that runs has mounts in the engine's namespace: its root, its network namespace, what it shares. A copy
//! of that namespace has them all, and libcontainer reads the whole table of mounts a dozen times over for one container
//! (once for each cgroup controller that it looks for). So the container is made in a copy without them: the engine's
//! folder for what runs is a mount of its own, which is taken away with everything below it and put back with what this
//! container needs. When the container has been made, this process is back where it was, and the copy is gone.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use guest_runtime::apart::Kept;
use guest_runtime::sys;
use oci_spec::runtime::Spec;

/// What is taken away, and what is put back.
#[derive(Debug, PartialEq, Eq)]
pub struct Apart {
    mounts: PathBuf,
    /// Below `mounts`, what contains others before them.
    needed: Vec<PathBuf>,
}

impl Apart {
    /// For a container with this spec, whose shim has the folder `dir`. `None` where the container passes mounts on to
    /// the engine's namespace, which only a direct copy of that can.
    pub fn of(mounts: &Path, dir: &Path, spec: &Spec) -> Option<Self> {
        // What is mounted where is told by real paths. One that there is not cannot have been mounted.
        let mounts = mounts.canonicalize().ok()?;
        let linux = spec.linux().as_ref();
        if linux.and_then(|linux| linux.rootfs_propagation().as_deref()) == Some("shared") {
            return None;
        }
        let namespaces = linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten();
        let joined = namespaces.filter_map(|namespace| namespace.path().as_deref());
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_deref());
        let root = spec.root().as_ref().map(|root| root.path().as_path());
        let wanted = joined.chain(sources).chain(root).chain([dir]);
        let real = wanted.filter_map(|path| path.canonicalize().ok());
        let below: BTreeSet<PathBuf> =
            real.filter(|path| *path != mounts && path.starts_with(&mounts)).collect();
        let mut needed: Vec<PathBuf> = Vec::new();
        // A folder comes before what is in it.
        for path in below {
            if needed.last().is_none_or(|last| !path.starts_with(last)) {
                needed.push(path);
            }
        }
        Some(Self { mounts, needed })
    }

    /// Does something there.
    ///
    /// # Errors
    /// When the kernel refuses a step; the work has then not been done, or this process cannot come back from it.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let kept = Kept::take(&self.mounts, &self.needed)?;
        sys::in_mounts_of_its_own(|| kept.alone(), work)
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Mount, Root};

    use super::*;

    fn spec(below: &Path, propagation: &str) -> Spec {
        let mut network = LinuxNamespace::default();
        network.set_typ(LinuxNamespaceType::Network).set_path(Some(below.join("netns/c1")));
        let mut linux = Linux::default();
        linux.set_namespaces(Some(vec![network])).set_rootfs_propagation(Some(propagation.to_owned()));
        let from = |source: PathBuf| {
            let mut mount = Mount::default();
            mount.set_source(Some(source));
            mount
        };
        let mut root = Root::default();
        root.set_path(below.join("c1/rootfs"));
        let mut spec = Spec::default();
        spec.set_linux(Some(linux)).set_root(Some(root));
        spec.set_mounts(Some(vec![from("proc".into()), from("/etc".into()), from(below.join("c2/shm"))]));
        spec
    }

    #[test]
    fn what_a_container_needs_of_others_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        for name in ["netns/c1", "netns/c2", "c1/rootfs", "c2/shm", "c2/rootfs"] {
            std::fs::create_dir_all(real.join(name)).unwrap();
        }
        let link = real.join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let needed = ["c1", "c2/shm", "netns/c1"].map(|name| real.join(name)).to_vec();
        for named in [&real, &link] {
            let apart = Apart::of(named, &real.join("c1"), &spec(named, "slave")).unwrap();
            assert_eq!(apart, Apart { mounts: real.clone(), needed: needed.clone() });
        }
        assert_eq!(Apart::of(&real, &real.join("c1"), &spec(&real, "shared")), None);
        assert_eq!(Apart::of(&real.join("no"), &real.join("c1"), &spec(&real, "slave")), None);
    }
}

//! What libcontainer leaves undone of a container's mounts.
//!
//! With cgroup v1 it makes the folder and one mount in it per controller, and drops the options the spec gave: a
//! container could write its own limits (those of version 2 it mounts as asked). Between creation and start the shim sets them right from inside the container's
//! mount namespace, where nothing of the container runs yet.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use guest_runtime::sys;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::{FsWord, statfs};
use rustix::mount::{MountFlags, mount_remount};

/// The kernel's `CGROUP_SUPER_MAGIC`, of version 1.
const CGROUP_MAGIC: FsWord = 0x0027_e0eb;

/// Where the cgroups are that a container may only read.
#[derive(Debug, PartialEq, Eq)]
pub struct ReadOnlyCgroups {
    folder: PathBuf,
    /// Mounted there by somebody else, with options of their own.
    others: Vec<PathBuf>,
}

impl ReadOnlyCgroups {
    /// `None` when the container may write them, sees none, or has the host's mounts.
    pub fn of(spec: &Spec) -> Option<Self> {
        let mut namespaces = spec.linux().as_ref()?.namespaces().iter().flatten();
        if !namespaces.any(|one| one.typ() == LinuxNamespaceType::Mount && one.path().is_none()) {
            return None;
        }
        let mounts = spec.mounts().as_deref().unwrap_or_default();
        let position = mounts.iter().position(|mount| mount.typ().as_deref() == Some("cgroup"))?;
        if !is_read_only(&mounts[position]) {
            return None;
        }
        let folder = mounts[position].destination().clone();
        let others: Vec<_> = mounts[position + 1..].iter().map(|mount| mount.destination().clone()).collect();
        let covered = others.iter().any(|other| folder.starts_with(other));
        (!covered).then_some(Self { folder, others })
    }

    /// Makes them so, for the container of this init. Its program must not have been started.
    pub fn apply(&self, init: i32) -> io::Result<()> {
        let namespace = File::open(format!("/proc/{init}/ns/mnt"))?;
        sys::in_mount_namespace(&namespace, || self.remount())
    }

    fn remount(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let path = entry.path();
            // A controller that shares its hierarchy is a link to it.
            if entry.file_type()?.is_dir()
                && !self.others.contains(&path)
                && statfs(&path)?.f_type == CGROUP_MAGIC
            {
                remount_read_only(&path)?;
            }
        }
        remount_read_only(&self.folder)
    }
}

fn is_read_only(mount: &Mount) -> bool {
    mount.options().iter().flatten().any(|option| option == "ro")
}

fn remount_read_only(path: &Path) -> io::Result<()> {
    let flags =
        MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount_remount(path, flags, "")?)
}

#[cfg(test)]
mod tests {
    use guest_runtime::defaults;
    use oci_spec::runtime::LinuxNamespace;

    use super::*;

    fn spec(mounts: Vec<Mount>) -> Spec {
        let mut spec = Spec::default();
        spec.set_mounts(Some(mounts));
        spec
    }

    fn at(destination: &str) -> Mount {
        let mut mount = Mount::default();
        mount.set_destination(destination.into()).set_typ(Some("bind".into()));
        mount
    }

    #[test]
    fn cgroups_are_read_only_as_the_spec_says() {
        let plain = ReadOnlyCgroups::of(&spec(defaults::mounts(1))).unwrap();
        assert_eq!(plain.folder, Path::new("/sys/fs/cgroup"));
        assert_eq!(ReadOnlyCgroups::of(&spec(defaults::privileged_mounts(1))), None);
        assert_eq!(ReadOnlyCgroups::of(&spec(vec![at("/sys/fs/cgroup")])), None);
    }

    #[test]
    fn mounts_of_others_are_left_alone() {
        let with = |destination| spec([defaults::mounts(1), vec![at(destination)]].concat());
        let one = ReadOnlyCgroups::of(&with("/sys/fs/cgroup/memory")).unwrap();
        assert!(one.others.contains(&"/sys/fs/cgroup/memory".into()));
        assert_eq!(ReadOnlyCgroups::of(&with("/sys/fs/cgroup")), None);
        assert_eq!(ReadOnlyCgroups::of(&with("/sys")), None);
    }

    #[test]
    fn the_hosts_own_mounts_are_left_alone() {
        let mut shared = spec(defaults::mounts(1));
        let mut linux = shared.linux().clone().unwrap();
        linux.set_namespaces(Some(Vec::new()));
        shared.set_linux(Some(linux.clone()));
        assert_eq!(ReadOnlyCgroups::of(&shared), None);
        let mut joined = LinuxNamespace::default();
        joined.set_typ(LinuxNamespaceType::Mount).set_path(Some("/proc/1/ns/mnt".into()));
        linux.set_namespaces(Some(vec![joined]));
        shared.set_linux(Some(linux));
        assert_eq!(ReadOnlyCgroups::of(&shared), None);
    }
}

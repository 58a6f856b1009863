//! What libcontainer leaves undone of a container's mounts.
//!
//! With cgroup v1 it makes the folder and one mount in it per controller, and drops the options the spec gave: a
//! container could write its own limits (those of version 2 it mounts as asked). And it leaves every mount as private,
//! shared or slave as the root was made, whatever the mount's own options say. Between creation and start the shim sets
//! both right from inside the container's mount namespace, where nothing of the container runs yet.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use guest_runtime::sys;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::{FsWord, statfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount_change, mount_remount};

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
        if !has_own_mounts(spec) {
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

/// Which mounts pass mounts on, and which do not.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Propagation {
    places: Vec<(PathBuf, MountPropagationFlags)>,
}

impl Propagation {
    /// `None` when no mount says, or the mounts are the host's own.
    pub fn of(spec: &Spec) -> Option<Self> {
        if !has_own_mounts(spec) {
            return None;
        }
        let mounts = spec.mounts().iter().flatten();
        let places: Vec<_> = mounts
            .filter_map(|mount| {
                let flags = mount.options().iter().flatten().rev().find_map(|option| propagation(option))?;
                Some((mount.destination().clone(), flags))
            })
            .collect();
        (!places.is_empty()).then_some(Self { places })
    }

    /// Makes them so, for the container of this init. Its program must not have been started.
    pub fn apply(&self, init: i32) -> io::Result<()> {
        let namespace = File::open(format!("/proc/{init}/ns/mnt"))?;
        sys::in_mount_namespace(&namespace, || self.change())
    }

    fn change(&self) -> io::Result<()> {
        for (place, flags) in &self.places {
            match mount_change(place, *flags) {
                // A later mount hides it.
                Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => {}
                Err(error) => {
                    let text = format!("{}: {}", place.display(), io::Error::from(error));
                    return Err(io::Error::new(io::Error::from(error).kind(), text));
                }
            }
        }
        Ok(())
    }
}

fn propagation(option: &str) -> Option<MountPropagationFlags> {
    let (word, deep) = match option.strip_prefix('r') {
        Some(word) => (word, MountPropagationFlags::REC),
        None => (option, MountPropagationFlags::empty()),
    };
    let kind = match word {
        "private" => MountPropagationFlags::PRIVATE,
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return None,
    };
    Some(kind | deep)
}

/// Whether the container gets a mount namespace made for it.
fn has_own_mounts(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let mut namespaces = linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten();
    namespaces.any(|one| one.typ() == LinuxNamespaceType::Mount && one.path().is_none())
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
    fn mounts_pass_on_what_they_say() {
        let with = |options: &[&str]| {
            let mut mount = at("/there");
            mount.set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
            Propagation::of(&spec(vec![mount])).map(|found| found.places[0].1)
        };
        let deep = MountPropagationFlags::REC;
        assert_eq!(with(&["rbind", "ro"]), None);
        assert_eq!(with(&["rbind", "rprivate"]), Some(MountPropagationFlags::PRIVATE | deep));
        assert_eq!(with(&["bind", "slave", "ro"]), Some(MountPropagationFlags::DOWNSTREAM));
        assert_eq!(
            with(&["rprivate", "rshared"]),
            Some(MountPropagationFlags::SHARED | deep),
            "the last one"
        );
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

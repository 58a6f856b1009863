//! A container's files as its processes see them, volumes and all, for as long as one operation on them takes.
//!
//! The root is mounted at a place of its own (one file system with the running container's, see
//! [`guest_images::Snapshotter::mount`]). A thread with a mount namespace of its own then mounts the volumes on it, where
//! nobody else sees them: whatever happens to the operation, they go with the thread. Every path is resolved by the kernel
//! inside the root, so neither links nor the container's processes can lead out of it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use guest_images::Snapshotter;
use guest_runtime::apart::Kept;
use guest_volumes::make_folders;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use tokio::sync::oneshot;

use super::super::record::Record;
use super::super::rootfs;
use super::super::run::{self, Context};
use crate::failure::{Failure, chain};

/// Links followed before a path is taken to go in circles (the kernel's number).
const LINKS_MAX: usize = 40;

/// Something that is mounted over the container's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    pub source: PathBuf,
    pub destination: PathBuf,
    pub read_only: bool,
}

/// What is mounted over the root of a container, outermost first.
pub fn mounted(record: &Record) -> Vec<Mounted> {
    let folders = record.mounts.iter().filter_map(|point| {
        let (destination, read_only) = (point.destination.clone(), point.read_only);
        Some(Mounted { source: point.lasting_source()?, destination, read_only })
    });
    let mut mounted: Vec<Mounted> = folders.collect();
    mounted.sort_by_key(|mount| mount.destination.components().count());
    mounted
}

/// The files that the engine writes for a container, once it has been started, where nothing of the user's is mounted.
pub fn engines_files(context: &Context, record: &Record) -> Vec<Mounted> {
    let other = record.host.network_mode.strip_prefix("container:");
    let folder = context.data_folder(other.unwrap_or(&record.id));
    let own = ["resolv.conf", "hostname", "hosts"].map(|name| Mounted {
        source: folder.join(name),
        destination: Path::new("/etc").join(name),
        read_only: record.host.readonly_rootfs,
    });
    let covered = |file: &Mounted| record.mounts.iter().any(|point| point.destination == file.destination);
    own.into_iter().filter(|file| file.source.is_file() && !covered(file)).collect()
}

/// A container's files.
pub struct Tree {
    root: OwnedFd,
    path: PathBuf,
}

impl Tree {
    /// Opens a path, following links.
    pub fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // Something was renamed meanwhile; the kernel wants to be asked again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    pub fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// The text of a file; empty when there is none.
    pub fn text(&self, path: &str) -> io::Result<String> {
        rootfs::read_text(&self.path, path)
    }

    pub fn root(&self) -> io::Result<OwnedFd> {
        self.folder(Path::new("/"))
    }

    /// What is at an absolute, plain path; a link at its end is not followed, unless `as_folder`.
    pub fn stat(&self, path: &Path, as_folder: bool) -> io::Result<Stat> {
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if !as_folder => {
                let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
                Ok(rustix::fs::statat(self.folder(parent)?, name, flags)?)
            }
            _ => Ok(rustix::fs::fstat(self.folder(path)?)?),
        }
    }

    /// The absolute path without links that `path` leads to; where it leads nowhere, as far as it goes.
    pub fn follow(&self, path: &Path) -> io::Result<PathBuf> {
        let mut walked = PathBuf::from("/");
        let mut rest: Vec<PathBuf> = parts(path);
        let mut links = 0;
        while let Some(part) = rest.pop() {
            if part == Path::new("..") {
                walked.pop();
                continue;
            }
            match self.link(&walked, part.as_os_str()) {
                Some(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(Errno::LOOP.into());
                    }
                    if target.is_absolute() {
                        walked = PathBuf::from("/");
                    }
                    rest.extend(parts(&target));
                }
                None => walked.push(part),
            }
        }
        Ok(walked)
    }

    fn link(&self, folder: &Path, name: &OsStr) -> Option<PathBuf> {
        let folder = self.folder(folder).ok()?;
        let target = rustix::fs::readlinkat(&folder, name, Vec::new()).ok()?;
        Some(PathBuf::from(OsStr::new(target.to_str().ok()?)))
    }
}

/// The parts of a path, the last one first.
fn parts(path: &Path) -> Vec<PathBuf> {
    let part = |component: Component<'_>| match component {
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::ParentDir => Some(PathBuf::from("..")),
        _ => None,
    };
    path.components().rev().filter_map(part).collect()
}

/// Runs `work` in the files of a container, with `mounts` on them. Once begun it is not to be dropped: give it a task.
pub async fn inside<T: Send + 'static>(
    context: &Arc<Context>,
    id: &str,
    mounts: Vec<Mounted>,
    work: impl FnOnce(&Tree) -> T + Send + 'static,
) -> Result<T, Failure> {
    let failed = |error: anyhow::Error| {
        Failure::broken(format!("cannot look into the container's files: {}", chain(error.as_ref())))
    };
    let place = Place::mount(context, id).await?;
    let (path, engines) = (place.path.clone(), context.mounts.clone());
    let (done, result) = oneshot::channel();
    std::thread::Builder::new()
        .name("files".to_owned())
        .spawn(move || {
            let result = alone(&path, engines.as_deref(), &mounts).map(|tree| work(&tree));
            // Whoever waits for it may have gone with the engine.
            let _ = done.send(result);
        })
        .map_err(|error| Failure::internal("cannot start a thread", &error))?;
    let result = result.await.map_err(|_| Failure::broken("the work on the container's files failed"));
    // The place is unmounted when nobody uses it any more.
    let unmounted = tokio::task::spawn_blocking(move || drop(place)).await;
    unmounted.map_err(|error| Failure::internal("unmounting the container's files failed", &error))?;
    result?.map_err(failed)
}

/// Gives this thread mounts of its own, with the container's volumes among them. They end with the thread.
fn alone(place: &Path, engines: Option<&Path>, mounts: &[Mounted]) -> anyhow::Result<Tree> {
    // Other containers' roots and networks are not to live longer because this thread has copies of their mounts.
    let take = |engines: &Path| Kept::take(&engines.canonicalize()?, &[place.canonicalize()?]);
    let kept = engines.map(take).transpose().context("cannot copy the mount of the container's files")?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    match kept {
        Some(kept) => kept.alone(),
        None => {
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).map_err(io::Error::from)
        }
    }
    .context("cannot make mounts private")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, place, flags, Mode::empty())
        .with_context(|| format!("cannot open `{}`", place.display()))?;
    let tree = Tree { root, path: place.to_owned() };
    for mount in mounts {
        show(&tree, mount).with_context(|| {
            format!("cannot mount `{}` at `{}`", mount.source.display(), mount.destination.display())
        })?;
    }
    Ok(tree)
}

fn show(tree: &Tree, mount: &Mounted) -> io::Result<()> {
    if std::fs::metadata(&mount.source)?.is_dir() {
        make_folders(&tree.root, &mount.destination)?;
    } else if let Some(parent) = mount.destination.parent() {
        make_folders(&tree.root, parent)?;
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o755);
        drop(rustix::fs::openat2(&tree.root, &mount.destination, flags, mode, ResolveFlags::IN_ROOT)?);
    }
    let named = |file: &OwnedFd| format!("/proc/self/fd/{}", file.as_raw_fd());
    let target = tree.open(&mount.destination, OFlags::PATH)?;
    rustix::mount::mount_bind_recursive(&mount.source, named(&target))?;
    if mount.read_only {
        // Opened again, it is the mount and no longer what is below.
        let target = tree.open(&mount.destination, OFlags::PATH)?;
        rustix::mount::mount_remount(named(&target), MountFlags::BIND | MountFlags::RDONLY, "")?;
    }
    Ok(())
}

/// The folder of all places.
fn views(context: &Context) -> PathBuf {
    context.run.with_file_name("views")
}

/// Where a container's root is mounted for one operation; unmounted when dropped, which blocks.
struct Place {
    snapshotter: Snapshotter,
    id: String,
    path: PathBuf,
}

impl Place {
    async fn mount(context: &Arc<Context>, id: &str) -> Result<Self, Failure> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let place = Self {
            snapshotter: context.snapshotter(),
            id: id.to_owned(),
            path: views(context).join(format!("{}-{number}", &id[..12])),
        };
        let running = context.rootfs(id);
        run::blocking(move || {
            place.snapshotter.mount_beside(&place.id, &place.path, Some(&running))?;
            Ok(place)
        })
        .await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = self.snapshotter.unmount(&self.id, &self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a container's files stay mounted");
        }
        if let Err(error) = std::fs::remove_dir(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a folder stays behind");
        }
    }
}

/// Removes what a killed engine left mounted.
pub fn sweep(context: &Context) -> io::Result<()> {
    let folder = views(context);
    let listed = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in listed {
        let path = entry?.path();
        match rustix::mount::unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Err(Errno::INVAL) => {}
            other => other?,
        }
        std::fs::remove_dir(&path)?;
    }
    Ok(())
}

/// Whether it is a folder.
pub fn is_folder(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::store::tests::folder;

    #[test]
    fn links_are_followed_inside_the_root() {
        let base = folder();
        std::fs::create_dir_all(base.join("root/usr/bin")).unwrap();
        symlink("usr/bin", base.join("root/bin")).unwrap();
        symlink("/bin/../lib/x", base.join("root/usr/bin/up")).unwrap();
        symlink("../../../../etc/shadow", base.join("root/usr/out")).unwrap();
        symlink("circle", base.join("root/circle")).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let root = rustix::fs::openat(CWD, base.join("root"), flags, Mode::empty()).unwrap();
        let tree = Tree { root, path: base.join("root") };
        let follow = |path: &str| tree.follow(Path::new(path)).map(|path| path.display().to_string());
        assert_eq!(follow("/bin/sh").unwrap(), "/usr/bin/sh");
        assert_eq!(follow("bin").unwrap(), "/usr/bin");
        assert_eq!(follow("/bin/up").unwrap(), "/usr/lib/x", "a link in the middle of a link");
        assert_eq!(follow("/usr/out").unwrap(), "/etc/shadow");
        assert_eq!(follow("/nowhere/at/all").unwrap(), "/nowhere/at/all");
        assert!(follow("/circle").is_err());
        let kind =
            |path: &str, as_folder| tree.stat(Path::new(path), as_folder).map(|stat| is_folder(&stat)).ok();
        assert_eq!((kind("/bin", false), kind("/bin", true)), (Some(false), Some(true)));
        assert_eq!((kind("/", false), kind("/usr/out", true), kind("/x", false)), (Some(true), None, None));
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn outer_mounts_come_first() {
        use super::super::super::mounts::MountPoint;
        use super::super::super::record::tests::record;
        let bind = |destination: &str| MountPoint {
            source: "/s".into(),
            destination: destination.into(),
            ..MountPoint::default()
        };
        let mut record = record();
        record.mounts = vec![bind("/a/b/c"), bind("/a")];
        assert_eq!(mounted(&record)[0].destination, Path::new("/a"));
    }
}

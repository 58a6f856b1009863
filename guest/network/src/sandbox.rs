//! A container's network namespace, kept alive by a bind mount on a file of a private folder.
//!
//! The file is the handle: the OCI runtime joins it by path, a restarted engine opens it again, and clean-up after a
//! crash lists the folder. A file without a mount (killed between the two steps) is listed too and deleted alike.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::blocking;
use crate::netlink::{Netlink, NetlinkError, Request, in_own_thread};

/// The calling thread's.
pub(crate) const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// A network namespace with a path. Dropping this value does not delete it; [`Sandbox::delete`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    path: PathBuf,
}

/// Why a sandbox could not be made, opened or deleted.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A step on the way failed.
    #[error("cannot {step} network namespace {path}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file is there but nothing is mounted on it, or something else is.
    #[error("{path} is not a network namespace")]
    NotANamespace {
        /// The file.
        path: PathBuf,
    },
    /// Its loopback interface could not be switched on.
    #[error("cannot set up the loopback interface of network namespace {path}")]
    Loopback {
        /// The namespace.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: NetlinkError,
    },
    /// The runtime ended before the work began.
    #[error("cannot change network namespaces while the program is ending")]
    ShuttingDown,
}

impl Sandbox {
    /// Makes a new namespace at `path` (its folder is made too), with loopback up. On failure nothing is left.
    ///
    /// # Errors
    /// When `path` exists, or the kernel refuses (no CAP_SYS_ADMIN, too many namespaces).
    pub async fn create(path: &Path) -> Result<Self, SandboxError> {
        let sandbox = Self { path: path.to_owned() };
        let place = sandbox.clone();
        blocking(move || place.create_mount(|| ())).await.map_err(|_| SandboxError::ShuttingDown)??;
        Ok(sandbox)
    }

    /// The namespace that is mounted at `path` already.
    ///
    /// # Errors
    /// When there is no namespace.
    pub fn open(path: &Path) -> Result<Self, SandboxError> {
        let sandbox = Self { path: path.to_owned() };
        sandbox.file()?;
        Ok(sandbox)
    }

    /// Whatever is at `path`, complete or not: to be deleted.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Every sandbox in `folder`, complete or not. A missing folder holds none.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(folder: &Path) -> Result<Vec<Self>, SandboxError> {
        let failed = |source| SandboxError::Step { step: "list folder of", path: folder.to_owned(), source };
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut sandboxes = Vec::new();
        for entry in entries {
            sandboxes.push(Self { path: entry.map_err(failed)?.path() });
        }
        sandboxes.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(sandboxes)
    }

    /// The file it is mounted on, for `linux.namespaces[].path` of an OCI spec.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts and removes the file. The kernel ends the namespace, and every interface in it, once its last process
    /// has gone. Deleting what is gone, or half there, is fine.
    ///
    /// # Errors
    /// When the mount or the file cannot be removed.
    pub async fn delete(self) -> Result<(), SandboxError> {
        blocking(move || self.remove_mount()).await.map_err(|_| SandboxError::ShuttingDown)?
    }

    /// An open file of the namespace.
    pub(crate) fn file(&self) -> Result<File, SandboxError> {
        let file = File::open(&self.path).map_err(|source| self.step("open", source))?;
        let kind = fstatfs(file.as_fd()).map_err(|errno| self.step("open", errno.into()))?.filesystem_type();
        if kind == NSFS_MAGIC {
            Ok(file)
        } else {
            Err(SandboxError::NotANamespace { path: self.path.clone() })
        }
    }

    /// Makes the namespace and then works in it, on the one thread: nobody has to be woken in between.
    pub(crate) fn create_mount<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, SandboxError> {
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).map_err(|source| self.step("create folder of", source))?;
        }
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(&self.path)
            .map_err(|source| self.step("create the file of", source))?;
        let made = in_own_thread(|| {
            let step = |errno: Errno| self.step("create", errno.into());
            unshare(CloneFlags::CLONE_NEWNET).map_err(step)?;
            // The loopback interface is the first of every namespace.
            Netlink::open()
                .and_then(|mut netlink| netlink.ask(Request::up(1)))
                .map_err(|source| SandboxError::Loopback { path: self.path.clone(), source })?;
            // Last: without it the namespace ends with this thread.
            mount(Some(OWN_NAMESPACE), &self.path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(step)?;
            Ok(work())
        });
        let made = made.unwrap_or_else(|source| Err(self.step("create", source)));
        if made.is_err()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "a failed network namespace stays behind");
        }
        made
    }

    fn remove_mount(&self) -> Result<(), SandboxError> {
        // Mounted twice after a confused restart: until nothing is mounted any more (EINVAL).
        loop {
            match umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => continue,
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(errno) => return Err(self.step("unmount", errno.into())),
            }
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|source| self.step("remove", source)),
        }
    }

    fn step(&self, step: &'static str, source: io::Error) -> SandboxError {
        SandboxError::Step { step, path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_file_is_not_opened_as_a_sandbox() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "").unwrap();
        assert!(matches!(Sandbox::open(&path), Err(SandboxError::NotANamespace { .. })));
        assert!(matches!(
            Sandbox::open(&folder.path().join("b")),
            Err(SandboxError::Step { step: "open", .. })
        ));
    }

    #[tokio::test]
    async fn a_file_left_without_its_mount_is_listed_and_deleted() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("b"), "").unwrap();
        fs::write(folder.path().join("a"), "").unwrap();
        let sandboxes = Sandbox::list(folder.path()).unwrap();
        assert_eq!(sandboxes.len(), 2);
        assert!(sandboxes[0].path().ends_with("a"));
        for sandbox in sandboxes {
            sandbox.clone().delete().await.unwrap();
            sandbox.delete().await.unwrap();
        }
        assert!(Sandbox::list(folder.path()).unwrap().is_empty());
        assert!(Sandbox::list(&folder.path().join("missing")).unwrap().is_empty());
    }
}

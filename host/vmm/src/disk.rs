//! The data disk's file: made or grown sparsely, locked for as long as it is open.
//!
//! The lock (`flock`) is the machine's lock: it dies with the process that holds it, so there is nothing to clean up
//! after a crash. A file is never made smaller.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::spec::DiskSpec;

/// How long to wait for a predecessor that is on its way out: it gives its guest five seconds to power off.
pub const LOCK_TIME_MAX: Duration = Duration::from_secs(8);
/// Between two tries for the lock.
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// A new disk needs this much room on the host for its empty file system and a first image.
const FREE_BYTES_MIN: u64 = 128 * 1024 * 1024;

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened or made.
    #[error("cannot open the disk `{}`", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// It is a folder, a device, …
    #[error("the disk `{}` is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Another process holds the lock.
    #[error("the disk `{}` is in use by another machine", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file system cannot hold it.
    #[error(
        "no space for the disk `{}`: {available_bytes} bytes are free, {FREE_BYTES_MIN} are needed to begin with",
        path.display()
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// What is free on its file system.
        available_bytes: u64,
    },
    /// The file cannot get its size.
    #[error("cannot make the disk `{}` {size_bytes} bytes large", path.display())]
    Grow {
        /// The file.
        path: PathBuf,
        /// The size that was wanted.
        size_bytes: u64,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The spec is smaller than the file.
    #[error(
        "the disk `{}` is {file_bytes} bytes large and cannot shrink to {size_bytes} bytes: keep its size, or remove \
         the machine to begin with an empty disk",
        path.display()
    )]
    Shrink {
        /// The file.
        path: PathBuf,
        /// Its size.
        file_bytes: u64,
        /// The size that was wanted.
        size_bytes: u64,
    },
    /// The wait for the lock was given up because the machine is to stop.
    #[error("the start was called off")]
    CalledOff,
}

/// Opens and locks the disk, making or growing it to its size.
///
/// Waits up to [`LOCK_TIME_MAX`] for another holder of the lock, unless `called_off` says true meanwhile.
pub fn open(spec: &DiskSpec, called_off: &dyn Fn() -> bool) -> Result<File, DiskError> {
    open_within(spec, LOCK_TIME_MAX, called_off)
}

fn open_within(spec: &DiskSpec, limit: Duration, called_off: &dyn Fn() -> bool) -> Result<File, DiskError> {
    let path = &spec.path;
    let deadline = Instant::now() + limit;
    loop {
        let file = open_file(path)?;
        match lock(&file, path)? {
            // The path may have been removed or replaced between opening and locking: then this is not the disk.
            true if is_at(&file, path)? => return resize(file, spec),
            true => {}
            false if Instant::now() >= deadline => return Err(DiskError::InUse { path: path.clone() }),
            false => std::thread::sleep(LOCK_RETRY),
        }
        if called_off() {
            return Err(DiskError::CalledOff);
        }
    }
}

fn open_file(path: &Path) -> Result<File, DiskError> {
    let failed = |source| DiskError::Open { path: path.to_owned(), source };
    // Looked at before opening: opening a fifo or a device has effects.
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(DiskError::NotAFile { path: path.to_owned() }),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(failed)
}

/// True when the lock was taken, false when somebody else has it.
fn lock(file: &File, path: &Path) -> Result<bool, DiskError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(DiskError::Open { path: path.to_owned(), source: error.into() }),
    }
}

fn is_at(file: &File, path: &Path) -> Result<bool, DiskError> {
    let failed = |source| DiskError::Open { path: path.to_owned(), source };
    let ours = file.metadata().map_err(failed)?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

fn resize(file: File, spec: &DiskSpec) -> Result<File, DiskError> {
    let (path, size_bytes) = (spec.path.clone(), spec.size_bytes);
    let file_bytes = match file.metadata() {
        Ok(metadata) => metadata.len(),
        Err(source) => return Err(DiskError::Open { path, source }),
    };
    if file_bytes > size_bytes {
        return Err(DiskError::Shrink { path, file_bytes, size_bytes });
    }
    if file_bytes < size_bytes {
        if let Some(available_bytes) = too_little_room(&file, file_bytes) {
            discard_if_new(file_bytes, &path);
            return Err(DiskError::NoSpace { path, available_bytes });
        }
        if let Err(source) = file.set_len(size_bytes) {
            discard_if_new(file_bytes, &path);
            return Err(DiskError::Grow { path, size_bytes, source });
        }
    }
    Ok(file)
}

/// A file without content is one we have just made; nothing half-made stays.
fn discard_if_new(file_bytes: u64, path: &Path) {
    if file_bytes == 0
        && let Err(error) = std::fs::remove_file(path)
    {
        tracing::warn!(%error, path = %path.display(), "cannot remove the empty disk file");
    }
}

/// The free bytes, if they are too few to begin a new disk.
fn too_little_room(file: &File, file_bytes: u64) -> Option<u64> {
    if file_bytes > 0 {
        return None;
    }
    let statistics = rustix::fs::fstatvfs(file).ok()?;
    let available = statistics.f_bavail.saturating_mul(statistics.f_frsize);
    (available < FREE_BYTES_MIN).then_some(available)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn spec(folder: &Path, size_bytes: u64) -> DiskSpec {
        DiskSpec { path: folder.join("disk.raw"), size_bytes }
    }

    fn open_now(spec: &DiskSpec) -> Result<File, DiskError> {
        open_within(spec, Duration::ZERO, &|| false)
    }

    #[test]
    fn a_new_disk_is_sparse_private_and_of_the_size() {
        let folder = tempfile::tempdir().unwrap();
        let metadata = open_now(&spec(folder.path(), 512 * MIB)).unwrap().metadata().unwrap();
        assert_eq!(metadata.len(), 512 * MIB);
        assert!(metadata.blocks() * 512 < MIB);
        assert_eq!(metadata.mode() & 0o777, 0o600);
    }

    #[test]
    fn a_disk_grows_and_keeps_its_content_but_never_shrinks() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk.raw"), b"content").unwrap();
        drop(open_now(&spec(folder.path(), 64 * MIB)).unwrap());
        drop(open_now(&spec(folder.path(), 128 * MIB)).unwrap());
        let error = open_now(&spec(folder.path(), 64 * MIB)).unwrap_err().to_string();
        assert!(error.contains("is 134217728 bytes large and cannot shrink to 67108864"), "{error}");
        let content = std::fs::read(folder.path().join("disk.raw")).unwrap();
        assert!(content.starts_with(b"content") && content.len() as u64 == 128 * MIB);
    }

    #[test]
    fn a_disk_serves_one_machine_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let spec = spec(folder.path(), 64 * MIB);
        let first = open_now(&spec).unwrap();
        let error = open_now(&spec).unwrap_err().to_string();
        assert!(error.ends_with("disk.raw` is in use by another machine"), "{error}");
        let called_off = open_within(&spec, Duration::from_secs(60), &|| true).unwrap_err();
        assert!(matches!(called_off, DiskError::CalledOff));
        let waiting = std::thread::spawn(move || open_within(&spec, Duration::from_secs(60), &|| false));
        drop(first);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn what_is_not_a_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let spec = DiskSpec { path: folder.path().to_owned(), size_bytes: 64 * MIB };
        assert!(open_now(&spec).unwrap_err().to_string().ends_with("is not a regular file"));
        let spec = DiskSpec { path: folder.path().join("no/disk"), size_bytes: 64 * MIB };
        assert!(open_now(&spec).unwrap_err().to_string().starts_with("cannot open the disk"));
    }

    #[test]
    fn an_impossible_size_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let spec = spec(folder.path(), u64::MAX / 512 * 512);
        let error = open_now(&spec).unwrap_err().to_string();
        assert!(error.starts_with("cannot make the disk"), "{error}");
        assert!(!spec.path.exists());
    }
}

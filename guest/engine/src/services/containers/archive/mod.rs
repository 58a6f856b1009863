//! Files of a container, running or not: told about, copied out and in, exported, compared with the image.

mod path;
pub mod tree;

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use guest_api::files::{FilesystemChange, PathStat, go_file_mode};
use guest_images::archive::{CopyIn, Source, copy_in, copy_out};
use guest_images::{ChangeKind, MountPoint};
use jiff::Timestamp;
use rustix::fs::{FileType, OFlags, Stat};
use tokio::sync::{mpsc, oneshot};

use self::path::AskedPath;
use self::tree::{Mounted, Tree, is_folder, mounted};
use super::record::{Record, View};
use super::service::Containers;
use super::table::Phase;
use super::{run, user};
use crate::failure::Failure;
use crate::pieces::{self, PieceWriter, Pieces};

/// What a runtime makes in a container's root to mount over, where the image does not have it; dockerd has these in a layer of
/// its own that nobody sees.
pub const MOUNT_POINTS: &[MountPoint] = &[
    MountPoint::Folder("dev"),
    MountPoint::Folder("dev/mqueue"),
    MountPoint::Folder("dev/pts"),
    MountPoint::Folder("dev/shm"),
    MountPoint::File("dev/console"),
    MountPoint::Folder("proc"),
    MountPoint::Folder("sys"),
    MountPoint::File(".dockerenv"),
    MountPoint::File("etc/hostname"),
    MountPoint::File("etc/hosts"),
    MountPoint::File("etc/resolv.conf"),
    MountPoint::Link("etc/mtab", "/proc/mounts"),
];

/// How much of an archive is still read once it is refused.
const REFUSED_BYTES_READ: u64 = 16 << 20;
/// How files come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtractQuery {
    /// Refuse to replace a folder by something else, or the other way round.
    pub keep_kinds: bool,
    /// Everything is given to the container's user.
    pub as_user: bool,
}

impl Containers {
    /// Tells about a path.
    pub async fn stat_path(&self, wanted: &str, path: &str) -> Result<PathStat, Failure> {
        let view = self.view(wanted)?;
        let (asked, name) = (AskedPath::new(path), wanted.to_owned());
        self.in_files(&view.record, move |tree| {
            stat(tree, &asked).map_err(|error| asked.failure(&error, &name))
        })
        .await?
    }

    /// The archive of a path, and what is there. The archive ends when its receiver is dropped.
    pub async fn copy_out(&self, wanted: &str, path: &str) -> Result<(PathStat, Pieces), Failure> {
        let view = self.view(wanted)?;
        let (asked, name) = (AskedPath::new(path), wanted.to_owned());
        let stream = self.stream(&view, self.shown(&view.record), move |tree, ready, output| {
            let told = stat(tree, &asked).map_err(|error| asked.failure(&error, &name));
            let folder = told.as_ref().is_ok_and(|stat| stat.mode & (1 << 31) != 0);
            let opened = told.and_then(|stat| {
                let at = if folder { Some(asked.path()) } else { asked.path().parent() };
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                let opened = tree.open(at.unwrap_or(Path::new("/")), flags);
                opened.map(|fd| (stat, fd)).map_err(|error| asked.failure(&error, &name))
            });
            let (stat, opened) = match opened {
                Ok(found) => found,
                // The client may have gone.
                Err(failure) => return drop(ready.send(Err(failure))),
            };
            if ready.send(Ok(stat)).is_err() {
                return;
            }
            let base = asked.base();
            let prefix = if base == "/" { base.clone() } else { format!("{base}/") };
            let source = if folder {
                Source::Folder { folder: opened, prefix: prefix.as_bytes() }
            } else {
                Source::Single { folder: opened.as_fd(), name: asked.name(), path: asked.name().as_bytes() }
            };
            pack(source, output);
        });
        let (stat, pieces) = stream.await?;
        self.file_event(&view.record, "archive-path");
        Ok((stat, pieces))
    }

    /// Writes the files of an archive into a folder of the container.
    pub async fn copy_in(
        &self,
        wanted: &str,
        path: &str,
        query: ExtractQuery,
        mut archive: impl Read + Send + 'static,
    ) -> Result<(), Failure> {
        let view = self.view(wanted)?;
        let (asked, name, record) = (AskedPath::new(path), wanted.to_owned(), view.record.clone());
        self.in_files(&view.record, move |tree| {
            let mut extract = || {
                let failed = |error: &io::Error| asked.failure(error, &name);
                let target = tree.follow(asked.path()).map_err(|error| failed(&error))?;
                let there = tree.stat(&target, false).map_err(|error| failed(&error))?;
                if !is_folder(&there) {
                    return Err(Failure::invalid("extraction point is not a directory"));
                }
                check_writable(&record, &target)?;
                let owner = if query.as_user { owner(&record, tree)? } else { None };
                let root = tree.root().map_err(|error| failed(&error))?;
                copy_in(root, &target, &mut archive, CopyIn { keep_kinds: query.keep_kinds, owner })
                    .map_err(|error| Failure::broken(error.chain()))
            };
            let result = extract();
            if result.is_err() {
                // A client that is still sending hears why only if its sending is not cut off. It may have gone itself.
                let _ = io::copy(&mut archive.take(REFUSED_BYTES_READ), &mut io::sink());
            }
            result
        })
        .await??;
        self.file_event(&view.record, "extract-to-dir");
        Ok(())
    }

    /// The archive of the whole root, without volumes.
    pub async fn export(&self, wanted: &str) -> Result<Pieces, Failure> {
        let view = self.view(wanted)?;
        let refuse = |why: &str| {
            Failure::conflict(format!("You cannot export container {} which is {why}", view.record.id))
        };
        match view.phase {
            Phase::Dead => return Err(refuse("Dead")),
            Phase::Removing => return Err(refuse("being removed")),
            _ => {}
        }
        let stream = self.stream(&view, Vec::new(), move |tree, ready, output| {
            let root = tree.open(Path::new("/"), OFlags::RDONLY | OFlags::DIRECTORY);
            let root = root.map_err(|error| Failure::internal("cannot open the container's root", &error));
            let (told, folder) = match root {
                Ok(folder) => (Ok(()), Some(folder)),
                Err(failure) => (Err(failure), None),
            };
            // Unless the client has gone.
            if ready.send(told).is_ok()
                && let Some(folder) = folder
            {
                pack(Source::Folder { folder, prefix: b"" }, output);
            }
        });
        let ((), pieces) = stream.await?;
        self.file_event(&view.record, "export");
        Ok(pieces)
    }

    /// What the container changed in its image's files.
    pub async fn changes(&self, wanted: &str) -> Result<Vec<FilesystemChange>, Failure> {
        let (snapshotter, id) = (self.context().snapshotter(), self.view(wanted)?.record.id.clone());
        let changes = run::blocking(move || snapshotter.changes(&id, MOUNT_POINTS)).await?;
        let told = |change: guest_images::Change| FilesystemChange {
            path: change.path.to_string_lossy().into_owned(),
            kind: match change.kind {
                ChangeKind::Modified => 0,
                ChangeKind::Added => 1,
                ChangeKind::Deleted => 2,
            },
        };
        Ok(changes.into_iter().map(told).collect())
    }

    async fn in_files<T: Send + 'static>(
        &self,
        record: &Record,
        work: impl FnOnce(&Tree) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        tree::inside(self.context(), &record.id, self.shown(record), work).await
    }

    /// What a copy sees over the root.
    fn shown(&self, record: &Record) -> Vec<Mounted> {
        let mut shown = mounted(record);
        shown.extend(tree::engines_files(self.context(), record));
        shown
    }

    /// Runs `work`, which says once whether it can begin, and then writes an archive.
    async fn stream<T: Send + 'static>(
        &self,
        view: &View,
        mounts: Vec<Mounted>,
        work: impl FnOnce(&Tree, oneshot::Sender<Result<T, Failure>>, PieceWriter) + Send + 'static,
    ) -> Result<(T, Pieces), Failure> {
        let (ready, begun) = oneshot::channel();
        let (output, archive) = mpsc::channel(pieces::WAITING);
        let (context, id) = (self.context().clone(), view.record.id.clone());
        let inside = async move {
            tree::inside(&context, &id, mounts, move |tree| work(tree, ready, PieceWriter::new(output))).await
        };
        // It outlives this request, and is finished also when the client has gone.
        let inside = self.tasks().spawn(inside);
        match begun.await {
            Ok(begun) => Ok((begun?, archive)),
            // It did not come so far as to say anything.
            Err(_) => match inside.await {
                Ok(Err(failure)) => Err(failure),
                Ok(Ok(())) => Err(Failure::broken("the archive was not begun")),
                Err(error) => Err(Failure::internal("making the archive failed", &error)),
            },
        }
    }

    fn file_event(&self, record: &Record, action: &str) {
        self.context().events.publish("container", action, &record.id, record.event_attributes());
    }
}

/// Writes the archive; a failure in the middle of it breaks the stream off, which is all a client can be told then.
fn pack(source: Source<'_>, mut output: PieceWriter) {
    if let Err(error) = copy_out(source, &mut output) {
        tracing::debug!(error = %error.chain(), "an archive is not complete");
        output.fail(io::Error::other(error.chain()));
    }
}

fn stat(tree: &Tree, asked: &AskedPath) -> io::Result<PathStat> {
    let stat = tree.stat(asked.path(), asked.is_folder())?;
    let link_target = if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        tree.follow(asked.path())?.to_string_lossy().into_owned()
    } else {
        String::new()
    };
    Ok(PathStat {
        name: asked.base(),
        size: stat.st_size,
        mode: go_file_mode(stat.st_mode),
        mtime: modified(&stat),
        link_target,
    })
}

fn modified(stat: &Stat) -> String {
    let nanoseconds = i32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Timestamp::new(stat.st_mtime, nanoseconds)
        .map_or_else(|_| super::NEVER.to_owned(), |moment| moment.to_string())
}

/// Whether anything may be written below `target`, which has no links in it.
fn check_writable(record: &Record, target: &Path) -> Result<(), Failure> {
    let mounts = mounted(record);
    match mounts.iter().rev().find(|mount| target.starts_with(&mount.destination)) {
        Some(mount) if mount.read_only => Err(Failure::invalid("mounted volume is marked read-only")),
        None if record.host.readonly_rootfs => Err(Failure::invalid("container rootfs is marked read-only")),
        _ => Ok(()),
    }
}

/// The container's user, looked up in its own files.
fn owner(record: &Record, tree: &Tree) -> Result<Option<(u32, u32)>, Failure> {
    if record.config.user.is_empty() {
        return Ok(None);
    }
    let text = |path: &str| {
        tree.text(path)
            .map_err(|error| Failure::internal(format!("cannot read the container's {path}"), &error))
    };
    let user = user::resolve(&record.config.user, &[], &text("/etc/passwd")?, &text("/etc/group")?)?;
    Ok(Some((user.uid, user.gid)))
}

#[cfg(test)]
mod tests {
    use super::super::mounts::MountPoint;
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn read_only_places_are_refused_in_dockerds_words() {
        let mut record = record();
        let text = |record: &Record, path: &str| {
            check_writable(record, Path::new(path)).err().map(|failure| failure.message).unwrap_or_default()
        };
        assert_eq!(text(&record, "/x"), "");
        record.host.readonly_rootfs = true;
        assert_eq!(text(&record, "/x"), "container rootfs is marked read-only");
        let bind = |destination: &str, read_only| MountPoint {
            source: "/s".into(),
            destination: destination.into(),
            read_only,
            ..MountPoint::default()
        };
        record.mounts = vec![bind("/data", false), bind("/data/fixed", true)];
        assert_eq!(text(&record, "/data/sub"), "");
        assert_eq!(text(&record, "/data/fixed"), "mounted volume is marked read-only");
        assert_eq!(text(&record, "/database"), "container rootfs is marked read-only");
    }
}

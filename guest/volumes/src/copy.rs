//! Copy-up: what an image has at a volume's place becomes the content of the empty volume.
//!
//! Everything is opened below a descriptor of the source and one of the destination, without following a link, so the tree
//! that is copied is the tree that lies there, whatever its links say. Owners, modes, times, extended attributes, links of
//! both kinds, devices, pipes and sockets are kept.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
    XattrFlags, chownat, fchmod, fgetxattr, flistxattr, fsetxattr, linkat, mkdirat, mknodat, openat, openat2,
    readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;
use thiserror::Error;

/// Why an image's files could not be copied.
#[derive(Debug, Error)]
#[error("cannot copy `{path}` into the volume")]
pub struct CopyError {
    path: PathBuf,
    source: io::Error,
}

/// Copies what is in the folder `source` into the folder `destination`, and makes that look like it.
///
/// Does nothing, and says `false`, when there is something in `destination` already.
pub fn fill(source: &OwnedFd, destination: &Path) -> Result<bool, CopyError> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source: Errno| CopyError { path, source: source.into() }
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let into = openat(CWD, destination, flags, Mode::empty()).map_err(fail(destination))?;
    if !names(&into).map_err(fail(destination))?.is_empty() {
        return Ok(false);
    }
    let room = Room { names: vec![0; 1 << 16], value: vec![0; 1 << 16] };
    let mut copy = Copy { from: source, into: &into, links: HashMap::new(), room };
    let mut folders = vec![PathBuf::from(".")];
    let mut next = 0;
    while let Some(folder) = folders.get(next).cloned() {
        next += 1;
        for name in copy.names(&folder).map_err(fail(&folder))? {
            let path = folder.join(name);
            match copy.entry(&path) {
                Ok(Kind::Folder) => folders.push(path),
                // Gone meanwhile: somebody else writes there too.
                Ok(Kind::Other) | Err(Errno::NOENT) => {}
                Err(error) => return Err(fail(&path)(error)),
            }
        }
    }
    // Last and from the inside out: making entries changes a folder's times.
    for folder in folders.iter().rev() {
        copy.describe_folder(folder).map_err(fail(folder))?;
    }
    Ok(true)
}

enum Kind {
    Folder,
    Other,
}

/// The kernel's largest list of attribute names, and its largest value.
struct Room {
    names: Vec<u8>,
    value: Vec<u8>,
}

struct Copy<'a> {
    from: &'a OwnedFd,
    into: &'a OwnedFd,
    /// First copies of files with several names.
    links: HashMap<(u64, u64), PathBuf>,
    room: Room,
}

/// Opens below `folder`, through folders only.
fn open(folder: impl AsFd, path: &Path, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    openat2(folder, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode, resolve)
}

fn names(folder: impl AsFd) -> rustix::io::Result<Vec<PathBuf>> {
    use std::os::unix::ffi::OsStrExt;
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(PathBuf::from(std::ffi::OsStr::from_bytes(name)));
        }
    }
    Ok(names)
}

fn split(path: &Path) -> (&Path, &Path) {
    (path.parent().unwrap_or(Path::new(".")), path.file_name().map_or(path, Path::new))
}

fn mode_of(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn times_of(stat: &Stat) -> Timestamps {
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    Timestamps {
        last_access: time(stat.st_atime, i64::try_from(stat.st_atime_nsec).unwrap_or(0)),
        last_modification: time(stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
    }
}

impl Copy<'_> {
    fn names(&self, folder: &Path) -> rustix::io::Result<Vec<PathBuf>> {
        names(open(self.from, folder, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?)
    }

    /// Copies one entry; of a folder only that it is there.
    fn entry(&mut self, path: &Path) -> rustix::io::Result<Kind> {
        let (folder, name) = split(path);
        let from = open(self.from, folder, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        let into = open(self.into, folder, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        let stat = statat(&from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            mkdirat(&into, name, Mode::RWXU)?;
            return Ok(Kind::Folder);
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                let (first_folder, first_name) = split(first);
                let first_folder =
                    open(self.into, first_folder, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
                linkat(&first_folder, first_name, &into, name, AtFlags::empty())?;
                return Ok(Kind::Other);
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.to_owned());
        }
        let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        match kind {
            FileType::RegularFile => {
                let source = open(&from, name, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let copy = open(&into, name, flags, Mode::RUSR | Mode::WUSR)?;
                let (mut source, mut copy) = (File::from(source), File::from(copy));
                io::copy(&mut source, &mut copy)
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
                rustix::fs::fchown(&copy, Some(owner), Some(group))?;
                // After the owner: a change of that takes the set-user-id bit away, and capabilities.
                fchmod(&copy, mode_of(&stat))?;
                attributes(&source, &copy, &mut self.room)?;
                rustix::fs::futimens(&copy, &times_of(&stat))?;
                return Ok(Kind::Other);
            }
            FileType::Symlink => {
                let target = readlinkat(&from, name, Vec::new())?;
                symlinkat(target.as_c_str(), &into, name)?;
            }
            other => {
                mknodat(&into, name, other, mode_of(&stat), stat.st_rdev)?;
            }
        }
        chownat(&into, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        if kind != FileType::Symlink {
            rustix::fs::chmodat(&into, name, mode_of(&stat), AtFlags::empty())?;
        }
        utimensat(&into, name, &times_of(&stat), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(Kind::Other)
    }

    fn describe_folder(&mut self, path: &Path) -> rustix::io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let from = open(self.from, path, flags, Mode::empty())?;
        let into = open(self.into, path, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&from)?;
        rustix::fs::fchown(&into, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
        fchmod(&into, mode_of(&stat))?;
        attributes(&from, &into, &mut self.room)?;
        rustix::fs::futimens(&into, &times_of(&stat))
    }
}

/// Copies extended attributes, as far as the volume's file system has any. `room` is scratch space for names and a value.
fn attributes(from: impl AsFd, into: impl AsFd, room: &mut Room) -> rustix::io::Result<()> {
    let length = match flistxattr(&from, &mut room.names[..]) {
        Err(Errno::OPNOTSUPP) | Ok(0) => return Ok(()),
        other => other?,
    };
    for name in room.names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let length = match fgetxattr(&from, name, &mut room.value[..]) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => continue,
            other => other?,
        };
        match fsetxattr(&into, name, &room.value[..length], XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) => {}
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn folder(path: &Path) -> OwnedFd {
        openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    #[test]
    fn a_tree_is_copied_as_it_lies_there() {
        let base = tempfile::tempdir().unwrap();
        let (from, into) = (base.path().join("from"), base.path().join("into"));
        fs::create_dir_all(from.join("deep/er")).unwrap();
        fs::create_dir(&into).unwrap();
        fs::write(from.join("deep/file"), "content").unwrap();
        fs::set_permissions(from.join("deep/file"), fs::Permissions::from_mode(0o4750)).unwrap();
        fs::set_permissions(from.join("deep/er"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o711)).unwrap();
        fs::hard_link(from.join("deep/file"), from.join("again")).unwrap();
        symlink("/etc", from.join("out")).unwrap();
        mknodat(folder(&from), "pipe", FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let attribute = rustix::fs::setxattr(from.join("again"), "user.note", b"x", XattrFlags::empty());
        let epoch = Timestamps {
            last_access: Timespec { tv_sec: 5, tv_nsec: 0 },
            last_modification: Timespec { tv_sec: 7, tv_nsec: 0 },
        };
        utimensat(CWD, from.join("deep"), &epoch, AtFlags::empty()).unwrap();

        assert!(fill(&folder(&from), &into).unwrap());
        let copied = fs::metadata(into.join("deep/file")).unwrap();
        assert_eq!(copied.mode() & 0o7777, 0o4750);
        assert_eq!(copied.ino(), fs::metadata(into.join("again")).unwrap().ino());
        assert_eq!(fs::read_to_string(into.join("again")).unwrap(), "content");
        assert_eq!(fs::metadata(into.join("deep/er")).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(fs::metadata(&into).unwrap().mode() & 0o7777, 0o711);
        assert_eq!(fs::metadata(into.join("deep")).unwrap().mtime(), 7);
        assert_eq!(fs::read_link(into.join("out")).unwrap(), Path::new("/etc"));
        assert_eq!(fs::symlink_metadata(into.join("pipe")).unwrap().mode() & 0o170_000, 0o010_000);
        if attribute.is_ok() {
            let mut value = [0_u8; 8];
            let length = rustix::fs::getxattr(into.join("again"), "user.note", &mut value[..]).unwrap();
            assert_eq!(&value[..length], b"x");
        }
        // Somebody has it by now.
        assert!(!fill(&folder(&from), &into).unwrap());
    }

    #[test]
    fn owners_are_kept() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let (from, into) = (base.path().join("from"), base.path().join("into"));
        fs::create_dir(&from).unwrap();
        fs::create_dir(&into).unwrap();
        symlink("nowhere", from.join("link")).unwrap();
        std::os::unix::fs::lchown(from.join("link"), Some(1000), Some(1001)).unwrap();
        std::os::unix::fs::chown(&from, Some(33), Some(34)).unwrap();
        assert!(fill(&folder(&from), &into).unwrap());
        let link = fs::symlink_metadata(into.join("link")).unwrap();
        assert_eq!((link.uid(), link.gid()), (1000, 1001));
        let root = fs::metadata(&into).unwrap();
        assert_eq!((root.uid(), root.gid()), (33, 34));
    }
}

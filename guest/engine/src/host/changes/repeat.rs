//! One change, repeated: the calls that make our kernel tell of it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use guest_protocol::changes::{Change, Kind, Spot, Touch, What, announcement};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use super::WITHIN;

/// A file that may be executed is not opened for writing, not even for a moment: whoever would start it then could not.
const RUNS: u32 = 0o111;

/// Repeats changes in what the host shares.
pub struct Repeater {
    base: OwnedFd,
    device: u64,
}

/// Opens something in the share. Links are not followed.
pub fn open_below(base: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(base, path, flags | OFlags::CLOEXEC, Mode::empty(), WITHIN)
}

impl Repeater {
    /// For the share that is mounted there.
    pub fn new(mount: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let base = rustix::fs::openat(CWD, mount, flags, Mode::empty())?;
        let device = rustix::fs::fstat(&base)?.st_dev;
        Ok(Self { base, device })
    }

    /// The root of the share.
    pub fn base(&self) -> &OwnedFd {
        &self.base
    }

    /// The share's device number.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// Repeats the change with this number in its batch.
    pub fn repeat(&self, index: usize, change: &Change) -> Result<(), Errno> {
        let name = name(&change.at)?;
        let folder = self.folder(&change.at)?;
        self.announce(index, false);
        match &change.what {
            What::Appeared(kind, touch) => self.appear(&folder, name, *kind, *touch),
            What::Touched(touch) => self.touch(&folder, name, *touch),
            What::Vanished { folder: true } => rustix::fs::unlinkat(&folder, name, AtFlags::REMOVEDIR),
            What::Vanished { folder: false } => rustix::fs::unlinkat(&folder, name, AtFlags::empty()),
            What::Renamed { folder: is_folder, to } => {
                let (to_folder, to_name) = (self.folder(to)?, self::name(to)?);
                self.announce(index, false);
                let renamed = rustix::fs::renameat(&folder, name, &to_folder, to_name);
                if renamed.is_ok() {
                    return Ok(());
                }
                // The guest knows the file by its new name already.
                self.announce(index, true);
                let flags = if *is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                let gone = rustix::fs::unlinkat(&folder, name, flags);
                let touch = Touch { modified: true, closed: true, attributes: true };
                gone.and(self.touch(&to_folder, to_name, touch))
            }
            What::Lost => set_times(&folder, OsStr::new(""), UTIME_NOW),
        }
    }

    fn folder(&self, spot: &Spot) -> Result<OwnedFd, Errno> {
        open_below(&self.base, Path::new(OsStr::from_bytes(&spot.folder)), OFlags::PATH | OFlags::DIRECTORY)
    }

    /// Tells the server which change comes: it answers that there is no such file.
    fn announce(&self, index: usize, apart: bool) {
        let _not_found =
            rustix::fs::statat(&self.base, announcement(index, apart), AtFlags::SYMLINK_NOFOLLOW);
    }

    fn appear(&self, folder: &OwnedFd, name: &OsStr, kind: Kind, touch: Touch) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(0o600);
        let node = |kind| rustix::fs::mknodat(folder, name, kind, mode, 0);
        let made = match kind {
            Kind::File => node(FileType::RegularFile),
            Kind::Pipe => node(FileType::Fifo),
            Kind::Socket => node(FileType::Socket),
            Kind::Folder => rustix::fs::mkdirat(folder, name, mode),
            Kind::Link => rustix::fs::symlinkat(c".", folder, name),
        };
        match made {
            Ok(()) if touch == Touch::default() => Ok(()),
            Ok(()) => self.touch(folder, name, touch),
            // Somebody here has found it already. That something happened to it is true all the same.
            Err(Errno::EXIST) if kind == Kind::File => {
                self.touch(folder, name, Touch { modified: true, closed: true, ..touch })
            }
            Err(Errno::EXIST) => self.touch(folder, name, Touch { attributes: true, ..touch }),
            Err(error) => Err(error),
        }
    }

    fn touch(&self, folder: &OwnedFd, name: &OsStr, touch: Touch) -> Result<(), Errno> {
        if touch.attributes {
            set_times(folder, name, UTIME_NOW)?;
        }
        let opened = if touch.closed { open_to_write(folder, name)? } else { None };
        if touch.modified {
            set_times(folder, name, UTIME_OMIT)?;
        }
        // It is closed now.
        drop(opened);
        Ok(())
    }
}

/// Opens a file as one would to write to it. Not one that is executed, or may be.
fn open_to_write(folder: &OwnedFd, name: &OsStr) -> Result<Option<OwnedFd>, Errno> {
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_mode & RUNS != 0 {
        return Ok(None);
    }
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat2(folder, name, flags, Mode::empty(), WITHIN) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::TXTBSY) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Both times are a change of attributes; that of modification alone is one of data.
fn set_times(folder: &OwnedFd, name: &OsStr, accessed: i64) -> Result<(), Errno> {
    let time = |nanoseconds: i64| Timespec { tv_sec: 0, tv_nsec: nanoseconds as _ };
    let times = Timestamps { last_access: time(accessed), last_modification: time(UTIME_NOW) };
    let flags = if name.is_empty() { AtFlags::EMPTY_PATH } else { AtFlags::SYMLINK_NOFOLLOW };
    rustix::fs::utimensat(folder, name, &times, flags)
}

/// One component, or nothing.
fn name(spot: &Spot) -> Result<&OsStr, Errno> {
    let name = OsStr::from_bytes(&spot.name);
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (None, None) => Ok(name),
        (Some(Component::Normal(only)), None) if only == name => Ok(name),
        _ => Err(Errno::INVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spot(folder: &str, name: &str) -> Spot {
        Spot { inode: 0, folder: folder.into(), name: name.into() }
    }

    /// Where nothing answers like our server, a repeated change is made.
    #[test]
    fn each_change_is_the_call_that_makes_it() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("sub")).unwrap();
        let repeater = Repeater::new(root.path()).unwrap();
        let make =
            |name: &str, what: What| repeater.repeat(0, &Change { at: spot("sub", name), inode: 0, what });
        let written = Touch { modified: true, closed: true, attributes: true };
        for (kind, name) in [(Kind::File, "f"), (Kind::Folder, "d"), (Kind::Link, "l"), (Kind::Pipe, "p")] {
            make(name, What::Appeared(kind, written)).unwrap();
            // It is there already.
            make(name, What::Appeared(kind, Touch::default())).unwrap();
        }
        make("f", What::Touched(written)).unwrap();
        make("f", What::Renamed { folder: false, to: spot("sub", "g") }).unwrap();
        make("", What::Lost).unwrap();
        make("d", What::Vanished { folder: true }).unwrap();
        make("l", What::Vanished { folder: false }).unwrap();
        assert_eq!(make("none", What::Touched(written)), Err(Errno::NOENT));
        assert!(root.path().join("sub/g").is_file());
        assert_eq!(std::fs::read_dir(root.path().join("sub")).unwrap().count(), 2);
    }

    #[test]
    fn nothing_outside_the_share_is_touched() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
        let repeater = Repeater::new(root.path()).unwrap();
        for (folder, name) in [("link", "x"), ("..", "x"), ("/tmp", "x"), ("", ".."), ("", "a/b"), ("", ".")]
        {
            let what = What::Appeared(Kind::File, Touch::default());
            let change = Change { at: spot(folder, name), inode: 0, what };
            assert!(repeater.repeat(0, &change).is_err(), "{folder} {name}");
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}

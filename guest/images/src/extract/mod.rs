//! Writes the entries of a tar stream as files below a root, which they cannot leave.
//!
//! Two uses, told apart by [`Rules`]: the folder of a layer, which is ours alone and where whiteouts mean something; and the
//! live root of a container, which others change meanwhile. The archive is hostile until proven otherwise:
//!
//! - Every path is resolved by the kernel with `openat2(RESOLVE_IN_ROOT)` below the root, so neither `..`, nor a symbolic
//!   link, nor a hard link leads out. A name that spells its way out is refused.
//! - Bytes and entries of a layer are bounded, and so is what the archive makes us remember.
//! - Attributes that overlayfs itself gives a meaning to are never taken from an archive.

mod path;

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    fs::File,
    io::{self, BufRead},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, XattrFlags},
    io::Errno,
};

use crate::{
    Error, Kind, Limits, Result,
    tarball::{Entry, EntryKind, Reader, TarError},
};

use path::{PATH_BYTES_MAX, TOO_LONG, base_name, magic, split, timestamps};
pub(crate) use path::{clean, copy_description};

/// The attribute by which overlayfs knows a folder that hides all below it.
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";
/// What the name of a whiteout begins with (OCI image specification, layer filesystem changeset).
pub(crate) const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// The name of the whiteout of everything in a folder.
pub(crate) const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";

/// Open folders remembered, so that neighbours in the archive do not each resolve their path.
const PARENTS_MAX: usize = 64;
/// Bytes of paths remembered for the end.
const REMEMBERED_BYTES_MAX: usize = 64 << 20;
/// Zeroes in a row that become a hole: a block of every file system in use.
const HOLE_BYTES_MIN: usize = 4096;

/// What holds for an extraction beside the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rules {
    /// Into the folder of a layer.
    Layer,
    /// Into a container, as `docker cp` does.
    Copy {
        /// Refuse to replace a folder by something else, or the other way round.
        keep_kinds: bool,
        /// Owner and group of everything, instead of the archive's.
        owner: Option<(u32, u32)>,
    },
}

/// A root while it is being written to.
pub(crate) struct Extraction<'a> {
    /// What errors call the archive.
    name: &'a str,
    /// What errors call the folder; the folder of a layer.
    path: &'a Path,
    limits: &'a Limits,
    rules: Rules,
    root: OwnedFd,
    /// The folder below the root that the archive's names begin in.
    base: Vec<u8>,
    parents: HashMap<Vec<u8>, OwnedFd>,
    /// Only root may give files away; others (fuzzing, tests) leave them as their own.
    gives_owners: bool,
    written: Written,
    /// Folders whose time is set last, because everything put into them changes it.
    times: Vec<(Vec<u8>, (i64, u32))>,
    remembered_bytes: usize,
}

/// What an extraction made.
#[derive(Default)]
pub(crate) struct Written {
    pub(crate) size: u64,
    pub(crate) entries: u64,
    /// Folders that the archive does not describe. The empty path is the root.
    pub(crate) implied: BTreeSet<Vec<u8>>,
}

impl<'a> Extraction<'a> {
    /// Into the empty folder of a layer.
    pub(crate) fn layer(name: &'a str, path: &'a Path, limits: &'a Limits) -> Result<Self> {
        let root =
            rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|source| Error::io("open", path, source))?;
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755))
            .map_err(|source| Error::io("change the mode of", path, source))?;
        Ok(Self::new(name, path, limits, Rules::Layer, root, Vec::new()))
    }

    /// Into the folder `path` of the live root `root`. Nothing is bounded but by the disk.
    pub(crate) fn copy(name: &'a str, root: OwnedFd, path: &'a Path, rules: Rules) -> Result<Self> {
        const UNLIMITED: &Limits =
            &Limits { layer_bytes_max: u64::MAX, layer_entries_max: u64::MAX, archive_bytes_max: u64::MAX };
        let base = clean(path.as_os_str().as_bytes())
            .map_err(|why| Error::invalid(format!("the folder `{}` {why}", path.display())))?;
        Ok(Self::new(name, path, UNLIMITED, rules, root, base))
    }

    fn new(
        name: &'a str,
        path: &'a Path,
        limits: &'a Limits,
        rules: Rules,
        root: OwnedFd,
        base: Vec<u8>,
    ) -> Self {
        let gives_owners = rustix::process::geteuid().is_root();
        let written = Written { implied: BTreeSet::from([Vec::new()]), ..Written::default() };
        Self {
            name,
            path,
            limits,
            rules,
            root,
            base,
            parents: HashMap::new(),
            gives_owners,
            written,
            times: Vec::new(),
            remembered_bytes: 0,
        }
    }

    /// The path of an archive's name below the root; `None` for the folder that the names begin in.
    fn path_of(&self, name: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
        let path = clean(name)?;
        if path.is_empty() {
            return Ok(None);
        }
        if self.base.is_empty() {
            return Ok(Some(path));
        }
        let path = [&self.base, &b"/"[..], &path].concat();
        if path.len() > PATH_BYTES_MAX { Err(TOO_LONG) } else { Ok(Some(path)) }
    }

    /// Reads the stream to its end and writes everything in it.
    pub(crate) fn write(mut self, input: &mut (impl BufRead + ?Sized)) -> Result<Written> {
        let mut reader = Reader::new(input);
        loop {
            let entry = reader.next().map_err(|source| self.unreadable(source))?;
            let Some(entry) = entry else { break };
            self.written.entries += 1;
            if self.written.entries > self.limits.layer_entries_max {
                return Err(Error::invalid(format!(
                    "{} has more than the limit of {} entries",
                    self.name, self.limits.layer_entries_max
                )));
            }
            self.apply(&entry, &mut reader)?;
        }
        // What follows the archive's end belongs to the diff id.
        let rest = reader.into_inner();
        loop {
            let length = rest.fill_buf().map_err(|source| self.unreadable(TarError::from(source)))?.len();
            if length == 0 {
                break;
            }
            rest.consume(length);
        }
        self.set_times()?;
        Ok(self.written)
    }

    fn unreadable(&self, source: TarError) -> Error {
        Error::because(Kind::Invalid, format!("{} cannot be unpacked", self.name), source)
    }

    fn refuse(&self, path: &[u8], why: &str) -> Error {
        Error::invalid(format!("{} is refused: entry `{}` {why}", self.name, String::from_utf8_lossy(path)))
    }

    /// A failed call on behalf of an entry.
    fn failed(&self, path: &[u8], action: &str, source: Errno) -> Error {
        match source {
            Errno::NOSPC | Errno::DQUOT => Error::io(&format!("unpack {}", self.name), self.path, source),
            _ => Error::because(
                if self.rules == Rules::Layer { Kind::Invalid } else { Kind::Internal },
                format!(
                    "{} cannot be unpacked: could not {action} `{}`",
                    self.name,
                    String::from_utf8_lossy(path)
                ),
                io::Error::from(source),
            ),
        }
    }

    fn apply(&mut self, entry: &Entry, data: &mut impl BufRead) -> Result<()> {
        let path = self.path_of(&entry.path).map_err(|why| self.refuse(&entry.path, why))?;
        let Some(path) = path else { return self.root_entry(entry) };
        let (folder, name) = split(&path);
        if self.rules == Rules::Layer && name.starts_with(WHITEOUT) {
            return self.whiteout(&path, folder, name);
        }
        let parent = self.parent(folder)?;
        let base = base_name(name);
        match entry.kind {
            EntryKind::Directory => self.directory(entry, &path, parent.as_fd(), base)?,
            EntryKind::File => self.file(entry, &path, parent.as_fd(), base, data)?,
            EntryKind::Symlink => {
                let target = OsStr::from_bytes(&entry.link);
                self.create(&path, parent.as_fd(), base, "make the symbolic link", |parent| {
                    rustix::fs::symlinkat(target, parent, base)
                })?;
                self.describe_by_name(entry, &path, parent.as_fd(), base)?;
            }
            EntryKind::HardLink => self.hard_link(entry, &path, parent.as_fd(), base)?,
            EntryKind::CharDevice | EntryKind::BlockDevice | EntryKind::Fifo => {
                let kind = match entry.kind {
                    EntryKind::CharDevice => FileType::CharacterDevice,
                    EntryKind::BlockDevice => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                let mode = Mode::from_raw_mode(entry.mode);
                self.create(&path, parent.as_fd(), base, "make the device", |parent| {
                    rustix::fs::mknodat(parent, base, kind, mode, device)
                })?;
                self.describe_by_name(entry, &path, parent.as_fd(), base)?;
                rustix::fs::chmodat(&parent, base, mode, AtFlags::empty())
                    .map_err(|source| self.failed(&path, "change the mode of", source))?;
            }
        }
        self.keep_parent(folder, parent);
        Ok(())
    }

    /// The archive describes the root folder itself.
    fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != EntryKind::Directory {
            return Err(self.refuse(&entry.path, "would replace the root folder"));
        }
        // Whoever copies into a folder leaves the folder itself as it is.
        if self.rules != Rules::Layer {
            return Ok(());
        }
        self.written.implied.remove(&b""[..]);
        self.describe(entry, b".", self.root.as_fd())?;
        self.remember_time(Vec::new(), entry.mtime)
    }

    fn directory(&mut self, entry: &Entry, path: &[u8], parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let make = |parent: BorrowedFd<'_>| rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700));
        match make(parent) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                if self.kind_of(path, parent, name)? == FileType::Directory {
                    // A folder twice is one folder, described by the last entry.
                    self.written.implied.remove(path);
                } else {
                    if let Rules::Copy { keep_kinds: true, .. } = self.rules {
                        return Err(self.overwrites(path, "non-directory", "directory"));
                    }
                    let hides = self.rules == Rules::Layer && self.is_whiteout(path, parent, name)?;
                    self.remove(path, parent, name)?;
                    make(parent).map_err(|source| self.failed(path, "make the folder", source))?;
                    if hides {
                        self.make_opaque(path, parent, name)?;
                    }
                }
            }
            Err(source) => return Err(self.failed(path, "make the folder", source)),
        }
        let folder = rustix::fs::openat(
            parent,
            name,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|source| self.failed(path, "open the folder", source))?;
        self.describe(entry, path, folder.as_fd())?;
        self.remember_time(path.to_vec(), entry.mtime)
    }

    fn file(
        &mut self,
        entry: &Entry,
        path: &[u8],
        parent: BorrowedFd<'_>,
        name: &OsStr,
        data: &mut impl BufRead,
    ) -> Result<()> {
        let total =
            self.written.size.checked_add(entry.size).filter(|total| *total <= self.limits.layer_bytes_max);
        self.written.size = total.ok_or_else(|| {
            Error::invalid(format!(
                "{} unpacks to more than the limit of {} bytes",
                self.name, self.limits.layer_bytes_max
            ))
        })?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = self.create(path, parent, name, "create", |parent| {
            rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))
        })?;
        let file = File::from(file);
        match &entry.sparse {
            None => {
                let ends_in_hole = self.copy_data(path, &file, 0, entry.size, data)?;
                if ends_in_hole {
                    rustix::fs::ftruncate(&file, entry.size)
                        .map_err(|source| self.failed(path, "size", source))?;
                }
            }
            Some(sparse) => {
                if sparse.size > self.limits.layer_bytes_max {
                    return Err(self.refuse(path, "is a sparse file larger than the limit"));
                }
                rustix::fs::ftruncate(&file, sparse.size)
                    .map_err(|source| self.failed(path, "size", source))?;
                for (offset, length) in &sparse.segments {
                    self.copy_data(path, &file, *offset, *length, data)?;
                }
            }
        }
        self.describe(entry, path, file.as_fd())?;
        let times = timestamps(entry.mtime);
        rustix::fs::futimens(&file, &times).map_err(|source| self.failed(path, "set the time of", source))
    }

    /// Copies `length` bytes to `offset`, straight out of the stream's buffer. Zeroes become holes; answers whether the
    /// last bytes are one.
    fn copy_data(
        &self,
        path: &[u8],
        file: &File,
        mut offset: u64,
        length: u64,
        data: &mut impl BufRead,
    ) -> Result<bool> {
        let mut rest = length;
        let mut hole = false;
        while rest > 0 {
            let available = data.fill_buf().map_err(|source| self.unreadable(TarError::from(source)))?;
            if available.is_empty() {
                return Err(self.unreadable(TarError::Truncated));
            }
            let step = usize::try_from(rest).unwrap_or(usize::MAX).min(available.len());
            hole = step >= HOLE_BYTES_MIN && available[..step].iter().all(|byte| *byte == 0);
            if !hole {
                file.write_all_at(&available[..step], offset).map_err(
                    |source| match Errno::from_io_error(&source) {
                        Some(code) => self.failed(path, "write", code),
                        None => Error::io("write a file in", self.path, source),
                    },
                )?;
            }
            offset += step as u64;
            data.consume(step);
            rest -= step as u64;
        }
        Ok(hole)
    }

    fn hard_link(&mut self, entry: &Entry, path: &[u8], parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let target = self.path_of(&entry.link).map_err(|_| {
            self.refuse(
                &entry.path,
                &format!("links to `{}`, outside of it", String::from_utf8_lossy(&entry.link)),
            )
        })?;
        let target = target.ok_or_else(|| self.refuse(&entry.path, "links to the root folder"))?;
        if target == path {
            return Ok(());
        }
        let missing = |extraction: &Self| {
            extraction.refuse(
                &entry.path,
                &format!("links to `{}`, which is not there", String::from_utf8_lossy(&entry.link)),
            )
        };
        let (folder, target_name) = split(&target);
        let from = match self.open_folder(folder) {
            Ok(from) => from,
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(missing(self)),
            Err(source) => return Err(self.failed(&target, "open", source)),
        };
        let target_name = base_name(target_name);
        match rustix::fs::statat(&from, target_name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                return Err(self.refuse(&entry.path, "is a hard link to a folder"));
            }
            Ok(_) => {}
            Err(Errno::NOENT) => return Err(missing(self)),
            Err(source) => return Err(self.failed(&target, "look at", source)),
        }
        self.create(path, parent, name, "make the hard link", |parent| {
            rustix::fs::linkat(&from, target_name, parent, name, AtFlags::empty())
        })
    }

    fn whiteout(&mut self, path: &[u8], folder: &[u8], name: &[u8]) -> Result<()> {
        if name == WHITEOUT_OPAQUE {
            if folder.is_empty() {
                return self.set_opaque(path, self.path);
            }
            let parent = self.parent(folder)?;
            let place = magic(&parent, OsStr::new("."));
            self.keep_parent(folder, parent);
            return self.set_opaque(path, &place);
        }
        // Notes that AUFS kept for itself.
        if name.starts_with(WHITEOUT_META) {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(self.refuse(path, "is a whiteout of nothing"));
        }
        let hidden = base_name(hidden);
        let parent = self.parent(folder)?;
        match rustix::fs::mknodat(&parent, hidden, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => {}
            // The layer brings this name itself, and hides only what is below.
            Err(Errno::EXIST) if self.kind_of(path, parent.as_fd(), hidden)? == FileType::Directory => {
                self.make_opaque(path, parent.as_fd(), hidden)?
            }
            Err(Errno::EXIST) => {}
            Err(source) => return Err(self.failed(path, "make the whiteout", source)),
        }
        self.keep_parent(folder, parent);
        Ok(())
    }

    fn make_opaque(&self, path: &[u8], parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        self.set_opaque(path, &magic(&parent, name))
    }

    fn set_opaque(&self, path: &[u8], place: &Path) -> Result<()> {
        rustix::fs::lsetxattr(place, OPAQUE, b"y", XattrFlags::empty())
            .map_err(|source| self.failed(path, "mark as opaque", source))
    }

    /// Makes something at a name; what was there before gives way.
    fn create<T>(
        &mut self,
        path: &[u8],
        parent: BorrowedFd<'_>,
        name: &OsStr,
        action: &str,
        make: impl Fn(BorrowedFd<'_>) -> rustix::io::Result<T>,
    ) -> Result<T> {
        match make(parent) {
            Err(Errno::EXIST) => {
                if let Rules::Copy { keep_kinds: true, .. } = self.rules
                    && self.kind_of(path, parent, name)? == FileType::Directory
                {
                    return Err(self.overwrites(path, "directory", "non-directory"));
                }
                self.remove(path, parent, name)?;
                make(parent)
            }
            result => result,
        }
        .map_err(|source| self.failed(path, action, source))
    }

    /// A replacement that the copy is not to make, in dockerd's words.
    fn overwrites(&self, path: &[u8], there: &str, new: &str) -> Error {
        Error::conflict(format!(
            "cannot overwrite {there} \"/{}\" with {new} \"/{}\"",
            String::from_utf8_lossy(path),
            String::from_utf8_lossy(&self.base)
        ))
    }

    fn remove(&mut self, path: &[u8], parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) => {
                std::fs::remove_dir_all(magic(&parent, name))
                    .map_err(|source| Error::io("replace a folder in", self.path, source))?;
            }
            Err(source) => return Err(self.failed(path, "replace", source)),
        }
        // A folder, or a link to one, may be remembered under this name.
        self.parents.clear();
        Ok(())
    }

    fn kind_of(&self, path: &[u8], parent: BorrowedFd<'_>, name: &OsStr) -> Result<FileType> {
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|source| self.failed(path, "look at", source))?;
        Ok(FileType::from_raw_mode(stat.st_mode))
    }

    fn is_whiteout(&self, path: &[u8], parent: BorrowedFd<'_>, name: &OsStr) -> Result<bool> {
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|source| self.failed(path, "look at", source))?;
        Ok(FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0)
    }

    /// The folder an entry lies in, made when the archive did not bring it.
    fn parent(&mut self, folder: &[u8]) -> Result<OwnedFd> {
        if let Some(parent) = self.parents.remove(folder) {
            return Ok(parent);
        }
        match self.open_folder(folder) {
            Ok(parent) => return Ok(parent),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(source) => return Err(self.failed(folder, "open the folder", source)),
        }
        self.make_implied(folder)?;
        self.open_folder(folder).map_err(|source| self.failed(folder, "open the folder", source))
    }

    /// Makes the missing folders on the way to `folder`, from the top.
    fn make_implied(&mut self, folder: &[u8]) -> Result<()> {
        let ends = folder
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'/')
            .map(|(index, _)| index)
            .chain([folder.len()]);
        for end in ends {
            let path = &folder[..end];
            let (above, name) = split(path);
            let parent =
                self.open_folder(above).map_err(|source| self.failed(above, "open the folder", source))?;
            let name = base_name(name);
            let make = || rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755));
            let made = match make() {
                Err(Errno::EXIST)
                    if self.rules == Rules::Layer && self.is_whiteout(path, parent.as_fd(), name)? =>
                {
                    self.remove(path, parent.as_fd(), name)?;
                    make().map_err(|source| self.failed(path, "make the folder", source))?;
                    self.make_opaque(path, parent.as_fd(), name)?;
                    true
                }
                Err(Errno::EXIST) => false,
                result => {
                    result.map(|()| true).map_err(|source| self.failed(path, "make the folder", source))?
                }
            };
            if made {
                rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(0o755), AtFlags::empty())
                    .map_err(|source| self.failed(path, "change the mode of", source))?;
                self.remembered_bytes += path.len();
                if self.remembered_bytes > 2 * REMEMBERED_BYTES_MAX {
                    return Err(self.refuse(path, "is one folder too many that the layer does not describe"));
                }
                self.written.implied.insert(path.to_vec());
            }
        }
        Ok(())
    }

    /// Opens a folder; links on the way are followed, but never out of the layer.
    fn open_folder(&self, folder: &[u8]) -> rustix::io::Result<OwnedFd> {
        self.resolve(folder, OFlags::empty())
    }

    fn resolve(&self, folder: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | flags;
        let path = OsStr::from_bytes(if folder.is_empty() { b"." } else { folder });
        let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        if self.rules == Rules::Layer {
            resolve |= ResolveFlags::NO_XDEV;
        }
        // A rename elsewhere on the machine makes the kernel ask for another try.
        for _ in 0..64 {
            match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
        Err(Errno::AGAIN)
    }

    fn keep_parent(&mut self, folder: &[u8], parent: OwnedFd) {
        if self.parents.len() >= PARENTS_MAX {
            self.parents.clear();
        }
        self.parents.insert(folder.to_vec(), parent);
    }

    /// Who it is given to.
    fn owner(&self, entry: &Entry) -> (Option<Uid>, Option<Gid>) {
        let (uid, gid) = match self.rules {
            Rules::Copy { owner: Some(owner), .. } => owner,
            _ => (entry.uid, entry.gid),
        };
        (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
    }

    /// Owner, mode and attributes of an open file or folder, in the order that keeps setuid and capabilities.
    fn describe(&self, entry: &Entry, path: &[u8], file: BorrowedFd<'_>) -> Result<()> {
        if self.gives_owners {
            let (uid, gid) = self.owner(entry);
            rustix::fs::fchown(file, uid, gid)
                .map_err(|source| self.failed(path, "change the owner of", source))?;
        }
        rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode))
            .map_err(|source| self.failed(path, "change the mode of", source))?;
        self.attributes(entry, path, |name, value| {
            rustix::fs::fsetxattr(file, name, value, XattrFlags::empty())
        })
    }

    /// Owner, attributes and time of something that cannot be opened.
    fn describe_by_name(
        &self,
        entry: &Entry,
        path: &[u8],
        parent: BorrowedFd<'_>,
        name: &OsStr,
    ) -> Result<()> {
        if self.gives_owners {
            let (uid, gid) = self.owner(entry);
            rustix::fs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|source| self.failed(path, "change the owner of", source))?;
        }
        self.attributes(entry, path, |attribute, value| {
            rustix::fs::lsetxattr(magic(&parent, name), attribute, value, XattrFlags::empty())
        })?;
        rustix::fs::utimensat(parent, name, &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|source| self.failed(path, "set the time of", source))
    }

    fn attributes(
        &self,
        entry: &Entry,
        path: &[u8],
        set: impl Fn(&OsStr, &[u8]) -> rustix::io::Result<()>,
    ) -> Result<()> {
        for (name, value) in &entry.xattrs {
            // These would let an image tell overlayfs what to show.
            if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
                continue;
            }
            match set(OsStr::from_bytes(name), value) {
                Ok(()) => {}
                // Docker too goes without attributes that this file system or this kind of file cannot have.
                Err(Errno::NOTSUP | Errno::PERM) => {
                    tracing::debug!(archive = self.name, attribute = %String::from_utf8_lossy(name), "attribute left out")
                }
                Err(source) => return Err(self.failed(path, "set an attribute of", source)),
            }
        }
        Ok(())
    }

    fn remember_time(&mut self, path: Vec<u8>, time: (i64, u32)) -> Result<()> {
        self.remembered_bytes += path.len() + 32;
        self.times.push((path, time));
        if self.remembered_bytes > REMEMBERED_BYTES_MAX { self.set_times() } else { Ok(()) }
    }

    /// Sets the times of folders, the last one first.
    fn set_times(&mut self) -> Result<()> {
        for (path, time) in std::mem::take(&mut self.times).into_iter().rev() {
            let folder = match self.resolve(&path, OFlags::NOFOLLOW) {
                Ok(folder) => folder,
                // A later entry replaced it.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(source) => return Err(self.failed(&path, "open the folder", source)),
            };
            rustix::fs::utimensat(&folder, ".", &timestamps(time), AtFlags::empty())
                .map_err(|source| self.failed(&path, "set the time of", source))?;
        }
        self.remembered_bytes = self.written.implied.iter().map(Vec::len).sum();
        Ok(())
    }
}

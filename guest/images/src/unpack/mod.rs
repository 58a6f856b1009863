//! Turns the blob of a layer into a folder that overlayfs can stack.
//!
//! One thread decompresses and computes the diff id, another writes files, so both cores work on one layer. The archive
//! is hostile until proven otherwise:
//!
//! - Every path is resolved by the kernel with `openat2(RESOLVE_IN_ROOT)` below the layer's folder, so neither `..`, nor
//!   a symbolic link, nor a hard link leads out. A name that spells its way out is refused.
//! - Bytes and entries are bounded, and so is what the archive makes us remember.
//! - Attributes that overlayfs itself gives a meaning to are never taken from an archive.
//! - The folder is the caller's temporary one: on any error it removes the whole.
//!
//! Whiteouts (OCI image specification, layer filesystem changeset) become overlayfs's: `.wh.x` a character device 0:0
//! named `x`, `.wh..wh..opq` the attribute `trusted.overlay.opaque`. They hide what is below, never what the same layer
//! brings: in either order, `.wh.x` together with a folder `x` makes that folder opaque.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use crate::{
    Digest, Error, Hasher, Kind, Limits, Result,
    tarball::{Entry, EntryKind, Reader, TarError},
};

/// The attribute by which overlayfs knows a folder that hides all below it.
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";
const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";

/// Bytes of a path at most (the kernel's PATH_MAX).
const PATH_BYTES_MAX: usize = 4095;
/// Open folders remembered, so that neighbours in the archive do not each resolve their path.
const PARENTS_MAX: usize = 64;
/// Bytes of paths remembered for the end.
const REMEMBERED_BYTES_MAX: usize = 64 << 20;
/// Bytes of one piece on its way from the decompressing to the writing thread, and pieces in flight.
const PIECE_BYTES: usize = 256 << 10;
const PIECES: usize = 8;

/// What an unpacked layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// The digest of the uncompressed archive.
    pub diff_id: Digest,
    /// Bytes of all files.
    pub size: u64,
    /// Files, folders, links.
    pub entries: u64,
    /// Folders that only exist because something lies in them: their owner and mode are those of the layer below. The
    /// empty path is the root.
    pub implied: Vec<PathBuf>,
}

/// What the owner of an unpacking on another thread sees and says.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Bytes of the blob read.
    pub(crate) read: AtomicU64,
    /// Asks it to give up.
    pub(crate) stopped: AtomicBool,
}

/// How a blob is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// Tells by the first bytes, because media types lie and archives have none.
    pub(crate) fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// The plain bytes of `input`.
    pub(crate) fn decoder<'a>(
        input: impl BufRead + Send + 'a,
    ) -> io::Result<(Self, Box<dyn Read + Send + 'a>)> {
        let mut input = input;
        // A pipe may give fewer bytes at first; then it is topped up.
        let mut start = Vec::with_capacity(4);
        input.by_ref().take(4).read_to_end(&mut start)?;
        let compression = Self::detect(&start);
        let whole = io::Cursor::new(start).chain(input);
        Ok(match compression {
            Self::None => (compression, Box::new(whole)),
            Self::Gzip => (compression, Box::new(flate2::bufread::MultiGzDecoder::new(whole))),
            Self::Zstd => (compression, Box::new(zstd::stream::read::Decoder::with_buffer(whole)?)),
        })
    }
}

/// Unpacks `blob`, whose digest is known to be right, into the empty folder `into`. Blocks.
///
/// `name` is what errors call the layer.
pub(crate) fn unpack_blob(
    name: &str,
    blob: &File,
    digest: Digest,
    into: &Path,
    limits: &Limits,
    meter: &Meter,
) -> Result<Unpacked> {
    let mut start = [0; 4];
    let length = blob.read_at(&mut start, 0).map_err(|source| Error::io("read the layer", into, source))?;
    let counted = Counted { file: blob, offset: 0, meter };
    if Compression::detect(&start[..length]) == Compression::None {
        // The digest of a plain layer is its diff id, and it was computed when the blob was stored.
        let mut input = BufReader::with_capacity(PIECE_BYTES, counted);
        let written = Layer::new(name, into, limits)?.write(&mut input)?;
        return Ok(written.unpacked(digest));
    }
    let input = BufReader::with_capacity(PIECE_BYTES, counted);
    let (_, decoder) = Compression::decoder(input).map_err(|source| damaged(name, source))?;
    unpack(name, decoder, into, limits)
}

/// Unpacks a plain tar stream into the empty folder `into`, computing its diff id on a second thread. Blocks.
pub fn unpack(name: &str, stream: impl Read + Send, into: &Path, limits: &Limits) -> Result<Unpacked> {
    std::thread::scope(|scope| {
        let (full, pieces) = sync_channel(PIECES);
        let (empty, used) = sync_channel(PIECES + 1);
        let decoder = std::thread::Builder::new()
            .name("layer-decode".to_owned())
            .spawn_scoped(scope, move || decode(name, stream, limits, full, used))
            .map_err(|source| Error::io("start a thread to unpack", into, source))?;
        let written = Layer::new(name, into, limits)
            .and_then(|layer| layer.write(&mut Pieces { pieces, empty, current: Vec::new(), offset: 0 }));
        match (decoder.join(), written) {
            (Ok(Ok(diff_id)), Ok(written)) => Ok(written.unpacked(diff_id)),
            // The writer only saw the stream break off; the decoder knows why.
            (Ok(Err(Some(error))), _) | (_, Err(error)) => Err(error),
            (Ok(Err(None)) | Err(_), Ok(_)) => {
                Err(Error::new(Kind::Internal, format!("layer {name} could not be decompressed")))
            }
        }
    })
}

fn damaged(name: &str, source: io::Error) -> Error {
    Error::because(
        Kind::Invalid,
        format!("layer {name} is damaged: its compressed data cannot be read"),
        source,
    )
}

/// Decompresses and hashes. `Err(None)` when the writing thread has stopped listening.
fn decode(
    name: &str,
    mut stream: impl Read,
    limits: &Limits,
    full: SyncSender<Option<Vec<u8>>>,
    used: Receiver<Vec<u8>>,
) -> Result<Digest, Option<Error>> {
    let mut hasher = Hasher::default();
    let mut total = 0u64;
    loop {
        let mut piece = used.try_recv().unwrap_or_default();
        piece.clear();
        let read = stream.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece);
        let read = read.map_err(|source| damaged(name, source))?;
        if read == 0 {
            full.send(None).map_err(|_| None)?;
            return Ok(hasher.finish());
        }
        total += read as u64;
        if total > limits.layer_bytes_max {
            return Err(Some(Error::invalid(format!(
                "layer {name} unpacks to more than the limit of {} bytes",
                limits.layer_bytes_max
            ))));
        }
        hasher.update(&piece);
        full.send(Some(piece)).map_err(|_| None)?;
    }
}

/// The blob's bytes, counted. Positioned reads, so that the handle can be shared.
struct Counted<'a> {
    file: &'a File,
    offset: u64,
    meter: &'a Meter,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.meter.stopped.load(Ordering::Relaxed) {
            return Err(io::Error::other("nobody waits for this layer any more"));
        }
        let length = self.file.read_at(buffer, self.offset)?;
        self.offset += length as u64;
        self.meter.read.store(self.offset, Ordering::Relaxed);
        Ok(length)
    }
}

/// The writing thread's end of the stream.
struct Pieces {
    pieces: Receiver<Option<Vec<u8>>>,
    empty: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    offset: usize,
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.offset == self.current.len() {
            match self.pieces.recv() {
                Ok(Some(piece)) => {
                    let old = std::mem::replace(&mut self.current, piece);
                    self.offset = 0;
                    // When the other side has enough buffers this one is simply dropped.
                    let _kept = self.empty.try_send(old);
                }
                Ok(None) => {
                    (self.current, self.offset) = (Vec::new(), 0);
                    // The stream has ended; say so again to whoever asks again.
                    let (end, again) = sync_channel(0);
                    drop(end);
                    self.pieces = again;
                    return Ok(&[]);
                }
                // After the end there is nobody to send; before it, the decoder has failed and has the reason.
                Err(_) if self.current.is_empty() => return Ok(&[]),
                Err(_) => return Err(io::Error::other("the layer could not be decompressed")),
            }
        }
        Ok(&self.current[self.offset..])
    }

    fn consume(&mut self, amount: usize) {
        self.offset += amount;
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut available = self.fill_buf()?;
        let length = available.read(buffer)?;
        self.consume(length);
        Ok(length)
    }
}

/// A layer's folder while it is being written.
struct Layer<'a> {
    name: &'a str,
    path: &'a Path,
    limits: &'a Limits,
    root: OwnedFd,
    parents: HashMap<Vec<u8>, OwnedFd>,
    /// Only root may give files away; others (fuzzing, tests) leave them as their own.
    gives_owners: bool,
    written: Written,
    /// Folders whose time is set last, because everything put into them changes it.
    times: Vec<(Vec<u8>, (i64, u32))>,
    remembered_bytes: usize,
}

#[derive(Default)]
struct Written {
    size: u64,
    entries: u64,
    implied: BTreeSet<Vec<u8>>,
}

impl Written {
    fn unpacked(self, diff_id: Digest) -> Unpacked {
        let implied = self.implied.into_iter().map(|path| PathBuf::from(OsStr::from_bytes(&path))).collect();
        Unpacked { diff_id, size: self.size, entries: self.entries, implied }
    }
}

impl<'a> Layer<'a> {
    fn new(name: &'a str, path: &'a Path, limits: &'a Limits) -> Result<Self> {
        let root =
            rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|source| Error::io("open", path, source))?;
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755))
            .map_err(|source| Error::io("change the mode of", path, source))?;
        let gives_owners = rustix::process::geteuid().is_root();
        let written = Written { implied: BTreeSet::from([Vec::new()]), ..Written::default() };
        Ok(Self {
            name,
            path,
            limits,
            root,
            parents: HashMap::new(),
            gives_owners,
            written,
            times: Vec::new(),
            remembered_bytes: 0,
        })
    }

    fn write(mut self, input: &mut (impl BufRead + ?Sized)) -> Result<Written> {
        let mut reader = Reader::new(input);
        loop {
            let entry = reader.next().map_err(|source| self.unreadable(source))?;
            let Some(entry) = entry else { break };
            self.written.entries += 1;
            if self.written.entries > self.limits.layer_entries_max {
                return Err(Error::invalid(format!(
                    "layer {} has more than the limit of {} entries",
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
        Error::because(Kind::Invalid, format!("layer {} cannot be unpacked", self.name), source)
    }

    fn refuse(&self, path: &[u8], why: &str) -> Error {
        Error::invalid(format!(
            "layer {} is refused: entry `{}` {why}",
            self.name,
            String::from_utf8_lossy(path)
        ))
    }

    /// A failed call on behalf of an entry.
    fn failed(&self, path: &[u8], action: &str, source: Errno) -> Error {
        match source {
            Errno::NOSPC | Errno::DQUOT => {
                Error::io(&format!("unpack layer {}", self.name), self.path, source)
            }
            _ => Error::because(
                Kind::Invalid,
                format!(
                    "layer {} cannot be unpacked: could not {action} `{}`",
                    self.name,
                    String::from_utf8_lossy(path)
                ),
                io::Error::from(source),
            ),
        }
    }

    fn apply(&mut self, entry: &Entry, data: &mut impl BufRead) -> Result<()> {
        let path = clean(&entry.path).map_err(|why| self.refuse(&entry.path, why))?;
        let Some(split) = split(&path) else { return self.root_entry(entry) };
        let (folder, name) = split;
        if name.starts_with(WHITEOUT) {
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
                    let hides = self.is_whiteout(path, parent, name)?;
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
                "layer {} unpacks to more than the limit of {} bytes",
                self.name, self.limits.layer_bytes_max
            ))
        })?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = self.create(path, parent, name, "create", |parent| {
            rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))
        })?;
        let mut file = File::from(file);
        match &entry.sparse {
            None => self.copy(path, &mut file, None, entry.size, data)?,
            Some(sparse) => {
                if sparse.size > self.limits.layer_bytes_max {
                    return Err(self.refuse(path, "is a sparse file larger than a layer may be"));
                }
                rustix::fs::ftruncate(&file, sparse.size)
                    .map_err(|source| self.failed(path, "size", source))?;
                for (offset, length) in &sparse.segments {
                    self.copy(path, &mut file, Some(*offset), *length, data)?;
                }
            }
        }
        self.describe(entry, path, file.as_fd())?;
        let times = timestamps(entry.mtime);
        rustix::fs::futimens(&file, &times).map_err(|source| self.failed(path, "set the time of", source))
    }

    /// Copies `length` bytes straight out of the stream's buffer.
    fn copy(
        &self,
        path: &[u8],
        file: &mut File,
        mut offset: Option<u64>,
        length: u64,
        data: &mut impl BufRead,
    ) -> Result<()> {
        let mut rest = length;
        while rest > 0 {
            let available = data.fill_buf().map_err(|source| self.unreadable(TarError::from(source)))?;
            if available.is_empty() {
                return Err(self.unreadable(TarError::Truncated));
            }
            let step = usize::try_from(rest).unwrap_or(usize::MAX).min(available.len());
            let written = match &mut offset {
                None => file.write_all(&available[..step]),
                Some(offset) => {
                    let result = file.write_all_at(&available[..step], *offset);
                    *offset += step as u64;
                    result
                }
            };
            written.map_err(|source| match Errno::from_io_error(&source) {
                Some(code) => self.failed(path, "write", code),
                None => Error::io("write a file of the layer in", self.path, source),
            })?;
            data.consume(step);
            rest -= step as u64;
        }
        Ok(())
    }

    fn hard_link(&mut self, entry: &Entry, path: &[u8], parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let target = clean(&entry.link).map_err(|_| {
            self.refuse(
                &entry.path,
                &format!("links to `{}`, outside of the layer", String::from_utf8_lossy(&entry.link)),
            )
        })?;
        if target == path {
            return Ok(());
        }
        let missing = |layer: &Self| {
            layer.refuse(
                &entry.path,
                &format!("links to `{}`, which is not in the layer", String::from_utf8_lossy(&entry.link)),
            )
        };
        let (folder, target_name) =
            split(&target).ok_or_else(|| self.refuse(&entry.path, "links to the root folder"))?;
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
                self.remove(path, parent, name)?;
                make(parent)
            }
            result => result,
        }
        .map_err(|source| self.failed(path, action, source))
    }

    fn remove(&mut self, path: &[u8], parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) => {
                std::fs::remove_dir_all(magic(&parent, name))
                    .map_err(|source| Error::io("replace a folder of the layer in", self.path, source))?;
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
            let (above, name) = split(path).unwrap_or((b"", path));
            let parent =
                self.open_folder(above).map_err(|source| self.failed(above, "open the folder", source))?;
            let name = base_name(name);
            let make = || rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755));
            let made = match make() {
                Err(Errno::EXIST) if self.is_whiteout(path, parent.as_fd(), name)? => {
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
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
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

    /// Owner, mode and attributes of an open file or folder, in the order that keeps setuid and capabilities.
    fn describe(&self, entry: &Entry, path: &[u8], file: BorrowedFd<'_>) -> Result<()> {
        if self.gives_owners {
            rustix::fs::fchown(file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
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
            rustix::fs::chownat(
                parent,
                name,
                Some(Uid::from_raw(entry.uid)),
                Some(Gid::from_raw(entry.gid)),
                AtFlags::SYMLINK_NOFOLLOW,
            )
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
                    tracing::debug!(layer = self.name, attribute = %String::from_utf8_lossy(name), "attribute left out")
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

/// A path to `name` below an open folder, for calls that take no folder.
fn magic(parent: &impl AsFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(parent.as_fd().as_raw_fd().to_string()).join(name)
}

fn base_name(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

/// The folder and the name; `None` for the root.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => Some((&path[..slash], &path[slash + 1..])),
        None => Some((b"", path)),
    }
}

/// The path without `.`, `..`, doubled and leading slashes; an error when it leads out.
fn clean(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or("leads out of the layer")?;
            }
            part if part.contains(&0) => return Err("has a name with a zero byte"),
            part => parts.push(part),
        }
    }
    let path = parts.join(&b'/');
    if path.len() > PATH_BYTES_MAX { Err("has a name longer than a path may be") } else { Ok(path) }
}

/// Times out of the kernel's reach become the nearest it can hold.
fn timestamps((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds.clamp(-(1 << 40), 1 << 40), tv_nsec: i64::from(nanoseconds) };
    Timestamps { last_access: time, last_modification: time }
}

/// Copies owner, mode and time of `from` to `to`; both are folders.
pub(crate) fn copy_description(from: &Path, to: &Path) -> Result<()> {
    let data = std::fs::symlink_metadata(from).map_err(|source| Error::io("look at", from, source))?;
    let failed = |source: Errno| Error::io("describe", to, source);
    if rustix::process::geteuid().is_root() {
        let (owner, group) = (Uid::from_raw(data.uid()), Gid::from_raw(data.gid()));
        rustix::fs::chownat(CWD, to, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    }
    let mode = Mode::from_raw_mode(data.mode() & 0o7777);
    rustix::fs::chmodat(CWD, to, mode, AtFlags::empty()).map_err(failed)?;
    let time = Timespec { tv_sec: data.mtime(), tv_nsec: data.mtime_nsec() };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)
}

/// Fuzz entry: unpacks arbitrary bytes (plain, gzip or zstd) into the empty folder `scratch` under small limits.
pub fn fuzz(bytes: &[u8], scratch: &Path) {
    let limits = Limits { layer_bytes_max: 1 << 20, layer_entries_max: 200, archive_bytes_max: 1 << 20 };
    let Ok((_, decoder)) = Compression::decoder(bytes) else { return };
    let _outcome = unpack("fuzz", decoder, scratch, &limits);
}

#[cfg(test)]
mod tests;

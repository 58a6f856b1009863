//! Packs folders and files into a tar stream: the other way round than `extract`.
//!
//! The tree may change meanwhile, because a container runs in it: what vanishes is left out, a file that grows is cut at the
//! size it had, one that shrinks is filled up with zeroes. Nothing is followed: every name is opened below the folder it
//! was listed in. Sockets are left out, as tar cannot hold them. Of the attributes those are kept that an image can give
//! again: `security.capability` and `user.…`. Times are in whole seconds and names are in order, so that the same tree always
//! gives the same bytes.

use std::{
    collections::{HashMap, HashSet},
    ffi::{CStr, CString, OsStr},
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat},
    io::Errno,
};

use crate::{
    Error, Kind, Result,
    extract::{OPAQUE, WHITEOUT, WHITEOUT_OPAQUE},
    tarball::{Entry, EntryKind, Writer},
};

const READ_BYTES: usize = 256 << 10;
/// Bytes of the names of a file's attributes, and of one attribute's value, at most (the kernel's XATTR_LIST_MAX).
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Packs trees into one archive.
pub(crate) struct Packer<'a, W> {
    writer: Writer<W>,
    /// Where a file with several names was first put.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// Whether overlayfs's whiteouts become those of layers.
    whiteouts: bool,
    /// Paths below the tree's root that are left out, with all below them.
    without: &'a HashSet<Vec<u8>>,
    buffer: Vec<u8>,
}

/// A folder that is being packed.
struct Level {
    folder: OwnedFd,
    /// Its children, the last one first.
    names: Vec<CString>,
    /// What their paths begin with.
    path: Vec<u8>,
}

impl<'a, W: Write> Packer<'a, W> {
    pub(crate) fn new(output: W, without: &'a HashSet<Vec<u8>>) -> Self {
        Self {
            writer: Writer::new(output),
            links: HashMap::new(),
            whiteouts: false,
            without,
            buffer: vec![0; READ_BYTES],
        }
    }

    /// Packs the upper folder of an overlay as a layer.
    pub(crate) fn layer(output: W, without: &'a HashSet<Vec<u8>>) -> Self {
        Self { whiteouts: true, ..Self::new(output, without) }
    }

    /// Ends the archive.
    pub(crate) fn finish(self) -> Result<W> {
        self.writer.finish().map_err(unwritten)
    }

    /// Packs everything in a folder; the names of what is in it get `prefix`. The folder itself is packed as `prefix`, unless
    /// that is empty.
    pub(crate) fn tree(&mut self, folder: OwnedFd, prefix: &[u8]) -> Result<()> {
        if !prefix.is_empty() {
            let stat = rustix::fs::fstat(&folder).map_err(|source| unread(prefix, source))?;
            self.folder(&folder, prefix, &stat)?;
        }
        let mut levels = vec![Level { names: list(&folder, prefix)?, folder, path: Vec::new() }];
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.names.pop() else {
                levels.pop();
                continue;
            };
            let mut path = level.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            if self.without.contains(&path) {
                continue;
            }
            let full = [prefix, &path].concat();
            if let Some(folder) = self.child(level.folder.as_fd(), &name, &full)? {
                let names = list(&folder, &full)?;
                levels.push(Level { folder, names, path });
            }
        }
        Ok(())
    }

    /// Packs one thing that is not a folder, under the name `path`.
    pub(crate) fn single(&mut self, folder: BorrowedFd<'_>, name: &OsStr, path: &[u8]) -> Result<()> {
        let name = CString::new(name.as_bytes()).map_err(|_| unread(path, Errno::INVAL))?;
        self.child(folder, &name, path).map(drop)
    }

    /// Packs one name; answers the open folder if it is one.
    fn child(&mut self, parent: BorrowedFd<'_>, name: &CStr, path: &[u8]) -> Result<Option<OwnedFd>> {
        let failed = |source| unread(path, source);
        let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            result => result.map_err(failed)?,
        };
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let folder = match rustix::fs::openat(parent, name, FOLDER, Mode::empty()) {
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
                    result => result.map_err(failed)?,
                };
                self.folder(&folder, path, &stat)?;
                return Ok(Some(folder));
            }
            FileType::CharacterDevice if self.whiteouts && stat.st_rdev == 0 => {
                self.whiteout(path, &stat)?;
                return Ok(None);
            }
            FileType::RegularFile => EntryKind::File,
            FileType::Symlink => EntryKind::Symlink,
            FileType::CharacterDevice => EntryKind::CharDevice,
            FileType::BlockDevice => EntryKind::BlockDevice,
            FileType::Fifo => EntryKind::Fifo,
            FileType::Socket | FileType::Unknown => {
                tracing::debug!(path = %String::from_utf8_lossy(path), "a socket is left out of the archive");
                return Ok(None);
            }
        };
        let mut entry = entry(kind, path, &stat);
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                entry.kind = EntryKind::HardLink;
                entry.link.clone_from(first);
                self.writer.entry(&entry).map_err(unwritten)?;
                return Ok(None);
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.to_vec());
        }
        match kind {
            EntryKind::File => self.file(parent, name, entry)?,
            EntryKind::Symlink => {
                entry.link = match rustix::fs::readlinkat(parent, name, Vec::new()) {
                    Err(Errno::NOENT | Errno::INVAL) => return Ok(None),
                    result => result.map_err(failed)?.into_bytes(),
                };
                self.writer.entry(&entry).map_err(unwritten)?;
            }
            _ => self.writer.entry(&entry).map_err(unwritten)?,
        }
        Ok(None)
    }

    fn folder(&mut self, folder: &OwnedFd, path: &[u8], stat: &Stat) -> Result<()> {
        let mut entry = entry(EntryKind::Directory, path, stat);
        entry.xattrs = attributes(folder, path)?;
        self.writer.entry(&entry).map_err(unwritten)?;
        if self.whiteouts && is_opaque(folder) {
            self.marker(&[path, b"/", WHITEOUT_OPAQUE].concat(), stat)?;
        }
        Ok(())
    }

    fn whiteout(&mut self, path: &[u8], stat: &Stat) -> Result<()> {
        let slash = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        self.marker(&[&path[..slash], WHITEOUT, &path[slash..]].concat(), stat)
    }

    /// An empty file whose name says something about what is below.
    fn marker(&mut self, path: &[u8], stat: &Stat) -> Result<()> {
        let mut entry = entry(EntryKind::File, path, stat);
        (entry.mode, entry.uid, entry.gid, entry.size) = (0, 0, 0, 0);
        self.writer.entry(&entry).map_err(unwritten)
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &CStr, mut entry: Entry) -> Result<()> {
        let path = std::mem::take(&mut entry.path);
        let failed = |source| unread(&path, source);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(parent, name, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(()),
            result => result.map_err(failed)?,
        };
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(());
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let xattrs = attributes(&file, &path)?;
        self.writer.entry(&Entry { size, xattrs, path: path.clone(), ..entry }).map_err(unwritten)?;
        let has_holes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512) < size;
        let mut offset = 0;
        while offset < size {
            let mut end = size;
            if has_holes {
                match rustix::fs::seek(&file, SeekFrom::Data(offset)) {
                    // Nothing but a hole to the end.
                    Err(Errno::NXIO) => return self.writer.hole(size - offset).map_err(unwritten),
                    Err(source) => return Err(failed(source)),
                    Ok(data) => {
                        let data = data.min(size);
                        self.writer.hole(data - offset).map_err(unwritten)?;
                        offset = data;
                    }
                }
                end = rustix::fs::seek(&file, SeekFrom::Hole(offset)).map_err(failed)?.min(size);
            }
            while offset < end {
                let step = usize::try_from(end - offset).unwrap_or(usize::MAX).min(self.buffer.len());
                let read = match rustix::io::pread(&file, &mut self.buffer[..step], offset) {
                    Err(Errno::INTR) => continue,
                    result => result.map_err(failed)?,
                };
                if read == 0 {
                    return Ok(());
                }
                self.writer.data(&self.buffer[..read]).map_err(unwritten)?;
                offset += read as u64;
            }
        }
        Ok(())
    }
}

fn entry(kind: EntryKind, path: &[u8], stat: &Stat) -> Entry {
    Entry {
        kind,
        path: path.to_vec(),
        link: Vec::new(),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: (stat.st_mtime, 0),
        device: (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)),
        xattrs: Vec::new(),
        size: 0,
        sparse: None,
    }
}

/// The names in a folder, the last one first.
fn list(folder: &OwnedFd, path: &[u8]) -> Result<Vec<CString>> {
    let failed = |source| unread(path, source);
    let mut names = Vec::new();
    for entry in Dir::read_from(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    names.sort_by(|a, b| b.cmp(a));
    Ok(names)
}

/// Whether a folder hides everything below it.
pub(crate) fn is_opaque(folder: &impl AsFd) -> bool {
    let mut value = [0; 1];
    matches!(rustix::fs::fgetxattr(folder, OPAQUE, &mut value), Ok(1)) && value == *b"y"
}

fn attributes(file: &OwnedFd, path: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; 1024];
    let length = loop {
        match rustix::fs::flistxattr(file, &mut names[..]) {
            Ok(length) => break length,
            Err(Errno::NOTSUP) => return Ok(Vec::new()),
            Err(Errno::RANGE) if names.len() < ATTRIBUTE_BYTES_MAX => names.resize(ATTRIBUTE_BYTES_MAX, 0),
            Err(source) => return Err(unread(path, source)),
        }
    };
    let mut attributes = Vec::new();
    for name in names[..length].split(|byte| *byte == 0) {
        if name != b"security.capability" && !name.starts_with(b"user.") {
            continue;
        }
        // overlayfs mounted by users marks its own so.
        if name.starts_with(b"user.overlay.") {
            continue;
        }
        let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
        match rustix::fs::fgetxattr(file, OsStr::from_bytes(name), &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                attributes.push((name.to_vec(), value));
            }
            Err(Errno::NODATA) => {}
            Err(source) => return Err(unread(path, source)),
        }
    }
    Ok(attributes)
}

fn unread(path: &[u8], source: Errno) -> Error {
    Error::io("pack", Path::new(OsStr::from_bytes(path)), source)
}

fn unwritten(source: io::Error) -> Error {
    Error::because(Kind::Internal, "the archive could not be written", source)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Read,
        os::unix::fs::{MetadataExt, PermissionsExt},
    };

    use super::*;
    use crate::tarball::Reader;

    fn open(path: &Path) -> OwnedFd {
        rustix::fs::open(path, FOLDER, Mode::empty()).expect("a folder")
    }

    fn packed(folder: &Path, prefix: &str, without: &[&str]) -> Vec<u8> {
        let without = without.iter().map(|path| path.as_bytes().to_vec()).collect();
        let mut packer = Packer::layer(Vec::new(), &without);
        packer.tree(open(folder), prefix.as_bytes()).expect("packed");
        packer.finish().expect("packed")
    }

    fn names(bytes: &[u8]) -> Vec<String> {
        let mut reader = Reader::new(bytes);
        let mut names = Vec::new();
        while let Some(entry) = reader.next().expect("a tar") {
            let link = if entry.link.is_empty() {
                String::new()
            } else {
                format!(" -> {}", String::from_utf8_lossy(&entry.link))
            };
            names.push(format!("{}{link}", String::from_utf8_lossy(&entry.path)));
        }
        names
    }

    #[test]
    fn a_tree_is_packed_in_order_with_its_links() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("b/deep")).expect("made");
        fs::write(path("b/file"), "hello").expect("made");
        fs::hard_link(path("b/file"), path("c")).expect("made");
        std::os::unix::fs::symlink("../outside", path("a")).expect("made");
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).expect("made");
        fs::set_permissions(path("b"), fs::Permissions::from_mode(0o2750)).expect("made");
        let bytes = packed(folder.path(), "x/", &["b/deep"]);
        assert_eq!(names(&bytes), ["x/", "x/a -> ../outside", "x/b/", "x/b/file", "x/c -> x/b/file"]);
        assert_eq!(bytes, packed(folder.path(), "x/", &["b/deep"]), "the same tree gives the same bytes");
        assert_eq!(names(&packed(folder.path(), "", &["b"])), ["a -> ../outside", "c"]);
        assert_eq!(names(&packed(folder.path(), "/", &["b"]))[..2], ["/", "/a -> ../outside"]);
    }

    #[test]
    fn holes_are_packed_as_zeroes_without_being_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = fs::File::create(folder.path().join("sparse")).expect("made");
        std::os::unix::fs::FileExt::write_all_at(&file, b"middle", 1 << 20).expect("made");
        file.set_len(3 << 20).expect("made");
        let bytes = packed(folder.path(), "", &[]);
        let mut reader = Reader::new(&bytes[..]);
        assert_eq!(reader.next().expect("a tar").expect("an entry").size, 3 << 20);
        let mut data = Vec::new();
        reader.read_to_end(&mut data).expect("data");
        assert_eq!(data.len(), 3 << 20);
        assert_eq!(&data[1 << 20..][..6], b"middle");
        assert_eq!(data.iter().filter(|byte| **byte != 0).count(), 6);
    }

    #[test]
    fn whiteouts_of_overlayfs_become_those_of_layers() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(folder.path().join("d/opaque")).expect("made");
        let node = folder.path().join("d/gone");
        rustix::fs::mknodat(rustix::fs::CWD, &node, FileType::CharacterDevice, Mode::empty(), 0)
            .expect("made");
        let opaque = folder.path().join("d/opaque");
        rustix::fs::lsetxattr(&opaque, OPAQUE, b"y", rustix::fs::XattrFlags::empty()).expect("made");
        let bytes = packed(folder.path(), "", &[]);
        assert_eq!(names(&bytes), ["d/", "d/.wh.gone", "d/opaque/", "d/opaque/.wh..wh..opq"]);
        // And what is unpacked from it is the same again.
        let again = tempfile::tempdir().expect("a folder");
        crate::unpack::unpack("test", &bytes[..], again.path(), &crate::Limits::default()).expect("unpacked");
        assert_eq!(packed(again.path(), "", &[]), bytes);
        assert_eq!(fs::symlink_metadata(again.path().join("d/gone")).expect("there").rdev(), 0);
    }
}

//! What a name leads to, and what a file is.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::Server;
use crate::export::Export;
use crate::node::{BENEATH, Identity, Node, Place, ROOT};
use crate::reply::{Attributes, Reply, Writer};
use crate::request::Name;

/// For how long the made-up root may be believed: exports come and go.
const ROOT_TIME: Duration = Duration::from_millis(100);
/// Each device's inode numbers are moved apart from here up. Real ones stay far below.
const DEVICE_SHIFT: u32 = 48;

impl Server {
    pub(super) fn lookup(&self, parent: u64, name: Name<'_>) -> Result<Reply, Errno> {
        let (node, attributes) = if parent == ROOT {
            let export_name = name.0.to_str().map_err(|_| Errno::NOENT)?;
            let export = self.exports().remove(export_name).ok_or(Errno::NOENT)?;
            let stat = rustix::fs::fstat(&export.root)?;
            let node = match self.nodes.known(Identity::of(&export, &stat), ROOT, name.0) {
                Some(node) => node,
                None => {
                    let root = rustix::io::fcntl_dupfd_cloexec(&export.root, 0)?;
                    self.nodes.learn(&export, root, &stat, Some(Place::new(ROOT, name.0)))?
                }
            };
            let attributes = self.attributes(&export, &node.file, &stat);
            (node, attributes)
        } else {
            self.find(&*self.nodes.get(parent)?, name)?
        };
        Ok(entry(&node, &attributes).done())
    }

    /// Looks a name up in a folder; the guest knows the file from now on.
    pub(super) fn find(&self, parent: &Node, name: Name<'_>) -> Result<(Arc<Node>, Attributes), Errno> {
        if parent.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let export = &parent.export;
        let stat = rustix::fs::statat(&parent.file, name.0, AtFlags::SYMLINK_NOFOLLOW)?;
        if let Some(node) = self.nodes.known(Identity::of(export, &stat), parent.number, name.0) {
            let attributes = self.attributes(export, &node.file, &stat);
            return Ok((node, attributes));
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(&parent.file, name.0, flags, Mode::empty(), BENEATH)?;
        self.learn(export, file, Some(Place::new(parent.number, name.0)))
    }

    /// A file under this name that the guest knows already; it is none the wiser.
    pub(super) fn already_known(&self, parent: &Node, name: Name<'_>) -> Option<Arc<Node>> {
        let stat = rustix::fs::statat(&parent.file, name.0, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        self.nodes.held(Identity::of(&parent.export, &stat))
    }

    /// The guest knows this file from now on. `file` is `O_PATH`; without a place it keeps its descriptor.
    pub(super) fn learn(
        &self,
        export: &Arc<Export>,
        file: OwnedFd,
        place: Option<Place>,
    ) -> Result<(Arc<Node>, Attributes), Errno> {
        let stat = rustix::fs::fstat(&file)?;
        let node = self.nodes.learn(export, file, &stat, place)?;
        let attributes = self.attributes(export, &node.file, &stat);
        Ok((node, attributes))
    }

    /// What the guest is told of a file.
    #[expect(clippy::unnecessary_cast, reason = "the fields' types differ between architectures")]
    pub(super) fn attributes(&self, export: &Export, file: &OwnedFd, stat: &Stat) -> Attributes {
        let owner = export.spec.owners.shown(file, stat);
        let time = |seconds: i64, nanoseconds: u64| (seconds as u64, nanoseconds as u32);
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        Attributes {
            number: self.shown_number(stat.st_dev as u64, stat.st_ino as u64),
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            accessed: time(stat.st_atime as i64, stat.st_atime_nsec as u64),
            modified: time(stat.st_mtime as i64, stat.st_mtime_nsec as u64),
            changed: time(stat.st_ctime as i64, stat.st_ctime_nsec as u64),
            mode: stat.st_mode & !0o7777 | owner.mode,
            links: stat.st_nlink as u32,
            uid: owner.uid,
            gid: owner.gid,
            device: minor & 0xff | major << 8 | (minor & !0xff) << 12,
            block_size: stat.st_blksize as u32,
        }
    }

    /// All exports are one device in the guest, and programs take files of one device and number for one file.
    pub(super) fn shown_number(&self, device: u64, number: u64) -> u64 {
        let mut devices = self.devices();
        let position = devices.iter().position(|known| *known == device).unwrap_or_else(|| {
            devices.push(device);
            devices.len() - 1
        });
        number ^ (position as u64) << DEVICE_SHIFT
    }

    pub(super) fn get_attributes(&self, number: u64, handle: Option<u64>) -> Result<Reply, Errno> {
        let mut writer = Writer::default();
        if number == ROOT {
            writer.attributes_for(&root_attributes(), ROOT_TIME);
            return Ok(writer.done());
        }
        // A handle outlives its name, and the guest asks by it; the node is just as good.
        let _same_file = handle;
        let node = self.nodes.get(number)?;
        let attributes = self.current_attributes(&node)?;
        writer.attributes_for(&attributes, node.export.spec.cache.attributes);
        Ok(writer.done())
    }

    pub(super) fn current_attributes(&self, node: &Node) -> Result<Attributes, Errno> {
        let stat = rustix::fs::fstat(&node.file)?;
        Ok(self.attributes(&node.export, &node.file, &stat))
    }

    pub(super) fn read_link(&self, number: u64) -> Result<Reply, Errno> {
        let node = self.nodes.get(number)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&node.file, c"", Vec::new())?;
        Ok(Reply::Bytes(target.into_bytes()))
    }

    pub(super) fn stat_fs(&self, number: u64) -> Result<Reply, Errno> {
        let mut writer = Writer::default();
        if number == ROOT {
            // It has no blocks.
            writer.0.resize(40, 0);
            writer.u32(4096).u32(255).u32(4096);
        } else {
            let stat = rustix::fs::fstatvfs(&self.nodes.get(number)?.file)?;
            writer
                .u64(stat.f_blocks)
                .u64(stat.f_bfree)
                .u64(stat.f_bavail)
                .u64(stat.f_files)
                .u64(stat.f_ffree);
            writer.u32(stat.f_bsize as u32).u32(stat.f_namemax as u32).u32(stat.f_frsize as u32);
        }
        writer.0.resize(80, 0);
        Ok(writer.done())
    }
}

/// The answer to a lookup.
pub fn entry(node: &Node, attributes: &Attributes) -> Writer {
    let cache = node.export.spec.cache;
    let mut writer = Writer::default();
    writer.entry(node.number, cache.names, cache.attributes, attributes);
    writer
}

/// The made-up root: a folder that only the guest's root may look into, for what is bound from it has been granted.
pub fn root_attributes() -> Attributes {
    Attributes {
        number: ROOT,
        mode: FileType::Directory.as_raw_mode() | 0o700,
        links: 2,
        block_size: 4096,
        ..Attributes::default()
    }
}

//! New files, names and links; changes of what a file is.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
};
use rustix::io::Errno;

use super::Server;
use super::data::{self, KEEP_CACHE};
use super::lookup::entry;
use crate::handle::Open;
use crate::node::{BENEATH, Node, Place, ROOT};
use crate::owner::{Owner, path_of};
use crate::reply::{Attributes, Reply, Writer};
use crate::request::{Changes, Header, Name, Time};

const SET_USER: u32 = 0o4000;
const SET_GROUP: u32 = 0o2000;
const GROUP_RUNS: u32 = 0o010;

impl Server {
    /// The folder something is made in.
    fn parent(&self, number: u64) -> Result<Arc<Node>, Errno> {
        let parent = self.changeable(number)?;
        match parent.kind {
            FileType::Directory => Ok(parent),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// Owner and permissions of what is made in `parent`: the maker's, but for the group of a set-group folder.
    fn owner_of_new(&self, parent: &Node, maker: &Header, kind: FileType, mode: u32) -> Result<Owner, Errno> {
        let mut owner = Owner { uid: maker.uid, gid: maker.gid, mode: mode & 0o7777 };
        let folder = self.current_attributes(parent)?;
        if folder.mode & SET_GROUP != 0 {
            owner.gid = folder.gid;
            if kind == FileType::Directory {
                owner.mode |= SET_GROUP;
            }
        }
        Ok(owner)
    }

    /// Gives a file that was just made to its owner.
    fn give(&self, node: &Node, made: Attributes, owner: Owner) -> Result<Attributes, Errno> {
        if (Owner { uid: made.uid, gid: made.gid, mode: made.mode & 0o7777 }) == owner {
            return Ok(made);
        }
        let owners = node.export.spec.owners;
        let stat = rustix::fs::fstat(&node.file)?;
        match owners.set(&node.file, &stat, owner) {
            // A file system without attributes: the file is the host user's, which it is in any case.
            Err(Errno::PERM) if owners != crate::owner::Owners::Passthrough => {}
            result => result?,
        }
        self.current_attributes(node)
    }

    /// Looks up what was just made under a name and gives it to its owner; without success it is removed again.
    fn finish(&self, parent: &Node, name: Name<'_>, owner: Owner) -> Result<Reply, Errno> {
        let (node, made) = self.find(parent, name)?;
        match self.give(&node, made, owner) {
            Ok(attributes) => Ok(entry(&node, &attributes).done()),
            Err(error) => {
                self.nodes.forget(node.number, 1);
                let flags =
                    if node.kind == FileType::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                if let Err(error) = rustix::fs::unlinkat(&parent.file, name.0, flags) {
                    tracing::debug!(%error, "a file that could not be given to its owner stays");
                }
                Err(error)
            }
        }
    }

    pub(super) fn symbolic_link(
        &self,
        maker: &Header,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Reply, Errno> {
        let parent = self.parent(maker.node)?;
        let owner = self.owner_of_new(&parent, maker, FileType::Symlink, 0o777)?;
        rustix::fs::symlinkat(target, &parent.file, name.0)?;
        self.finish(&parent, name, owner)
    }

    pub(super) fn make_folder(&self, maker: &Header, name: Name<'_>, mode: u32) -> Result<Reply, Errno> {
        let parent = self.parent(maker.node)?;
        let owner = self.owner_of_new(&parent, maker, FileType::Directory, mode)?;
        let mode = parent.export.spec.owners.disk_mode(FileType::Directory, mode);
        rustix::fs::mkdirat(&parent.file, name.0, Mode::from_raw_mode(mode))?;
        self.finish(&parent, name, owner)
    }

    /// Pipes and sockets live in the guest's kernel; on the disk they are names. Devices would not be: they are refused.
    pub(super) fn make_node(&self, maker: &Header, name: Name<'_>, mode: u32) -> Result<Reply, Errno> {
        let parent = self.parent(maker.node)?;
        let kind = FileType::from_raw_mode(mode);
        let owner = self.owner_of_new(&parent, maker, kind, mode)?;
        let disk_mode = Mode::from_raw_mode(parent.export.spec.owners.disk_mode(kind, mode));
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                drop(rustix::fs::openat2(&parent.file, name.0, flags, disk_mode, BENEATH)?);
            }
            FileType::Fifo | FileType::Socket => {
                rustix::fs::mknodat(&parent.file, name.0, kind, disk_mode, 0)?;
            }
            _ => return Err(Errno::PERM),
        }
        self.finish(&parent, name, owner)
    }

    pub(super) fn create(
        &self,
        maker: &Header,
        name: Name<'_>,
        flags: u32,
        mode: u32,
    ) -> Result<Reply, Errno> {
        let parent = self.parent(maker.node)?;
        let asked = OFlags::from_bits_retain(flags);
        let owner = self.owner_of_new(&parent, maker, FileType::RegularFile, mode)?;
        let disk_mode = parent.export.spec.owners.disk_mode(FileType::RegularFile, mode);
        let new = data::open_flags(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        match rustix::fs::openat2(&parent.file, name.0, new, Mode::from_raw_mode(disk_mode), BENEATH) {
            Ok(file) => match self.created(&parent, Some(name), file, owner) {
                Ok(reply) => Ok(reply),
                Err(error) => {
                    if let Err(error) = rustix::fs::unlinkat(&parent.file, name.0, AtFlags::empty()) {
                        tracing::debug!(%error, "a file that could not be given to its owner stays");
                    }
                    Err(error)
                }
            },
            // Somebody on the host was faster.
            Err(Errno::EXIST) if !asked.contains(OFlags::EXCL) => {
                let (node, mut attributes) = self.find(&parent, name)?;
                let opened = self.open_node(&node, flags).and_then(|(handle, keep)| {
                    if asked.contains(OFlags::TRUNC) {
                        rustix::fs::ftruncate(self.handles.get(handle)?.file()?, 0)?;
                        attributes = self.current_attributes(&node)?;
                    }
                    Ok((handle, keep))
                });
                let (handle, keep) = opened.inspect_err(|_| self.nodes.forget(node.number, 1))?;
                let mut writer = entry(&node, &attributes);
                writer.opened(handle, keep);
                Ok(writer.done())
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn create_unnamed(&self, maker: &Header, flags: u32, mode: u32) -> Result<Reply, Errno> {
        let parent = self.parent(maker.node)?;
        let owner = self.owner_of_new(&parent, maker, FileType::RegularFile, mode)?;
        let disk_mode = parent.export.spec.owners.disk_mode(FileType::RegularFile, mode);
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let new = data::open_flags(flags) | OFlags::TMPFILE | exclusive;
        let mode = Mode::from_raw_mode(disk_mode);
        let file = rustix::fs::openat(CWD, path_of(&parent.file), new, mode)?;
        self.created(&parent, None, file, owner)
    }

    /// A file that was just made, and is open.
    fn created(
        &self,
        parent: &Node,
        name: Option<Name<'_>>,
        file: OwnedFd,
        owner: Owner,
    ) -> Result<Reply, Errno> {
        // The same file, whatever its name leads to by now.
        let named = rustix::fs::openat(CWD, path_of(&file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let place = name.map(|name| Place::new(parent.number, name.0));
        let (node, made) = self.learn(&parent.export, named, place)?;
        let opened = self.give(&node, made, owner).and_then(|attributes| {
            let handle = self.handles.insert(Open::File(file), Some(Arc::clone(&node)))?;
            Ok((attributes, handle))
        });
        let (attributes, handle) = opened.inspect_err(|_| self.nodes.forget(node.number, 1))?;
        node.sees(data::version(&attributes));
        let mut writer = entry(&node, &attributes);
        writer.opened(handle, KEEP_CACHE);
        Ok(writer.done())
    }

    pub(super) fn unlink(&self, parent: u64, name: Name<'_>, folder: bool) -> Result<Reply, Errno> {
        let parent = self.parent(parent)?;
        let flags = if folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let lost = self.already_known(&parent, name);
        rustix::fs::unlinkat(&parent.file, name.0, flags)?;
        if let Some(lost) = lost {
            self.nodes.unnamed(&lost, parent.number, name.0);
        }
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(super) fn rename(
        &self,
        from_folder: u64,
        from: Name<'_>,
        to_folder: u64,
        to: Name<'_>,
        flags: u32,
    ) -> Result<Reply, Errno> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if flags.contains(RenameFlags::WHITEOUT) {
            // It is a device node.
            return Err(Errno::INVAL);
        }
        let (from_folder, to_folder) = (self.parent(from_folder)?, self.parent(to_folder)?);
        if from_folder.export.number != to_folder.export.number {
            return Err(Errno::XDEV);
        }
        let (moved, replaced) = (self.already_known(&from_folder, from), self.already_known(&to_folder, to));
        rustix::fs::renameat_with(&from_folder.file, from.0, &to_folder.file, to.0, flags)?;
        match replaced {
            Some(other) if flags.contains(RenameFlags::EXCHANGE) => {
                self.nodes.moved(&other, from_folder.number, from.0);
            }
            Some(lost) => self.nodes.unnamed(&lost, to_folder.number, to.0),
            None => {}
        }
        if let Some(moved) = moved {
            self.nodes.moved(&moved, to_folder.number, to.0);
        }
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(super) fn link(&self, node: u64, folder: u64, name: Name<'_>) -> Result<Reply, Errno> {
        let (node, folder) = (self.changeable(node)?, self.parent(folder)?);
        if node.export.number != folder.export.number {
            // Else a file of a read-only export could be had in a writable one.
            return Err(Errno::XDEV);
        }
        if node.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        rustix::fs::linkat(
            CWD,
            path_of(&node.file),
            &folder.file,
            name.0.to_owned(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        let (node, attributes) = self.find(&folder, name)?;
        Ok(entry(&node, &attributes).done())
    }

    pub(super) fn set_attributes(&self, number: u64, changes: Changes) -> Result<Reply, Errno> {
        if number == ROOT {
            return Err(Errno::ROFS);
        }
        let node = self.changeable(number)?;
        self.change_owner(&node, &changes)?;
        if let Some(size) = changes.size {
            self.truncate(&node, changes.handle, size)?;
        }
        if changes.accessed.is_some() || changes.modified.is_some() {
            let times =
                Timestamps { last_access: time(changes.accessed), last_modification: time(changes.modified) };
            match node.kind {
                FileType::Symlink => rustix::fs::utimensat(&node.file, c"", &times, AtFlags::EMPTY_PATH)?,
                _ => rustix::fs::utimensat(CWD, path_of(&node.file), &times, AtFlags::empty())?,
            }
        }
        let attributes = self.current_attributes(&node)?;
        let mut writer = Writer::default();
        writer.attributes_for(&attributes, node.export.spec.cache.attributes);
        Ok(writer.done())
    }

    fn change_owner(&self, node: &Node, changes: &Changes) -> Result<(), Errno> {
        let Changes { mode, uid, gid, drop_privileges, .. } = *changes;
        if mode.is_none() && uid.is_none() && gid.is_none() && !drop_privileges {
            return Ok(());
        }
        let stat = rustix::fs::fstat(&node.file)?;
        let owners = node.export.spec.owners;
        let before = owners.shown(&node.file, &stat);
        let mut owner = Owner {
            uid: uid.unwrap_or(before.uid),
            gid: gid.unwrap_or(before.gid),
            mode: mode.unwrap_or(before.mode) & 0o7777,
        };
        if drop_privileges && mode.is_none() {
            owner.mode = without_privileges(owner.mode);
        }
        if owner == before && mode.is_none() {
            return Ok(());
        }
        owners.set(&node.file, &stat, owner)
    }

    /// Takes the set-user and set-group bits from a file that somebody without the right to keep them writes to.
    pub(super) fn drop_privileges(&self, node: &Node) -> Result<(), Errno> {
        let stat = rustix::fs::fstat(&node.file)?;
        let before = node.export.spec.owners.shown(&node.file, &stat);
        let mode = without_privileges(before.mode);
        if mode == before.mode {
            return Ok(());
        }
        node.export.spec.owners.set(&node.file, &stat, Owner { mode, ..before })
    }
}

fn without_privileges(mode: u32) -> u32 {
    let mode = mode & !SET_USER;
    // Without the right to run it the bit means something else (mandatory locks).
    if mode & GROUP_RUNS != 0 { mode & !SET_GROUP } else { mode }
}

fn time(time: Option<Time>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT as _ },
        Some(Time::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW as _ },
        // Times before 1970 are negative numbers on the wire too.
        Some(Time::At { seconds, nanoseconds }) => {
            Timespec { tv_sec: seconds as i64, tv_nsec: i64::from(nanoseconds.min(999_999_999)) as _ }
        }
    }
}

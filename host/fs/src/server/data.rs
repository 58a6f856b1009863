//! The data of files.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::{DATA_BYTES_MAX, Payload, Room, Server};
use crate::handle::{Handle, Open};
use crate::node::{Node, ROOT, Version};
use crate::owner::path_of;
use crate::reply::{Attributes, Reply, Writer};

/// The pages in the guest's cache are still right (`FOPEN_KEEP_CACHE`).
pub const KEEP_CACHE: u32 = 2;
/// `SEEK_DATA` and `SEEK_HOLE`; the guest's kernel does the others itself.
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;
/// The most copied by one request, so that it ends soon.
const COPY_BYTES_MAX: u64 = 64 << 20;

/// How a file is opened for a guest that asked with these flags.
///
/// Appending is the guest's: its kernel says where to write, and writes back whole pages by any open file. Nothing here
/// waits for the other end of a pipe.
pub fn open_flags(flags: u32) -> OFlags {
    let kept = OFlags::RWMODE | OFlags::SYNC | OFlags::DSYNC;
    OFlags::from_bits_retain(flags) & kept | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK
}

pub fn version(attributes: &Attributes) -> Version {
    Version { size: attributes.size, modified: attributes.modified, changed: attributes.changed }
}

impl Server {
    pub(super) fn open(&self, number: u64, flags: u32, drop_privileges: bool) -> Result<Reply, Errno> {
        if number == ROOT {
            return Err(Errno::ISDIR);
        }
        let node = self.nodes.get(number)?;
        let (handle, keep) = self.open_node(&node, flags)?;
        if drop_privileges && !node.export.spec.read_only {
            self.drop_privileges(&node)?;
        }
        let mut writer = Writer::default();
        writer.opened(handle, keep);
        Ok(writer.done())
    }

    /// Opens a file; returns its handle and whether the guest's cached pages are right.
    pub(super) fn open_node(&self, node: &Arc<Node>, flags: u32) -> Result<(u64, u32), Errno> {
        let file = reopen(node, open_flags(flags))?;
        let attributes = self.current_attributes(node)?;
        let handle = self.handles.insert(Open::File(file), Some(Arc::clone(node)))?;
        let keep = if node.sees(version(&attributes)) { KEEP_CACHE } else { 0 };
        Ok((handle, keep))
    }

    pub(super) fn read(
        &self,
        handle: u64,
        offset: u64,
        size: u32,
        room: &mut dyn Room,
    ) -> Result<Reply, Errno> {
        let handle = self.handles.get(handle)?;
        let file = handle.file()?;
        let size = (size.min(DATA_BYTES_MAX) as usize).min(room.remaining());
        let mut done = 0;
        while done < size {
            match room.read_at(file.as_fd(), offset.saturating_add(done as u64), size - done) {
                Ok(0) => break,
                Ok(count) => done += count,
                // What was read is worth more than why there is no more.
                Err(_) if done > 0 => break,
                Err(error) => return Err(errno(&error)),
            }
        }
        Ok(Reply::Data(done))
    }

    pub(super) fn write(
        &self,
        handle: u64,
        offset: u64,
        size: u32,
        drop_privileges: bool,
        payload: &mut dyn Payload,
    ) -> Result<Reply, Errno> {
        let handle = self.handles.get(handle)?;
        let file = handle.file()?;
        handle.writable()?;
        if payload.remaining() != size as usize || size > DATA_BYTES_MAX {
            return Err(Errno::INVAL);
        }
        if drop_privileges && let Some(node) = &handle.node {
            self.drop_privileges(node)?;
        }
        let mut done: u32 = 0;
        while done < size {
            match payload.write_at(file.as_fd(), offset.saturating_add(u64::from(done))) {
                Ok(0) => break,
                Ok(count) => done += count as u32,
                Err(_) if done > 0 => break,
                Err(error) => return Err(errno(&error)),
            }
        }
        let mut writer = Writer::default();
        writer.u32(done).u32(0);
        Ok(writer.done())
    }

    pub(super) fn truncate(&self, node: &Arc<Node>, handle: Option<u64>, size: u64) -> Result<(), Errno> {
        if let Some(handle) = handle {
            let handle = self.handles.get(handle)?;
            handle.writable()?;
            return rustix::fs::ftruncate(handle.file()?, size);
        }
        rustix::fs::ftruncate(reopen(node, open_flags(OFlags::WRONLY.bits()))?, size)
    }

    pub(super) fn sync(&self, handle: u64, data_only: bool) -> Result<Reply, Errno> {
        let handle: Arc<Handle> = self.handles.get(handle)?;
        match &handle.open {
            Open::File(file) if data_only => rustix::fs::fdatasync(file)?,
            Open::File(file) => rustix::fs::fsync(file)?,
            Open::Folder(folder) => {
                let folder = rustix::io::fcntl_dupfd_cloexec(
                    &*folder.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
                    0,
                )?;
                rustix::fs::fsync(folder)?;
            }
            Open::Root | Open::Repeated { .. } => {}
        }
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(super) fn sync_fs(&self, number: u64) -> Result<Reply, Errno> {
        let folders = match number {
            ROOT => self.exports().into_values().collect(),
            _ => vec![Arc::clone(&self.nodes.get(number)?.export)],
        };
        for export in folders {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::openat(CWD, path_of(&export.root), flags, Mode::empty())?;
            rustix::fs::syncfs(root)?;
        }
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(super) fn allocate(&self, handle: u64, offset: u64, length: u64, mode: u32) -> Result<Reply, Errno> {
        let handle = self.handles.get(handle)?;
        handle.writable()?;
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(handle.file()?, mode, offset, length)?;
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(super) fn seek(&self, handle: u64, offset: u64, whence: u32) -> Result<Reply, Errno> {
        let handle = self.handles.get(handle)?;
        let from = match whence {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        let mut writer = Writer::default();
        writer.u64(rustix::fs::seek(handle.file()?, from)?);
        Ok(writer.done())
    }

    pub(super) fn copy(
        &self,
        (from, mut from_offset): (u64, u64),
        (to, mut to_offset): (u64, u64),
        length: u64,
        flags: u64,
    ) -> Result<Reply, Errno> {
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.handles.get(from)?, self.handles.get(to)?);
        to.writable()?;
        let length = length.min(COPY_BYTES_MAX) as usize;
        let copied = rustix::fs::copy_file_range(
            from.file()?,
            Some(&mut from_offset),
            to.file()?,
            Some(&mut to_offset),
            length,
        )?;
        let mut writer = Writer::default();
        writer.u32(copied as u32).u32(0);
        Ok(writer.done())
    }
}

/// Opens a file that the guest knows. Only files with data: pipes and sockets are the guest's, devices nobody's.
pub(super) fn reopen(node: &Node, flags: OFlags) -> Result<OwnedFd, Errno> {
    match node.kind {
        FileType::RegularFile => {}
        FileType::Directory => return Err(Errno::ISDIR),
        FileType::Symlink => return Err(Errno::LOOP),
        _ => return Err(Errno::NXIO),
    }
    if node.export.spec.read_only && flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
        return Err(Errno::ROFS);
    }
    rustix::fs::openat(CWD, path_of(&node.file), flags, Mode::empty())
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

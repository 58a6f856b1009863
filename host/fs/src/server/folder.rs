//! What is in a folder.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, FileType, Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::Server;
use super::lookup::root_attributes;
use crate::handle::Open;
use crate::node::{Node, ROOT};
use crate::owner::path_of;
use crate::reply::{Attributes, ENTRY_BYTES, Reply, Writer, name_bytes};
use crate::request::Name;

/// Names are read from the host in pieces of this size.
const BUFFER_BYTES: usize = 32 << 10;
/// The longest answer.
const ANSWER_BYTES_MAX: usize = 256 << 10;

impl Server {
    pub(super) fn open_folder(&self, number: u64) -> Result<Reply, Errno> {
        let handle = if number == ROOT {
            self.handles.insert(Open::Root, None)?
        } else {
            let node = self.nodes.get(number)?;
            if node.kind != FileType::Directory {
                return Err(Errno::NOTDIR);
            }
            let folder = read_names_of(&node)?;
            self.handles.insert(Open::Folder(Mutex::new(folder)), Some(node))?
        };
        let mut writer = Writer::default();
        writer.opened(handle, 0);
        Ok(writer.done())
    }

    pub(super) fn read_folder(
        &self,
        handle: u64,
        offset: u64,
        size: usize,
        plus: bool,
    ) -> Result<Reply, Errno> {
        let handle = self.handles.get(handle)?;
        let mut list = List { writer: Writer::default(), size: size.min(ANSWER_BYTES_MAX), plus };
        match (&handle.open, &handle.node) {
            (Open::Root, _) => self.read_root(offset, &mut list)?,
            (Open::Folder(folder), Some(node)) => {
                let folder = folder.lock().unwrap_or_else(PoisonError::into_inner);
                self.read_names(&folder, node, offset, &mut list)?;
            }
            _ => return Err(Errno::NOTDIR),
        }
        Ok(list.writer.done())
    }

    fn read_root(&self, offset: u64, list: &mut List) -> Result<(), Errno> {
        let exports = self.exports();
        let names = [".", ".."].into_iter().map(|name| (name, None));
        let names = names.chain(exports.iter().map(|(name, export)| (name.as_str(), Some(export))));
        for (position, (name, export)) in
            names.enumerate().skip(usize::try_from(offset).unwrap_or(usize::MAX))
        {
            if !list.fits(name.as_bytes()) {
                break;
            }
            let mut number = root_attributes().number;
            if let Some(export) = export {
                let stat = rustix::fs::fstat(&export.root)?;
                number = self.attributes(export, &export.root, &stat).number;
            }
            list.push(None, number, position as u64 + 1, FileType::Directory, name.as_bytes());
        }
        Ok(())
    }

    fn read_names(
        &self,
        folder: &OwnedFd,
        node: &Arc<Node>,
        offset: u64,
        list: &mut List,
    ) -> Result<(), Errno> {
        rustix::fs::seek(folder, SeekFrom::Start(offset))?;
        let here = rustix::fs::fstat(folder)?;
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        let mut names = RawDir::new(folder, buffer.spare_capacity_mut());
        while let Some(entry) = names.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // What was read so far is not lost; the error comes again.
                Err(_) if !list.writer.0.is_empty() => break,
                Err(error) => return Err(error),
            };
            let name = entry.file_name();
            if !list.fits(name.to_bytes()) {
                break;
            }
            let dots = matches!(name.to_bytes(), b"." | b"..");
            let found = match list.plus && !dots {
                true => match self.find(node, Name(name)) {
                    Ok(found) => Some(found),
                    // It went meanwhile.
                    Err(Errno::NOENT) => continue,
                    // The guest looks it up by itself, and is told why not.
                    Err(_) => None,
                },
                false => None,
            };
            let inode = if dots { here.st_ino as u64 } else { entry.ino() };
            let number = match &found {
                Some((_, attributes)) => attributes.number,
                None => self.shown_number(here.st_dev as u64, inode),
            };
            list.push(found, number, entry.next_entry_cookie(), entry.file_type(), name.to_bytes());
        }
        Ok(())
    }
}

/// Opens a folder for its names.
pub(super) fn read_names_of(folder: &Node) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path_of(&folder.file), flags, Mode::empty())
}

/// An answer with names, with what they lead to if that was asked for.
struct List {
    writer: Writer,
    size: usize,
    plus: bool,
}

impl List {
    fn fits(&self, name: &[u8]) -> bool {
        let entry = if self.plus { ENTRY_BYTES } else { 0 };
        self.writer.0.len() + entry + name_bytes(name) <= self.size
    }

    fn push(
        &mut self,
        found: Option<(Arc<Node>, Attributes)>,
        number: u64,
        next: u64,
        kind: FileType,
        name: &[u8],
    ) {
        if self.plus {
            match &found {
                Some((node, attributes)) => {
                    let cache = node.export.spec.cache;
                    self.writer.entry(node.number, cache.names, cache.attributes, attributes);
                }
                None => self.writer.0.resize(self.writer.0.len() + ENTRY_BYTES, 0),
            }
        }
        let kind = if kind == FileType::Unknown { 0 } else { kind.as_raw_mode() >> 12 };
        self.writer.name_in_folder(number, next, kind, name);
    }
}

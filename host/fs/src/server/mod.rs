//! The server: which request is whose work.

mod attribute;
mod change;
mod data;
mod folder;
mod lookup;
mod repeat;
mod save;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::io::Errno;

use crate::export::{Export, ExportError, ExportSpec};
use crate::handle::Handles;
use crate::node::{Node, Nodes, ROOT};
use crate::reply::{Reply, Writer};
use crate::request::{self, Header, Operation};
use crate::watch::Ledger;

/// The version of the protocol spoken (major 7).
const MINOR: u32 = 38;
/// Older kernels lack what we count on.
const MINOR_MIN: u32 = 31;
/// Features of the protocol (`FUSE_…` in `fuse.h`).
const ASYNC_READ: u64 = 1;
const BIG_WRITES: u64 = 1 << 5;
const AUTO_INVAL_DATA: u64 = 1 << 12;
const DO_READDIRPLUS: u64 = 1 << 13;
const READDIRPLUS_AUTO: u64 = 1 << 14;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
/// More feature bits follow.
pub const INIT_EXTENDED: u64 = 1 << 30;
/// Those we want. Locks are not among them: the guest's kernel keeps them, for all containers alike.
const WANTED: u64 = ASYNC_READ
    | BIG_WRITES
    | AUTO_INVAL_DATA
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES
    | HANDLE_KILLPRIV_V2
    | INIT_EXTENDED;
/// The most data of one read or write.
pub const DATA_BYTES_MAX: u32 = 1 << 20;
const PAGE_BYTES: u32 = 4096;

/// The data of a write, wherever they lie.
pub trait Payload {
    /// How many bytes are left.
    fn remaining(&self) -> usize;
    /// Writes some of them to a file and consumes what was taken.
    fn write_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize>;
}

/// Where the answer's data go, wherever that lies.
pub trait Room {
    /// How many bytes fit.
    fn remaining(&self) -> usize;
    /// Reads at most `count` bytes from a file and consumes the room. Zero is the end of the file.
    fn read_at(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize>;
}

/// Serves all exports of one machine.
pub struct Server {
    exports: RwLock<Exports>,
    pub(crate) nodes: Nodes,
    handles: Handles,
    /// Devices of the host by the order in which they were met: their position makes inode numbers unique.
    devices: Mutex<Vec<u64>>,
    /// What the guest changes itself, while somebody is told of changes.
    pub(crate) ledger: Ledger,
    /// The guest's thread that repeats changes made on the host; 0 is none.
    pub(crate) repeater: AtomicU32,
    /// Counts the beginnings and ends of repeating.
    pub(crate) generation: AtomicU64,
    repeating: Mutex<repeat::Repeating>,
}

#[derive(Default)]
struct Exports {
    by_name: BTreeMap<String, Arc<Export>>,
    last: u32,
}

impl Server {
    /// A server without exports. It keeps at most `descriptors_max` files open: half for what the guest has open, half
    /// for what it knows, of which those that it does not use are closed from a quarter on.
    pub fn new(descriptors_max: usize) -> Self {
        Self {
            exports: RwLock::default(),
            nodes: Nodes::new(descriptors_max / 4),
            handles: Handles::new(descriptors_max / 2),
            devices: Mutex::default(),
            ledger: Ledger::default(),
            repeater: AtomicU32::default(),
            generation: AtomicU64::default(),
            repeating: Mutex::default(),
        }
    }

    /// Shares a folder from now on.
    pub fn add(&self, spec: ExportSpec) -> Result<(), ExportError> {
        let mut exports = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        if exports.by_name.contains_key(&spec.name) {
            return Err(ExportError::Name(spec.name));
        }
        exports.last += 1;
        let export = Export::open(spec, exports.last)?;
        tracing::info!(share = export.spec.name, path = %export.spec.path.display(), "folder shared");
        exports.by_name.insert(export.spec.name.clone(), Arc::new(export));
        Ok(())
    }

    /// Shares a folder no longer. What the guest knows and has open of it is stale at once. `false` if there is none.
    pub fn remove(&self, name: &str) -> bool {
        let mut exports = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        let Some(export) = exports.by_name.remove(name) else { return false };
        drop(exports);
        export.removed.store(true, Ordering::Release);
        self.handles.remove_all(|handle| {
            handle.node.as_ref().is_some_and(|node| node.export.number == export.number)
        });
        self.nodes.remove(|other| other.number == export.number);
        tracing::info!(share = name, "folder no longer shared");
        true
    }

    /// Forgets everything the guest knows and has open: it starts over.
    pub fn reset(&self) {
        self.handles.remove_all(|_| true);
        self.nodes.remove(|_| true);
    }

    /// How many files the guest knows, and how many it has open.
    pub fn held(&self) -> (usize, usize) {
        (self.nodes.count().0, self.handles.count())
    }

    /// How many descriptors are open for them.
    pub fn descriptors(&self) -> usize {
        self.nodes.count().1 + self.handles.count()
    }

    /// Carries out one request: its header and arguments, a write's data in `payload`, a read's into `room`.
    ///
    /// The answer's header is the caller's to write. `Reply::Bytes` is never longer than `room`.
    pub fn handle(&self, request: &[u8], payload: &mut dyn Payload, room: &mut dyn Room) -> Reply {
        let Some(header) = request::header(request) else { return Reply::None };
        let operation = match request::operation(header.opcode, &request[request::HEADER_BYTES..]) {
            Ok(operation) => operation,
            // Nobody waits for an answer to these.
            Err(_) if matches!(header.opcode, 2 | 36 | 42) => return Reply::None,
            Err(error) => return Reply::Error(error),
        };
        let repeated = self.is_repeated(&header).then(|| self.repeat(&header, &operation)).flatten();
        let result = repeated.unwrap_or_else(|| {
            // Written down until it is made.
            let _making = self.ledger.is_kept().then(|| self.ledger.make(self.own(&header, &operation)));
            self.carry_out(&header, operation, payload, room)
        });
        match result {
            Ok(Reply::Bytes(bytes)) if bytes.len() > room.remaining() => Reply::Error(Errno::INVAL),
            Ok(reply) => reply,
            Err(error) => Reply::Error(error),
        }
    }

    fn carry_out(
        &self,
        header: &Header,
        operation: Operation<'_>,
        payload: &mut dyn Payload,
        room: &mut dyn Room,
    ) -> Result<Reply, Errno> {
        let number = header.node;
        match operation {
            Operation::Init { major, minor, readahead, flags } => init(major, minor, readahead, flags),
            Operation::Destroy => {
                self.reset();
                Ok(Reply::Bytes(Vec::new()))
            }
            Operation::Interrupt => Ok(Reply::None),
            Operation::Forget { count } => {
                self.nodes.forget(number, count);
                Ok(Reply::None)
            }
            Operation::BatchForget { list } => {
                request::forgets(list).for_each(|(number, count)| self.nodes.forget(number, count));
                Ok(Reply::None)
            }
            Operation::Lookup { name } => self.lookup(number, name),
            Operation::GetAttributes { handle } => self.get_attributes(number, handle),
            Operation::ReadLink => self.read_link(number),
            Operation::StatFs => self.stat_fs(number),
            Operation::SetAttributes(changes) => self.set_attributes(number, changes),
            Operation::SymbolicLink { name, target } => self.symbolic_link(header, name, target),
            Operation::MakeNode { name, mode } => self.make_node(header, name, mode),
            Operation::MakeFolder { name, mode } => self.make_folder(header, name, mode),
            Operation::Unlink { name } => self.unlink(number, name, false),
            Operation::RemoveFolder { name } => self.unlink(number, name, true),
            Operation::Rename { from, folder, to, flags } => self.rename(number, from, folder, to, flags),
            Operation::Link { node, name } => self.link(node, number, name),
            Operation::Create { name, flags, mode } => self.create(header, name, flags, mode),
            Operation::CreateUnnamed { flags, mode } => self.create_unnamed(header, flags, mode),
            Operation::Open { flags, drop_privileges } => self.open(number, flags, drop_privileges),
            Operation::Read { handle, offset, size } => self.read(handle, offset, size, room),
            Operation::Write { handle, offset, size, drop_privileges } => {
                self.write(handle, offset, size, drop_privileges, payload)
            }
            Operation::Release { handle } => self.release(handle),
            // Nothing is kept back here, and the kernel keeps the locks: it need not ask again.
            Operation::Flush { .. } => Err(Errno::NOSYS),
            Operation::Sync { handle, data_only } => self.sync(handle, data_only),
            Operation::SyncFs => self.sync_fs(number),
            Operation::Allocate { handle, offset, length, mode } => {
                self.allocate(handle, offset, length, mode)
            }
            Operation::Seek { handle, offset, whence } => self.seek(handle, offset, whence),
            Operation::Copy { from, from_offset, to, to_offset, length, flags } => {
                self.copy((from, from_offset), (to, to_offset), length, flags)
            }
            Operation::SetXattr { name, value, flags } => self.set_xattr(number, name, value, flags),
            Operation::GetXattr { name, size } => self.get_xattr(number, name, size),
            Operation::ListXattr { size } => self.list_xattr(number, size),
            Operation::RemoveXattr { name } => self.remove_xattr(number, name),
            Operation::OpenFolder => self.open_folder(number),
            Operation::ReadFolder { handle, offset, size, plus } => {
                let size = (size as usize).min(room.remaining());
                self.read_folder(handle, offset, size, plus)
            }
            Operation::Unsupported => Err(Errno::NOSYS),
        }
    }

    /// A file that may be changed.
    fn changeable(&self, number: u64) -> Result<Arc<Node>, Errno> {
        if number == ROOT {
            return Err(Errno::ROFS);
        }
        let node = self.nodes.get(number)?;
        match node.export.spec.read_only {
            true => Err(Errno::ROFS),
            false => Ok(node),
        }
    }

    /// All exports, by name.
    fn exports(&self) -> BTreeMap<String, Arc<Export>> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner).by_name.clone()
    }

    fn devices(&self) -> MutexGuard<'_, Vec<u64>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Agrees on version and features (`FUSE_INIT`).
fn init(major: u32, minor: u32, readahead: u32, flags: u64) -> Result<Reply, Errno> {
    let mut writer = Writer::default();
    if major > 7 {
        // It asks again in our version.
        writer.u32(7).u32(MINOR);
        writer.0.resize(64, 0);
        return Ok(writer.done());
    }
    if major < 7 || minor < MINOR_MIN {
        tracing::warn!(major, minor, "the guest's kernel speaks too old a file protocol");
        return Err(Errno::PROTO);
    }
    let taken = flags & WANTED;
    writer.u32(7).u32(MINOR.min(minor)).u32(readahead.min(DATA_BYTES_MAX)).u32(taken as u32);
    // Requests in the background, from how many on it is congested, bytes of one write, granularity of times.
    writer.u16(64).u16(48).u32(DATA_BYTES_MAX).u32(1);
    writer.u16((DATA_BYTES_MAX / PAGE_BYTES) as u16).u16(0).u32((taken >> 32) as u32);
    writer.0.resize(64, 0);
    Ok(writer.done())
}

//! What the guest's repeating thread asks: answered from what the guest knows, as if each change were still to come.
//!
//! Nothing it asks changes anything. It finds the names that the guest knows, whether or not they are still on the disk; one
//! that is to appear is not there yet, and one that is gone by now is made up: the guest hears that it came and that it went.

use std::ffi::{CStr, CString};
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use guest_protocol::changes::{self, Change, Kind, What};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Server;
use super::lookup::entry;
use crate::handle::Open;
use crate::node::{BENEATH, Identity, Place, ROOT};
use crate::reply::{Attributes, Reply, Writer};
use crate::request::{Header, Name, Operation};
use crate::watch::{Own, Spot, Step};

/// A batch that is being repeated.
#[derive(Default)]
pub struct Repeating {
    steps: Vec<Step>,
    /// Which of them is next, until it is done; and whether a renaming is done in two.
    at: Option<(usize, bool)>,
}

/// What is to happen with a name in the step that is next.
enum Role {
    None,
    Appears,
    Vanishes { folder: bool },
    Leaves { to: Spot },
    Arrives,
}

impl Server {
    /// Whether a request is the repeating thread's.
    pub(super) fn is_repeated(&self, header: &Header) -> bool {
        header.process != 0 && header.process == self.repeater.load(Ordering::Acquire)
    }

    fn repeating(&self) -> MutexGuard<'_, Repeating> {
        self.repeating.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch is to be repeated, or no more.
    pub(crate) fn set_repeating(&self, steps: Vec<Step>) {
        *self.repeating() = Repeating { steps, at: None };
    }

    fn role(&self, folder: u64, name: &CStr) -> Role {
        let repeating = self.repeating();
        let Some((at, apart)) = repeating.at else { return Role::None };
        let is = |spot: &Spot| spot.0 == folder && *spot.1 == *name;
        match repeating.steps.get(at) {
            Some(Step::Appeared { at, .. }) if is(at) => Role::Appears,
            Some(Step::Vanished { at, folder }) if is(at) => Role::Vanishes { folder: *folder },
            Some(Step::Renamed { from, folder, .. }) if is(from) && apart => {
                Role::Vanishes { folder: *folder }
            }
            Some(Step::Renamed { from, to, .. }) if is(from) => Role::Leaves { to: to.clone() },
            Some(Step::Renamed { to, .. }) if is(to) && !apart => Role::Arrives,
            _ => Role::None,
        }
    }

    /// Answers the repeating thread; `None` for what is answered like anybody's question.
    pub(super) fn repeat(&self, header: &Header, operation: &Operation<'_>) -> Option<Result<Reply, Errno>> {
        let number = header.node;
        let done = || Ok(Reply::Bytes(Vec::new()));
        Some(match *operation {
            Operation::Lookup { name } if number == ROOT => {
                self.repeating().at = Some(changes::announced(name.0.to_bytes())?);
                Err(Errno::NOENT)
            }
            Operation::Lookup { name } => self.find_repeated(number, name),
            Operation::GetAttributes { .. } | Operation::SetAttributes(_) if number != ROOT => {
                let (attributes, time) = match self.nodes.get(number) {
                    Ok(node) => match self.current_attributes(&node) {
                        Ok(attributes) => (attributes, node.export.spec.cache.attributes),
                        Err(error) => return Some(Err(error)),
                    },
                    Err(_) => (self.made_up(number, FileType::RegularFile), Duration::ZERO),
                };
                let mut writer = Writer::default();
                writer.attributes_for(&attributes, time);
                Ok(writer.done())
            }
            Operation::MakeNode { name, mode } => {
                self.make_repeated(number, name, FileType::from_raw_mode(mode))
            }
            Operation::MakeFolder { name, .. } => self.make_repeated(number, name, FileType::Directory),
            Operation::SymbolicLink { name, .. } => self.make_repeated(number, name, FileType::Symlink),
            Operation::Unlink { name } | Operation::RemoveFolder { name } => {
                self.nodes.believed_gone(number, name.0);
                self.repeating().at = None;
                done()
            }
            Operation::Rename { from, folder, to, .. } => {
                self.nodes.believed_moved((number, from.0), (folder, to.0));
                self.repeating().at = None;
                done()
            }
            Operation::Open { .. } => self.handle_of_nothing(number, None),
            Operation::OpenFolder if number != ROOT => {
                let generation = self.generation.load(Ordering::Acquire);
                self.handle_of_nothing(number, Some(generation)).inspect(|_| self.nodes.watch_below(number))
            }
            Operation::Create { .. }
            | Operation::CreateUnnamed { .. }
            | Operation::Link { .. }
            | Operation::Write { .. }
            | Operation::Allocate { .. }
            | Operation::Copy { .. }
            | Operation::SetXattr { .. }
            | Operation::RemoveXattr { .. } => Err(Errno::PERM),
            _ => return None,
        })
    }

    fn handle_of_nothing(&self, number: u64, watched: Option<u64>) -> Result<Reply, Errno> {
        let handle = self.handles.insert(Open::Repeated { watched }, Some(self.nodes.get(number)?))?;
        let mut writer = Writer::default();
        writer.opened(handle, 0);
        Ok(writer.done())
    }

    /// The repeating thread closes a folder: it is watched no longer, unless that thread is of the past.
    pub(super) fn release(&self, handle: u64) -> Result<Reply, Errno> {
        let handle = self.handles.remove(handle)?;
        if let (Open::Repeated { watched: Some(generation) }, Some(node)) = (&handle.open, &handle.node)
            && *generation == self.generation.load(Ordering::Acquire)
        {
            self.nodes.watch_below_no_longer(node.number);
        }
        Ok(Reply::Bytes(Vec::new()))
    }

    fn find_repeated(&self, parent: u64, name: Name<'_>) -> Result<Reply, Errno> {
        let known = self.nodes.named(parent, name.0);
        match (self.role(parent, name.0), known) {
            (Role::Appears | Role::Arrives, None) => Err(Errno::NOENT),
            (_, Some(number)) => self.known_entry(number),
            (Role::Vanishes { folder }, None) => {
                let kind = if folder { FileType::Directory } else { FileType::RegularFile };
                Ok(self.made_up_entry(self.nodes.fresh(), kind))
            }
            (Role::Leaves { to }, None) => self.moved_entry((parent, name.0), &to),
            (Role::None, None) => {
                let (node, attributes) = self.find(&*self.nodes.get(parent)?, name)?;
                Ok(entry(&node, &attributes).done())
            }
        }
    }

    /// A file that the guest knows, wherever it is by now.
    fn known_entry(&self, number: u64) -> Result<Reply, Errno> {
        let (kind, _) = self.nodes.count_lookup(number).ok_or(Errno::NOENT)?;
        if let Ok(node) = self.nodes.get(number)
            && let Ok(attributes) = self.current_attributes(&node)
        {
            return Ok(entry(&node, &attributes).done());
        }
        Ok(self.made_up_entry(number, kind))
    }

    /// A file that the guest did not know by its old name: it learns it, if it does not know it by the new one.
    fn moved_entry(&self, from: (u64, &CStr), to: &Spot) -> Result<Reply, Errno> {
        let folder = self.nodes.get(to.0)?;
        let stat = rustix::fs::statat(&folder.file, &*to.1, AtFlags::SYMLINK_NOFOLLOW)?;
        if let Some(known) = self.nodes.named(to.0, &to.1)
            && self.nodes.identity(known) == Some(Identity::of(&folder.export, &stat))
        {
            return Err(Errno::NOENT);
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(&folder.file, &*to.1, flags, Mode::empty(), BENEATH)?;
        let (node, attributes) = self.learn(&folder.export, file, Some(Place::new(from.0, from.1)))?;
        Ok(entry(&node, &attributes).done())
    }

    /// What was made on the host is made in the guest: the guest learns it.
    fn make_repeated(&self, parent: u64, name: Name<'_>, kind: FileType) -> Result<Reply, Errno> {
        let found = self.find(&*self.nodes.get(parent)?, name);
        let appears = matches!(self.role(parent, name.0), Role::Appears);
        let made = match found {
            Ok((node, _)) if node.kind != kind => {
                self.nodes.forget(node.number, 1);
                return Err(Errno::EXIST);
            }
            Ok((node, attributes)) => entry(&node, &attributes).done(),
            // It went since, which is told next.
            Err(Errno::NOENT) if appears => self.made_up_entry(self.nodes.fresh(), kind),
            Err(error) => return Err(error),
        };
        self.repeating().at = None;
        Ok(made)
    }

    /// A file that is not there, not to be remembered.
    fn made_up_entry(&self, number: u64, kind: FileType) -> Reply {
        let mut writer = Writer::default();
        writer.entry(number, Duration::ZERO, Duration::ZERO, &self.made_up(number, kind));
        writer.done()
    }

    /// What is told of a file that is not there.
    fn made_up(&self, number: u64, kind: FileType) -> Attributes {
        let number = self.shown_inode(number).unwrap_or(number);
        Attributes {
            number,
            mode: kind.as_raw_mode() | 0o700,
            links: 1,
            block_size: 4096,
            ..Attributes::default()
        }
    }

    /// The inode number that the guest is shown of a known file.
    fn shown_inode(&self, number: u64) -> Option<u64> {
        let identity = self.nodes.identity(number)?;
        Some(self.shown_number(identity.device, identity.inode))
    }

    /// A step in words of the guest; `None` when there is nothing to repeat any more.
    pub(crate) fn describe(&self, step: &Step) -> Option<Change> {
        let spot = |folder: u64, name: &CStr| {
            Some(changes::Spot {
                inode: self.shown_inode(folder)?,
                folder: self.nodes.path(folder)?,
                name: name.to_bytes().to_vec(),
            })
        };
        let (at, what) = match step {
            Step::Appeared { at, touch, folder } => {
                (at.clone(), What::Appeared(self.kind_of(at, *folder)?, *touch))
            }
            Step::Touched { at, touch } => (at.clone(), What::Touched(*touch)),
            Step::Vanished { at, folder } => (at.clone(), What::Vanished { folder: *folder }),
            Step::Renamed { from, to, folder } => {
                (from.clone(), What::Renamed { folder: *folder, to: spot(to.0, &to.1)? })
            }
            Step::Lost { folder } => ((*folder, CString::default()), What::Lost),
        };
        let inode = self.nodes.named(at.0, &at.1).and_then(|number| self.shown_inode(number));
        Some(Change { at: spot(at.0, &at.1)?, inode: inode.unwrap_or_default(), what })
    }

    /// Of what is gone by now, only whether it was a folder is known.
    fn kind_of(&self, at: &Spot, was_folder: bool) -> Option<Kind> {
        let folder = self.nodes.get(at.0).ok()?;
        let stat = match rustix::fs::statat(&folder.file, &*at.1, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Some(if was_folder { Kind::Folder } else { Kind::File }),
            stat => stat.ok()?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Some(Kind::File),
            FileType::Directory => Some(Kind::Folder),
            FileType::Symlink => Some(Kind::Link),
            FileType::Fifo => Some(Kind::Pipe),
            FileType::Socket => Some(Kind::Socket),
            // Devices are not shared.
            _ => None,
        }
    }

    /// What a request changes on the host, as far as it is watched.
    pub(super) fn own(&self, header: &Header, operation: &Operation<'_>) -> Vec<Own> {
        let folder = |number: u64| self.nodes.is_watched(number).then_some(number);
        let data = |number: u64| self.nodes.is_in_watched(number).then_some(Own::Data(number));
        let open = |handle: u64| {
            let handle = self.handles.get(handle).ok()?;
            data(handle.node.as_ref()?.number)
        };
        let appears = |number: u64, name: Name<'_>| Some(Own::Appears(folder(number)?, name.0.to_owned()));
        let vanishes = |number: u64, name: Name<'_>| Some(Own::Vanishes(folder(number)?, name.0.to_owned()));
        let number = header.node;
        let own = match *operation {
            Operation::SetAttributes(_)
            | Operation::SetXattr { .. }
            | Operation::RemoveXattr { .. }
            | Operation::Open { drop_privileges: true, .. } => [data(number), None, None, None],
            Operation::SymbolicLink { name, .. }
            | Operation::MakeNode { name, .. }
            | Operation::MakeFolder { name, .. }
            // It is removed again if it cannot be given to its owner.
            | Operation::Create { name, .. } => [appears(number, name), vanishes(number, name), None, None],
            Operation::Link { node, name } => [appears(number, name), data(node), None, None],
            Operation::Unlink { name } | Operation::RemoveFolder { name } => {
                [vanishes(number, name), None, None, None]
            }
            Operation::Rename { from, folder, to, .. } => {
                // They may be exchanged.
                [vanishes(number, from), appears(folder, to), vanishes(folder, to), appears(number, from)]
            }
            Operation::Write { handle, .. }
            | Operation::Allocate { handle, .. }
            | Operation::Copy { to: handle, .. } => [open(handle), None, None, None],
            _ => [None, None, None, None],
        };
        own.into_iter().flatten().collect()
    }
}

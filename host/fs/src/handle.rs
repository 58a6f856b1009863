//! What the guest has open, by the numbers we gave it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::node::{Node, ROOT};
use crate::saved::SavedHandle;

/// What is open.
#[derive(Debug)]
pub enum Open {
    /// A file.
    File(OwnedFd),
    /// A folder, whose position one reader at a time moves.
    Folder(Mutex<OwnedFd>),
    /// The made-up root.
    Root,
    /// What the repeating thread opens, and nothing is done with. A folder is watched meanwhile, on behalf of this
    /// generation of that thread.
    Repeated { watched: Option<u64> },
}

/// One open file or folder.
#[derive(Debug)]
pub struct Handle {
    pub open: Open,
    /// `None` for the made-up root.
    pub node: Option<Arc<Node>>,
}

impl Handle {
    /// The open file; `EBADF` for a folder.
    pub fn file(&self) -> Result<&OwnedFd, Errno> {
        match &self.open {
            Open::File(file) => Ok(file),
            Open::Folder(_) | Open::Root | Open::Repeated { .. } => Err(Errno::BADF),
        }
    }

    /// Whether this handle's export takes changes.
    pub fn writable(&self) -> Result<(), Errno> {
        match &self.node {
            Some(node) if !node.export.spec.read_only => Ok(()),
            _ => Err(Errno::ROFS),
        }
    }
}

/// All that is open.
pub struct Handles {
    table: Mutex<Table>,
    open_max: usize,
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

impl Handles {
    /// Each takes a descriptor of the process: there are at most `open_max`.
    pub fn new(open_max: usize) -> Self {
        Self { table: Mutex::default(), open_max }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, open: Open, node: Option<Arc<Node>>) -> Result<u64, Errno> {
        let mut table = self.table();
        if table.open.len() >= self.open_max {
            return Err(Errno::NFILE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(Handle { open, node }));
        Ok(number)
    }

    /// What a saved machine keeps: what is open and the last number given, in the order of the numbers. What the repeating
    /// thread has open is not kept.
    pub fn save(&self) -> rustix::io::Result<(Vec<SavedHandle>, u64)> {
        let table = self.table();
        let mut handles = Vec::with_capacity(table.open.len());
        for (number, handle) in &table.open {
            let flags = match &handle.open {
                Open::File(file) => Some(rustix::fs::fcntl_getfl(file)?.bits()),
                Open::Folder(_) | Open::Root => None,
                Open::Repeated { .. } => continue,
            };
            let file = handle.node.as_ref().map_or(ROOT, |node| node.number);
            handles.push(SavedHandle { number: *number, file, flags });
        }
        handles.sort_by_key(|handle| handle.number);
        Ok((handles, table.last))
    }

    /// Numbers from here on were never given.
    pub fn set_last(&self, last: u64) {
        self.table().last = last;
    }

    /// The same as [`Self::insert`], under a number that was given before; `false` when it is taken.
    pub fn restore(&self, number: u64, open: Open, node: Option<Arc<Node>>) -> Result<bool, Errno> {
        let mut table = self.table();
        if table.open.len() >= self.open_max {
            return Err(Errno::NFILE);
        }
        Ok(table.open.insert(number, Arc::new(Handle { open, node })).is_none())
    }

    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.table().open.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// Takes it out. It is closed when the last who works with it is done, without the lock: closing may take long.
    pub fn remove(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.table().open.remove(&number).ok_or(Errno::BADF)
    }

    /// Closes whatever `which` says.
    pub fn remove_all(&self, which: impl Fn(&Handle) -> bool) {
        let mut gone = Vec::new();
        self.table().open.retain(|_, handle| {
            let goes = which(handle);
            if goes {
                gone.push(Arc::clone(handle));
            }
            !goes
        });
    }

    /// How many are open.
    pub fn count(&self) -> usize {
        self.table().open.len()
    }
}

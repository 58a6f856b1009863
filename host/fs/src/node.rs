//! The files and folders the guest knows, by the numbers we gave it.
//!
//! A number lives as long as the guest has looked the file up more often than it forgot it. An open `O_PATH` descriptor
//! belongs to each, so the file keeps its identity (device and inode number) whatever becomes of its name.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use crate::export::Export;

/// The made-up root.
pub const ROOT: u64 = 1;

/// A file, for as long as a name on the host or a descriptor leads to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub export: u32,
    pub device: u64,
    pub inode: u64,
}

impl Identity {
    #[expect(clippy::unnecessary_cast, reason = "the fields' types differ between architectures")]
    pub fn of(export: &Export, stat: &Stat) -> Self {
        Self { export: export.number, device: stat.st_dev as u64, inode: stat.st_ino as u64 }
    }
}

/// A state of a file's data: while it is the same, the guest's cached pages are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    pub size: u64,
    pub modified: (u64, u32),
    pub changed: (u64, u32),
}

/// One file or folder.
#[derive(Debug)]
pub struct Node {
    pub number: u64,
    pub export: Arc<Export>,
    /// `O_PATH`, links not followed.
    pub file: OwnedFd,
    pub kind: FileType,
    identity: Identity,
    /// The data the guest may have in its cache.
    seen: Mutex<Option<Version>>,
}

impl Node {
    /// Takes note that the guest opens this version; `true` when it is the one it had.
    pub fn sees(&self, version: Version) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.replace(version) == Some(version)
    }
}

struct Known {
    node: Arc<Node>,
    lookups: u64,
}

/// All that the guest knows.
#[derive(Default)]
pub struct Nodes(Mutex<Table>);

#[derive(Default)]
struct Table {
    known: HashMap<u64, Known>,
    numbers: HashMap<Identity, u64>,
    last: u64,
}

impl Nodes {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of a number; `ESTALE` when the guest has no such number, or its export has gone.
    pub fn get(&self, number: u64) -> Result<Arc<Node>, Errno> {
        let table = self.table();
        let known = table.known.get(&number).ok_or(Errno::STALE)?;
        match known.node.export.removed.load(Ordering::Acquire) {
            true => Err(Errno::STALE),
            false => Ok(Arc::clone(&known.node)),
        }
    }

    /// The file that is known by this identity, looked up once more.
    pub fn known(&self, identity: Identity) -> Option<Arc<Node>> {
        let mut table = self.table();
        let number = *table.numbers.get(&identity)?;
        let known = table.known.get_mut(&number)?;
        known.lookups = known.lookups.saturating_add(1);
        Some(Arc::clone(&known.node))
    }

    /// Takes note of a lookup of this file, which is kept unless it is known already.
    pub fn learn(&self, export: &Arc<Export>, file: OwnedFd, stat: &Stat) -> Arc<Node> {
        let identity = Identity::of(export, stat);
        let mut table = self.table();
        let table = &mut *table;
        if let Some(number) = table.numbers.get(&identity)
            && let Some(known) = table.known.get_mut(number)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Arc::clone(&known.node);
        }
        table.last = table.last.max(ROOT) + 1;
        let number = table.last;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let export = Arc::clone(export);
        let node = Arc::new(Node { number, export, file, kind, identity, seen: Mutex::new(None) });
        table.numbers.insert(identity, number);
        table.known.insert(number, Known { node: Arc::clone(&node), lookups: 1 });
        node
    }

    /// Takes back lookups. More than there were are taken for all of them.
    pub fn forget(&self, number: u64, count: u64) {
        let mut table = self.table();
        let Some(known) = table.known.get_mut(&number) else { return };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            let gone = table.known.remove(&number);
            if let Some(gone) = &gone {
                table.numbers.remove(&gone.node.identity);
            }
            // Descriptors are closed without the lock.
            drop((table, gone));
        }
    }

    /// Forgets whatever `which` says.
    pub fn remove(&self, which: impl Fn(&Node) -> bool) {
        let mut gone = Vec::new();
        let mut table = self.table();
        let table = &mut *table;
        table.known.retain(|_, known| {
            let goes = which(&known.node);
            if goes {
                gone.push(Arc::clone(&known.node));
            }
            !goes
        });
        for node in &gone {
            table.numbers.remove(&node.identity);
        }
    }

    /// How many files are known.
    pub fn count(&self) -> usize {
        self.table().known.len()
    }
}

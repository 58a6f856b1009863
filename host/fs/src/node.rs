//! The files and folders the guest knows, by the numbers we gave it.
//!
//! A number lives as long as the guest has looked the file up more often than it forgot it. An open `O_PATH` descriptor
//! belongs to each that is in use, so the file keeps its identity (device and inode number) whatever becomes of its name.
//! Descriptors are few and files are many: those of files that were not asked for lately are closed. When the guest comes
//! back to one, it is found again by the name it was last known by, in the folder that was known, and only if it is still
//! that very file. A file that is open or has lost its name keeps its descriptor.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::export::Export;
use crate::request::is_component;
use crate::saved::{SavedError, SavedFile};
use crate::watch::{Folders, Notifier, Token};

/// Looks at so many files at most to find one whose descriptor can be closed.
const LOOKS_MAX: usize = 64;
/// A file this deep below the nearest known descriptor is not looked for.
const DEPTH_MAX: usize = 512;

/// A component is one step down: no magic link, and nothing above.
pub const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

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

/// The data the guest may have in its cache.
type Seen = Arc<Mutex<Option<Version>>>;

/// One file or folder, with its descriptor.
#[derive(Debug)]
pub struct Node {
    pub number: u64,
    pub export: Arc<Export>,
    /// `O_PATH`, links not followed.
    pub file: OwnedFd,
    pub kind: FileType,
    seen: Seen,
    /// Asked for since the last look for descriptors to close.
    used: AtomicBool,
}

impl Node {
    /// Takes note that the guest opens this version; `true` when it is the one it had.
    pub fn sees(&self, version: Version) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.replace(version) == Some(version)
    }
}

/// Where a file was found: its name in a known folder. In the made-up root it is the root of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    folder: u64,
    name: CString,
}

impl Place {
    pub fn new(folder: u64, name: &CStr) -> Self {
        Self { folder, name: name.to_owned() }
    }

    fn is(&self, folder: u64, name: &CStr) -> bool {
        self.folder == folder && *self.name == *name
    }
}

struct Known {
    export: Arc<Export>,
    identity: Identity,
    kind: FileType,
    seen: Seen,
    lookups: u64,
    /// `None` keeps the descriptor.
    place: Option<Place>,
    node: Option<Arc<Node>>,
}

/// All that the guest knows.
pub struct Nodes {
    table: Mutex<Table>,
    descriptors_max: usize,
}

#[derive(Default)]
struct Table {
    known: HashMap<u64, Known>,
    numbers: HashMap<Identity, u64>,
    last: u64,
    /// How many have a descriptor, and in which order they are looked at.
    live: usize,
    turns: VecDeque<u64>,
    folders: Folders,
}

impl Table {
    /// A number that was never given.
    fn fresh(&mut self) -> u64 {
        self.last = self.last.max(ROOT) + 1;
        self.last
    }

    /// Takes note of the name that a file is found by.
    fn set_place(&mut self, number: u64, place: Option<Place>) {
        let Some(known) = self.known.get_mut(&number) else { return };
        if !self.folders.is_idle() {
            if let Some(before) = &known.place {
                self.folders.unnamed(before.folder, &before.name, number);
            }
            if let Some(place) = &place {
                self.folders.named(place.folder, &place.name, number);
            }
        }
        known.place = place;
        self.watch(number);
    }

    /// Watches a folder if the one it is in is watched.
    fn watch(&mut self, number: u64) {
        if self.folders.is_idle() {
            return;
        }
        if let Some(Known { kind: FileType::Directory, place: Some(place), node: Some(node), .. }) =
            self.known.get(&number)
            && self.folders.is_watched(place.folder)
        {
            self.folders.watch(number, &node.file);
        }
    }

    /// Whether a folder is one of those that are to be watched with all below, or below one.
    fn is_below_a_root(&self, number: u64, found: &mut HashMap<u64, bool>) -> bool {
        let (mut way, mut here) = (Vec::new(), number);
        let below = loop {
            if self.folders.is_root(here) {
                break true;
            }
            if let Some(found) = found.get(&here) {
                break *found;
            }
            way.push(here);
            match self.known.get(&here).and_then(|known| known.place.as_ref()) {
                Some(place) if place.folder != ROOT && way.len() < DEPTH_MAX => here = place.folder,
                _ => break false,
            }
        };
        found.extend(way.into_iter().map(|number| (number, below)));
        below
    }

    /// After the roots have changed: watches what is below them, and nothing else.
    fn watch_below_roots(&mut self) {
        let mut found = HashMap::new();
        let folders = self.known.iter().filter(|(_, known)| known.kind == FileType::Directory);
        let wanted: HashSet<u64> = folders
            .map(|(number, _)| *number)
            .filter(|number| self.is_below_a_root(*number, &mut found))
            .collect();
        self.folders.keep_only(&wanted);
        let Self { known, folders, .. } = self;
        for number in &wanted {
            if let Some(Known { node: Some(node), .. }) = known.get(number) {
                folders.watch(*number, &node.file);
            }
        }
        for (number, known) in known {
            if let Some(place) = &known.place {
                folders.named(place.folder, &place.name, *number);
            }
        }
    }

    /// Gives a known file its descriptor. Returns others that are to be closed without the lock.
    fn enliven(
        &mut self,
        number: u64,
        file: OwnedFd,
        descriptors_max: usize,
    ) -> Result<(Arc<Node>, Vec<Arc<Node>>), Errno> {
        let gone = self.make_room(descriptors_max);
        // All are in use: files that are open, or that have no name any more.
        if self.live >= descriptors_max.saturating_mul(2) {
            return Err(Errno::NFILE);
        }
        let known = self.known.get_mut(&number).ok_or(Errno::STALE)?;
        if let Some(node) = &known.node {
            return Ok((Arc::clone(node), gone));
        }
        let (export, kind, seen) = (Arc::clone(&known.export), known.kind, Arc::clone(&known.seen));
        let node = Arc::new(Node { number, export, file, kind, seen, used: AtomicBool::new(false) });
        known.node = Some(Arc::clone(&node));
        self.live += 1;
        self.turns.push_back(number);
        Ok((node, gone))
    }

    fn make_room(&mut self, descriptors_max: usize) -> Vec<Arc<Node>> {
        let mut gone = Vec::new();
        for _ in 0..LOOKS_MAX {
            if self.live < descriptors_max {
                break;
            }
            let Some(number) = self.turns.pop_front() else { break };
            let Some(known) = self.known.get_mut(&number) else { continue };
            let Some(node) = known.node.take() else { continue };
            // Whoever has it open or works on it holds it, and can only have got it under the lock.
            if known.place.is_none()
                || Arc::strong_count(&node) > 1
                || node.used.swap(false, Ordering::Relaxed)
            {
                known.node = Some(node);
                self.turns.push_back(number);
            } else {
                self.live -= 1;
                gone.push(node);
            }
        }
        gone
    }

    fn forget(&mut self, number: u64) -> Option<Known> {
        let known = self.known.remove(&number)?;
        if self.numbers.get(&known.identity) == Some(&number) {
            self.numbers.remove(&known.identity);
        }
        if !self.folders.is_idle() {
            self.folders.unwatch(number);
            if let Some(place) = &known.place {
                self.folders.unnamed(place.folder, &place.name, number);
            }
        }
        self.live -= usize::from(known.node.is_some());
        if self.turns.len() > 2 * self.known.len() + LOOKS_MAX {
            let Self { turns, known, .. } = self;
            turns.retain(|number| known.contains_key(number));
        }
        Some(known)
    }
}

impl Nodes {
    /// At most about this many descriptors are kept for files that are not open, and twice as many in all.
    pub fn new(descriptors_max: usize) -> Self {
        Self { table: Mutex::default(), descriptors_max: descriptors_max.max(1) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of a number; `ESTALE` when the guest has no such number, its export has gone, or it cannot be found again.
    pub fn get(&self, number: u64) -> Result<Arc<Node>, Errno> {
        self.get_within(number, DEPTH_MAX)
    }

    fn get_within(&self, number: u64, depth: usize) -> Result<Arc<Node>, Errno> {
        let (export, identity, kind, place) = {
            let table = self.table();
            let known = table.known.get(&number).ok_or(Errno::STALE)?;
            if known.export.removed.load(Ordering::Acquire) {
                return Err(Errno::STALE);
            }
            if let Some(node) = &known.node {
                node.used.store(true, Ordering::Relaxed);
                return Ok(Arc::clone(node));
            }
            let place = known.place.clone().ok_or(Errno::STALE)?;
            (Arc::clone(&known.export), known.identity, known.kind, place)
        };
        let depth = depth.checked_sub(1).ok_or(Errno::STALE)?;
        let file = match place.folder {
            ROOT => rustix::io::fcntl_dupfd_cloexec(&export.root, 0)?,
            folder => {
                let folder = self.get_within(folder, depth)?;
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::openat2(&folder.file, &*place.name, flags, Mode::empty(), BENEATH).map_err(
                    |error| match error {
                        Errno::NOENT | Errno::NOTDIR => Errno::STALE,
                        error => error,
                    },
                )?
            }
        };
        let stat = rustix::fs::fstat(&file)?;
        // A number that is used again may be another kind of file, and some kinds are not opened.
        if Identity::of(&export, &stat) != identity || FileType::from_raw_mode(stat.st_mode) != kind {
            return Err(Errno::STALE);
        }
        let (node, gone) = self.table().enliven(number, file, self.descriptors_max)?;
        drop(gone);
        Ok(node)
    }

    /// The file that is known by this identity, looked up once more under this name. `None` also when its descriptor was
    /// closed: [`Self::learn`] gives it a new one.
    pub fn known(&self, identity: Identity, folder: u64, name: &CStr) -> Option<Arc<Node>> {
        let mut table = self.table();
        let number = *table.numbers.get(&identity)?;
        let known = table.known.get_mut(&number)?;
        let node = known.node.clone()?;
        node.used.store(true, Ordering::Relaxed);
        known.lookups = known.lookups.saturating_add(1);
        match known.place.as_ref().is_some_and(|place| place.is(folder, name)) {
            true => table.watch(number),
            false => table.set_place(number, Some(Place::new(folder, name))),
        }
        Some(node)
    }

    /// Takes note of a lookup of this file, which is kept unless it is known already.
    pub fn learn(
        &self,
        export: &Arc<Export>,
        file: OwnedFd,
        stat: &Stat,
        place: Option<Place>,
    ) -> Result<Arc<Node>, Errno> {
        let identity = Identity::of(export, stat);
        let mut table = self.table();
        let kind = FileType::from_raw_mode(stat.st_mode);
        let number = table.numbers.get(&identity).copied();
        // Of another kind is another file, to which the host gave the inode number of one that is gone.
        let same = |number: &u64| table.known.get(number).is_some_and(|known| known.kind == kind);
        let number = match number.filter(same) {
            Some(number) => number,
            None => {
                let number = table.fresh();
                let (export, seen) = (Arc::clone(export), Seen::default());
                table.numbers.insert(identity, number);
                let known = Known { export, identity, kind, seen, lookups: 0, place: None, node: None };
                table.known.insert(number, known);
                number
            }
        };
        let enlivened = table.enliven(number, file, self.descriptors_max);
        let known = table.known.get_mut(&number).ok_or(Errno::STALE)?;
        match enlivened {
            Ok((node, gone)) => {
                known.lookups = known.lookups.saturating_add(1);
                match place {
                    Some(place) => table.set_place(number, Some(place)),
                    None => table.watch(number),
                }
                drop((table, gone));
                Ok(node)
            }
            Err(error) => {
                let unknown = known.lookups == 0;
                let gone = if unknown { table.forget(number) } else { None };
                drop((table, gone));
                Err(error)
            }
        }
    }

    /// The file of this identity if the guest knows it; no lookup is counted.
    pub fn held(&self, identity: Identity) -> Option<Arc<Node>> {
        let number = *self.table().numbers.get(&identity)?;
        self.get(number).ok()
    }

    /// A file has another name now.
    pub fn moved(&self, node: &Node, folder: u64, name: &CStr) {
        self.table().set_place(node.number, Some(Place::new(folder, name)));
    }

    /// A file has lost this name: if it was found by it, it keeps its descriptor until it is found by another.
    pub fn unnamed(&self, node: &Node, folder: u64, name: &CStr) {
        self.lost_name(node.number, folder, name);
    }

    fn lost_name(&self, number: u64, folder: u64, name: &CStr) {
        let mut table = self.table();
        let place = table.known.get(&number).and_then(|known| known.place.as_ref());
        if place.is_some_and(|place| place.is(folder, name)) {
            table.set_place(number, None);
        }
    }

    /// Takes back lookups. More than there were are taken for all of them.
    pub fn forget(&self, number: u64, count: u64) {
        let mut table = self.table();
        let Some(known) = table.known.get_mut(&number) else { return };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            let gone = table.forget(number);
            // Descriptors are closed without the lock.
            drop((table, gone));
        }
    }

    /// Forgets whatever is in the exports that `which` names.
    pub fn remove(&self, which: impl Fn(&Export) -> bool) {
        let mut table = self.table();
        let numbers: Vec<u64> =
            table.known.iter().filter(|(_, known)| which(&known.export)).map(|(number, _)| *number).collect();
        let gone: Vec<Known> = numbers.into_iter().filter_map(|number| table.forget(number)).collect();
        drop((table, gone));
    }

    /// What a saved machine keeps: the files and the last number given, in the order of their numbers.
    pub fn save(&self) -> (Vec<SavedFile>, u64) {
        let table = self.table();
        let file = |(number, known): (&u64, &Known)| {
            // One without a name goes with its descriptor.
            let place = known.place.as_ref()?;
            Some(SavedFile {
                number: *number,
                export: known.export.spec.name.clone(),
                device: known.identity.device,
                inode: known.identity.inode,
                kind: known.kind.as_raw_mode(),
                lookups: known.lookups,
                place: (place.folder, place.name.as_bytes().to_vec()),
            })
        };
        let mut files: Vec<SavedFile> = table.known.iter().filter_map(file).collect();
        files.sort_by_key(|file| file.number);
        (files, table.last)
    }

    /// Knows these files again, of the exports that `export` finds; the others are stale. None is known before, and none has a
    /// descriptor until it is asked for.
    pub fn restore(
        &self,
        files: &[SavedFile],
        last: u64,
        export: impl Fn(&str) -> Option<Arc<Export>>,
    ) -> Result<(), SavedError> {
        let mut table = self.table();
        for file in files {
            let SavedFile { number, device, inode, lookups, .. } = *file;
            if number <= ROOT || number > last {
                return Err(SavedError("a file has a number that was never given"));
            }
            if lookups == 0 {
                return Err(SavedError("a file was never looked up"));
            }
            let (folder, name) = &file.place;
            let name = CString::new(name.as_slice()).ok().filter(|name| is_component(name.as_bytes()));
            let name = name.ok_or(SavedError("a file has no name of a file"))?;
            let place = Some(Place { folder: *folder, name });
            let Some(export) = export(&file.export) else { continue };
            let identity = Identity { export: export.number, device, inode };
            let kind = FileType::from_raw_mode(file.kind);
            let known = Known { export, identity, kind, seen: Seen::default(), lookups, place, node: None };
            if table.known.contains_key(&number) || table.numbers.contains_key(&identity) {
                return Err(SavedError("a file is there twice"));
            }
            table.known.insert(number, known);
            table.numbers.insert(identity, number);
        }
        table.last = last;
        Ok(())
    }

    /// Begins to watch folders, or ends it. None is watched at first.
    pub fn watch_with(&self, notifier: Option<Arc<dyn Notifier>>) {
        self.table().folders.watch_with(notifier);
    }

    /// Watches a folder from now on, and what the guest knows or will know below it.
    pub fn watch_below(&self, number: u64) {
        let mut table = self.table();
        table.folders.add_root(number);
        table.watch_below_roots();
    }

    /// Watches it no longer, unless somebody else wants it to be.
    pub fn watch_below_no_longer(&self, number: u64) {
        let mut table = self.table();
        table.folders.remove_root(number);
        table.watch_below_roots();
    }

    /// The folders that are watched as this; the host's kernel does it no longer if it is `gone`.
    pub fn watched_as(&self, token: Token, gone: bool) -> Vec<u64> {
        let mut table = self.table();
        let numbers = table.folders.of(token).to_vec();
        if gone {
            table.folders.gone(token);
        }
        numbers
    }

    /// All folders that are watched.
    pub fn watched(&self) -> Vec<u64> {
        self.table().folders.all().collect()
    }

    /// Whether changes in this folder are told.
    pub fn is_watched(&self, folder: u64) -> bool {
        self.table().folders.is_watched(folder)
    }

    /// Whether changes of this file are told.
    pub fn is_in_watched(&self, number: u64) -> bool {
        let table = self.table();
        let place = table.known.get(&number).and_then(|known| known.place.as_ref());
        place.is_some_and(|place| table.folders.is_watched(place.folder))
    }

    /// The file that the guest knows by this name in a watched folder.
    pub fn named(&self, folder: u64, name: &CStr) -> Option<u64> {
        self.table().folders.known(folder, name)
    }

    /// Counts one more lookup of a known file; its kind and device and inode number.
    pub fn count_lookup(&self, number: u64) -> Option<(FileType, Identity)> {
        let mut table = self.table();
        let known = table.known.get_mut(&number)?;
        known.lookups = known.lookups.saturating_add(1);
        Some((known.kind, known.identity))
    }

    /// Which file on the disk this is.
    pub fn identity(&self, number: u64) -> Option<Identity> {
        Some(self.table().known.get(&number)?.identity)
    }

    /// The guest believes that a file has this name now, which may have been another's, and no more that one.
    pub fn believed_moved(&self, from: (u64, &CStr), to: (u64, &CStr)) {
        let mut table = self.table();
        if let Some(replaced) = table.folders.known(to.0, to.1) {
            table.set_place(replaced, None);
        }
        if let Some(moved) = table.folders.known(from.0, from.1) {
            table.set_place(moved, Some(Place::new(to.0, to.1)));
        }
    }

    /// The guest believes that this name has gone.
    pub fn believed_gone(&self, folder: u64, name: &CStr) {
        if let Some(number) = self.named(folder, name) {
            self.lost_name(number, folder, name);
        }
    }

    /// A number for a file that is not there, but was.
    pub fn fresh(&self) -> u64 {
        self.table().fresh()
    }

    /// The names that lead to a known folder, from the made-up root down, with a slash between.
    pub fn path(&self, number: u64) -> Option<Vec<u8>> {
        let table = self.table();
        let (mut names, mut here) = (Vec::new(), number);
        while here != ROOT {
            let place = table.known.get(&here)?.place.as_ref()?;
            names.push(place.name.as_bytes());
            if names.len() > DEPTH_MAX {
                return None;
            }
            here = place.folder;
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// How many files are known, and how many of them have a descriptor.
    pub fn count(&self) -> (usize, usize) {
        let table = self.table();
        (table.known.len(), table.live)
    }
}

//! Unpacked layers, and writable folders on top of them, over overlayfs.
//!
//! On disk, below the root:
//!
//! - `layers/<chain id>`: a committed layer, immutable, shared by every image and snapshot that stands on it. overlayfs
//!   stacks folders, so a layer holds only its own changes.
//! - `snapshots/<key>/{fs,work}`: a writable snapshot.
//! - `layers/tmp-…`, `snapshots/tmp-…`: on the way in or out; swept at the next start.
//!
//! A layer or snapshot exists when the database has a row for it and a folder bears its name. Making: folder under a
//! temporary name, rename, row. Removing: row, rename to a temporary name, delete. So a crash at any instant leaves either
//! the old state or the new one, and leftovers that no row names.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use redb::{ReadableTable, WriteTransaction};
use rustix::fs::{Mode, OFlags};

use crate::{
    ChainId, Change, Digest, Error, MountPoint, Result,
    changes::{self, Scaffold},
    database::{self, LAYERS, LayerRecord, SNAPSHOTS, SnapshotRecord, Store},
    extract, overlay,
    pack::Packer,
    seal, unpack,
};

/// What a temporary folder's name begins with.
pub(crate) const TEMPORARY: &str = "tmp-";
const KEY_LENGTH_MAX: usize = 128;

/// What an overlay is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounts {
    /// Read-only layers, topmost first. Empty for a snapshot on nothing, which is then `upper` itself.
    pub lower: Vec<PathBuf>,
    /// Where changes go.
    pub upper: PathBuf,
    /// overlayfs's own.
    pub work: PathBuf,
}

/// What a writable snapshot occupies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on the disk.
    pub size_bytes: u64,
    /// Bytes of the files' contents, as they say themselves.
    pub content_bytes: u64,
    /// Files and folders.
    pub inodes: u64,
}

/// A writable snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its key, normally the container's id.
    pub key: String,
    /// What it stands on.
    pub parent: Option<ChainId>,
}

/// The layers and the snapshots. Cheap to clone.
///
/// All methods block; `remove`, `usage` and `commit` for as long as it takes to walk the files. A key has 1 to 128 characters
/// of `A–Z a–z 0–9 _ . -`.
#[derive(Debug, Clone)]
pub struct Snapshotter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    layers: PathBuf,
    snapshots: PathBuf,
    store: Store,
    /// In place in this run, without a row yet.
    fresh: Mutex<HashMap<ChainId, LayerRecord>>,
    temporaries: AtomicU64,
    /// Where this process mounted which snapshots.
    mounted: Mutex<HashMap<PathBuf, String>>,
    /// One mounting of a snapshot at a time.
    mounting: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

impl Snapshotter {
    pub(crate) fn open(root: &Path, store: Store) -> Result<Self> {
        let (layers, snapshots) = (root.join("layers"), root.join("snapshots"));
        for folder in [&layers, &snapshots] {
            // Nobody but the engine walks in here: the files belong to whom the image says.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .map_err(|source| Error::io("make the folder", folder, source))?;
        }
        Ok(Self(Arc::new(Inner {
            layers,
            snapshots,
            store,
            fresh: Mutex::default(),
            temporaries: AtomicU64::new(0),
            mounted: Mutex::default(),
            mounting: Mutex::default(),
        })))
    }

    /// Makes a writable folder on top of `parent` (see [`Image::chain`](crate::Image::chain)).
    ///
    /// `Conflict` when the key is taken, `NotFound` when the parent is not here, `Corrupt` when a layer's folder is gone.
    pub fn prepare(&self, key: &str, parent: Option<ChainId>) -> Result<Mounts> {
        let folder = self.folder(key)?;
        let lower = self.lower(parent)?;
        if self.0.store.get::<SnapshotRecord>(SNAPSHOTS, key)?.is_some() {
            return Err(Error::conflict(format!("snapshot `{key}` exists already")));
        }
        let temporary = self.temporary(&self.0.snapshots)?;
        let make = || -> Result<()> {
            let (upper, work) = (temporary.join("fs"), temporary.join("work"));
            for part in [&upper, &work] {
                fs::DirBuilder::new()
                    .mode(0o755)
                    .create(part)
                    .map_err(|source| Error::io("make the folder", part, source))?;
            }
            // overlayfs shows the upper folder's own owner and mode for the root.
            if let Some(top) = lower.first() {
                extract::copy_description(top, &upper)?;
            }
            // A folder without a row is a leftover of a crash.
            self.discard(&folder)?;
            fs::rename(&temporary, &folder).map_err(|source| Error::io("rename to", &folder, source))?;
            self.sync_names()
        };
        if let Err(error) = make() {
            self.discard_quietly(&temporary);
            self.discard_quietly(&folder);
            return Err(error);
        }
        let transaction = self.0.store.write()?;
        {
            // In the transaction, because the layer may have been collected a moment ago.
            if let Some(parent) = parent
                && transaction.open_table(LAYERS)?.get(parent.digest().hex().as_str())?.is_none()
            {
                self.discard_quietly(&folder);
                return Err(no_layer(&parent));
            }
            let mut table = transaction.open_table(SNAPSHOTS)?;
            table.insert(key, database::encode(&SnapshotRecord { parent })?.as_slice())?;
        }
        transaction.commit()?;
        Ok(Mounts { lower, upper: folder.join("fs"), work: folder.join("work") })
    }

    /// The parts of the overlay.
    pub fn mounts(&self, key: &str) -> Result<Mounts> {
        let folder = self.folder(key)?;
        let record = self.record(key)?;
        let mounts =
            Mounts { lower: self.lower(record.parent)?, upper: folder.join("fs"), work: folder.join("work") };
        if mounts.upper.is_dir() {
            Ok(mounts)
        } else {
            Err(Error::corrupt(format!("snapshot `{key}` is damaged: `{}` is gone", mounts.upper.display())))
        }
    }

    /// The folders of a stack of layers, the topmost first; none for no layers.
    ///
    /// # Errors
    /// When one of them is gone.
    pub fn layer_folders(&self, top: Option<ChainId>) -> Result<Vec<PathBuf>> {
        self.lower(top)
    }

    /// Mounts it at `target`, which is made when absent. Fine when it is mounted there already.
    ///
    /// Where it is mounted at another place too, both show one file system: two overlays over one upper folder would not
    /// see each other's changes.
    pub fn mount(&self, key: &str, target: &Path) -> Result<()> {
        self.mount_beside(key, target, None)
    }

    /// Like [`mount`](Self::mount), where it may be mounted at `other` since before this process began.
    pub fn mount_beside(&self, key: &str, target: &Path, other: Option<&Path>) -> Result<()> {
        let mounts = self.mounts(key)?;
        fs::create_dir_all(target).map_err(|source| Error::io("make the folder", target, source))?;
        let turn = self.mounting(key);
        let _mine = lock(&turn);
        if overlay::is_mounted(target)? {
            return Ok(());
        }
        let mut shared = false;
        for place in self.places(key).iter().map(PathBuf::as_path).chain(other) {
            if !shared && overlay::is_mounted(place)? {
                overlay::bind(place, target)?;
                shared = true;
            }
        }
        if !shared {
            overlay::mount(&mounts, target)?;
        }
        lock(&self.0.mounted).insert(target.to_path_buf(), key.to_owned());
        Ok(())
    }

    /// Opens the root of a snapshot that is not mounted: nothing of it is to be seen in the table of mounts, and nothing
    /// stays when the descriptor is closed. `scratch` is a folder that may be made and removed for it.
    pub fn open_root(&self, key: &str, scratch: &Path) -> Result<std::os::fd::OwnedFd> {
        overlay::open(&self.mounts(key)?, scratch)
    }

    /// Unmounts; fine when nothing is mounted there.
    ///
    /// It takes turns with [`mount`](Self::mount) of the same key: a place that goes away between being found mounted
    /// and being bound would show an empty folder at the other.
    pub fn unmount(&self, key: &str, target: &Path) -> Result<()> {
        let turn = self.mounting(key);
        let _mine = lock(&turn);
        overlay::unmount(target)?;
        lock(&self.0.mounted).remove(target);
        Ok(())
    }

    /// What was changed in it, by path, but for what a runtime puts into every root. Blocks for as long as it takes to walk the
    /// changes.
    pub fn changes(&self, key: &str, points: &[MountPoint]) -> Result<Vec<Change>> {
        let mounts = self.mounts(key)?;
        changes::changes(&mounts, &Scaffold::find(&mounts, points)?)
    }

    /// Writes what was changed in it as the tar of a layer. The same changes give the same bytes.
    pub fn diff(&self, key: &str, points: &[MountPoint], output: impl io::Write) -> Result<()> {
        let mounts = self.mounts(key)?;
        let scaffold = Scaffold::find(&mounts, points)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let upper = rustix::fs::open(&mounts.upper, flags, Mode::empty())
            .map_err(|source| Error::io("open", &mounts.upper, source))?;
        let mut packer = Packer::layer(output, &scaffold.without);
        packer.tree(upper, b"")?;
        packer.finish().map(drop)
    }

    /// Where a snapshot is mounted, as far as this process did it.
    fn places(&self, key: &str) -> Vec<PathBuf> {
        let mounted = lock(&self.0.mounted);
        mounted.iter().filter(|(_, mounted)| *mounted == key).map(|(place, _)| place.clone()).collect()
    }

    /// The lock under which one snapshot is mounted.
    fn mounting(&self, key: &str) -> Arc<Mutex<()>> {
        let mut mounting = lock(&self.0.mounting);
        mounting.retain(|_, turn| Arc::strong_count(turn) > 1);
        mounting.entry(key.to_owned()).or_default().clone()
    }

    /// Turns the changes of `key` into a layer on its parent; the key is gone afterwards. It must not be mounted.
    ///
    /// The layer is kept only while something refers to it: an image that is made from it, or a snapshot on it.
    pub fn commit(&self, key: &str, diff_id: Digest) -> Result<ChainId> {
        let folder = self.folder(key)?;
        let parent = self.record(key)?.parent;
        let chain = ChainId::next(parent, diff_id);
        let upper = folder.join("fs");
        let target = self.layer_path(&chain);
        let record = match self.layer(&chain)? {
            Some(record) => record,
            None => {
                let (size, seal) = (usage(&upper)?.content_bytes, Some(seal::of(&upper)?));
                self.discard(&target)?;
                fs::rename(&upper, &target).map_err(|source| Error::io("rename to", &target, source))?;
                self.sync()?;
                LayerRecord { diff_id, parent, size, blob: None, seal }
            }
        };
        let transaction = self.0.store.write()?;
        {
            let mut layers = transaction.open_table(LAYERS)?;
            layers.insert(chain.digest().hex().as_str(), database::encode(&record)?.as_slice())?;
            transaction.open_table(SNAPSHOTS)?.remove(key)?;
        }
        transaction.commit()?;
        self.discard(&folder)?;
        Ok(chain)
    }

    /// Removes a writable folder; fine when it is not there. It must not be mounted.
    pub fn remove(&self, key: &str) -> Result<()> {
        let folder = self.folder(key)?;
        let transaction = self.0.store.write()?;
        transaction.open_table(SNAPSHOTS)?.remove(key)?;
        transaction.commit()?;
        self.discard(&folder)
    }

    /// Counts what was written into it.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        self.record(key)?;
        usage(&self.folder(key)?.join("fs"))
    }

    /// All writable folders.
    pub fn list(&self) -> Result<Vec<SnapshotInfo>> {
        let table = self.0.store.read()?.open_table(SNAPSHOTS)?;
        Ok(database::all::<SnapshotRecord>(&table)?
            .into_iter()
            .map(|(key, record)| SnapshotInfo { key, parent: record.parent })
            .collect())
    }

    fn folder(&self, key: &str) -> Result<PathBuf> {
        let plain =
            key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
        if !plain
            || key.is_empty()
            || key.len() > KEY_LENGTH_MAX
            || key.starts_with(['.', '-'])
            || key.starts_with(TEMPORARY)
        {
            return Err(Error::invalid(format!("`{key}` cannot be the key of a snapshot")));
        }
        Ok(self.0.snapshots.join(key))
    }

    fn record(&self, key: &str) -> Result<SnapshotRecord> {
        self.0
            .store
            .get(SNAPSHOTS, key)?
            .ok_or_else(|| Error::not_found(format!("there is no snapshot `{key}`")))
    }

    fn fresh(&self) -> MutexGuard<'_, HashMap<ChainId, LayerRecord>> {
        lock(&self.0.fresh)
    }

    /// Where a layer lies, whether or not it is there.
    pub(crate) fn layer_path(&self, chain: &ChainId) -> PathBuf {
        self.0.layers.join(chain.digest().hex())
    }

    /// A layer that is in place.
    pub(crate) fn layer(&self, chain: &ChainId) -> Result<Option<LayerRecord>> {
        if let Some(record) = self.fresh().get(chain) {
            return Ok(Some(record.clone()));
        }
        let record = self.0.store.get(LAYERS, &chain.digest().hex())?;
        Ok(record.filter(|_| self.layer_path(chain).is_dir()))
    }

    /// The folders of a chain, topmost first.
    fn lower(&self, chain: Option<ChainId>) -> Result<Vec<PathBuf>> {
        let mut folders = Vec::new();
        let mut next = chain;
        while let Some(chain) = next {
            let record = self
                .0
                .store
                .get::<LayerRecord>(LAYERS, &chain.digest().hex())?
                .ok_or_else(|| no_layer(&chain))?;
            let folder = self.layer_path(&chain);
            if !folder.is_dir() {
                return Err(Error::corrupt(format!(
                    "layer {chain} is damaged: `{}` is gone; remove the images that use it and pull them again",
                    folder.display()
                )));
            }
            folders.push(folder);
            next = record.parent;
        }
        Ok(folders)
    }

    /// An empty folder to unpack a layer into.
    pub(crate) fn layer_temporary(&self) -> Result<Temporary> {
        Ok(Temporary { snapshotter: self.clone(), path: self.temporary(&self.0.layers)?, placed: false })
    }

    fn temporary(&self, within: &Path) -> Result<PathBuf> {
        let number = self.0.temporaries.fetch_add(1, Ordering::Relaxed);
        let path = within.join(format!("{TEMPORARY}{}-{number}", std::process::id()));
        self.discard_in_place(&path)?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|source| Error::io("make the folder", &path, source))?;
        Ok(path)
    }

    /// Puts an unpacked layer in its place; it came from `blob`. Its parent is in place already; folders that the layer only implies look
    /// as they do there.
    pub(crate) fn place(
        &self,
        mut temporary: Temporary,
        unpacked: &unpack::Unpacked,
        blob: Digest,
        parent: Option<ChainId>,
    ) -> Result<(ChainId, LayerRecord)> {
        let chain = ChainId::next(parent, unpacked.diff_id);
        if let Some(record) = self.layer(&chain)? {
            return Ok((chain, record));
        }
        self.adopt_descriptions(&temporary.path, &unpacked.implied, parent)?;
        let seal = Some(seal::of(&temporary.path)?);
        let record =
            LayerRecord { diff_id: unpacked.diff_id, parent, size: unpacked.size, blob: Some(blob), seal };
        let target = self.layer_path(&chain);
        self.discard(&target)?;
        fs::rename(&temporary.path, &target).map_err(|source| Error::io("rename to", &target, source))?;
        temporary.placed = true;
        self.fresh().insert(chain, record.clone());
        Ok((chain, record))
    }

    fn adopt_descriptions(&self, layer: &Path, implied: &[PathBuf], parent: Option<ChainId>) -> Result<()> {
        let mut below = Vec::new();
        let mut next = parent;
        while let Some(chain) = next {
            below.push(self.layer_path(&chain));
            next = self.layer(&chain)?.ok_or_else(|| no_layer(&chain))?.parent;
        }
        for path in implied {
            // A link on the way would lead elsewhere; overlayfs looks at folders only.
            let is_folder = |root: &Path| {
                let mut folder = root.to_path_buf();
                let mut components = path.components();
                loop {
                    match fs::symlink_metadata(&folder) {
                        Ok(data) if data.is_dir() => {}
                        _ => return false,
                    }
                    match components.next() {
                        Some(component) => folder.push(component),
                        None => return true,
                    }
                }
            };
            if let Some(described) = below.iter().find(|below| is_folder(below)).filter(|_| is_folder(layer))
            {
                extract::copy_description(&described.join(path), &layer.join(path))?;
            }
        }
        Ok(())
    }

    /// Gives layers a row. The caller has synced the file system.
    pub(crate) fn record_layers(&self, transaction: &WriteTransaction, chains: &[ChainId]) -> Result<()> {
        let mut table = transaction.open_table(LAYERS)?;
        for chain in chains {
            let record = self.fresh().get(chain).cloned();
            if let Some(record) = record {
                table.insert(chain.digest().hex().as_str(), database::encode(&record)?.as_slice())?;
            } else if table.get(chain.digest().hex().as_str())?.is_none() {
                return Err(no_layer(chain));
            }
        }
        Ok(())
    }

    /// Forgets that layers are fresh, once their rows are committed.
    pub(crate) fn recorded(&self, chains: &[ChainId]) {
        let mut fresh = self.fresh();
        for chain in chains {
            fresh.remove(chain);
        }
    }

    /// Takes a layer that nothing refers to out of the way; the caller deletes what it became. Its row is gone already.
    pub(crate) fn retire_layer(&self, chain: &ChainId) -> Result<Option<PathBuf>> {
        self.fresh().remove(chain);
        let path = self.layer_path(chain);
        let number = self.0.temporaries.fetch_add(1, Ordering::Relaxed);
        let aside = self.0.layers.join(format!("{TEMPORARY}{}-{number}", std::process::id()));
        match fs::rename(&path, &aside) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            result => result.map(|()| Some(aside)).map_err(|source| Error::io("rename", &path, source)),
        }
    }

    /// Layers in place without a row, and the blobs they came from.
    pub(crate) fn fresh_layers(&self) -> Vec<(ChainId, Option<Digest>)> {
        self.fresh().iter().map(|(chain, record)| (*chain, record.blob)).collect()
    }

    /// The folders that hold layers and snapshots.
    pub(crate) fn folders(&self) -> (&Path, &Path) {
        (&self.0.layers, &self.0.snapshots)
    }

    /// Makes the names of writable folders last. The database syncs its own data and not the file system's journal, so after a power
    /// failure there could be a row for a folder that is not there.
    fn sync_names(&self) -> Result<()> {
        let folder = &self.0.snapshots;
        let synced = fs::File::open(folder).and_then(|names| names.sync_all());
        synced.map_err(|source| Error::io("sync", folder, source))
    }

    /// Makes everything written so far durable: one call for the whole file system.
    pub(crate) fn sync(&self) -> Result<()> {
        let folder =
            fs::File::open(&self.0.layers).map_err(|source| Error::io("open", &self.0.layers, source))?;
        rustix::fs::syncfs(&folder).map_err(|source| Error::io("sync", &self.0.layers, source))
    }

    /// Renames a folder out of the way and deletes it. Fine when it is not there.
    pub(crate) fn discard(&self, folder: &Path) -> Result<()> {
        let number = self.0.temporaries.fetch_add(1, Ordering::Relaxed);
        let aside = folder.with_file_name(format!("{TEMPORARY}{}-{number}", std::process::id()));
        match fs::rename(folder, &aside) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(Error::io("rename", folder, source)),
            Ok(()) => self.discard_in_place(&aside),
        }
    }

    pub(crate) fn discard_in_place(&self, folder: &Path) -> Result<()> {
        match fs::remove_dir_all(folder) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(|source| Error::io("remove", folder, source)),
        }
    }

    fn discard_quietly(&self, folder: &Path) {
        if let Err(error) = self.discard_in_place(folder) {
            tracing::warn!(path = %folder.display(), error = %error.chain(), "a temporary folder could not be removed; the next start does it");
        }
    }
}

/// A folder on its way to becoming a layer; dropped, it is removed.
#[derive(Debug)]
pub(crate) struct Temporary {
    snapshotter: Snapshotter,
    path: PathBuf,
    placed: bool,
}

impl Temporary {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.placed {
            self.snapshotter.discard_quietly(&self.path);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The maps stay right whatever panicked beside them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn no_layer(chain: &ChainId) -> Error {
    Error::not_found(format!("layer {chain} is not in the store"))
}

/// Blocks, contents and inodes below a folder, hard links once.
pub(crate) fn usage(folder: &Path) -> Result<Usage> {
    let mut total = Usage::default();
    let mut seen = HashSet::new();
    let mut pending = vec![folder.to_path_buf()];
    while let Some(folder) = pending.pop() {
        let listed = match fs::read_dir(&folder) {
            // A running container may remove what we are about to count.
            Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
            result => result.map_err(|source| Error::io("list", &folder, source))?,
        };
        for entry in listed {
            let entry = entry.map_err(|source| Error::io("list", &folder, source))?;
            let Ok(data) = entry.metadata() else { continue };
            if data.nlink() > 1 && !data.is_dir() && !seen.insert(data.ino()) {
                continue;
            }
            total.size_bytes += data.blocks() * 512;
            if !data.is_dir() {
                total.content_bytes += data.len();
            }
            total.inodes += 1;
            if data.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(total)
}

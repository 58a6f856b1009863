//! Checking a store that nobody uses: every row against every other and against the disk, every blob against its digest.
//!
//! What is found is of three sorts. *Leftovers* are what a crash may leave by design; the next start sweeps them. *Repaired*
//! is what could be put right without losing anything that can still be used. *Damage* is left, with a sentence on what a
//! person can do.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    io::Read,
    path::Path,
    sync::Arc,
};

use redb::ReadableTable;
use serde::de::DeserializeOwned;

use crate::{
    ChainId, ContentStore, Digest, Error, Hasher, ImageId, Result, Snapshotter,
    database::{
        self, BLOBS, ImageRecord, LAYERS, LayerRecord, NAMES, RECORDS, SNAPSHOTS, SnapshotRecord, Store,
    },
    manifest, seal, sweep,
};

/// What a check found, in sentences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// What a crash left by design.
    pub leftovers: Vec<String>,
    /// What was put right.
    pub repaired: Vec<String>,
    /// What is still wrong.
    pub damage: Vec<String>,
}

impl Findings {
    /// Adds what another check found.
    pub fn add(&mut self, other: Self) {
        self.leftovers.extend(other.leftovers);
        self.repaired.extend(other.repaired);
        self.damage.extend(other.damage);
    }

    /// Something that the next start removes as well as a repair.
    fn leftover(&mut self, repaired: bool, what: String) {
        if repaired {
            self.repaired.push(format!("{what}: removed"));
        } else {
            self.leftovers.push(format!("{what}; the next start removes it"));
        }
    }

    /// Something that can be put right: done with `repair`, told without.
    fn mend(&mut self, repair: bool, what: String, how: &str) {
        if repair {
            self.repaired.push(format!("{what}: {how}"));
        } else {
            self.damage.push(format!("{what}: a repair {how}"));
        }
    }
}

/// Checks the store in `root`, which no engine has open; with `repair` puts right what is safe. `keys` are the snapshots that
/// somebody owns. Blocks for as long as it takes to read every blob and to look at every file.
///
/// An error means that the check itself could not go on.
pub fn check(
    root: &Path,
    database: Arc<redb::Database>,
    keys: &HashSet<String>,
    repair: bool,
) -> Result<Findings> {
    if !root.exists() {
        return Ok(Findings::default());
    }
    let store = Store::open(database)?;
    let content = ContentStore::open(root, store.clone())?;
    let snapshotter = Snapshotter::open(root, store.clone())?;
    let mut check =
        Check { content, snapshotter, store, repair, unreadable: false, findings: Findings::default() };
    check.run(keys)?;
    Ok(check.findings)
}

struct Check {
    content: ContentStore,
    snapshotter: Snapshotter,
    store: Store,
    repair: bool,
    /// A record cannot be read, so nobody knows what it needs: nothing is taken away.
    unreadable: bool,
    findings: Findings,
}

/// Changes to make once everything has been looked at.
#[derive(Default)]
struct Repairs {
    names: Vec<String>,
    blobs: Vec<Digest>,
    layers: Vec<ChainId>,
}

impl Check {
    fn run(&mut self, keys: &HashSet<String>) -> Result<()> {
        let mut repairs = Repairs::default();
        let layers: BTreeMap<String, LayerRecord> = self.rows(LAYERS, "layer")?;
        let images: BTreeMap<String, ImageRecord> = self.rows(RECORDS, "image")?;
        let snapshots: BTreeMap<String, SnapshotRecord> = self.rows(SNAPSHOTS, "snapshot")?;
        let sound = self.sound_layers(&layers)?;
        self.unreferenced_layers(&layers, &sound, &images, &snapshots, &mut repairs);
        let blobs = self.sound_blobs(&images, &sound, &mut repairs)?;
        for (key, record) in &images {
            self.image(key, record, &blobs, &layers)?;
        }
        self.names(&mut repairs)?;
        self.snapshots(&snapshots, &layers, keys)?;
        self.leftovers(&layers, &snapshots)?;
        if self.repair {
            self.apply(repairs)?;
            // What cannot be read has been told; sweeping needs every record.
            if let Err(error) = sweep::at_start(&self.store, &self.content, &self.snapshotter) {
                self.findings.damage.push(format!("leftovers cannot be removed: {}", error.chain()));
            }
        }
        Ok(())
    }

    /// The rows that can be read.
    fn rows<T: DeserializeOwned>(
        &mut self,
        table: redb::TableDefinition<'static, &str, &[u8]>,
        what: &str,
    ) -> Result<BTreeMap<String, T>> {
        let table = self.store.read()?.open_table(table)?;
        let mut rows = BTreeMap::new();
        for row in table.iter()? {
            let (key, bytes) = row?;
            match serde_json::from_slice(bytes.value()) {
                Ok(record) => drop(rows.insert(key.value().to_owned(), record)),
                Err(error) => {
                    self.unreadable = true;
                    self.findings.damage.push(format!(
                    "the record of {what} `{}` cannot be read ({error}): it was written by another version, or the disk lost it",
                    key.value()
                ));
                }
            }
        }
        Ok(rows)
    }

    /// Layers whose folder is as it was when it was put there.
    fn sound_layers(&mut self, layers: &BTreeMap<String, LayerRecord>) -> Result<HashSet<String>> {
        let mut sound = HashSet::new();
        for (key, record) in layers {
            let Ok(digest) = database::digest_of_key(key) else {
                self.findings.damage.push(format!("the layer `{key}` has a key that is no digest"));
                continue;
            };
            let chain = ChainId::from(digest);
            let folder = self.snapshotter.layer_path(&chain);
            let named = ChainId::next(record.parent, record.diff_id);
            if named != chain {
                self.findings.damage.push(format!(
                    "layer {chain} is recorded as {named}, by its parent and its content: remove the images that use it and pull them again"
                ));
            } else if !folder.is_dir() {
                // Told below, where it is known whether anything needs it.
            } else if let Some(parent) =
                record.parent.filter(|parent| !layers.contains_key(&parent.digest().hex()))
            {
                self.findings.damage.push(format!(
                    "layer {chain} stands on {parent}, which is not there: remove the images that use it and pull them again"
                ));
            } else if let Some(expected) = record.seal
                && seal::of(&folder)? != expected
            {
                self.findings.damage.push(format!(
                    "layer {chain} has changed in `{}`: remove the images that use it and pull them again",
                    folder.display()
                ));
            } else {
                sound.insert(key.clone());
            }
        }
        Ok(sound)
    }

    /// Layers that are gone from the disk: the row goes too where nothing stands on it.
    fn unreferenced_layers(
        &mut self,
        layers: &BTreeMap<String, LayerRecord>,
        sound: &HashSet<String>,
        images: &BTreeMap<String, ImageRecord>,
        snapshots: &BTreeMap<String, SnapshotRecord>,
        repairs: &mut Repairs,
    ) {
        let image_layers = images.values().flat_map(|image| image.layers.iter().map(|layer| layer.chain_id));
        let parents = layers.values().filter_map(|layer| layer.parent);
        let used: HashSet<ChainId> = image_layers
            .chain(snapshots.values().filter_map(|snapshot| snapshot.parent))
            .chain(parents)
            .collect();
        for key in layers.keys().filter(|key| !sound.contains(*key)) {
            let Ok(chain) = database::digest_of_key(key).map(ChainId::from) else { continue };
            let folder = self.snapshotter.layer_path(&chain);
            if folder.is_dir() {
                continue;
            }
            if used.contains(&chain) || self.unreadable {
                self.findings.damage.push(format!(
                    "layer {chain} is gone from `{}`: remove the images that use it and pull them again",
                    folder.display()
                ));
            } else {
                let what = format!("layer {chain}, which nothing uses, is gone from `{}`", folder.display());
                self.findings.mend(self.repair, what, "removes its record");
                repairs.layers.push(chain);
            }
        }
    }

    /// Blobs that hold what they are named after. That of a layer which lies unpacked beside it can go: a push or the next
    /// pull brings it again.
    fn sound_blobs(
        &mut self,
        images: &BTreeMap<String, ImageRecord>,
        layers: &HashSet<String>,
        repairs: &mut Repairs,
    ) -> Result<HashSet<Digest>> {
        let mut needed: HashMap<Digest, Vec<String>> = HashMap::new();
        let mut spare: HashSet<Digest> = HashSet::new();
        for (key, record) in images {
            let id = database::digest_of_key(key).ok();
            for digest in id.into_iter().chain([record.manifest]).chain(record.indexes.iter().copied()) {
                needed.entry(digest).or_default().push(key.clone());
            }
            for layer in &record.layers {
                if layers.contains(&layer.chain_id.digest().hex()) {
                    spare.insert(layer.digest);
                } else {
                    needed.entry(layer.digest).or_default().push(key.clone());
                }
            }
        }
        let rows = ContentStore::rows(&self.store.read()?.open_table(BLOBS)?)?;
        let mut sound = HashSet::new();
        for (digest, size) in rows {
            let path = self.content.path(&digest);
            let fault = match content_digest(&path) {
                Ok((found, _)) if found == digest => {
                    sound.insert(digest);
                    continue;
                }
                Ok((_, length)) if length != size => format!("has {length} bytes instead of {size}"),
                Ok((found, _)) => format!("holds {found}"),
                Err(error) => format!("cannot be read ({})", error.chain()),
            };
            let what = format!("blob {digest} {fault} in `{}`", path.display());
            match needed.get(&digest) {
                Some(users) => self.findings.damage.push(format!(
                    "{what}: remove and pull again {}",
                    users.iter().map(|key| format!("sha256:{key}")).collect::<Vec<_>>().join(", ")
                )),
                None if self.unreadable => self.findings.damage.push(what),
                None => {
                    let how = if spare.contains(&digest) {
                        "forgets it; its layer lies unpacked and whole"
                    } else {
                        "forgets it; nothing uses it"
                    };
                    self.findings.mend(self.repair, what, how);
                    repairs.blobs.push(digest);
                }
            }
        }
        Ok(sound)
    }

    fn image(
        &mut self,
        key: &str,
        record: &ImageRecord,
        blobs: &HashSet<Digest>,
        layers: &BTreeMap<String, LayerRecord>,
    ) -> Result<()> {
        let Ok(id) = database::digest_of_key(key) else {
            self.findings.damage.push(format!("the image `{key}` has a key that is no digest"));
            return Ok(());
        };
        let again = "remove the image and pull it again";
        let rows = self.store.read()?.open_table(BLOBS)?;
        for (digest, what) in [(id, "configuration"), (record.manifest, "manifest")] {
            // One whose row is there but whose content is wrong has been told.
            if rows.get(digest.hex().as_str())?.is_none() {
                self.findings.damage.push(format!("image {id} has no {what} ({digest}): {again}"));
            }
        }
        let mut below = None;
        for layer in &record.layers {
            if ChainId::next(below, layer.diff_id) != layer.chain_id {
                self.findings.damage.push(format!(
                    "image {id} names layer {} where {} belongs: {again}",
                    layer.chain_id,
                    ChainId::next(below, layer.diff_id)
                ));
            }
            if !layers.contains_key(&layer.chain_id.digest().hex()) {
                self.findings
                    .damage
                    .push(format!("image {id} needs layer {}, which is not there: {again}", layer.chain_id));
            }
            below = Some(layer.chain_id);
        }
        if blobs.contains(&id) {
            self.configuration(id, record)?;
        }
        Ok(())
    }

    fn configuration(&mut self, id: ImageId, record: &ImageRecord) -> Result<()> {
        let bytes = self.content.read(&id, manifest::CONFIG_BYTES_MAX)?;
        match manifest::parse_config(&bytes, None) {
            Ok(config) => {
                let recorded: Vec<Digest> = record.layers.iter().map(|layer| layer.diff_id).collect();
                if config.rootfs.diff_ids != recorded {
                    self.findings.damage.push(format!(
                        "image {id} has {} layers by its configuration and {} by its record, or others: remove the image and pull it again",
                        config.rootfs.diff_ids.len(),
                        recorded.len()
                    ));
                }
            }
            Err(error) => self.findings.damage.push(format!(
                "the configuration of image {id} cannot be understood ({}): remove the image",
                error.chain()
            )),
        }
        Ok(())
    }

    fn names(&mut self, repairs: &mut Repairs) -> Result<()> {
        let transaction = self.store.read()?;
        let (table, records) = (transaction.open_table(NAMES)?, transaction.open_table(RECORDS)?);
        for row in table.iter()? {
            let (name, key) = row?;
            let (name, key) = (name.value(), key.value());
            let fault = if name.parse::<crate::Reference>().is_err() {
                format!("the name `{name}` is none")
            } else if records.get(key)?.is_none() {
                format!("the name `{name}` stands for the image {key}, which is gone")
            } else {
                continue;
            };
            self.findings.mend(self.repair, fault, "removes the name");
            repairs.names.push(name.to_owned());
        }
        Ok(())
    }

    fn snapshots(
        &mut self,
        snapshots: &BTreeMap<String, SnapshotRecord>,
        layers: &BTreeMap<String, LayerRecord>,
        keys: &HashSet<String>,
    ) -> Result<()> {
        let (_, folder) = self.snapshotter.folders();
        let folder = folder.to_owned();
        for (key, record) in snapshots {
            if !keys.contains(key) {
                let what = format!("the writable layer `{key}` belongs to no container");
                if self.repair {
                    self.snapshotter.remove(key)?;
                }
                self.findings.leftover(self.repair, what);
                continue;
            }
            for part in ["fs", "work"] {
                if !folder.join(key).join(part).is_dir() {
                    self.findings.damage.push(format!(
                        "the writable layer `{key}` has lost its folder `{part}`: remove the container"
                    ));
                }
            }
            if let Some(parent) = record.parent.filter(|parent| !layers.contains_key(&parent.digest().hex()))
            {
                self.findings.damage.push(format!(
                    "the writable layer `{key}` stands on {parent}, which is not there: remove the container"
                ));
            }
        }
        for key in keys.iter().filter(|key| !snapshots.contains_key(*key)) {
            self.findings.damage.push(format!("container {key} has no writable layer: remove the container"));
        }
        Ok(())
    }

    /// Files and folders that no row names.
    fn leftovers(
        &mut self,
        layers: &BTreeMap<String, LayerRecord>,
        snapshots: &BTreeMap<String, SnapshotRecord>,
    ) -> Result<()> {
        let blobs: HashSet<String> = ContentStore::rows(&self.store.read()?.open_table(BLOBS)?)?
            .into_iter()
            .map(|(digest, _)| digest.hex())
            .collect();
        let (whole, partial) = self.content.folders();
        let (layer_folder, snapshot_folder) = self.snapshotter.folders();
        let unnamed = |folder: &Path, known: &dyn Fn(&str) -> bool| -> Result<Vec<String>> {
            let paths = sweep::listed(folder)?;
            let unnamed = paths.iter().filter(|path| !known(&sweep::name(path)));
            Ok(unnamed.map(|path| format!("`{}` belongs to nothing", path.display())).collect())
        };
        let mut found = unnamed(whole, &|name| blobs.contains(name))?;
        // A download that was cut short is kept for the next try.
        found.extend(unnamed(partial, &|name| Digest::from_hex(name).is_ok())?);
        found.extend(unnamed(layer_folder, &|name| layers.contains_key(name))?);
        found.extend(unnamed(snapshot_folder, &|name| snapshots.contains_key(name))?);
        for what in found {
            self.findings.leftover(self.repair, what);
        }
        Ok(())
    }

    fn apply(&self, repairs: Repairs) -> Result<()> {
        let transaction = self.store.write()?;
        {
            let mut names = transaction.open_table(NAMES)?;
            for name in &repairs.names {
                names.remove(name.as_str())?;
            }
            let mut blobs = transaction.open_table(BLOBS)?;
            for digest in &repairs.blobs {
                blobs.remove(digest.hex().as_str())?;
            }
            let mut layers = transaction.open_table(LAYERS)?;
            for chain in &repairs.layers {
                layers.remove(chain.digest().hex().as_str())?;
            }
        }
        transaction.commit()?;
        for digest in &repairs.blobs {
            self.content.forget(digest)?;
        }
        Ok(())
    }
}

/// Digest and length of a file.
fn content_digest(path: &Path) -> Result<(Digest, u64)> {
    let failed = |source| Error::io("read", path, source);
    let mut file = fs::File::open(path).map_err(failed)?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 256 << 10];
    let mut length = 0;
    loop {
        let read = file.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            return Ok((hasher.finish(), length));
        }
        hasher.update(&buffer[..read]);
        length += read as u64;
    }
}

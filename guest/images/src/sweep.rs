//! Tidying: what a crash left is swept at the start, what nothing refers to is collected when asked.
//!
//! The roots are the images in the index, the writable snapshots, and the leases of operations under way.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    ChainId, ContentStore, Digest, Error, Images, Result, Snapshotter,
    database::{
        self, BLOBS, ImageRecord, LAYERS, LayerRecord, PLACES, RECORDS, SNAPSHOTS, SnapshotRecord, Store,
    },
    download::blocking,
    images::Inner,
    places,
    snapshot::TEMPORARY,
};

/// How long an unfinished download is kept for another try.
const PARTIAL_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// What the collector removed.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) layers: HashSet<ChainId>,
    pub(crate) bytes: u64,
}

/// Sweeps leftovers and looks for damage. Answers a sentence for each damaged or missing piece.
pub(crate) fn at_start(
    store: &Store,
    content: &ContentStore,
    snapshotter: &Snapshotter,
) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let transaction = store.read()?;
    let blobs: HashMap<Digest, u64> =
        ContentStore::rows(&transaction.open_table(BLOBS)?)?.into_iter().collect();
    let layers: HashSet<String> = database::all::<LayerRecord>(&transaction.open_table(LAYERS)?)?
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    let snapshots: HashSet<String> = database::all::<SnapshotRecord>(&transaction.open_table(SNAPSHOTS)?)?
        .into_iter()
        .map(|(key, _)| key)
        .collect();

    let (whole, partial) = content.folders();
    for path in listed(partial)? {
        if Digest::from_hex(&name(&path)).is_err() {
            remove_file(&path)?;
        }
    }
    for path in listed(whole)? {
        match Digest::from_hex(&name(&path)) {
            Ok(digest) if blobs.contains_key(&digest) => {}
            // Whole perhaps, but not known to be on the disk: the next pull hashes it again.
            Ok(digest) => {
                let target = content.partial_path(&digest);
                fs::rename(&path, &target).map_err(|source| Error::io("rename to", &target, source))?;
            }
            Err(_) => remove_file(&path)?,
        }
    }
    for (digest, size) in &blobs {
        let path = content.path(digest);
        match fs::metadata(&path) {
            Ok(data) if data.len() == *size => {}
            Ok(data) => problems.push(format!(
                "blob {digest} has {} bytes instead of {size}: pull or load the images that use it again",
                data.len()
            )),
            Err(source) => problems.push(format!(
                "blob {digest} cannot be read ({source}): pull or load the images that use it again"
            )),
        }
    }

    let (layer_folder, snapshot_folder) = snapshotter.folders();
    for (folder, known, what) in [(layer_folder, &layers, "layer"), (snapshot_folder, &snapshots, "snapshot")]
    {
        for path in listed(folder)? {
            if name(&path).starts_with(TEMPORARY) {
                snapshotter.discard_in_place(&path)?;
            } else if !known.contains(&name(&path)) {
                snapshotter.discard(&path)?;
            }
        }
        for key in known {
            if !folder.join(key).is_dir() {
                problems.push(format!("{what} {key} is gone from `{}`", folder.display()));
            }
        }
    }
    for problem in &problems {
        tracing::warn!(problem, "the image store is damaged");
    }
    Ok(problems)
}

impl Images {
    /// Removes what neither the index, nor a snapshot, nor a lease refers to.
    pub(crate) async fn collect(&self) -> Result<Collected> {
        let closed = self.0.leases.close_gate().await;
        let inner = self.0.clone();
        let (mut collected, retired) = blocking(move || retire(&inner)).await?;
        drop(closed);
        let snapshotter = self.0.snapshotter.clone();
        blocking(move || {
            for folder in retired {
                collected.bytes += crate::snapshot::usage(&folder)?.size_bytes;
                snapshotter.discard_in_place(&folder)?;
            }
            Ok(collected)
        })
        .await
    }
}

/// Removes rows and names; answers the folders that remain to be deleted. The gate is closed.
fn retire(inner: &Inner) -> Result<(Collected, Vec<PathBuf>)> {
    let mut collected = Collected::default();
    let transaction = inner.store.write()?;
    let (mut dead_blobs, mut dead_chains) = (Vec::new(), Vec::new());
    {
        let mut blobs = transaction.open_table(BLOBS)?;
        let mut layers = transaction.open_table(LAYERS)?;
        let known: HashMap<ChainId, LayerRecord> = database::all::<LayerRecord>(&layers)?
            .into_iter()
            .map(|(key, record)| Ok((ChainId::from(database::digest_of_key(&key)?), record)))
            .collect::<Result<_>>()?;
        let (mut live_blobs, mut live_chains) = (HashSet::new(), HashSet::new());
        let mut keep_chain = |chain: Option<ChainId>| {
            let mut next = chain;
            while let Some(chain) = next.filter(|chain| live_chains.insert(*chain)) {
                next = known.get(&chain).and_then(|record| record.parent);
            }
        };
        for (key, record) in database::all::<ImageRecord>(&transaction.open_table(RECORDS)?)? {
            live_blobs.extend([database::digest_of_key(&key)?, record.manifest]);
            live_blobs.extend(record.indexes);
            live_blobs.extend(record.layers.iter().map(|layer| layer.digest));
            keep_chain(record.layers.last().map(|layer| layer.chain_id));
        }
        for (_, snapshot) in database::all::<SnapshotRecord>(&transaction.open_table(SNAPSHOTS)?)? {
            keep_chain(snapshot.parent);
        }
        for chain in known.keys().filter(|chain| inner.leases.holds(chain.digest())) {
            keep_chain(Some(*chain));
        }
        // A layer keeps the blob it came from, whichever image brought it.
        let mut live_layers = HashSet::new();
        for (_, record) in known.iter().filter(|(chain, _)| live_chains.contains(*chain)) {
            live_blobs.extend(record.blob);
            live_layers.insert(record.diff_id.hex());
        }
        let held = |chain: &ChainId| inner.leases.holds(chain.digest()) || live_chains.contains(chain);
        let (kept, abandoned): (Vec<_>, Vec<_>) =
            inner.snapshotter.fresh_layers().into_iter().partition(|(chain, _)| held(chain));
        live_blobs.extend(kept.into_iter().filter_map(|(_, blob)| blob));
        for (digest, _) in ContentStore::rows(&blobs)? {
            if !live_blobs.contains(&digest) && !inner.leases.holds(&digest) {
                blobs.remove(digest.hex().as_str())?;
                dead_blobs.push(digest);
            }
        }
        for chain in known.keys().filter(|chain| !live_chains.contains(*chain)) {
            layers.remove(chain.digest().hex().as_str())?;
            dead_chains.push(*chain);
        }
        let idle = |digest: &Digest| !inner.leases.holds(digest);
        dead_blobs.extend(
            inner
                .content
                .fresh_blobs()
                .into_iter()
                .filter(|digest| idle(digest) && !live_blobs.contains(digest)),
        );
        dead_chains.extend(abandoned.into_iter().map(|(chain, _)| chain));
        let mut places = transaction.open_table(PLACES)?;
        for diff_id in places::known(&places)? {
            if !live_layers.contains(&diff_id) {
                places.remove(diff_id.as_str())?;
            }
        }
    }
    transaction.commit()?;
    for digest in dead_blobs {
        collected.bytes += inner.content.forget(&digest)?;
    }
    guest_fault::point("rmi.after-blobs");
    let mut retired = Vec::new();
    for chain in dead_chains {
        retired.extend(inner.snapshotter.retire_layer(&chain)?);
        collected.layers.insert(chain);
    }
    let (_, partial) = inner.content.folders();
    for path in listed(partial)? {
        let Ok(digest) = Digest::from_hex(&name(&path)) else { continue };
        let Ok(data) = fs::metadata(&path) else { continue };
        let old = data
            .modified()
            .ok()
            .and_then(|modified| modified.elapsed().ok())
            .is_some_and(|age| age > PARTIAL_AGE_MAX);
        if old && !inner.leases.holds(&digest) {
            remove_file(&path)?;
            collected.bytes += data.len();
        }
    }
    Ok((collected, retired))
}

pub(crate) fn listed(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |source| Error::io("list", folder, source);
    fs::read_dir(folder).map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.path())).collect()
}

pub(crate) fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| Error::io("remove", path, source)),
    }
}

//! The tables of this crate in the engine's database, and their records.

use std::sync::Arc;

use redb::{ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{ChainId, Digest, Error, ImageId, ImageLayer, Kind, Result};

/// Blobs that are durable: digest to size.
pub(crate) const BLOBS: TableDefinition<'static, &str, u64> = TableDefinition::new("images_blobs");
/// Unpacked layers that are durable: chain to [`LayerRecord`].
pub(crate) const LAYERS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("images_layers");
/// Images: id to [`ImageRecord`].
pub(crate) const RECORDS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("images_records");
/// Names in canonical form, with a tag or a digest: to the id.
pub(crate) const NAMES: TableDefinition<'static, &str, &str> = TableDefinition::new("images_names");
/// Writable snapshots: key to [`SnapshotRecord`].
pub(crate) const SNAPSHOTS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("images_snapshots");
/// Where layers lie in registries: diff id to a list of [`Place`](crate::places::Place)s.
pub(crate) const PLACES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("images_places");
const META: TableDefinition<'static, &str, u64> = TableDefinition::new("images_meta");
const VERSION: u64 = 1;

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) manifest: Digest,
    pub(crate) manifest_media_type: String,
    /// The indexes through which it was found; kept with it.
    pub(crate) indexes: Vec<Digest>,
    pub(crate) layers: Vec<ImageLayer>,
    /// The image it was committed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<ImageId>,
    pub(crate) last_tagged: i64,
}

/// An unpacked layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) diff_id: Digest,
    pub(crate) parent: Option<ChainId>,
    pub(crate) size: u64,
    /// The blob it was unpacked from, which is kept as long as the layer: a push or a save needs the exact bytes.
    #[serde(default)]
    pub(crate) blob: Option<Digest>,
    /// See [`crate::seal`]. Absent in layers of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seal: Option<Digest>,
}

/// A writable folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    pub(crate) parent: Option<ChainId>,
}

/// The engine's database, as this crate uses it. Calls block.
#[derive(Debug, Clone)]
pub(crate) struct Store(Arc<redb::Database>);

impl Store {
    /// Makes the tables, so that reading never has to ask whether they are there.
    pub(crate) fn open(database: Arc<redb::Database>) -> Result<Self> {
        let store = Self(database);
        let transaction = store.write()?;
        {
            let mut meta = transaction.open_table(META)?;
            let version = meta.get("version")?.map(|version| version.value());
            match version {
                None => drop(meta.insert("version", VERSION)?),
                Some(VERSION) => {}
                Some(version) => {
                    return Err(Error::new(
                        Kind::Internal,
                        format!("the image store has format {version}; this engine reads format {VERSION}"),
                    ));
                }
            }
            transaction.open_table(BLOBS)?;
            transaction.open_table(LAYERS)?;
            transaction.open_table(RECORDS)?;
            transaction.open_table(NAMES)?;
            transaction.open_table(SNAPSHOTS)?;
            transaction.open_table(PLACES)?;
        }
        transaction.commit()?;
        Ok(store)
    }

    pub(crate) fn read(&self) -> Result<ReadTransaction> {
        Ok(self.0.begin_read()?)
    }

    pub(crate) fn write(&self) -> Result<WriteTransaction> {
        Ok(self.0.begin_write()?)
    }

    /// The record of `key`, by a transaction of its own.
    pub(crate) fn get<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'static, &str, &[u8]>,
        key: &str,
    ) -> Result<Option<T>> {
        get(&self.read()?.open_table(table)?, key)
    }
}

/// One record of a table.
pub(crate) fn get<T: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<T>> {
    table.get(key)?.map(|bytes| decode(key, bytes.value())).transpose()
}

/// All records of a table.
pub(crate) fn all<T: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<Vec<(String, T)>> {
    table
        .iter()?
        .map(|row| {
            let (key, bytes) = row?;
            Ok((key.value().to_owned(), decode(key.value(), bytes.value())?))
        })
        .collect()
}

fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|source| {
        Error::because(
            Kind::Corrupt,
            format!("the record of `{key}` in the engine's database cannot be read"),
            source,
        )
    })
}

/// A record as the tables hold it.
pub(crate) fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(record)
        .map_err(|source| Error::because(Kind::Internal, "a record could not be encoded", source))
}

/// The key of a digest: without its algorithm, of which there is one.
pub(crate) fn digest_of_key(key: &str) -> Result<Digest> {
    Digest::from_hex(key).map_err(|source| {
        Error::because(
            Kind::Corrupt,
            format!("the engine's database has the key `{key}`, which is no digest"),
            source,
        )
    })
}

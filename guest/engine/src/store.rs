//! The engine's part of the metadata store: versioned records in one redb file, shared with the image store (which
//! owns tables of its own).
//!
//! Writes go through one thread that gathers what is waiting into one transaction, so fifty containers created at
//! once cost a few syncs, not fifty. A write that was acknowledged has been synced.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

/// Container records by id; owned by the container service.
pub const CONTAINERS: Table = Table(TableDefinition::new("containers"));
/// Records of networks that users made, by id; owned by the network service.
pub const NETWORKS: Table = Table(TableDefinition::new("networks"));
/// Volume records by name; owned by the volume service.
pub const VOLUMES: Table = Table(TableDefinition::new("volumes"));
/// Facts about this engine by name (`id`, `bridge`); owned by the system and network services.
pub const ENGINE: Table = Table(TableDefinition::new("engine"));

/// Layout of the values; written in front of each.
const VERSION: u8 = 1;
/// Most writes in one transaction: bounds the time the first of them waits for the last.
const BATCH_MAX: usize = 256;
/// Writes waiting; more than this makes writers wait.
const QUEUE_LENGTH: usize = 1024;

/// One table of records.
#[derive(Clone, Copy)]
pub struct Table(TableDefinition<'static, &'static str, &'static [u8]>);

/// A key, and its record or why that cannot be read.
pub type Row<T> = (String, Result<T, StoreError>);

/// Why the store could not do it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot open the metadata store `{path}`: {reason}")]
    Open { path: String, reason: String },
    #[error("cannot read from the metadata store: {0}")]
    Read(String),
    #[error("cannot write to the metadata store: {0}")]
    Write(String),
    #[error(
        "the record `{key}` has layout version {version}, which this version of the engine does not know"
    )]
    Version { key: String, version: u8 },
    #[error("the record `{key}` cannot be understood: {reason}")]
    Content { key: String, reason: String },
}

struct Write {
    table: Table,
    key: String,
    /// `None` removes.
    value: Option<Vec<u8>>,
    done: oneshot::Sender<Result<(), StoreError>>,
}

/// Makes an empty database if there is none: under another name, on disk, then renamed. One that was killed while it made
/// its file in place would leave something that is refused for ever.
fn make_whole(path: &Path) -> Result<(), redb::DatabaseError> {
    if path.exists() {
        return Ok(());
    }
    let new = path.with_extension("new");
    if let Err(error) = std::fs::remove_file(&new)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(redb::StorageError::Io(error).into());
    }
    drop(Database::create(&new)?);
    let rename = || {
        std::fs::File::open(&new)?.sync_all()?;
        std::fs::rename(&new, path)?;
        path.parent().map_or(Ok(()), |folder| std::fs::File::open(folder)?.sync_all())
    };
    rename().map_err(|error: std::io::Error| redb::StorageError::Io(error).into())
}

/// Handle to the store. Cheap to clone; the file closes when the last one and the image store's are gone.
#[derive(Clone)]
pub struct Store {
    database: Arc<Database>,
    writes: mpsc::Sender<Write>,
}

impl Store {
    /// Opens or makes the store and starts its writing thread, which ends with the last handle.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |reason: String| StoreError::Open { path: path.display().to_string(), reason };
        make_whole(path).map_err(|error| fail(error.to_string()))?;
        // Called over and over while it goes on.
        let told = AtomicBool::new(false);
        let repair = move |_: &mut redb::RepairSession| {
            if !told.swap(true, Ordering::Relaxed) {
                tracing::info!("the metadata store was not closed: it is repaired");
            }
        };
        let database = match Database::builder().set_repair_callback(repair).open(path) {
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                return Err(fail("another engine uses this data root".to_owned()));
            }
            other => Arc::new(other.map_err(|error| fail(error.to_string()))?),
        };
        // Records hold environments.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(|error| fail(error.to_string()))?;
        let (writes, queue) = mpsc::channel(QUEUE_LENGTH);
        let worker = database.clone();
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || write_batches(&worker, queue))
            .map_err(|error| fail(error.to_string()))?;
        Ok(Self { database, writes })
    }

    /// The file itself, for the image store.
    pub fn database(&self) -> Arc<Database> {
        self.database.clone()
    }

    /// Puts a record; returns once it is on disk.
    pub async fn put<T: Serialize>(&self, table: Table, key: &str, record: &T) -> Result<(), StoreError> {
        self.put_later(table, key, record).await?.await
    }

    /// Queues a record. The inner future tells when it is on disk; dropping it does not cancel the write.
    pub async fn put_later<T: Serialize>(
        &self,
        table: Table,
        key: &str,
        record: &T,
    ) -> Result<impl Future<Output = Result<(), StoreError>> + use<T>, StoreError> {
        let mut value = vec![VERSION];
        serde_json::to_writer(&mut value, record).map_err(|error| StoreError::Write(error.to_string()))?;
        self.queue(table, key, Some(value)).await
    }

    /// Removes a record; returns once that is on disk. Removing what is not there is fine.
    pub async fn remove(&self, table: Table, key: &str) -> Result<(), StoreError> {
        self.queue(table, key, None).await?.await
    }

    async fn queue(
        &self,
        table: Table,
        key: &str,
        value: Option<Vec<u8>>,
    ) -> Result<impl Future<Output = Result<(), StoreError>> + use<>, StoreError> {
        let (done, answer) = oneshot::channel();
        let gone = || StoreError::Write("the writing thread has ended".to_owned());
        self.writes.send(Write { table, key: key.to_owned(), value, done }).await.map_err(|_| gone())?;
        Ok(async move { answer.await.map_err(|_| gone())? })
    }

    /// One record.
    pub fn get<T: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<T>, StoreError> {
        let failed = |error: &dyn std::error::Error| StoreError::Read(error.to_string());
        let transaction = self.database.begin_read().map_err(|error| failed(&error))?;
        let table = match transaction.open_table(table.0) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            other => other.map_err(|error| failed(&error))?,
        };
        let value = table.get(key).map_err(|error| failed(&error))?;
        value.map(|value| decode(key, value.value())).transpose()
    }

    /// All records of a table.
    pub fn all<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>, StoreError> {
        self.rows(table)?.into_iter().map(|(key, record)| Ok((key, record?))).collect()
    }

    /// All rows of a table, with what is wrong with those that cannot be read.
    pub fn rows<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<Row<T>>, StoreError> {
        let failed = |error: &dyn std::error::Error| StoreError::Read(error.to_string());
        let transaction = self.database.begin_read().map_err(|error| failed(&error))?;
        let table = match transaction.open_table(table.0) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            other => other.map_err(|error| failed(&error))?,
        };
        let mut rows = Vec::new();
        for entry in table.iter().map_err(|error| failed(&error))? {
            let (key, value) = entry.map_err(|error| failed(&error))?;
            rows.push((key.value().to_owned(), decode(key.value(), value.value())));
        }
        Ok(rows)
    }
}

fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, StoreError> {
    let content = |reason: String| StoreError::Content { key: key.to_owned(), reason };
    match value.split_first() {
        Some((&VERSION, json)) => serde_json::from_slice(json).map_err(|error| content(error.to_string())),
        Some((&version, _)) => Err(StoreError::Version { key: key.to_owned(), version }),
        None => Err(content("it is empty".to_owned())),
    }
}

fn write_batches(database: &Database, mut queue: mpsc::Receiver<Write>) {
    while let Some(first) = queue.blocking_recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        let result = commit(database, &batch).map_err(|error| StoreError::Write(error.to_string()));
        for write in batch {
            // The writer may have stopped waiting.
            let _ = write.done.send(result.clone());
        }
    }
}

fn commit(database: &Database, batch: &[Write]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for write in batch {
        let mut table = transaction.open_table(write.table.0)?;
        match &write.value {
            Some(value) => table.insert(write.key.as_str(), value.as_slice())?,
            None => table.remove(write.key.as_str())?,
        };
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn folder() -> std::path::PathBuf {
        let name = format!("guest-engine-test-{}-{:x}", std::process::id(), rand::random::<u64>());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[tokio::test]
    async fn what_a_killed_first_start_left_is_begun_again() {
        let folder = folder();
        let path = folder.join("engine.redb");
        std::fs::write(path.with_extension("new"), "half").unwrap();
        let store = Store::open(&path).unwrap();
        store.put(CONTAINERS, "a", &1).await.unwrap();
        assert!(!path.with_extension("new").exists());
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[tokio::test]
    async fn records_survive_a_restart() {
        let folder = folder();
        let path = folder.join("engine.redb");
        let store = Store::open(&path).unwrap();
        store.put(CONTAINERS, "a", &vec![1, 2]).await.unwrap();
        store.put(CONTAINERS, "b", &vec![3]).await.unwrap();
        store.remove(CONTAINERS, "b").await.unwrap();
        store.remove(CONTAINERS, "never there").await.unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::Open { .. })));
        drop(store);

        let reopened = (0..100)
            .find_map(|_| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                Store::open(&path).ok()
            })
            .expect("the store closes soon after its last handle");
        assert_eq!(reopened.all::<Vec<i32>>(CONTAINERS).unwrap(), [("a".to_owned(), vec![1, 2])]);
        assert_eq!(reopened.get::<String>(ENGINE, "id").unwrap(), None);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_record_of_a_newer_layout_is_refused() {
        let error = decode::<String>("x", &[9, b'"', b'"']).unwrap_err();
        assert!(matches!(error, StoreError::Version { version: 9, .. }), "{error}");
        assert!(decode::<String>("x", &[]).is_err());
        assert!(decode::<String>("x", &[VERSION, b'{']).is_err());
    }
}

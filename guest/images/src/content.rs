//! Blobs by their sha256, in one folder: `blobs/sha256/<hex>`, and `blobs/partial/<hex>` while they arrive.
//!
//! A blob enters under a temporary name, is hashed while it is written, and gets its name only when digest and size are
//! right. Renaming is not yet durable: a blob is *fresh* until the transaction of the image that needs it, after a
//! `syncfs`, gives it a row. At the next start a blob without a row is treated as a partial download, which is hashed
//! again before anyone believes it.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use redb::{ReadableTable, WriteTransaction};

use crate::{
    Digest, Error, Hasher, Kind, Result,
    database::{self, BLOBS, Store},
};

/// The blobs. Cheap to clone. Calls block for a few system calls, unless they say more.
#[derive(Debug, Clone)]
pub struct ContentStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    blobs: PathBuf,
    partial: PathBuf,
    store: Store,
    /// Verified in this run, without a row yet.
    fresh: Mutex<HashMap<Digest, u64>>,
    temporaries: AtomicU64,
}

impl ContentStore {
    pub(crate) fn open(root: &Path, store: Store) -> Result<Self> {
        let blobs = root.join("blobs/sha256");
        let partial = root.join("blobs/partial");
        for folder in [&blobs, &partial] {
            fs::create_dir_all(folder).map_err(|source| Error::io("make the folder", folder, source))?;
        }
        Ok(Self(Arc::new(Inner {
            blobs,
            partial,
            store,
            fresh: Mutex::default(),
            temporaries: AtomicU64::new(0),
        })))
    }

    /// Where a blob lies, whether or not it is there.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.0.blobs.join(digest.hex())
    }

    pub(crate) fn partial_path(&self, digest: &Digest) -> PathBuf {
        self.0.partial.join(digest.hex())
    }

    pub(crate) fn folders(&self) -> (&Path, &Path) {
        (&self.0.blobs, &self.0.partial)
    }

    fn fresh(&self) -> MutexGuard<'_, HashMap<Digest, u64>> {
        self.0.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size of a blob that is here and was verified.
    pub fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        if let Some(size) = self.fresh().get(digest) {
            return Ok(Some(*size));
        }
        let table = self.0.store.read()?.open_table(BLOBS)?;
        Ok(table.get(digest.hex().as_str())?.map(|size| size.value()))
    }

    /// Opens a blob for reading.
    pub fn open_blob(&self, digest: &Digest) -> Result<File> {
        let Some(size) = self.size(digest)? else {
            return Err(Error::not_found(format!("blob {digest} is not in the store")));
        };
        let path = self.path(digest);
        let damaged = || {
            Error::corrupt(format!(
                "blob {digest} is damaged or gone from `{}`: remove the images that use it and pull them again",
                path.display()
            ))
        };
        let file = match File::open(&path) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Err(damaged()),
            result => result.map_err(|source| Error::io("open", &path, source))?,
        };
        let length = file.metadata().map_err(|source| Error::io("look at", &path, source))?.len();
        if length == size { Ok(file) } else { Err(damaged()) }
    }

    /// Reads a small blob (a manifest, a configuration) and verifies it once more.
    pub fn read(&self, digest: &Digest, bytes_max: u64) -> Result<Vec<u8>> {
        let file = self.open_blob(digest)?;
        let mut bytes = Vec::new();
        let path = self.path(digest);
        file.take(bytes_max + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| Error::io("read", &path, source))?;
        if bytes.len() as u64 > bytes_max {
            return Err(Error::invalid(format!("blob {digest} has more than {bytes_max} bytes")));
        }
        if Digest::of(&bytes) != *digest {
            return Err(Error::corrupt(format!(
                "blob {digest} in `{}` is damaged: its content has another digest",
                path.display()
            )));
        }
        Ok(bytes)
    }

    /// Stores a small blob.
    pub(crate) fn insert(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        if self.size(&digest)?.is_none() {
            let mut ingest = self.ingest()?;
            ingest.write_all(bytes).map_err(|source| ingest.failed(source))?;
            ingest.finish(None)?;
        }
        Ok(digest)
    }

    /// Begins a blob whose digest is not known yet. Dropped unfinished, it leaves nothing.
    pub(crate) fn ingest(&self) -> Result<Ingest> {
        let number = self.0.temporaries.fetch_add(1, Ordering::Relaxed);
        let path = self.0.partial.join(format!("ingest-{}-{number}", std::process::id()));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| Error::io("create", &path, source))?;
        Ok(Ingest {
            content: self.clone(),
            file,
            path,
            hasher: Hasher::default(),
            length: 0,
            keep: false,
            done: false,
        })
    }

    /// Begins or takes up again a blob of known digest. Blocks while what is there already is hashed. Dropped unfinished,
    /// it stays for the next try.
    pub(crate) fn resume(&self, digest: &Digest, size: u64) -> Result<Ingest> {
        let path = self.partial_path(digest);
        let failed = |source| Error::io("open", &path, source);
        let mut file = loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(failed)?;
            // The writer of a download that was dropped a moment ago may still be at it; it may even finish and rename.
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
                .map_err(|source| failed(source.into()))?;
            let inode = file.metadata().map_err(failed)?.ino();
            if fs::metadata(&path).is_ok_and(|named| named.ino() == inode) {
                break file;
            }
        };
        let mut hasher = Hasher::default();
        let mut length = file.metadata().map_err(failed)?.len();
        if length > size {
            file.set_len(0).map_err(failed)?;
            length = 0;
        }
        let mut rest = length;
        let mut buffer = vec![0; 256 << 10];
        while rest > 0 {
            let read = file.read(&mut buffer).map_err(|source| Error::io("read", &path, source))?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            rest = rest.saturating_sub(read as u64);
        }
        Ok(Ingest {
            content: self.clone(),
            file,
            path,
            hasher,
            length: length - rest,
            keep: true,
            done: false,
        })
    }

    /// Gives blobs a row. The caller has synced the file system.
    pub(crate) fn record(&self, transaction: &WriteTransaction, digests: &[Digest]) -> Result<()> {
        let mut table = transaction.open_table(BLOBS)?;
        for digest in digests {
            let key = digest.hex();
            if table.get(key.as_str())?.is_some() {
                continue;
            }
            let size = self.fresh().get(digest).copied();
            let size = size.ok_or_else(|| {
                Error::new(
                    Kind::Internal,
                    format!("blob {digest} was to be recorded but is not in the store"),
                )
            })?;
            table.insert(key.as_str(), size)?;
        }
        Ok(())
    }

    /// Forgets that blobs are fresh, once their rows are committed.
    pub(crate) fn recorded(&self, digests: &[Digest]) {
        let mut fresh = self.fresh();
        for digest in digests {
            fresh.remove(digest);
        }
    }

    /// Removes a blob that nothing refers to. Its row is gone already.
    pub(crate) fn forget(&self, digest: &Digest) -> Result<u64> {
        self.fresh().remove(digest);
        let path = self.path(digest);
        let size = fs::metadata(&path).map(|data| data.blocks() * 512).unwrap_or(0);
        match fs::remove_file(&path) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(0),
            result => result.map(|()| size).map_err(|source| Error::io("remove", &path, source)),
        }
    }

    /// Blobs in place without a row.
    pub(crate) fn fresh_blobs(&self) -> Vec<Digest> {
        self.fresh().keys().copied().collect()
    }

    /// All blobs with a row.
    pub(crate) fn rows(table: &impl ReadableTable<&'static str, u64>) -> Result<Vec<(Digest, u64)>> {
        table
            .iter()?
            .map(|row| {
                let (key, size) = row?;
                Ok((database::digest_of_key(key.value())?, size.value()))
            })
            .collect()
    }
}

/// A blob on its way in.
#[derive(Debug)]
pub(crate) struct Ingest {
    content: ContentStore,
    file: File,
    path: PathBuf,
    hasher: Hasher,
    length: u64,
    /// Whether the temporary file stays when this is dropped unfinished.
    keep: bool,
    done: bool,
}

impl Ingest {
    /// The digest of what was written so far.
    pub(crate) fn digest(&self) -> Digest {
        self.hasher.clone().finish()
    }

    /// Bytes written, with those of earlier tries.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Begins again from nothing.
    pub(crate) fn restart(&mut self) -> Result<()> {
        let result = self.file.set_len(0).and_then(|()| io::Seek::rewind(&mut self.file));
        result.map_err(|source| Error::io("empty", &self.path, source))?;
        (self.hasher, self.length) = (Hasher::default(), 0);
        Ok(())
    }

    /// Nothing is kept, whatever happens.
    pub(crate) fn discard(mut self) {
        self.keep = false;
    }

    pub(crate) fn failed(&self, source: io::Error) -> Error {
        Error::io("write", &self.path, source)
    }

    /// Verifies and gives the blob its name. What does not match is removed.
    pub(crate) fn finish(mut self, expected: Option<(Digest, u64)>) -> Result<(Digest, u64)> {
        let (digest, size) = (std::mem::take(&mut self.hasher).finish(), self.length);
        if let Some((wanted, wanted_size)) = expected {
            self.keep = false;
            if size != wanted_size {
                return Err(Error::invalid(format!(
                    "blob {wanted} has {size} bytes, but the manifest says {wanted_size}: refused"
                )));
            }
            if digest != wanted {
                return Err(Error::invalid(format!(
                    "blob {wanted} arrived with the digest {digest}: refused, nothing of it was kept"
                )));
            }
        }
        let target = self.content.path(&digest);
        fs::rename(&self.path, &target).map_err(|source| Error::io("rename to", &target, source))?;
        self.done = true;
        self.content.fresh().insert(digest, size);
        Ok((digest, size))
    }
}

impl Write for Ingest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        let nothing_to_keep = !self.keep || self.length == 0;
        if !self.done
            && nothing_to_keep
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "a temporary blob could not be removed; the next start does it");
        }
    }
}

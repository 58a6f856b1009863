//! Turns the blob of a layer into a folder that overlayfs can stack.
//!
//! One thread decompresses and computes the diff id, another writes files, so both cores work on one layer. What the archive may
//! do is `extract`'s to say. The folder is the caller's temporary one: on any error it removes
//! the whole.
//!
//! Whiteouts (OCI image specification, layer filesystem changeset) become overlayfs's: `.wh.x` a character device 0:0
//! named `x`, `.wh..wh..opq` the attribute `trusted.overlay.opaque`. They hide what is below, never what the same layer
//! brings: in either order, `.wh.x` together with a folder `x` makes that folder opaque.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use crate::{
    Digest, Error, Hasher, Kind, Limits, Result,
    compression::Compression,
    extract::{Extraction, Written},
};

/// Bytes of one piece on its way from the decompressing to the writing thread, and pieces in flight.
const PIECE_BYTES: usize = 256 << 10;
const PIECES: usize = 8;

/// What an unpacked layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// The digest of the uncompressed archive.
    pub diff_id: Digest,
    /// Bytes of all files.
    pub size: u64,
    /// Files, folders, links.
    pub entries: u64,
    /// Folders that only exist because something lies in them: their owner and mode are those of the layer below. The
    /// empty path is the root.
    pub implied: Vec<PathBuf>,
}

/// What the owner of an unpacking on another thread sees and says.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Bytes of the blob read.
    pub(crate) read: AtomicU64,
    /// Asks it to give up.
    pub(crate) stopped: AtomicBool,
}

/// Unpacks `blob`, whose digest is known to be right, into the empty folder `into`. Blocks.
///
/// `name` is what errors call the layer.
pub(crate) fn unpack_blob(
    name: &str,
    blob: &File,
    digest: Digest,
    into: &Path,
    limits: &Limits,
    meter: &Meter,
) -> Result<Unpacked> {
    let mut start = [0; 4];
    let length = blob.read_at(&mut start, 0).map_err(|source| Error::io("read the layer", into, source))?;
    let counted = Counted { file: blob, offset: 0, meter };
    if Compression::detect(&start[..length]) == Compression::None {
        // The digest of a plain layer is its diff id, and it was computed when the blob was stored.
        let mut input = BufReader::with_capacity(PIECE_BYTES, counted);
        let written = Extraction::layer(&named(name), into, limits)?.write(&mut input)?;
        return Ok(unpacked(written, digest));
    }
    let input = BufReader::with_capacity(PIECE_BYTES, counted);
    let (_, decoder) = Compression::decoder(input).map_err(|source| damaged(name, source))?;
    unpack(name, decoder, into, limits)
}

/// Unpacks a plain tar stream into the empty folder `into`, computing its diff id on a second thread. Blocks.
pub fn unpack(name: &str, stream: impl Read + Send, into: &Path, limits: &Limits) -> Result<Unpacked> {
    std::thread::scope(|scope| {
        let (full, pieces) = sync_channel(PIECES);
        let (empty, used) = sync_channel(PIECES + 1);
        let decoder = std::thread::Builder::new()
            .name("layer-decode".to_owned())
            .spawn_scoped(scope, move || decode(name, stream, limits, full, used))
            .map_err(|source| Error::io("start a thread to unpack", into, source))?;
        let written = Extraction::layer(&named(name), into, limits)
            .and_then(|layer| layer.write(&mut Pieces { pieces, empty, current: Vec::new(), offset: 0 }));
        match (decoder.join(), written) {
            (Ok(Ok(diff_id)), Ok(written)) => Ok(unpacked(written, diff_id)),
            // The writer only saw the stream break off; the decoder knows why.
            (Ok(Err(Some(error))), _) | (_, Err(error)) => Err(error),
            (Ok(Err(None)) | Err(_), Ok(_)) => {
                Err(Error::new(Kind::Internal, format!("layer {name} could not be decompressed")))
            }
        }
    })
}

fn named(name: &str) -> String {
    format!("layer {name}")
}

fn unpacked(written: Written, diff_id: Digest) -> Unpacked {
    let implied = written.implied.into_iter().map(|path| PathBuf::from(OsStr::from_bytes(&path))).collect();
    Unpacked { diff_id, size: written.size, entries: written.entries, implied }
}

fn damaged(name: &str, source: io::Error) -> Error {
    Error::because(
        Kind::Invalid,
        format!("layer {name} is damaged: its compressed data cannot be read"),
        source,
    )
}

/// Decompresses and hashes. `Err(None)` when the writing thread has stopped listening.
fn decode(
    name: &str,
    mut stream: impl Read,
    limits: &Limits,
    full: SyncSender<Option<Vec<u8>>>,
    used: Receiver<Vec<u8>>,
) -> Result<Digest, Option<Error>> {
    let mut hasher = Hasher::default();
    let mut total = 0u64;
    loop {
        let mut piece = used.try_recv().unwrap_or_default();
        piece.clear();
        let read = stream.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece);
        let read = read.map_err(|source| damaged(name, source))?;
        if read == 0 {
            full.send(None).map_err(|_| None)?;
            return Ok(hasher.finish());
        }
        total += read as u64;
        if total > limits.layer_bytes_max {
            return Err(Some(Error::invalid(format!(
                "layer {name} unpacks to more than the limit of {} bytes",
                limits.layer_bytes_max
            ))));
        }
        hasher.update(&piece);
        full.send(Some(piece)).map_err(|_| None)?;
    }
}

/// The blob's bytes, counted. Positioned reads, so that the handle can be shared.
struct Counted<'a> {
    file: &'a File,
    offset: u64,
    meter: &'a Meter,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.meter.stopped.load(Ordering::Relaxed) {
            return Err(io::Error::other("nobody waits for this layer any more"));
        }
        let length = self.file.read_at(buffer, self.offset)?;
        self.offset += length as u64;
        self.meter.read.store(self.offset, Ordering::Relaxed);
        Ok(length)
    }
}

/// The writing thread's end of the stream.
struct Pieces {
    pieces: Receiver<Option<Vec<u8>>>,
    empty: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    offset: usize,
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.offset == self.current.len() {
            match self.pieces.recv() {
                Ok(Some(piece)) => {
                    let old = std::mem::replace(&mut self.current, piece);
                    self.offset = 0;
                    // When the other side has enough buffers this one is simply dropped.
                    let _kept = self.empty.try_send(old);
                }
                Ok(None) => {
                    (self.current, self.offset) = (Vec::new(), 0);
                    // The stream has ended; say so again to whoever asks again.
                    let (end, again) = sync_channel(0);
                    drop(end);
                    self.pieces = again;
                    return Ok(&[]);
                }
                // After the end there is nobody to send; before it, the decoder has failed and has the reason.
                Err(_) if self.current.is_empty() => return Ok(&[]),
                Err(_) => return Err(io::Error::other("the layer could not be decompressed")),
            }
        }
        Ok(&self.current[self.offset..])
    }

    fn consume(&mut self, amount: usize) {
        self.offset += amount;
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut available = self.fill_buf()?;
        let length = available.read(buffer)?;
        self.consume(length);
        Ok(length)
    }
}

/// Fuzz entry: unpacks arbitrary bytes (plain, gzip or zstd) into the empty folder `scratch` under small limits.
pub fn fuzz(bytes: &[u8], scratch: &Path) {
    let limits = Limits { layer_bytes_max: 1 << 20, layer_entries_max: 200, archive_bytes_max: 1 << 20 };
    let Ok((_, decoder)) = Compression::decoder(bytes) else { return };
    let _outcome = unpack("fuzz", decoder, scratch, &limits);
}

#[cfg(test)]
mod tests;

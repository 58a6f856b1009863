//! Tar streams, both ways. Knows nothing of files: [`Reader`] turns bytes into [`Entry`]s, [`Writer`] turns entries into
//! bytes.

mod read;
mod write;

pub(crate) use read::{Entry, EntryKind, Reader, TarError};
pub(crate) use write::Writer;

/// What everything in a tar stream is padded to.
const BLOCK: usize = 512;

/// Zeroes after `size` bytes of data.
fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

//! One request of the driver: read from its buffers, checked, carried out (virtio 1.3 §5.2.6).
//!
//! Where a request's parts lie among descriptors does not matter: its header is the first 16 bytes the device may read,
//! its status the last byte the device may write.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::Counters;
use super::file::Backend;
use crate::virtio::buffers::Buffers;

/// The unit of all positions and lengths.
pub(super) const SECTOR_BYTES: u64 = 512;
/// The most ranges of one discard or write-zeroes request.
pub(super) const MAX_RANGES: usize = 32;
/// The most sectors of one range: 4 GiB, which takes a file system well under a second.
pub(super) const MAX_RANGE_SECTORS: u32 = 8 << 20;
/// The most data of one request. Sixteen times what Linux sends; more would keep other queues waiting.
const MAX_DATA_BYTES: usize = 64 << 20;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
/// Flag of a range to write zeroes to: the space may be given up.
const RANGE_UNMAP: u32 = 1;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("a request is malformed: {0}")]
    Malformed(&'static str),
    #[error("a request of unknown type {0}")]
    Unsupported(u32),
    #[error("a request of type {0} with flags it cannot have")]
    Flags(u32),
    #[error("sectors {sector} to {} are outside of the disk's {sectors}", .sector.saturating_add(*.count))]
    OutOfRange { sector: u64, count: u64, sectors: u64 },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("flushing the disk failed")]
    Flush(#[source] io::Error),
    #[error("{what} {length} bytes at offset {offset} of the disk failed")]
    Io {
        what: &'static str,
        offset: u64,
        length: u64,
        #[source]
        source: io::Error,
    },
}

impl RequestError {
    pub fn status(&self) -> u8 {
        match self {
            Self::Unsupported(_) | Self::Flags(_) => VIRTIO_BLK_S_UNSUPP as u8,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::Unsupported => {
                VIRTIO_BLK_S_UNSUPP as u8
            }
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }

    /// Whether the request can be carried out once the host's disk has space. A failed flush cannot: the kernel has then given up
    /// what it was to write.
    pub fn wants_space(&self) -> bool {
        matches!(
            self,
            Self::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        )
    }
}

/// Carries out the request in a chain's buffers and writes its status.
///
/// Returns how many bytes were written for the driver and what went wrong; `None` for a chain that has no room for a
/// status, which cannot be answered at all.
pub(super) fn serve(
    backend: &Backend,
    counters: &Counters,
    readable: Buffers<'_>,
    mut writable: Buffers<'_>,
) -> Option<(u32, Result<(), RequestError>)> {
    let room = writable.len().checked_sub(1)?;
    let mut data = writable.split_front(room);
    let mut status = writable;
    let result = carry_out(backend, counters, readable, &mut data);
    let code = match &result {
        Ok(()) => VIRTIO_BLK_S_OK as u8,
        Err(error) => error.status(),
    };
    status.copy_in(&[code]);
    // A failed read may have written part of its buffer; the driver looks at none of it.
    let written = if result.is_ok() { room - data.len() } else { 0 };
    Some((written as u32 + 1, result))
}

fn carry_out(
    backend: &Backend,
    counters: &Counters,
    mut readable: Buffers<'_>,
    writable: &mut Buffers<'_>,
) -> Result<(), RequestError> {
    let mut header = [0; HEADER_BYTES];
    if readable.copy_out(&mut header) < HEADER_BYTES {
        return Err(RequestError::Malformed("its header is cut off"));
    }
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let (_, sector) = header.split_last_chunk().expect("a header is longer than its sector");
    let sector = u64::from_le_bytes(*sector);
    match kind {
        VIRTIO_BLK_T_IN => {
            counters.reads.add(1);
            let length = writable.len() as u64;
            let offset = data_offset(backend, sector, writable.len())?;
            backend.read(offset, writable).map_err(|source| RequestError::Io {
                what: "reading",
                offset,
                length,
                source,
            })?;
            counters.read_bytes.add(length);
        }
        VIRTIO_BLK_T_OUT => {
            counters.writes.add(1);
            writes_allowed(backend)?;
            let length = readable.len() as u64;
            let offset = data_offset(backend, sector, readable.len())?;
            backend.write(offset, &mut readable).map_err(|source| RequestError::Io {
                what: "writing",
                offset,
                length,
                source,
            })?;
            counters.written_bytes.add(length);
        }
        VIRTIO_BLK_T_FLUSH => {
            counters.flushes.add(1);
            backend.flush().map_err(RequestError::Flush)?;
        }
        VIRTIO_BLK_T_GET_ID => {
            writable.copy_in(backend.serial());
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            counters.discards.add(1);
            writes_allowed(backend)?;
            ranges(backend, kind, &mut readable)?;
        }
        _ => return Err(RequestError::Unsupported(kind)),
    }
    Ok(())
}

fn writes_allowed(backend: &Backend) -> Result<(), RequestError> {
    match backend.read_only() {
        true => Err(RequestError::ReadOnly),
        false => Ok(()),
    }
}

/// Where in the file the data of a read or write begins.
fn data_offset(backend: &Backend, sector: u64, length: usize) -> Result<u64, RequestError> {
    if length == 0 || !(length as u64).is_multiple_of(SECTOR_BYTES) {
        return Err(RequestError::Malformed("its data is not whole sectors"));
    }
    if length > MAX_DATA_BYTES {
        return Err(RequestError::Malformed("its data is too long"));
    }
    offset_of(backend, sector, length as u64 / SECTOR_BYTES)
}

fn offset_of(backend: &Backend, sector: u64, count: u64) -> Result<u64, RequestError> {
    match sector.checked_add(count) {
        Some(end) if end <= backend.sectors() => Ok(sector * SECTOR_BYTES),
        _ => Err(RequestError::OutOfRange { sector, count, sectors: backend.sectors() }),
    }
}

/// Discards or zeroes the ranges of a request. All are checked before the first is touched.
fn ranges(backend: &Backend, kind: u32, readable: &mut Buffers<'_>) -> Result<(), RequestError> {
    let count = readable.len() / RANGE_BYTES;
    if count == 0 || !readable.len().is_multiple_of(RANGE_BYTES) || count > MAX_RANGES {
        return Err(RequestError::Malformed("it has no, too many or cut-off ranges"));
    }
    let mut bytes = [0; RANGE_BYTES * MAX_RANGES];
    let length = readable.copy_out(&mut bytes);
    let (chunks, _) = bytes[..length].as_chunks::<RANGE_BYTES>();
    let mut checked = [(0, 0, false); MAX_RANGES];
    for (range, target) in chunks.iter().zip(&mut checked) {
        let (sector, rest) = range.split_first_chunk().expect("a range is longer than its sector");
        let (sectors, flags) = rest.split_first_chunk().expect("a range ends in two words");
        let sector = u64::from_le_bytes(*sector);
        let sectors = u32::from_le_bytes(*sectors);
        let flags = u32::from_le_bytes(*flags.first_chunk().expect("a range ends in two words"));
        let allowed = if kind == VIRTIO_BLK_T_DISCARD { 0 } else { RANGE_UNMAP };
        if flags & !allowed != 0 {
            return Err(RequestError::Flags(kind));
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(RequestError::Malformed("a range is too long"));
        }
        let offset = offset_of(backend, sector, u64::from(sectors))?;
        let unmap = kind == VIRTIO_BLK_T_DISCARD || flags & RANGE_UNMAP != 0;
        *target = (offset, u64::from(sectors) * SECTOR_BYTES, unmap);
    }
    for &(offset, length, unmap) in checked.iter().filter(|(_, length, _)| *length > 0) {
        let (what, result) = match unmap {
            true => ("discarding", backend.punch(offset, length)),
            false => ("zeroing", backend.zero(offset, length)),
        };
        result.map_err(|source| RequestError::Io { what, offset, length, source })?;
    }
    Ok(())
}

//! The disk (virtio 1.3 §5.2) over a raw sparse file.
//!
//! Owns: requests, and the file's blocks. Does not own: the file's name or lock; the caller opens it, sizes it
//! and keeps others away. The file's length when the device is made is the disk's capacity, in whole sectors; a
//! [`Handle`] makes both larger while it is used.
//!
//! Data moves between the file and guest memory without a copy. What the guest discards becomes a hole in the file, so
//! the host gets its space back. A flush is `fdatasync`; writes before it are in the page cache of the host only.
//!
//! What the guest writes while the host's disk is full is neither lost nor an error: such a request waits and is tried again
//! each second, while others go on, discards among them, which make space. Whoever [watches](Handle::watch) is told.
//!
//! All queues are served by the device's own thread (`block`), in turns. Files: `request` reads and carries out one
//! request, `file` is the back end, `queue` the rings.

mod file;
mod queue;
mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use self::file::Backend;
pub(crate) use self::queue::Queues;
use self::request::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::counter::Counter;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceKind;
use crate::virtio::threaded::{Front, Threaded};
use crate::virtio::worker::Mailbox;

/// Size of every queue: 1 MiB in single pages is two requests, where half of it makes three.
const QUEUE_SIZE: u16 = 256;
/// The most queues offered; QEMU or the guest may use fewer.
const MAX_QUEUES: usize = 16;
/// Data segments of one request: a chain is no longer than its queue, less the request's header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests to read, and the bytes read.
    pub reads: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Requests to write; one that waits for space on the host's disk counts with each try.
    pub writes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// Requests to flush.
    pub flushes: Counter,
    /// Requests to discard or write zeroes.
    pub discards: Counter,
    /// Requests that ended in an I/O error.
    pub errors: Counter,
    /// Requests that had to wait because the host's disk was full.
    pub no_space: Counter,
    /// Requests of a kind we do not do.
    pub unsupported: Counter,
    /// Chains that were no requests at all.
    pub malformed: Counter,
}

/// Why a disk is as large as it was.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// It never shrinks.
    #[error("the disk has {disk_bytes} bytes and never shrinks to {size_bytes}")]
    Shrink {
        /// What it has.
        disk_bytes: u64,
        /// What was wanted.
        size_bytes: u64,
    },
    /// Its file cannot have the size: the host's file system, or a limit of the user's, does not allow it.
    #[error("the disk's file cannot be made {size_bytes} bytes large")]
    File {
        /// What was wanted.
        size_bytes: u64,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The device's thread has ended.
    #[error("the disk's thread has ended")]
    Gone,
}

/// Who is told what became of a disk that was to grow: its size in bytes.
type Told = Box<dyn FnOnce(Result<u64, GrowError>) + Send>;
/// Who is told whether requests wait for space on the host's disk.
type Watcher = Box<dyn Fn(bool) + Send>;

/// What the thread is asked for.
pub enum Message {
    /// The disk is to be this large.
    Grow {
        /// In whole sectors; a rest is not used.
        size_bytes: u64,
        /// Who is told.
        told: Told,
    },
    /// From now on this one is told.
    Watch(Watcher),
    /// Another file behind the same capacity, to see how its errors come through.
    #[cfg(test)]
    Replace(File),
}

/// Asks for what can be done with a disk in use, from any thread.
#[derive(Clone)]
pub struct Handle {
    mailbox: Mailbox<Message>,
}

impl Handle {
    /// Makes the disk and its file `size_bytes` large, sparsely, and tells the driver. `told` is called on the device's
    /// thread, or on this one when that has ended; when the thread ends meanwhile it is dropped.
    pub fn grow(&self, size_bytes: u64, told: impl FnOnce(Result<u64, GrowError>) + Send + 'static) {
        if let Err(Message::Grow { told, .. }) =
            self.mailbox.send(Message::Grow { size_bytes, told: Box::new(told) })
        {
            told(Err(GrowError::Gone));
        }
    }

    /// From now on `told` is called on the device's thread: with `true` when requests begin to wait because the host's disk is
    /// full, and with `false` when none waits any more.
    pub fn watch(&self, told: impl Fn(bool) + Send + 'static) {
        // A thread that has ended has nothing to tell.
        let _ended = self.mailbox.send(Message::Watch(Box::new(told)));
    }
}

/// The disk.
pub struct Block {
    counters: Arc<Counters>,
    front: Front<Message>,
}

impl Block {
    /// Makes a disk of `backend` with `queues` queues (1 to 16; others are brought into that range), and its thread.
    pub fn new(backend: Backend, queues: usize) -> io::Result<Self> {
        let queues = queues.clamp(1, MAX_QUEUES);
        let counters = Arc::new(Counters::default());
        let config = ConfigSpace::new(config_space(backend.sectors(), queues as u16));
        let features = features(backend.read_only());
        let (shared, space) = (Arc::clone(&counters), config.clone());
        let front =
            Front::spawn(DeviceKind::Block, features, vec![QUEUE_SIZE; queues], config, move |_registry| {
                Queues::new(backend, space, queues, shared)
            })?;
        Ok(Self { counters, front })
    }

    /// Makes a disk of an open file; see [`Backend::new`].
    pub fn from_file(file: File, serial: &str, read_only: bool, queues: usize) -> io::Result<Self> {
        Self::new(Backend::new(file, serial, read_only)?, queues)
    }

    /// A handle for what can be done with the disk in use.
    pub fn handle(&self) -> Handle {
        Handle { mailbox: self.front.mailbox() }
    }

    /// What the device has done.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

/// The model without a thread, for fuzz targets.
pub(crate) fn model(backend: Backend, queues: usize) -> Queues {
    let config = ConfigSpace::new(config_space(backend.sectors(), queues as u16));
    Queues::new(backend, config, queues, Arc::default())
}

fn features(read_only: bool) -> u64 {
    let kind = match read_only {
        true => 1 << VIRTIO_BLK_F_RO,
        false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
    };
    1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_MQ
        | kind
}

/// The configuration space (virtio 1.3 §5.2.4). Nothing in it is writable: the cache mode, the only candidate, is not
/// offered.
fn config_space(sectors: u64, queues: u16) -> Vec<u8> {
    let mut config = Vec::with_capacity(60);
    config.extend(sectors.to_le_bytes()); // capacity, which `Queues` changes
    config.extend(0u32.to_le_bytes()); // size_max, not offered
    config.extend(MAX_SEGMENTS.to_le_bytes()); // seg_max
    config.extend([0; 4]); // geometry, not offered
    config.extend(512u32.to_le_bytes()); // blk_size
    config.extend([3, 0]); // physical blocks of 2³ sectors, aligned
    config.extend(8u16.to_le_bytes()); // min_io_size in blocks
    config.extend(0u32.to_le_bytes()); // opt_io_size
    config.extend([0, 0]); // writeback (not offered), unused
    config.extend(queues.to_le_bytes()); // num_queues
    config.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    config.extend((MAX_RANGES as u32).to_le_bytes()); // max_discard_seg
    config.extend(8u32.to_le_bytes()); // discard_sector_alignment
    config.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    config.extend((MAX_RANGES as u32).to_le_bytes()); // max_write_zeroes_seg
    config.extend([1, 0, 0, 0]); // write_zeroes_may_unmap, unused
    config
}

impl Threaded for Block {
    type Message = Message;

    fn front(&self) -> &Front<Message> {
        &self.front
    }
}

//! What loading a kernel has in common on all architectures: what it is told, its initramfs, and why it cannot be booted.

use std::io::{self, Seek, SeekFrom};
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::slots::Slot;

/// Below this there is no room for a kernel at all.
pub(crate) const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// Kernels of x86 and arm64 read at most 2048 bytes of command line, its end included (`COMMAND_LINE_SIZE`).
pub const CMDLINE_BYTES_MAX: usize = 2048;
const PAGE_BYTES: u64 = 4096;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the sentences are the documentation")]
pub enum BootError {
    #[error("the kernel cannot be read")]
    ReadKernel(#[source] io::Error),
    #[error("the kernel is {what}")]
    UnknownFormat { what: &'static str },
    #[error("the kernel is a damaged {format}: {reason}")]
    Damaged { format: &'static str, reason: String },
    #[error("the kernel ({format}) has no {entry}")]
    NoEntry { format: &'static str, entry: &'static str },
    #[error("the kernel wants {needed} bytes of memory below the initramfs, but only {room} are there")]
    KernelTooLarge { needed: u64, room: u64 },
    #[error("the initramfs cannot be read")]
    ReadInitramfs(#[source] io::Error),
    #[error("the initramfs of {size} bytes does not fit behind the kernel: the machine needs more memory")]
    InitramfsTooLarge { size: u64 },
    #[error("the kernel's command line has {length} bytes, its end included; at most {limit} are read")]
    CmdlineTooLong { length: usize, limit: usize },
    #[error("the kernel's command line holds a zero byte")]
    CmdlineZero,
    #[error("{processors} processors are more than the {limit} that a kernel can be told of")]
    TooManyProcessors { processors: u32, limit: u32 },
    #[error("{bytes} bytes of memory are too little to boot a kernel")]
    TooLittleMemory { bytes: u64 },
    #[error("the machine cannot be described to the kernel: {reason}")]
    Description { reason: String },
    #[error("guest memory cannot be written")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What a kernel is to be told, beside itself.
#[derive(Debug, Clone, Copy)]
pub struct Parameters<'a> {
    /// The command line.
    pub cmdline: &'a str,
    /// How many processors there are.
    pub cpus: u32,
    /// The virtio-mmio slots in use.
    pub slots: &'a [Slot],
}

impl Parameters<'_> {
    /// Refuses a command line that a kernel would read only a part of. `limit` counts the zero byte at its end.
    pub(crate) fn check_cmdline(&self, limit: usize) -> Result<(), BootError> {
        let length = self.cmdline.len() + 1;
        if length > limit {
            return Err(BootError::CmdlineTooLong { length, limit });
        }
        if self.cmdline.contains('\0') {
            return Err(BootError::CmdlineZero);
        }
        Ok(())
    }
}

/// Puts the initramfs as high as it may be, so that the kernel in front of it can grow. `room` is the RAM from the
/// kernel's end. Returns where it is.
pub(crate) fn load_initramfs<I: ReadVolatile + Seek>(
    memory: &GuestMemoryMmap,
    initramfs: &mut I,
    room: Range<u64>,
) -> Result<Range<u64>, BootError> {
    if room.start > room.end {
        return Err(BootError::KernelTooLarge { needed: room.start, room: room.end });
    }
    let size = initramfs.seek(SeekFrom::End(0)).map_err(BootError::ReadInitramfs)?;
    initramfs.seek(SeekFrom::Start(0)).map_err(BootError::ReadInitramfs)?;
    let start = room.end.checked_sub(size).map(|start| start & !(PAGE_BYTES - 1));
    let start = start.filter(|&start| start >= room.start).ok_or(BootError::InitramfsTooLarge { size })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), initramfs, size as usize)
        .map_err(|error| BootError::ReadInitramfs(io::Error::other(error)))?;
    Ok(start..start + size)
}

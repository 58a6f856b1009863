//! Loading a Linux kernel and telling it about its machine.
//!
//! Two kinds of file: an ELF `vmlinux` with a PVH entry, which needs no decompressor and starts at once, and a
//! `bzImage` entered by the 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`), as distributions ship it.
//! What is left to the hypervisor is to set the first processor's registers to the [`Entry`]; the others wait for the
//! kernel to start them.

mod bzimage;
mod pvh;

use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::acpi;
use super::layout::{self, Slot};
use crate::memory;

/// How the first processor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, `rbx` = the start info (Xen's `hvm_start_info`, PVH).
    Pvh {
        /// The first instruction.
        instruction: GuestAddress,
    },
    /// 64-bit mode, `rsi` = the boot parameters, paging on.
    Long {
        /// The first instruction.
        instruction: GuestAddress,
    },
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the sentences are the documentation")]
pub enum BootError {
    #[error("the kernel cannot be read")]
    ReadKernel(#[source] io::Error),
    #[error("the kernel is neither an ELF file (vmlinux) nor a bzImage")]
    UnknownFormat,
    #[error("the kernel is a damaged {format}: {reason}")]
    Damaged { format: &'static str, reason: String },
    #[error("the kernel (vmlinux) has no PVH entry: it must be built with CONFIG_PVH=y")]
    NoPvhEntry,
    #[error("the kernel (bzImage) has no 64-bit entry: it is a 32-bit kernel, or older than Linux 3.8")]
    NoLongEntry,
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
    #[error("{processors} processors are more than the 255 that ACPI's table can name")]
    TooManyProcessors { processors: u32 },
    #[error("{bytes} bytes of memory are too little to boot a kernel")]
    TooLittleMemory { bytes: u64 },
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

/// Below this there is no room for a kernel at all.
const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// Old kernels want their initramfs below 2 GiB (`initrd_addr_max` of the boot header).
const INITRAMFS_END_MAX: u64 = 0x8000_0000;
const PAGE_BYTES: u64 = 4096;

/// Loads kernel and initramfs, and writes everything a kernel is told into guest memory.
///
/// Both files are untrusted: whatever is in them, memory outside the guest's is not touched and the answer is an entry
/// or a sentence.
pub fn load<K, I>(
    memory: &GuestMemoryMmap,
    kernel: &mut K,
    initramfs: &mut I,
    parameters: Parameters<'_>,
) -> Result<Entry, BootError>
where
    K: Read + ReadVolatile + Seek,
    I: ReadVolatile + Seek,
{
    let bytes = memory::size(memory);
    if bytes < MEMORY_BYTES_MIN {
        return Err(BootError::TooLittleMemory { bytes });
    }
    let cpus = u8::try_from(parameters.cpus)
        .map_err(|_| BootError::TooManyProcessors { processors: parameters.cpus })?;
    let loaded = load_kernel(memory, kernel)?;
    let modules = load_initramfs(memory, initramfs, loaded.end(), bytes)?;
    write_cmdline(memory, parameters.cmdline, loaded.cmdline_bytes_max())?;
    memory.write_slice(&acpi::tables(cpus, parameters.slots), acpi::ROOT)?;
    let map = layout::memory_map(bytes);
    match loaded {
        Loaded::Elf { entry, .. } => {
            pvh::write(memory, &map, modules)?;
            Ok(Entry::Pvh { instruction: entry })
        }
        Loaded::BzImage { start, header, .. } => {
            bzimage::write(memory, *header, &map, modules, parameters.cmdline.len())?;
            Ok(Entry::Long { instruction: GuestAddress(start.0 + bzimage::LONG_ENTRY_OFFSET) })
        }
    }
}

/// A range of guest memory.
#[derive(Debug, Clone, Copy)]
struct Range {
    start: u64,
    size: u64,
}

/// A kernel in guest memory.
enum Loaded {
    Elf { entry: GuestAddress, end: u64 },
    BzImage { start: GuestAddress, header: Box<bzimage::Header>, end: u64 },
}

impl Loaded {
    /// The first byte behind all memory that the kernel takes for itself, decompressed.
    fn end(&self) -> u64 {
        match self {
            Self::Elf { end, .. } | Self::BzImage { end, .. } => *end,
        }
    }

    /// How many bytes of command line the kernel reads, its end included.
    fn cmdline_bytes_max(&self) -> usize {
        match self {
            Self::Elf { .. } => layout::CMDLINE_BYTES_MAX,
            Self::BzImage { header, .. } => {
                (header.cmdline_size as usize).saturating_add(1).min(layout::CMDLINE_BYTES_MAX)
            }
        }
    }
}

fn load_kernel<K: Read + ReadVolatile + Seek>(
    memory: &GuestMemoryMmap,
    kernel: &mut K,
) -> Result<Loaded, BootError> {
    let mut mark = [0; 4];
    kernel.seek(SeekFrom::Start(0)).map_err(BootError::ReadKernel)?;
    match kernel.read_exact(&mut mark) {
        Ok(()) if mark == *b"\x7fELF" => load_elf(memory, kernel),
        Ok(()) => load_bzimage(memory, kernel),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(BootError::UnknownFormat),
        Err(error) => Err(BootError::ReadKernel(error)),
    }
}

fn load_elf<K: Read + ReadVolatile + Seek>(
    memory: &GuestMemoryMmap,
    kernel: &mut K,
) -> Result<Loaded, BootError> {
    let result = Elf::load(memory, None, kernel, Some(GuestAddress(layout::HIGH_MEMORY_START)))
        .map_err(|error| BootError::Damaged { format: "ELF file", reason: error.to_string() })?;
    let PvhBootCapability::PvhEntryPresent(entry) = result.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry);
    };
    Ok(Loaded::Elf { entry, end: result.kernel_end })
}

fn load_bzimage<K: Read + ReadVolatile + Seek>(
    memory: &GuestMemoryMmap,
    kernel: &mut K,
) -> Result<Loaded, BootError> {
    let header = bzimage::header(kernel)?;
    let result = BzImage::load(memory, None, kernel, Some(GuestAddress(layout::HIGH_MEMORY_START)))
        .map_err(|error| BootError::Damaged { format: "bzImage", reason: error.to_string() })?;
    let end = bzimage::end(&header, result.kernel_load.0).max(result.kernel_end);
    Ok(Loaded::BzImage { start: result.kernel_load, header: Box::new(header), end })
}

/// Puts the initramfs as high as it may be, so that the kernel in front of it can grow.
fn load_initramfs<I: ReadVolatile + Seek>(
    memory: &GuestMemoryMmap,
    initramfs: &mut I,
    kernel_end: u64,
    bytes: u64,
) -> Result<Range, BootError> {
    let room_end = bytes.min(layout::GAP_START).min(INITRAMFS_END_MAX);
    if kernel_end > room_end {
        return Err(BootError::KernelTooLarge { needed: kernel_end, room: room_end });
    }
    let size = initramfs.seek(SeekFrom::End(0)).map_err(BootError::ReadInitramfs)?;
    initramfs.seek(SeekFrom::Start(0)).map_err(BootError::ReadInitramfs)?;
    let start = room_end.checked_sub(size).map(|start| start & !(PAGE_BYTES - 1));
    let start = start.filter(|&start| start >= kernel_end).ok_or(BootError::InitramfsTooLarge { size })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), initramfs, size as usize)
        .map_err(|error| BootError::ReadInitramfs(io::Error::other(error)))?;
    Ok(Range { start, size })
}

/// Writes the command line with its zero byte.
fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str, limit: usize) -> Result<(), BootError> {
    let length = cmdline.len() + 1;
    if length > limit {
        return Err(BootError::CmdlineTooLong { length, limit });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineZero);
    }
    memory.write_slice(cmdline.as_bytes(), layout::CMDLINE)?;
    memory.write_obj(0_u8, GuestAddress(layout::CMDLINE.0 + cmdline.len() as u64))?;
    Ok(())
}

/// Entry for the fuzz target: a kernel of somebody else's making.
pub fn load_hostile(bytes: &[u8]) {
    /// Allocated once: what an earlier input left in it is no more hostile than the next.
    static MEMORY: std::sync::OnceLock<GuestMemoryMmap> = std::sync::OnceLock::new();
    let memory = MEMORY.get_or_init(|| memory::allocate(32).expect("32 MiB of address space"));
    let parameters = Parameters { cmdline: "quiet", cpus: 2, slots: &[] };
    let (mut kernel, mut initramfs) = (io::Cursor::new(bytes), io::Cursor::new(&bytes[bytes.len() / 2..]));
    // A refusal is as good as an entry.
    let _loaded = load(memory, &mut kernel, &mut initramfs, parameters);
}

#[cfg(test)]
mod tests;

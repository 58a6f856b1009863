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
use super::layout;
use crate::arch::boot::{BootError, CMDLINE_BYTES_MAX, MEMORY_BYTES_MIN, Parameters, load_initramfs};
use crate::memory;

/// Where in a kernel's file which bytes say that it is one (`HdrS`).
pub const MARK: (u64, [u8; 4]) = (0x202, *b"HdrS");
/// What a file without the mark is, for messages.
pub const NOT_A_KERNEL: &str = "not a Linux kernel image (bzImage)";
/// What a kernel is told for this board.
///
/// `panic=-1` and `reboot=t` turn a dead kernel into a machine that ends at once instead of one that hangs.
/// `no_timer_check` believes in the timer's interrupt: a software processor that had to wait for its turn on a busy
/// computer misses the moment in which the kernel looks for it, and the kernel gives up. `tsc=nowatchdog` believes in the clock: held
/// against another twice a second it wakes an idle machine, and on a busy computer the comparison itself can fail.
pub const CMDLINE: &str = "console=ttyS0 panic=-1 reboot=t no_timer_check tsc=nowatchdog";

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

const UNKNOWN_FORMAT: BootError =
    BootError::UnknownFormat { what: "neither an ELF file (vmlinux) nor a bzImage" };
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
        .map_err(|_| BootError::TooManyProcessors { processors: parameters.cpus, limit: u8::MAX.into() })?;
    let loaded = load_kernel(memory, kernel)?;
    parameters.check_cmdline(loaded.cmdline_bytes_max())?;
    let room_end = bytes.min(layout::GAP_START).min(INITRAMFS_END_MAX);
    let modules = load_initramfs(memory, initramfs, loaded.end()..room_end)?;
    write_cmdline(memory, parameters.cmdline)?;
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
            Self::Elf { .. } => CMDLINE_BYTES_MAX,
            Self::BzImage { header, .. } => {
                (header.cmdline_size as usize).saturating_add(1).min(CMDLINE_BYTES_MAX)
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
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(UNKNOWN_FORMAT),
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
        return Err(BootError::NoEntry {
            format: "vmlinux",
            entry: "PVH entry: it must be built with CONFIG_PVH=y",
        });
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

/// Writes the command line with its zero byte.
fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
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

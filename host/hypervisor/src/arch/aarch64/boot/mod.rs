//! Loading a Linux kernel and telling it about its machine.
//!
//! A kernel is an uncompressed `Image`, as Debian ships it (Linux `Documentation/arch/arm64/booting.rst`). What is left to
//! the hypervisor is to set the first processor's registers to the [`Entry`]; the others wait for the kernel to start them.

mod image;

use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::{device_tree, layout};
use crate::arch::boot::{BootError, CMDLINE_BYTES_MAX, MEMORY_BYTES_MIN, Parameters, load_initramfs};
use crate::memory;

/// Where in a kernel's file which bytes say that it is one.
pub const MARK: (u64, [u8; 4]) = (image::MAGIC_OFFSET as u64, image::MAGIC);
/// What a file without the mark is, for messages.
pub const NOT_A_KERNEL: &str = "not a Linux kernel image (arm64 Image, unpacked)";
/// What a kernel is told for this board. `panic=-1` turns a dead kernel into a machine that ends at once instead of one
/// that hangs.
pub const CMDLINE: &str = "console=ttyAMA0 panic=-1";

/// How the first processor begins: at EL1 with the MMU off and interrupts masked, `x0` = the device tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub instruction: GuestAddress,
    /// The flattened device tree.
    pub device_tree: GuestAddress,
}

/// Loads kernel and initramfs, and writes everything a kernel is told into guest memory, whose RAM is where the layout has
/// it.
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
    if parameters.cpus > layout::CPUS_MAX {
        return Err(BootError::TooManyProcessors { processors: parameters.cpus, limit: layout::CPUS_MAX });
    }
    parameters.check_cmdline(CMDLINE_BYTES_MAX)?;
    let room_end = (layout::RAM_START + bytes).min(layout::INITRAMFS_END_MAX);
    let kernel = load_kernel(memory, kernel, room_end)?;
    let initramfs = load_initramfs(memory, initramfs, kernel.end..room_end)?;
    let tree = device_tree::build(&parameters, &layout::ram_ranges(bytes), initramfs)
        .map_err(|error| BootError::Description { reason: error.to_string() })?;
    memory.write_slice(&tree, layout::DEVICE_TREE)?;
    Ok(Entry { instruction: GuestAddress(kernel.start), device_tree: layout::DEVICE_TREE })
}

/// Puts the kernel where it wants to be, in the RAM before `room_end`. Returns all that it takes for itself.
fn load_kernel<K: Read + ReadVolatile + Seek>(
    memory: &GuestMemoryMmap,
    kernel: &mut K,
    room_end: u64,
) -> Result<std::ops::Range<u64>, BootError> {
    let header = image::header(kernel)?;
    let size = kernel.seek(SeekFrom::End(0)).map_err(BootError::ReadKernel)?;
    let start = layout::KERNEL_BASE.saturating_add(header.text_offset);
    let end = start.saturating_add(header.image_size.max(size));
    if end > room_end {
        let [needed, room] = [end, room_end].map(|address| address - layout::RAM_START);
        return Err(BootError::KernelTooLarge { needed, room });
    }
    kernel.seek(SeekFrom::Start(0)).map_err(BootError::ReadKernel)?;
    memory
        .read_exact_volatile_from(GuestAddress(start), kernel, size as usize)
        .map_err(|error| BootError::ReadKernel(io::Error::other(error)))?;
    Ok(start..end)
}

/// Entry for the fuzz target: a kernel of somebody else's making.
pub fn load_hostile(bytes: &[u8]) {
    /// Allocated once: what an earlier input left in it is no more hostile than the next.
    static MEMORY: std::sync::OnceLock<GuestMemoryMmap> = std::sync::OnceLock::new();
    let ranges = [(GuestAddress(layout::RAM_START), 32 << 20)];
    let memory =
        MEMORY.get_or_init(|| GuestMemoryMmap::from_ranges(&ranges).expect("32 MiB of address space"));
    let parameters = Parameters { cmdline: "quiet", cpus: 2, slots: &[] };
    let (mut kernel, mut initramfs) = (io::Cursor::new(bytes), io::Cursor::new(&bytes[bytes.len() / 2..]));
    // A refusal is as good as an entry.
    let _loaded = load(memory, &mut kernel, &mut initramfs, parameters);
}

#[cfg(test)]
mod tests;

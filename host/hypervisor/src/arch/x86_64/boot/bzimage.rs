//! What a bzImage is told, and the page tables it is entered with (Linux `Documentation/arch/x86/boot.rst`).

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, PAGE_BYTES, UNKNOWN_FORMAT, acpi};
use crate::arch::x86_64::layout::{self, Region};

pub(super) type Header = setup_header;

/// Where 64-bit code begins in the loaded kernel.
pub(super) const LONG_ENTRY_OFFSET: u64 = 0x200;
/// Where the header is in the file, and in the boot parameters.
const HEADER_OFFSET: u64 = 0x1f1;
/// `HdrS`.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `XLF_KERNEL_64`.
const HAS_LONG_ENTRY: u16 = 1;
/// The protocol that brought `xloadflags`.
const VERSION_MIN: u16 = 0x20c;

/// Reads and checks the header.
pub(super) fn header(kernel: &mut (impl Read + Seek)) -> Result<Header, BootError> {
    let mut header = Header::default();
    kernel.seek(SeekFrom::Start(HEADER_OFFSET)).map_err(BootError::ReadKernel)?;
    match kernel.read_exact(header.as_mut_slice()) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Err(UNKNOWN_FORMAT);
        }
        result => result.map_err(BootError::ReadKernel)?,
    }
    if { header.header } != HEADER_MAGIC {
        return Err(UNKNOWN_FORMAT);
    }
    if { header.version } < VERSION_MIN || header.xloadflags & HAS_LONG_ENTRY == 0 {
        return Err(BootError::NoEntry {
            format: "bzImage",
            entry: "64-bit entry: it is a 32-bit kernel, or older than Linux 3.8",
        });
    }
    Ok(header)
}

/// The end of the memory that the kernel needs to unpack itself, from the address it prefers or was loaded at.
pub(super) fn end(header: &Header, start: u64) -> u64 {
    start.max(header.pref_address).saturating_add(header.init_size.into())
}

pub(super) fn write(
    memory: &GuestMemoryMmap,
    mut header: Header,
    map: &[Region],
    initramfs: Range<u64>,
    cmdline_bytes: usize,
) -> Result<(), BootError> {
    /// "None of the assigned boot loaders".
    const LOADER_UNDEFINED: u8 = 0xff;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::CMDLINE.0 as u32;
    header.cmdline_size = cmdline_bytes as u32;
    header.ramdisk_image = initramfs.start as u32;
    header.ramdisk_size = (initramfs.end - initramfs.start) as u32;
    let mut parameters = boot_params { hdr: header, acpi_rsdp_addr: acpi::ROOT.0, ..Default::default() };
    for (entry, region) in parameters.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: region.start, size: region.size, r#type: region.kind as u32 };
    }
    parameters.e820_entries = map.len() as u8;
    memory.write_obj(parameters, layout::BOOT_PARAMS)?;
    write_page_tables(memory)?;
    write_gdt(memory)
}

/// The first 4 GiB, mapped to themselves in pages of 2 MiB.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const LARGE_BYTES: u64 = 2 << 20;
    let level4 = layout::PAGE_TABLES.0;
    let level3 = level4 + PAGE_BYTES;
    let level2 = level3 + PAGE_BYTES;
    memory.write_obj(level3 | PRESENT_WRITABLE, GuestAddress(level4))?;
    for gib in 0..4 {
        let table = level2 + gib * PAGE_BYTES;
        memory.write_obj(table | PRESENT_WRITABLE, GuestAddress(level3 + gib * 8))?;
    }
    for page in 0..4 * 512 {
        memory.write_obj((page * LARGE_BYTES) | LARGE | PRESENT_WRITABLE, GuestAddress(level2 + page * 8))?;
    }
    Ok(())
}

/// The code segment must be selector 0x10, the data segment 0x18 (boot.rst, "64-bit Boot Protocol").
fn write_gdt(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const CODE: u64 = 0x00af_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    memory.write_obj([0, 0, CODE, DATA], layout::GDT)?;
    Ok(())
}

//! What a PVH kernel is told (Xen `docs/misc/pvh.pandoc`, `hvm_start_info` version 1).

use std::ops::Range;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{BootError, acpi};
use crate::arch::x86_64::layout::{self, Region};

const MAGIC: u32 = 0x336e_c578;
const MODULES: GuestAddress = GuestAddress(layout::START_INFO.0 + 0x100);
const MEMORY_MAP: GuestAddress = GuestAddress(layout::START_INFO.0 + 0x200);

pub(super) fn write(
    memory: &GuestMemoryMmap,
    map: &[Region],
    initramfs: Range<u64>,
) -> Result<(), BootError> {
    let entries: Vec<_> = map
        .iter()
        .map(|region| hvm_memmap_table_entry {
            addr: region.start,
            size: region.size,
            type_: region.kind as u32,
            reserved: 0,
        })
        .collect();
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: 1,
        modlist_paddr: MODULES.0,
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: acpi::ROOT.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: entries.len() as u32,
        ..Default::default()
    };
    let module = hvm_modlist_entry {
        paddr: initramfs.start,
        size: initramfs.end - initramfs.start,
        ..Default::default()
    };
    let mut parameters = BootParams::new(&start_info, layout::START_INFO);
    parameters.set_sections(&entries, MEMORY_MAP);
    parameters.set_modules(&[module], MODULES);
    PvhBootConfigurator::write_bootparams(&parameters, memory)
        .map_err(|error| BootError::Damaged { format: "start info", reason: error.to_string() })
}

//! Where things are in the guest's physical address space.
//!
//! ```text
//! 0                RAM: boot structures below 0x9fc00
//! 0x000e_0000      ACPI tables
//! 0x0010_0000      RAM: kernel, initramfs at its end
//! 0xc000_0000      gap: virtio-mmio slots, I/O APIC, local APICs, KVM's own pages
//! 0x1_0000_0000    the rest of the RAM
//! ```

use vm_memory::GuestAddress;

use crate::arch::slots::{SLOT_BYTES, Slot};

/// RAM ends here at the latest below 4 GiB.
pub const GAP_START: u64 = 0xc000_0000;
/// The rest of the RAM begins here.
pub const GAP_END: u64 = 0x1_0000_0000;
/// End of the memory that a BIOS would leave to the boot loader.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Where a kernel looks for ACPI's root pointer (ACPI 6.5, §5.2.5.1), and where all our tables are.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI tables, start of the RAM the kernel is loaded into.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// PVH's `hvm_start_info`, with its module list and memory map right behind it.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// The Linux boot protocol's "zero page".
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// Descriptor table of the 64-bit entry.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Page tables of the 64-bit entry: six pages that map the first 4 GiB to themselves.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);

/// The first virtio-mmio slot.
pub const MMIO_START: u64 = 0xd000_0000;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Every processor's local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that KVM needs on Intel for real mode; the three pages of a task state segment follow it.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`IDENTITY_MAP`].
pub const TASK_STATE: u64 = 0xfffb_d000;

/// First port of the serial line (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the serial line.
pub const SERIAL_GSI: u32 = 4;
/// ACPI's interrupt. Never raised, but a kernel insists on one.
pub const ACPI_GSI: u32 = 9;
/// Interrupts for virtio-mmio slots: the I/O APIC's upper pins, which no old device claims, then free ones below.
pub const MMIO_GSIS: [u32; 15] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 14, 15];
/// How many slots there are.
pub const MMIO_SLOTS: usize = MMIO_GSIS.len();
/// ACPI's PM1a event block: status and enable, two bytes each.
pub const PM_EVENT_PORT: u16 = 0x600;
/// ACPI's PM1a control block, two bytes.
pub const PM_CONTROL_PORT: u16 = 0x604;
/// Command port of the keyboard controller, whose one command left is "reset".
pub const RESET_PORT: u16 = 0x64;
/// The command that resets.
pub const RESET_COMMAND: u8 = 0xfe;

/// The slot with this index, while there are interrupts.
pub fn mmio_slot(index: usize) -> Option<Slot> {
    let gsi = *MMIO_GSIS.get(index)?;
    Some(Slot { address: MMIO_START + index as u64 * SLOT_BYTES, gsi })
}

/// What a range of addresses is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RegionKind {
    /// Usable memory (`E820_TYPE_RAM`).
    Ram = 1,
    /// Hands off (`E820_TYPE_RESERVED`).
    Reserved = 2,
    /// ACPI tables (`E820_TYPE_ACPI`).
    Acpi = 3,
}

/// One line of the memory map that the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What is there.
    pub kind: RegionKind,
}

/// Where RAM of this size lies: one range, or two around the gap.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= GAP_START { vec![(0, bytes)] } else { vec![(0, GAP_START), (GAP_END, bytes - GAP_START)] }
}

/// The memory map (e820) for RAM of this size, in ascending order. The RAM must reach above [`HIGH_MEMORY_START`].
pub fn memory_map(bytes: u64) -> Vec<Region> {
    let region = |start: u64, end: u64, kind| Region { start, size: end - start, kind };
    let low_end = bytes.min(GAP_START);
    let mut map = vec![
        region(0, LOW_MEMORY_END, RegionKind::Ram),
        region(LOW_MEMORY_END, ACPI_START, RegionKind::Reserved),
        region(ACPI_START, HIGH_MEMORY_START, RegionKind::Acpi),
        region(HIGH_MEMORY_START, low_end, RegionKind::Ram),
        region(IDENTITY_MAP, IDENTITY_MAP + 0x4000, RegionKind::Reserved),
    ];
    if bytes > GAP_START {
        map.push(region(GAP_END, GAP_END + bytes - GAP_START, RegionKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_splits_around_the_gap() {
        assert_eq!(ram_ranges(512 * MIB), [(0, 512 * MIB)]);
        assert_eq!(ram_ranges(3072 * MIB), [(0, GAP_START)]);
        assert_eq!(ram_ranges(5 * 1024 * MIB), [(0, GAP_START), (GAP_END, 2048 * MIB)]);
    }

    #[test]
    fn slots_end_with_the_interrupts() {
        assert_eq!(mmio_slot(0), Some(Slot { address: 0xd000_0000, gsi: 16 }));
        assert_eq!(mmio_slot(8), Some(Slot { address: 0xd000_8000, gsi: 5 }));
        assert_eq!(mmio_slot(MMIO_GSIS.len()), None);
        let mut gsis = MMIO_GSIS.to_vec();
        gsis.extend([SERIAL_GSI, ACPI_GSI, 0, 1, 2, 8, 12, 13]);
        gsis.sort_unstable();
        gsis.dedup();
        assert_eq!(gsis.len(), MMIO_GSIS.len() + 8, "an interrupt is used twice");
    }

    proptest! {
        #[test]
        fn the_map_is_ordered_and_its_ram_exists(mib in 2u64..64 * 1024) {
            let (map, ranges) = (memory_map(mib * MIB), ram_ranges(mib * MIB));
            prop_assert!(map.windows(2).all(|pair| pair[0].start + pair[0].size <= pair[1].start));
            for region in map.iter().filter(|region| region.kind == RegionKind::Ram) {
                prop_assert!(region.size > 0);
                let inside = |range: &(u64, u64)| {
                    region.start >= range.0 && region.start + region.size <= range.0 + range.1
                };
                prop_assert!(ranges.iter().any(inside), "{region:?} in {ranges:?}");
            }
            prop_assert_eq!(ranges.iter().map(|range| range.1).sum::<u64>(), mib * MIB);
        }
    }
}

//! Where things are in the guest's physical address space.
//!
//! ```text
//! 0x0800_0000  GIC: distributor
//! 0x0900_0000  GIC: redistributors, one behind the other
//! 0x1000_0000  serial line (PL011)
//! 0x1100_0000  virtio-mmio slots
//! 0x8000_0000  RAM: the device tree, 2 MiB further the kernel, the initramfs at the end
//! ```

use vm_memory::GuestAddress;

use crate::arch::slots::{SLOT_BYTES, Slot};

/// The GIC's distributor (Arm IHI 0069, GICv3, §12.8).
pub const DISTRIBUTOR: u64 = 0x0800_0000;
/// Size of the distributor's registers.
pub const DISTRIBUTOR_BYTES: u64 = 0x1_0000;
/// The redistributor of the first processor; the others' follow.
pub const REDISTRIBUTORS: u64 = 0x0900_0000;
/// Size of one redistributor's registers: a frame for itself and one for interrupts of its processor.
pub const REDISTRIBUTOR_BYTES: u64 = 0x2_0000;
/// As many processors as KVM's GIC takes (`VGIC_V3_MAX_CPUS`).
pub const CPUS_MAX: u32 = 512;

/// The serial line's registers.
pub const SERIAL: u64 = 0x1000_0000;
/// Size of the serial line's registers.
pub const SERIAL_BYTES: u64 = 0x1000;
/// Interrupt of the serial line.
pub const SERIAL_GSI: u32 = 0;

/// The first virtio-mmio slot.
pub const MMIO_START: u64 = 0x1100_0000;
/// How many slots there are: one for each interrupt behind the serial line's.
pub const MMIO_SLOTS: usize = SPIS as usize - 1;
/// Shared peripheral interrupts of the GIC. KVM counts its interrupts in steps of 32, of which the first 32 are the
/// processors' own.
pub const SPIS: u32 = 32;

/// Where RAM begins: at 2 GiB, so that it is one piece, and a whole number of GiB, from where a kernel counts the 32 GiB
/// in which it and its initramfs must be (Linux `Documentation/arch/arm64/booting.rst`).
pub const RAM_START: u64 = 0x8000_0000;
/// The device tree, in the 2 MiB before the kernel.
pub const DEVICE_TREE: GuestAddress = GuestAddress(RAM_START);
/// The most that a device tree may have.
pub const DEVICE_TREE_BYTES_MAX: usize = 2 << 20;
/// The address that a kernel's own offset is added to: the next after the device tree that 2 MiB divide.
pub const KERNEL_BASE: u64 = RAM_START + DEVICE_TREE_BYTES_MAX as u64;
/// Kernel and initramfs end here at the latest.
pub const INITRAMFS_END_MAX: u64 = RAM_START + (32 << 30);

/// The slot with this index, while there are interrupts.
pub fn mmio_slot(index: usize) -> Option<Slot> {
    let gsi = SERIAL_GSI + 1 + u32::try_from(index).ok().filter(|_| index < MMIO_SLOTS)?;
    Some(Slot { address: MMIO_START + index as u64 * SLOT_BYTES, gsi })
}

/// Where RAM of this size lies: in one piece.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    vec![(RAM_START, bytes)]
}

/// A processor's affinity: how the device tree and PSCI name it, the affinity fields of its `MPIDR_EL1`.
///
/// KVM gives processor n this one (Linux `arch/arm64/kvm/sys_regs.c`, `reset_mpidr`): 16 processors in each of the lowest
/// level, which are as many as one software-generated interrupt can name.
pub fn affinity(index: u32) -> u64 {
    u64::from(index & 0xf | (index >> 4 & 0xff) << 8 | (index >> 12 & 0xff) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_end_with_the_interrupts() {
        assert_eq!(mmio_slot(0), Some(Slot { address: 0x1100_0000, gsi: 1 }));
        assert_eq!(mmio_slot(30), Some(Slot { address: 0x1101_e000, gsi: 31 }));
        assert_eq!(mmio_slot(31), None);
        assert_eq!(mmio_slot(usize::MAX), None);
    }

    #[test]
    fn nothing_overlaps() {
        let places = [
            (DISTRIBUTOR, DISTRIBUTOR_BYTES),
            (REDISTRIBUTORS, REDISTRIBUTOR_BYTES * u64::from(CPUS_MAX)),
            (SERIAL, SERIAL_BYTES),
            (MMIO_START, SLOT_BYTES * MMIO_SLOTS as u64),
            (RAM_START, 1),
        ];
        for pair in places.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        assert!(KERNEL_BASE.is_multiple_of(2 << 20) && RAM_START.is_multiple_of(1 << 30));
    }

    #[test]
    fn processors_have_different_affinities() {
        assert_eq!([0, 15, 16, 511].map(affinity), [0, 15, 0x100, 0x1f0f]);
        let mut all: Vec<_> = (0..CPUS_MAX).map(affinity).collect();
        all.dedup();
        assert_eq!(all.len(), CPUS_MAX as usize);
    }
}

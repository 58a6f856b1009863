//! RAM that a running machine may get: addresses behind its own, and a memory file of which nothing is touched yet.
//!
//! The guest reaches none of it until it is granted ([`kvm::Growth`](crate::kvm::Growth)), so a hostile one takes no more
//! of the host than its user has allowed. What was granted once stays within reach until the machine's end.

use std::fs::File;

use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use crate::arch::native::layout;
use crate::memory::{MemoryError, map, sealed_file};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Memory that can be added to a machine.
#[derive(Debug)]
pub struct Reserve {
    file: File,
    start: u64,
    bytes: u64,
    block_bytes: u64,
    granted: u64,
}

impl Reserve {
    /// What a machine of `ram_mib` can get, up to `most_mib` in all. `None` when that is nothing.
    pub fn new(ram_mib: u32, most_mib: u64) -> Result<Option<Self>, MemoryError> {
        let ram = u64::from(ram_mib) * MIB;
        let block_bytes = block_bytes(ram);
        let bytes = most_mib.saturating_mul(MIB).saturating_sub(ram) / block_bytes * block_bytes;
        if bytes == 0 {
            return Ok(None);
        }
        let file = sealed_file(bytes).map_err(MemoryError::of(bytes, "the memory file cannot be made"))?;
        Ok(Some(Self { file, start: start(ram), bytes, block_bytes, granted: 0 }))
    }

    /// Where it begins in the guest.
    pub fn start(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    /// All that can be granted.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the guest reaches, from the start.
    pub fn granted(&self) -> u64 {
        self.granted
    }

    /// What must be granted for the guest to use `bytes`: whole blocks of its kernel, and not more than there is.
    pub fn rounded(&self, bytes: u64) -> u64 {
        bytes.min(self.bytes).next_multiple_of(self.block_bytes)
    }

    /// Maps what is missing for the guest to reach the first `bytes`; `None` when nothing is.
    pub(crate) fn next(&self, bytes: u64) -> Result<Option<GuestRegionMmap>, MemoryError> {
        let missing = self.rounded(bytes).saturating_sub(self.granted);
        if missing == 0 {
            return Ok(None);
        }
        let file = self.file.try_clone().map_err(MemoryError::of(missing, "no descriptor is free"))?;
        map(FileOffset::new(file, self.granted), self.start + self.granted, missing).map(Some)
    }

    /// Takes note that the guest reaches the first `bytes`.
    pub(crate) fn grant(&mut self, bytes: u64) {
        self.granted = self.granted.max(self.rounded(bytes));
    }
}

/// What a Linux guest adds at once, a memory block: 128 MiB, and up to 2 GiB once it has 64 GiB (Linux
/// `arch/x86/mm/init_64.c`, `probe_memory_block_size`).
fn block_bytes(ram: u64) -> u64 {
    if ram < 64 * GIB { 128 * MIB } else { 2 * GIB }
}

/// The first address behind RAM of this size that suits every kernel's blocks.
fn start(ram: u64) -> u64 {
    let ends = layout::ram_ranges(ram).into_iter().map(|(start, size)| start + size);
    // Never below 4 GiB, where a PC has its gap.
    ends.max().unwrap_or_default().max(4 * GIB).next_multiple_of(2 * GIB)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryRegion;

    use super::*;

    #[test]
    fn a_reserve_lies_behind_the_ram_and_has_whole_blocks() {
        let reserve = Reserve::new(1024, 3000).unwrap().unwrap();
        assert_eq!((reserve.start().0, reserve.bytes(), reserve.granted()), (4 * GIB, 15 * 128 * MIB, 0));
        assert_eq!(
            [0, 1, 128 * MIB, u64::MAX].map(|bytes| reserve.rounded(bytes)),
            [0, 128 * MIB, 128 * MIB, 15 * 128 * MIB]
        );
        let large = Reserve::new(65 << 10, 70 << 10).unwrap().unwrap();
        let end = layout::ram_ranges(65 << 30).into_iter().map(|(start, size)| start + size).max().unwrap();
        assert!(large.start().0 >= end && large.start().0.is_multiple_of(2 * GIB), "{large:?}");
        assert_eq!((large.bytes(), large.rounded(1)), (4 * GIB, 2 * GIB));
        assert!(Reserve::new(1024, 1100).unwrap().is_none(), "less than a block");
        assert!(Reserve::new(1024, 512).unwrap().is_none());
    }

    #[test]
    fn parts_follow_each_other_in_the_guest_and_in_the_file() {
        let mut reserve = Reserve::new(1024, 3000).unwrap().unwrap();
        let mut parts = Vec::new();
        for bytes in [MIB, 100 * MIB, 300 * MIB, 200 * MIB] {
            parts.extend(reserve.next(bytes).unwrap());
            reserve.grant(bytes);
        }
        let places: Vec<_> = parts
            .iter()
            .map(|part| (part.start_addr().0 - 4 * GIB, part.file_offset().unwrap().start(), part.len()))
            .collect();
        assert_eq!(places, [(0, 0, 128 * MIB), (128 * MIB, 128 * MIB, 256 * MIB)]);
        assert_eq!(reserve.granted(), 384 * MIB);
    }
}

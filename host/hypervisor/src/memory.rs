//! Guest RAM: one sealed memory file, mapped shared.
//!
//! A file, so that pages given back by the guest can be punched out of it and another process could be handed it; sealed,
//! so that nobody who is handed it can shrink it under our feet. It is left out of core dumps: a guest's memory holds
//! its containers' secrets.

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::arch::x86_64::layout;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot get {mib} MiB of guest memory: {step}")]
pub struct MemoryError {
    mib: u32,
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Allocates guest RAM. Pages come into being when they are first touched.
pub fn allocate(mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    let failed = |step| move |source: io::Error| MemoryError { mib, step, source };
    let bytes = u64::from(mib) << 20;
    let file = sealed_file(bytes).map_err(failed("the memory file cannot be made"))?;
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, size) in layout::ram_ranges(bytes) {
        let part = FileOffset::new(file.try_clone().map_err(failed("no descriptor is free"))?, offset);
        let mapping = MmapRegion::from_file(part, size as usize)
            .map_err(|error| failed("it cannot be mapped")(io::Error::other(error)))?;
        leave_out_of_dumps(&mapping).map_err(failed("it cannot be kept out of core dumps"))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| failed("it does not fit the address space")(io::ErrorKind::InvalidInput.into()))?;
        regions.push(region);
        offset += size;
    }
    GuestMemoryMmap::from_regions(regions)
        .map_err(|error| failed("its parts do not fit together")(io::Error::other(error)))
}

/// How many bytes of RAM a guest has.
pub fn size(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

fn sealed_file(bytes: u64) -> io::Result<File> {
    let fd = rustix::fs::memfd_create(c"guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd.into())
}

fn leave_out_of_dumps(mapping: &MmapRegion) -> io::Result<()> {
    // SAFETY: the range is exactly one mapping that we own, and the advice changes only what a core dump holds.
    unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), mapping.size(), rustix::mm::Advice::LinuxDontDump) }
        .map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_is_where_the_layout_says_and_cannot_shrink() {
        let memory = allocate(4096).unwrap();
        assert_eq!(size(&memory), 4 << 30);
        memory.write_obj(7_u32, GuestAddress(layout::GAP_END)).unwrap();
        memory.write_obj(8_u32, GuestAddress(layout::GAP_START - 4)).unwrap();
        assert!(memory.write_obj(9_u32, GuestAddress(layout::GAP_START)).is_err());
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(rustix::fs::ftruncate(file, 4096).is_err(), "the file is sealed");
        let mut second = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut second, layout::GAP_START).unwrap();
        assert_eq!(second, 7_u32.to_le_bytes(), "the second range follows the first in the file");
    }
}

//! Guest RAM: a sealed memory file, mapped shared.
//!
//! A file, so that pages given back by the guest can be punched out of it and another process could be handed it; sealed,
//! so that nobody who is handed it can shrink it under our feet. It is left out of core dumps: a guest's memory holds
//! its containers' secrets.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::arch::native::layout;

/// The RAM of a machine, to which may be added while it runs. Clones are the same RAM.
pub type Ram = GuestMemoryAtomic<GuestMemoryMmap>;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot get {mib} MiB of guest memory: {step}")]
pub struct MemoryError {
    mib: u64,
    step: &'static str,
    #[source]
    source: io::Error,
}

impl MemoryError {
    /// The error of this step towards so many bytes.
    pub(crate) fn of(bytes: u64, step: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self { mib: bytes >> 20, step, source }
    }
}

/// Allocates guest RAM. Pages come into being when they are first touched.
pub fn allocate(mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    let bytes = u64::from(mib) << 20;
    let failed = |step| MemoryError::of(bytes, step);
    let file = sealed_file(bytes).map_err(failed("the memory file cannot be made"))?;
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, size) in layout::ram_ranges(bytes) {
        let file = file.try_clone().map_err(failed("no descriptor is free"))?;
        regions.push(map(FileOffset::new(file, offset), start, size)?);
        offset += size;
    }
    GuestMemoryMmap::from_regions(regions)
        .map_err(|error| failed("its parts do not fit together")(io::Error::other(error)))
}

/// Maps a part of a memory file, which the guest finds at `start`.
pub(crate) fn map(part: FileOffset, start: u64, size: u64) -> Result<GuestRegionMmap, MemoryError> {
    let failed = |step| MemoryError::of(size, step);
    let mapping = MmapRegion::from_file(part, size as usize)
        .map_err(|error| failed("it cannot be mapped")(io::Error::other(error)))?;
    leave_out_of_dumps(&mapping).map_err(failed("it cannot be kept out of core dumps"))?;
    GuestRegionMmap::new(mapping, GuestAddress(start))
        .ok_or_else(|| failed("it does not fit the address space")(io::ErrorKind::InvalidInput.into()))
}

/// How many bytes of RAM a guest has.
pub fn size(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// How many bytes of RAM the host holds for the guest now: those it has touched and not given back.
pub fn held(memory: &GuestMemoryMmap) -> io::Result<u64> {
    // Regions are parts of one file or of several; each file's first part stands for it.
    let parts = memory.iter().filter_map(|region| region.file_offset());
    parts.filter(|part| part.start() == 0).map(|part| Ok(part.file().metadata()?.blocks() * 512)).sum()
}

/// Gives the host back what lies in a range of RAM; the guest finds zeroes there when it touches it next. Returns the
/// bytes given back: only whole pages can be.
///
/// A hole is punched into the memory file: that unmaps the pages here and everywhere, and frees them.
pub fn give_back(memory: &GuestMemoryMmap, start: GuestAddress, length: u64) -> io::Result<u64> {
    let page = page_bytes();
    let (first, last) = (start.0, start.0.saturating_add(length));
    let mut given = 0;
    for region in memory.iter() {
        let Some(part) = region.file_offset() else { continue };
        let base = region.start_addr().0;
        // Regions begin at whole pages, in the guest and in the file.
        let Some(from) = first.max(base).checked_next_multiple_of(page) else { continue };
        let to = last.min(base.saturating_add(region.len())) / page * page;
        if from < to {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(part.file(), flags, part.start() + (from - base), to - from)?;
            given += to - from;
        }
    }
    Ok(given)
}

/// The host's page size.
fn page_bytes() -> u64 {
    // SAFETY: the call reads a constant of the system.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // Cannot fail for this name; 4 KiB is right for most that could.
    u64::try_from(bytes).unwrap_or(4096)
}

/// A memory file that neither shrinks nor grows.
pub(crate) fn sealed_file(bytes: u64) -> io::Result<File> {
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
mod dump_tests {
    use super::*;

    /// proc(5): `VmFlags` of `/proc/PID/smaps`; `dd` is what `MADV_DONTDUMP` sets.
    #[test]
    fn no_page_of_a_guest_is_in_a_core_dump() {
        let memory = allocate(4096).unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let flags_at = |start: usize| {
            let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&format!("{start:x}-")));
            lines.find_map(|line| line.strip_prefix("VmFlags: ")).map(str::to_owned)
        };
        for region in memory.iter() {
            let start = region.as_ptr() as usize;
            let flags = flags_at(start).expect("the region is a mapping of its own");
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
        }
        let mut others = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags: "));
        assert!(others.any(|flags| !flags.contains(" dd")), "every mapping has the flag");
    }
}

// Only a PC's RAM has a gap, and these look at both sides of it.
#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn what_is_given_back_is_free_on_the_host_and_zero_in_the_guest() {
        const MIB: u64 = 1 << 20;
        let memory = allocate(4096).unwrap();
        assert_eq!(held(&memory).unwrap(), 0, "nothing was touched yet");
        // On both sides of the gap.
        let ends = [layout::GAP_START - MIB, layout::GAP_END];
        for start in ends {
            memory.write_slice(&[7; MIB as usize], GuestAddress(start)).unwrap();
        }
        assert_eq!(held(&memory).unwrap(), 2 * MIB);
        // A range that is not of whole pages: the page at either end stays.
        assert_eq!(give_back(&memory, GuestAddress(ends[0] + 1), MIB - 2).unwrap(), MIB - 2 * 4096);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(ends[0])).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(ends[0] + 4096)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(ends[0] + MIB - 1)).unwrap(), 7);
        // The gap between the two is nobody's.
        let all = layout::GAP_END + MIB - ends[0];
        assert_eq!(give_back(&memory, GuestAddress(ends[0]), all).unwrap(), 2 * MIB);
        assert_eq!(held(&memory).unwrap(), 0);
        assert_eq!(give_back(&memory, GuestAddress(ends[0] + 10), 100).unwrap(), 0);
        assert_eq!(give_back(&memory, GuestAddress(u64::MAX - 10), u64::MAX).unwrap(), 0);
    }

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

//! Compressed swap: a part of the machine's own memory, into which pages go that nobody touches, at a third of their size or so.
//!
//! Linux `Documentation/admin-guide/blockdev/zram.rst`. Without it a machine that is short of memory can only drop files and
//! kill; its disk is no place for swap, which would make it grow on the host.

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::{machine, sys};

const SYSFS: &str = "/sys/block/zram0";
const DEVICE: &CStr = c"/dev/zram0";

/// Fast above all: it is the kernel's own choice where there is one.
const ALGORITHM: &str = "lz4";

/// Bytes of a page, and of the header, which is one page.
const PAGE_BYTES: usize = 4096;
/// Where version, number of the last page and number of bad pages are in the header (Linux `include/linux/swap.h`,
/// `union swap_header`): behind room for boot sectors.
const INFO: usize = 1024;
/// At the end of the header.
const MAGIC: &[u8; 10] = b"SWAPSPACE2";

/// What was turned on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swap {
    /// Pages of this size together can be swapped.
    pub bytes: u64,
    /// The memory they may take, compressed; when that is full, no more are taken.
    pub memory_bytes: u64,
}

impl Swap {
    /// Half of the memory can be swapped, and a quarter goes to it at the very most, when nothing can be made smaller than half.
    fn of(memory_bytes: u64) -> Self {
        let page = PAGE_BYTES as u64;
        Self { bytes: memory_bytes / 2 / page * page, memory_bytes: memory_bytes / 4 / page * page }
    }
}

/// Makes the swap and turns it on. Blocks for some milliseconds.
pub fn turn_on() -> Result<Swap> {
    let swap = Swap::of(machine::memory_bytes());
    let set = |name: &str, value: &str| {
        let path = Path::new(SYSFS).join(name);
        fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
    };
    ensure!(Path::new(SYSFS).exists(), "the kernel has no zram");
    // Some kernel has only others.
    let chosen = set("comp_algorithm", ALGORITHM);
    set("disksize", &swap.bytes.to_string()).map_err(|error| match chosen {
        Ok(()) => error,
        Err(chosen) => error.context(chosen),
    })?;
    set("mem_limit", &swap.memory_bytes.to_string())?;
    let path = DEVICE.to_str()?;
    let device = File::options().write(true).open(path).with_context(|| format!("cannot open {path}"))?;
    device.write_all_at(&header(swap.bytes)?, 0).with_context(|| format!("cannot write to {path}"))?;
    drop(device);
    sys::swap_on(DEVICE).with_context(|| format!("the kernel does not swap to {path}"))?;
    Ok(swap)
}

/// The first page of a swap area of so many bytes.
fn header(bytes: u64) -> Result<[u8; PAGE_BYTES]> {
    let pages = bytes / PAGE_BYTES as u64;
    let last = pages.checked_sub(1).and_then(|last| u32::try_from(last).ok());
    let last = last.with_context(|| format!("{bytes} bytes are no size for swap"))?;
    let mut page = [0; PAGE_BYTES];
    page[INFO..INFO + 4].copy_from_slice(&1_u32.to_ne_bytes());
    page[INFO + 4..INFO + 8].copy_from_slice(&last.to_ne_bytes());
    page[PAGE_BYTES - MAGIC.len()..].copy_from_slice(MAGIC);
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_memory_in_whole_pages() {
        assert_eq!(Swap::of(4 << 30), Swap { bytes: 2 << 30, memory_bytes: 1 << 30 });
        assert_eq!(Swap::of((640 << 20) + 5000), Swap { bytes: 320 << 20, memory_bytes: 160 << 20 });
        assert_eq!(Swap::of(100), Swap { bytes: 0, memory_bytes: 0 });
    }

    #[test]
    fn the_header_is_what_mkswap_writes() {
        let page = header(1 << 20).unwrap();
        assert_eq!(&page[1024..1036], [1_u32, 255, 0].map(u32::to_ne_bytes).as_flattened());
        assert_eq!(&page[4086..], b"SWAPSPACE2");
        assert!(page[..1024].iter().chain(&page[1036..4086]).all(|byte| *byte == 0));
        // There is no place for a page in them, or no number.
        assert!(header(0).is_err() && header(4095).is_err() && header(u64::MAX).is_err());
    }
}

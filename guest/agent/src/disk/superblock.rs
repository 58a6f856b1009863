//! What is on a disk, told from its first and last bytes. Pure: bytes in, a verdict out.

/// Bytes from the start of the disk that [`identify`] wants to see. Every file system, partition table, volume
/// manager and encryption that could have been there leaves a mark within the first MiB.
pub const HEAD_LENGTH: usize = 1 << 20;

/// Bytes from the end of the disk that [`identify`] wants to see.
pub const TAIL_LENGTH: usize = 512;

/// The name of the file system we make. One with another name is somebody else's.
pub const LABEL: &str = "engine-data";

/// Written to the last [`TAIL_LENGTH`] bytes while the disk is being formatted, and removed after. A disk that
/// carries it was cut off half-way through its first boot: it holds nothing yet, and may be formatted again.
///
/// A container can put the same words into a file, and that file can come to lie at the end of the disk. So the mark
/// counts only where no file system has ever been mounted: what mounts one writes that into its super block.
pub const FORMATTING_MARK: &[u8] = b"engine-data: formatting under way";

/// What a disk holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: it has never been written to.
    Blank,
    /// The beginnings of our file system.
    HalfFormatted,
    /// Our file system.
    Ours {
        /// The size that the file system believes the disk to have at least.
        size_bytes: u64,
        /// It was unmounted properly and no error has been seen since its last check: `e2fsck -p` would end at once.
        clean: bool,
    },
    /// A file system of the right kind that is not ours.
    OtherName(String),
    /// Something else, or what is left of ours.
    Unknown,
}

const SUPERBLOCK: usize = 1024;
const MAGIC: u64 = 0xEF53;

/// Tells what the disk holds from its first [`HEAD_LENGTH`] and last [`TAIL_LENGTH`] bytes (fewer on a smaller disk).
///
/// Offsets are those of the ext4 super block in the kernel's documentation (`ext4/super`).
pub fn identify(head: &[u8], tail: &[u8]) -> Content {
    let marked = tail.starts_with(FORMATTING_MARK);
    let Some(block) = head.get(SUPERBLOCK..2 * SUPERBLOCK) else { return Content::Unknown };
    let number = |offset: usize| {
        u64::from(u32::from_le_bytes([
            block[offset],
            block[offset + 1],
            block[offset + 2],
            block[offset + 3],
        ]))
    };
    let (mounted_at, mount_count) = (number(0x2C), number(0x34) & 0xFFFF);
    match number(0x38) & 0xFFFF {
        MAGIC if marked && mounted_at == 0 && mount_count == 0 => return Content::HalfFormatted,
        MAGIC => {}
        _ if marked => return Content::HalfFormatted,
        _ if head.iter().chain(tail).all(|byte| *byte == 0) => return Content::Blank,
        _ => return Content::Unknown,
    }
    let label = block[0x78..0x88].split(|byte| *byte == 0).next().unwrap_or_default();
    if label != LABEL.as_bytes() {
        return Content::OtherName(String::from_utf8_lossy(label).escape_default().to_string());
    }
    const INCOMPAT_NEEDS_RECOVERY: u64 = 0x4;
    const INCOMPAT_64BIT: u64 = 0x80;
    const STATE_VALID: u64 = 0x1;
    let (features, state) = (number(0x60), number(0x3A) & 0xFFFF);
    let high = if features & INCOMPAT_64BIT != 0 { number(0x150) } else { 0 };
    // Any other bit of the state tells of errors or orphans.
    let clean = state == STATE_VALID && features & INCOMPAT_NEEDS_RECOVERY == 0;
    let blocks = high << 32 | number(0x4);
    // 1 KiB << n, up to 64 KiB; more is no file system of this kind.
    match number(0x18) {
        shift @ 0..=6 => Content::Ours { size_bytes: blocks.saturating_mul(1024 << shift), clean },
        _ => Content::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::process::Command;

    fn head(edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
        let mut head = vec![0; HEAD_LENGTH];
        edit(&mut head);
        head
    }

    fn superblock(head: &mut [u8], label: &[u8]) {
        let block = &mut head[SUPERBLOCK..];
        block[0x4..0x8].copy_from_slice(&1000_u32.to_le_bytes());
        block[0x18..0x1C].copy_from_slice(&2_u32.to_le_bytes());
        block[0x38..0x3A].copy_from_slice(&[0x53, 0xEF]);
        block[0x3A] = 1;
        block[0x78..0x78 + label.len()].copy_from_slice(label);
    }

    const OURS: Content = Content::Ours { size_bytes: 4_096_000, clean: true };

    #[track_caller]
    fn check(edit: impl FnOnce(&mut [u8]), expected: &Content) {
        assert_eq!(&identify(&head(edit), &[0; TAIL_LENGTH]), expected);
    }

    #[test]
    fn the_table() {
        check(|_| {}, &Content::Blank);
        check(|head| head[0] = 1, &Content::Unknown);
        check(|head| head[HEAD_LENGTH - 1] = 1, &Content::Unknown);
        check(|head| superblock(head, b"engine-data"), &OURS);
        check(|head| superblock(head, b"rootfs"), &Content::OtherName("rootfs".into()));
        check(|head| superblock(head, b"engine-data-copy"), &Content::OtherName("engine-data-copy".into()));
        check(|head| superblock(head, b"\x1b[2J"), &Content::OtherName("\\u{1b}[2J".into()));
        let huge = |head: &mut [u8]| {
            superblock(head, b"engine-data");
            head[SUPERBLOCK + 0x60] = 0x80;
            head[SUPERBLOCK + 0x150] = 1;
        };
        check(huge, &Content::Ours { size_bytes: ((1 << 32) + 1000) * 4096, clean: true });
        for (offset, value) in [(0x3A, 0), (0x3A, 3), (0x3A, 5), (0x60, 4)] {
            let unclean = |head: &mut [u8]| {
                superblock(head, b"engine-data");
                head[SUPERBLOCK + offset] = value;
            };
            check(unclean, &Content::Ours { size_bytes: 4_096_000, clean: false });
        }
        let damaged = |head: &mut [u8]| {
            superblock(head, b"engine-data");
            head[SUPERBLOCK + 0x18] = 200;
        };
        check(damaged, &Content::Unknown);
    }

    #[test]
    fn a_mark_at_the_end_means_half_formatted_unless_it_was_ever_mounted() {
        let mut tail = [0; TAIL_LENGTH];
        tail[..FORMATTING_MARK.len()].copy_from_slice(FORMATTING_MARK);
        assert_eq!(identify(&head(|_| {}), &tail), Content::HalfFormatted);
        assert_eq!(identify(&head(|head| head[8192] = 1), &tail), Content::HalfFormatted);
        assert_eq!(identify(&head(|head| superblock(head, b"engine-data")), &tail), Content::HalfFormatted);
        for offset in [0x2C, 0x34] {
            let mounted = head(|head| {
                superblock(head, b"engine-data");
                head[SUPERBLOCK + offset] = 1;
            });
            assert_eq!(identify(&mounted, &tail), OURS);
        }
        assert_eq!(identify(&head(|_| {}), &[7; TAIL_LENGTH]), Content::Unknown);
    }

    #[test]
    fn disks_smaller_than_a_superblock_are_no_panic() {
        for length in [0, 1, 1023, 1025, 1100, 2047] {
            assert_eq!(identify(&vec![0; length], &[]), Content::Unknown);
        }
    }

    /// The real thing, where the tool is installed (it is in the image).
    #[test]
    fn what_mke2fs_makes_is_recognised() {
        let _children = crate::process::tests::CHILDREN.lock().unwrap();
        let path = std::env::temp_dir().join(format!("superblock-{}", std::process::id()));
        File::create(&path).unwrap().set_len(32 << 20).unwrap();
        let made = Command::new("/usr/sbin/mke2fs").args(crate::disk::FORMAT).arg(&path).output();
        let bytes = fs::read(&path);
        fs::remove_file(&path).unwrap();
        let output = made.expect("e2fsprogs is installed by installer/setup");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let bytes = bytes.unwrap();
        let content = identify(&bytes[..HEAD_LENGTH], &bytes[bytes.len() - TAIL_LENGTH..]);
        assert_eq!(content, Content::Ours { size_bytes: 32 << 20, clean: true });
    }
}

use std::io::Cursor;

use proptest::prelude::*;

use self::image_file::image;
use super::*;

#[path = "../../../../tests/kernel/image.rs"]
mod image_file;

const MIB: u64 = 1 << 20;

fn guest(mib: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(layout::RAM_START), (mib * MIB) as usize)]).unwrap()
}

fn loaded(
    memory: &GuestMemoryMmap,
    kernel: &[u8],
    initramfs: &[u8],
    cmdline: &str,
) -> Result<Entry, BootError> {
    let parameters = Parameters { cmdline, cpus: 2, slots: &[] };
    load(memory, &mut Cursor::new(kernel), &mut Cursor::new(initramfs), parameters)
}

fn refused(kernel: &[u8]) -> String {
    loaded(&guest(64), kernel, b"x", "").unwrap_err().to_string()
}

#[test]
fn a_kernel_and_what_it_is_told_are_in_memory() {
    let memory = guest(64);
    let entry = loaded(&memory, &image(b"code", MIB), b"initramfs", "quiet").unwrap();
    assert_eq!(entry.instruction, GuestAddress(layout::RAM_START + 2 * MIB));
    assert_eq!(entry.device_tree, GuestAddress(layout::RAM_START));
    let read = |bytes: &mut [u8], at: u64| memory.read_slice(bytes, GuestAddress(at)).unwrap();
    let (mut code, mut initramfs, mut mark) = ([0; 4], [0; 9], [0; 4]);
    read(&mut code, entry.instruction.0 + 64);
    assert_eq!(&code, b"code");
    read(&mut initramfs, layout::RAM_START + 64 * MIB - 4096);
    assert_eq!(&initramfs, b"initramfs", "as high as there is memory");
    read(&mut mark, entry.device_tree.0);
    assert_eq!(mark, [0xd0, 0x0d, 0xfe, 0xed]);
}

#[test]
fn a_kernel_goes_where_it_wants_to() {
    let mut kernel = image(b"code", MIB);
    kernel[8..16].copy_from_slice(&0x8_0000_u64.to_le_bytes());
    let entry = loaded(&guest(64), &kernel, b"", "").unwrap();
    assert_eq!(entry.instruction, GuestAddress(layout::KERNEL_BASE + 0x8_0000));
}

#[test]
fn bad_kernels_are_refused_with_a_sentence() {
    let changed = |at: usize, bytes: &[u8]| {
        let mut kernel = image(b"code", MIB);
        kernel[at..at + bytes.len()].copy_from_slice(bytes);
        kernel
    };
    assert_eq!(refused(b""), "the kernel is no arm64 Image");
    assert_eq!(refused(&[0; 4096]), "the kernel is no arm64 Image");
    assert!(refused(&[&[0x1f, 0x8b][..], &[0; 100]].concat()).contains("gzip"));
    assert!(refused(&[&b"MZ\0\0zimg"[..], &[0; 100]].concat()).contains("CONFIG_EFI_ZBOOT"));
    assert!(refused(&changed(24, &[1])).contains("big-endian"));
    assert_eq!(refused(&changed(16, &[0; 8])), "the kernel (Image) has no size: it is older than Linux 3.17");
    assert_eq!(
        refused(&image(b"code", 63 * MIB)),
        format!(
            "the kernel wants {} bytes of memory below the initramfs, but only {} are there",
            65 * MIB,
            64 * MIB
        )
    );
    assert!(refused(&changed(8, &[0xff; 16])).starts_with("the kernel wants 18446744071562067967 bytes"));
}

#[test]
fn what_does_not_fit_is_told() {
    let (memory, kernel) = (guest(64), image(b"code", MIB));
    let sentence = |initramfs: &[u8], cmdline: &str| {
        loaded(&memory, &kernel, initramfs, cmdline).unwrap_err().to_string()
    };
    assert!(sentence(&vec![0; 62 << 20], "").contains("65011712 bytes does not fit behind the kernel"));
    assert!(sentence(b"", &"x".repeat(2048)).contains("2049 bytes, its end included; at most 2048"));
    assert!(sentence(b"", "a\0b").contains("holds a zero byte"));
    loaded(&memory, &kernel, b"", &"x".repeat(2047)).unwrap();
    let many = Parameters { cmdline: "", cpus: 513, slots: &[] };
    let error = load(&memory, &mut Cursor::new(&kernel), &mut Cursor::new(b""), many).unwrap_err();
    assert!(error.to_string().starts_with("513 processors are more than the 512"));
    let error = loaded(&guest(8), &kernel, b"", "").unwrap_err();
    assert_eq!(error.to_string(), "8388608 bytes of memory are too little to boot a kernel");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_kernels_never_panic(
        changes in proptest::collection::vec((0_usize..64, any::<u8>()), 0..12),
        cut in 0_usize..200,
    ) {
        let mut kernel = image(&[0; 64], MIB);
        for (at, byte) in changes {
            kernel[at] = byte;
        }
        kernel.truncate(cut);
        // Either is right; a panic is not.
        drop(loaded(&guest(32), &kernel, b"initramfs", "quiet"));
    }
}

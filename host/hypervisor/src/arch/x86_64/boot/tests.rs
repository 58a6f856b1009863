use std::io::Cursor;

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use proptest::prelude::*;
use vm_memory::ByteValued;

use self::vmlinux::vmlinux;
use super::*;

#[path = "../../../../tests/kernel/vmlinux.rs"]
mod vmlinux;

const MIB: u64 = 1 << 20;

/// A bzImage: one sector of set-up code with the header, then `code`.
fn bz_image(code: &[u8], init_bytes: u32) -> Vec<u8> {
    let mut header = setup_header();
    header.init_size = init_bytes;
    let mut file = vec![0; 1024];
    file[0x1f1..0x1f1 + header.as_slice().len()].copy_from_slice(header.as_slice());
    file.extend(code);
    file
}

fn setup_header() -> bzimage::Header {
    bzimage::Header {
        setup_sects: 1,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        xloadflags: 1,
        code32_start: MIB as u32,
        pref_address: 16 * MIB,
        init_size: 1 << 20,
        cmdline_size: 2047,
        ..Default::default()
    }
}

fn guest(mib: u32) -> GuestMemoryMmap {
    memory::allocate(mib).unwrap()
}

fn parameters(cmdline: &str) -> Parameters<'_> {
    Parameters { cmdline, cpus: 2, slots: &[] }
}

fn loaded(
    memory: &GuestMemoryMmap,
    kernel: &[u8],
    initramfs: &[u8],
    cmdline: &str,
) -> Result<Entry, BootError> {
    load(memory, &mut Cursor::new(kernel), &mut Cursor::new(initramfs), parameters(cmdline))
}

fn refused(kernel: &[u8]) -> String {
    loaded(&guest(64), kernel, b"x", "").unwrap_err().to_string()
}

#[test]
fn a_pvh_kernel_is_told_everything() {
    let memory = guest(64);
    let entry = loaded(&memory, &vmlinux(b"code", 4096, true), b"initramfs", "quiet panic=-1").unwrap();
    assert_eq!(entry, Entry::Pvh { instruction: GuestAddress(MIB + 0x10) });
    let mut code = [0; 4];
    memory.read_slice(&mut code, GuestAddress(MIB)).unwrap();
    assert_eq!(&code, b"code");

    let info: hvm_start_info = memory.read_obj(layout::START_INFO).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    let mut cmdline = [0; 15];
    memory.read_slice(&mut cmdline, GuestAddress(info.cmdline_paddr)).unwrap();
    assert_eq!(&cmdline, b"quiet panic=-1\0");
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    let mut initramfs = [0; 9];
    memory.read_slice(&mut initramfs, GuestAddress(module.paddr)).unwrap();
    assert_eq!((&initramfs, module.size), (b"initramfs", 9));
    assert_eq!(module.paddr, 64 * MIB - 4096, "as high as there is memory");
    let mut mark = [0; 8];
    memory.read_slice(&mut mark, GuestAddress(info.rsdp_paddr)).unwrap();
    assert_eq!(&mark, b"RSD PTR ");
    let map: Vec<_> = (0..u64::from(info.memmap_entries))
        .map(|index| {
            let entry: hvm_memmap_table_entry =
                memory.read_obj(GuestAddress(info.memmap_paddr + index * 24)).unwrap();
            (entry.addr, entry.size, entry.type_)
        })
        .collect();
    let expected: Vec<_> = layout::memory_map(64 * MIB)
        .iter()
        .map(|region| (region.start, region.size, region.kind as u32))
        .collect();
    assert_eq!(map, expected);
}

#[test]
fn a_bz_image_is_told_everything() {
    let memory = guest(64);
    let entry = loaded(&memory, &bz_image(b"code", 1 << 20), b"initramfs", "quiet").unwrap();
    assert_eq!(entry, Entry::Long { instruction: GuestAddress(MIB + 0x200) });
    let told: boot_params = memory.read_obj(layout::BOOT_PARAMS).unwrap();
    let header = told.hdr;
    assert_eq!({ header.ramdisk_image }, (64 * MIB - 4096) as u32);
    assert_eq!({ header.ramdisk_size }, 9);
    assert_eq!({ header.cmd_line_ptr }, layout::CMDLINE.0 as u32);
    assert_eq!(header.type_of_loader, 0xff);
    assert_eq!({ told.acpi_rsdp_addr }, layout::ACPI_START);
    let map = layout::memory_map(64 * MIB);
    assert_eq!(usize::from(told.e820_entries), map.len());
    for (entry, region) in { told.e820_table }.iter().zip(&map) {
        assert_eq!(
            ({ entry.addr }, { entry.size }, { entry.r#type }),
            (region.start, region.size, region.kind as u32)
        );
    }
    // The page tables map 3 GiB + 2 MiB to itself.
    let at = 3 * 1024 * MIB + 2 * MIB;
    let mut table = layout::PAGE_TABLES.0;
    for shift in [39, 30, 21] {
        let entry: u64 = memory.read_obj(GuestAddress(table + (at >> shift & 511) * 8)).unwrap();
        assert_eq!(entry & 3, 3);
        table = entry & !0xfff;
    }
    assert_eq!(table, at);
}

#[test]
fn bad_kernels_are_refused_with_a_sentence() {
    let neither = "the kernel is neither an ELF file (vmlinux) nor a bzImage";
    assert_eq!(refused(b""), neither);
    assert_eq!(refused(b"MZ"), neither);
    assert_eq!(refused(&[0; 4096]), neither);
    assert_eq!(
        refused(&vmlinux(b"code", 4096, false)),
        "the kernel (vmlinux) has no PVH entry: it must be built with CONFIG_PVH=y"
    );
    assert!(refused(b"\x7fELF\x01").starts_with("the kernel is a damaged ELF file: "));
    assert!(refused(&vmlinux(b"code", 4096, true)[..100]).starts_with("the kernel is a damaged ELF file: "));
    assert_eq!(
        refused(&vmlinux(b"code", 100 * MIB, true)),
        format!(
            "the kernel wants {} bytes of memory below the initramfs, but only {} are there",
            101 * MIB,
            64 * MIB
        )
    );
    assert!(refused(&bz_image(b"code", 0x8000_0000)).starts_with("the kernel wants 2164260864 bytes"));
    let mut old = bz_image(b"code", 1);
    old[0x236] = 0;
    assert!(refused(&old).starts_with("the kernel (bzImage) has no 64-bit entry"));
    let mut low = bz_image(b"code", 1);
    low[0x214..0x218].copy_from_slice(&0x1000_u32.to_le_bytes());
    assert!(refused(&low).starts_with("the kernel is a damaged bzImage: "));
}

#[test]
fn what_does_not_fit_is_told() {
    let (memory, kernel) = (guest(64), vmlinux(b"code", 4096, true));
    let sentence = |initramfs: &[u8], cmdline: &str| {
        loaded(&memory, &kernel, initramfs, cmdline).unwrap_err().to_string()
    };
    assert!(sentence(&vec![0; 64 << 20], "").contains("67108864 bytes does not fit behind the kernel"));
    assert!(sentence(b"", &"x".repeat(2048)).contains("2049 bytes, its end included; at most 2048"));
    assert!(sentence(b"", "a\0b").contains("holds a zero byte"));
    let long = "x".repeat(2047);
    loaded(&memory, &kernel, b"", &long).unwrap();
    let many = Parameters { cmdline: "", cpus: 256, slots: &[] };
    let error = load(&memory, &mut Cursor::new(&kernel), &mut Cursor::new(b""), many).unwrap_err();
    assert!(error.to_string().starts_with("256 processors are more than"));
    let error = loaded(&guest(8), &kernel, b"", "").unwrap_err();
    assert_eq!(error.to_string(), "8388608 bytes of memory are too little to boot a kernel");
}

#[test]
fn a_kernels_own_limit_of_its_command_line_counts() {
    let mut kernel = bz_image(b"code", 1);
    kernel[0x238..0x23c].copy_from_slice(&255_u32.to_le_bytes());
    loaded(&guest(64), &kernel, b"", &"x".repeat(255)).unwrap();
    let error = loaded(&guest(64), &kernel, b"", &"x".repeat(256)).unwrap_err().to_string();
    assert!(error.contains("257 bytes") && error.contains("at most 256"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_kernels_never_panic(
        bz: bool,
        changes in proptest::collection::vec((0_usize..1100, any::<u8>()), 0..12),
        cut in 0_usize..1200,
    ) {
        let mut kernel = if bz { bz_image(b"code", 4096) } else { vmlinux(b"code", 4096, true) };
        for (at, byte) in changes {
            if let Some(place) = kernel.get_mut(at) {
                *place = byte;
            }
        }
        kernel.truncate(cut);
        // Either is right; a panic is not.
        drop(loaded(&guest(32), &kernel, b"initramfs", "quiet"));
    }
}

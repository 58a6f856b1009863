//! A kernel of a few bytes for x86-64, for tests.

const MIB: u64 = 1 << 20;

/// An ELF kernel: one segment of `code` at 1 MiB that takes `bytes` of memory, and a PVH note if `note`.
pub fn vmlinux(code: &[u8], bytes: u64, note: bool) -> Vec<u8> {
    let mut file = vec![0; 64 + 2 * 56];
    let note_at = file.len();
    // An ELF note: name "Xen", XEN_ELFNOTE_PHYS32_ENTRY (18), the entry's address.
    for part in [4_u32, 8, 18, u32::from_le_bytes(*b"Xen\0")] {
        file.extend(part.to_le_bytes());
    }
    file.extend((MIB + 0x10).to_le_bytes());
    let note_size = file.len() - note_at;
    let code_at = file.len();
    file.extend(code);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2_u16.to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(20, &1_u32.to_le_bytes());
    put(24, &MIB.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &64_u16.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &2_u16.to_le_bytes());
    let mut header = |at: usize, kind: u32, offset: usize, size: usize, memory: u64| {
        put(at, &kind.to_le_bytes());
        put(at + 8, &(offset as u64).to_le_bytes());
        put(at + 16, &MIB.to_le_bytes());
        put(at + 24, &MIB.to_le_bytes());
        put(at + 32, &(size as u64).to_le_bytes());
        put(at + 40, &memory.to_le_bytes());
        put(at + 48, &4_u64.to_le_bytes());
    };
    header(64, 1, code_at, code.len(), bytes);
    header(64 + 56, if note { 4 } else { 0 }, note_at, note_size, note_size as u64);
    file
}

//! A kernel of a few bytes for arm64, for tests.

/// An `Image`: a header whose first instruction jumps over it, then `code`. It takes `bytes` of memory.
pub fn image(code: &[u8], bytes: u64) -> Vec<u8> {
    let mut file = vec![0; 64];
    // b 0x40
    file[..4].copy_from_slice(&0x1400_0010_u32.to_le_bytes());
    file[16..24].copy_from_slice(&bytes.to_le_bytes());
    file[56..60].copy_from_slice(b"ARM\x64");
    file.extend(code);
    file
}

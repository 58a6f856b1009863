//! The header of an arm64 `Image` (Linux `Documentation/arch/arm64/booting.rst`, "Call the kernel image").

use std::io::{ErrorKind, Read, Seek, SeekFrom};

use crate::arch::boot::BootError;

/// Where the magic number is.
pub(super) const MAGIC_OFFSET: usize = 56;
/// The magic number.
pub(super) const MAGIC: [u8; 4] = *b"ARM\x64";
const HEADER_BYTES: usize = 64;
const TEXT_OFFSET: usize = 8;
const IMAGE_SIZE: usize = 16;
const FLAGS: usize = 24;
/// Flag: the kernel is big-endian.
const BIG_ENDIAN: u64 = 1;

/// What a kernel says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// How far behind an address that 2 MiB divide the kernel wants to be, in bytes.
    pub text_offset: u64,
    /// How many bytes of memory it takes from there, more than its file has.
    pub image_size: u64,
}

/// Reads and checks the header.
pub(super) fn header(kernel: &mut (impl Read + Seek)) -> Result<Header, BootError> {
    let mut bytes = [0; HEADER_BYTES];
    kernel.seek(SeekFrom::Start(0)).map_err(BootError::ReadKernel)?;
    match kernel.read_exact(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            return Err(BootError::UnknownFormat { what: "no arm64 Image" });
        }
        result => result.map_err(BootError::ReadKernel)?,
    }
    if bytes[MAGIC_OFFSET..MAGIC_OFFSET + 4] != MAGIC {
        return Err(BootError::UnknownFormat { what: other_format(&bytes) });
    }
    let number = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    if number(FLAGS) & BIG_ENDIAN != 0 {
        return Err(BootError::UnknownFormat { what: "a big-endian arm64 Image: it must be little-endian" });
    }
    match number(IMAGE_SIZE) {
        // Its offset means nothing either.
        0 => Err(BootError::NoEntry { format: "Image", entry: "size: it is older than Linux 3.17" }),
        image_size => Ok(Header { text_offset: number(TEXT_OFFSET), image_size }),
    }
}

/// What a kernel is that is not an `Image`, with the cure where there is one.
fn other_format(bytes: &[u8; HEADER_BYTES]) -> &'static str {
    if bytes.starts_with(&[0x1f, 0x8b]) {
        "compressed by gzip (Image.gz): unpack it first"
    } else if bytes.starts_with(b"MZ") && bytes[4..8] == *b"zimg" {
        "an EFI program that unpacks itself (CONFIG_EFI_ZBOOT=y): take the Image inside"
    } else {
        "no arm64 Image"
    }
}

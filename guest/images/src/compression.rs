//! How archives are packed, told by their first bytes: media types lie, and archives have none.

use std::io::{self, BufRead, Read};

/// What unpacking xz may take: the archive says how much, and `xz -9` asks for 65 MiB.
const XZ_MEMORY_BYTES: u64 = 128 << 20;

/// How a blob is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
    /// Archives of `load` and `import` only: no media type names it, so it is pushed packed otherwise.
    Bzip2,
    /// As [`Bzip2`](Self::Bzip2).
    Xz,
}

impl Compression {
    /// Tells by the first bytes, because media types lie and archives have none.
    pub(crate) fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Self::Bzip2,
            [0xfd, b'7', b'z', b'X', ..] => Self::Xz,
            _ => Self::None,
        }
    }

    /// The plain bytes of `input`.
    pub(crate) fn decoder<'a>(
        input: impl BufRead + Send + 'a,
    ) -> io::Result<(Self, Box<dyn Read + Send + 'a>)> {
        let mut input = input;
        // A pipe may give fewer bytes at first; then it is topped up.
        let mut start = Vec::with_capacity(4);
        input.by_ref().take(4).read_to_end(&mut start)?;
        let compression = Self::detect(&start);
        let whole = io::Cursor::new(start).chain(input);
        Ok(match compression {
            Self::None => (compression, Box::new(whole)),
            Self::Gzip => (compression, Box::new(flate2::bufread::MultiGzDecoder::new(whole))),
            Self::Zstd => (compression, Box::new(zstd::stream::read::Decoder::with_buffer(whole)?)),
            Self::Bzip2 => (compression, Box::new(bzip2::bufread::MultiBzDecoder::new(whole))),
            Self::Xz => {
                let stream = liblzma::stream::Stream::new_stream_decoder(
                    XZ_MEMORY_BYTES,
                    liblzma::stream::CONCATENATED,
                )?;
                (compression, Box::new(liblzma::bufread::XzDecoder::new_stream(whole, stream)))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn unpacked(packed: &[u8]) -> (Compression, Vec<u8>) {
        let (compression, mut decoder) = Compression::decoder(packed).expect("a decoder");
        let mut plain = Vec::new();
        decoder.read_to_end(&mut plain).expect("unpacked");
        (compression, plain)
    }

    #[test]
    fn archives_packed_with_bzip2_and_xz_are_read() {
        let plain = b"the archive of a root".repeat(1000);
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bzip2.write_all(&plain).expect("packed");
        let packed = bzip2.finish().expect("packed");
        assert_eq!(unpacked(&packed), (Compression::Bzip2, plain.clone()));
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&plain).expect("packed");
        let packed = xz.finish().expect("packed");
        assert_eq!(unpacked(&packed), (Compression::Xz, plain));
    }

    #[test]
    fn a_damaged_archive_is_an_error() {
        for packed in [&b"BZh91AY&SY\xff\xff\xff\xff"[..], b"\xfd7zXZ\0\0\x04\xff\xff\xff\xff"] {
            let failed = match Compression::decoder(packed) {
                Ok((_, mut decoder)) => io::copy(&mut decoder, &mut io::sink()).is_err(),
                Err(_) => true,
            };
            assert!(failed, "{packed:?}");
        }
    }
}

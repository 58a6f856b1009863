//! How archives are packed, told by their first bytes: media types lie, and archives have none.

use std::io::{self, BufRead, Read};

/// How a blob is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// Tells by the first bytes, because media types lie and archives have none.
    pub(crate) fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
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
        })
    }
}

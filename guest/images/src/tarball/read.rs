//! Reads tar streams of every dialect that images come in: v7, ustar, GNU (long names, sparse), PAX (long names, times,
//! extended attributes, sparse 0.0, 0.1 and 1.0).
//!
//! Knows nothing of files: it turns bytes into [`Entry`]s. What an archive says about itself is bounded (names, PAX
//! records, sparse maps), so a hostile one cannot make us hold more than a few megabytes. The rules where dialects
//! disagree are those of Go's `archive/tar`, because that is what images are made with.

use std::io::{self, BufRead, Read};

use super::{BLOCK, padding};

/// Bytes of one PAX header or long name at most, as in Go.
const METADATA_BYTES_MAX: u64 = 1 << 20;
/// Data segments of one sparse file at most.
const SEGMENTS_MAX: usize = 1 << 18;
/// Headers about headers in a row at most.
const EXTENSIONS_MAX: usize = 16;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink,
    HardLink,
    CharDevice,
    BlockDevice,
    Fifo,
}

/// One file, folder, link or device of an archive.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) kind: EntryKind,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of data that follow in the archive.
    pub(crate) size: u64,
    pub(crate) sparse: Option<Sparse>,
}

/// Where the data of a sparse file goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sparse {
    /// The size of the file with its holes.
    pub(crate) size: u64,
    /// Offset and length of each piece of data, ascending.
    pub(crate) segments: Vec<(u64, u64)>,
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("the archive ends in the middle of an entry")]
    Truncated,
    #[error("the archive has a header that is not one of tar's ({0})")]
    Header(&'static str),
    #[error("the archive has an entry of the unknown type `{0}`")]
    Type(char),
    #[error(
        "the archive describes an entry with more than {METADATA_BYTES_MAX} bytes of names and attributes"
    )]
    Metadata,
    #[error("reading the archive failed")]
    Read(#[source] io::Error),
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof { Self::Truncated } else { Self::Read(error) }
    }
}

/// Reads one archive, entry by entry. `Read` and `BufRead` give the data of the current entry.
pub(crate) struct Reader<R> {
    input: R,
    /// Data of the current entry not yet read.
    remaining: u64,
    /// Zeroes after that data.
    padding: u64,
}

/// What PAX records say about the next entry.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_major: Option<u64>,
    sparse_minor: Option<u64>,
    /// Offsets and lengths in turn (0.0 and 0.1).
    sparse_map: Option<Vec<u64>>,
}

impl<R: BufRead> Reader<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, remaining: 0, padding: 0 }
    }

    /// What is left of the input, for reading on behind the archive's end.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    /// The next entry; what was not read of the last one is skipped. `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extended = Extended::default();
        let (mut long_name, mut long_link) = (None, None);
        for _ in 0..EXTENSIONS_MAX {
            self.skip_rest()?;
            let Some(block) = self.block()? else { return Ok(None) };
            let header = Header(&block);
            let size = header.size()?;
            match header.kind() {
                b'x' => extended = parse_pax(&self.metadata(size)?)?,
                // Global records would have to apply to all that follows; Docker ignores them too.
                b'g' => drop(self.metadata(size)?),
                b'L' => long_name = Some(until_nul(&self.metadata(size)?).to_vec()),
                b'K' => long_link = Some(until_nul(&self.metadata(size)?).to_vec()),
                _ => return self.entry(&block, extended, long_name, long_link).map(Some),
            }
        }
        Err(TarError::Metadata)
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        extended: Extended,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let header = Header(block);
        let path = extended.path.or(long_name).unwrap_or_else(|| header.path());
        let kind = match header.kind() {
            0 if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => return Err(TarError::Type(char::from(other))),
        };
        let size =
            if kind == EntryKind::File { extended.size.map_or_else(|| header.size(), Ok)? } else { 0 };
        let seconds = || header.number(136..148).map(|value| (value, 0));
        let mut entry = Entry {
            kind,
            path,
            link: extended.link.or(long_link).unwrap_or_else(|| until_nul(&block[157..257]).to_vec()),
            mode: u32::try_from(header.number(100..108)? & 0o7777).map_err(|_| TarError::Header("mode"))?,
            uid: extended.uid.map_or_else(|| header.id(108..116), Ok)?,
            gid: extended.gid.map_or_else(|| header.id(116..124), Ok)?,
            mtime: extended.mtime.map_or_else(seconds, Ok)?,
            device: if matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice) {
                (header.id(329..337)?, header.id(337..345)?)
            } else {
                (0, 0)
            },
            xattrs: extended.xattrs,
            size,
            sparse: None,
        };
        self.remaining = size;
        self.padding = padding(size);
        if header.kind() == b'S' {
            self.old_sparse(block, &mut entry)?;
        } else if kind == EntryKind::File
            && (extended.sparse_major, extended.sparse_minor) == (Some(1), Some(0))
        {
            let map = self.sparse_map_in_data()?;
            let real = extended.sparse_size.ok_or(TarError::Header("sparse size"))?;
            entry.size = self.remaining;
            entry.sparse = Some(sparse(real, &map, entry.size)?);
            entry.path = extended.sparse_name.unwrap_or(entry.path);
        } else if kind == EntryKind::File
            && let Some(map) = extended.sparse_map
        {
            let real = extended.sparse_size.ok_or(TarError::Header("sparse size"))?;
            entry.sparse = Some(sparse(real, &map, entry.size)?);
            entry.path = extended.sparse_name.unwrap_or(entry.path);
        }
        Ok(entry)
    }

    /// GNU's own sparse format: four segments in the header, then blocks of 21.
    fn old_sparse(&mut self, block: &[u8; BLOCK], entry: &mut Entry) -> Result<(), TarError> {
        let mut map = Vec::new();
        let push = |bytes: &[u8], count: usize, map: &mut Vec<u64>| -> Result<(), TarError> {
            for piece in bytes[..count * 24].chunks_exact(24) {
                if piece[0] == 0 {
                    break;
                }
                map.push(unsigned(&piece[..12])?);
                map.push(unsigned(&piece[12..])?);
            }
            Ok(())
        };
        push(&block[386..482], 4, &mut map)?;
        let mut more = block[482] != 0;
        let real = unsigned(&block[483..495])?;
        while more {
            let mut extension = [0; BLOCK];
            self.input.read_exact(&mut extension)?;
            push(&extension, 21, &mut map)?;
            more = extension[504] != 0;
            if map.len() > 2 * SEGMENTS_MAX {
                return Err(TarError::Metadata);
            }
        }
        entry.sparse = Some(sparse(real, &map, entry.size)?);
        Ok(())
    }

    /// The map of PAX sparse 1.0: decimal lines at the start of the data, padded to a block.
    fn sparse_map_in_data(&mut self) -> Result<Vec<u64>, TarError> {
        let mut map = Vec::new();
        let mut wanted = None;
        let mut line = Vec::new();
        let mut used = 0;
        while wanted.is_none_or(|wanted| map.len() < wanted) {
            let mut byte = [0];
            if self.read(&mut byte)? == 0 || used > METADATA_BYTES_MAX * 16 {
                return Err(TarError::Header("sparse map"));
            }
            used += 1;
            match byte[0] {
                b'\n' => {
                    let number = decimal(&line)?;
                    line.clear();
                    match wanted {
                        None if number > SEGMENTS_MAX as u64 => return Err(TarError::Metadata),
                        None => wanted = Some(2 * usize::try_from(number).map_err(|_| TarError::Metadata)?),
                        Some(_) => map.push(number),
                    }
                }
                digit if line.len() < 20 => line.push(digit),
                _ => return Err(TarError::Header("sparse map")),
            }
        }
        let mut rest = padding(used);
        while rest > 0 {
            let mut skipped = [0; BLOCK];
            let length = usize::try_from(rest).unwrap_or(BLOCK).min(BLOCK);
            let read = self.read(&mut skipped[..length])?;
            if read == 0 {
                return Err(TarError::Truncated);
            }
            rest -= read as u64;
        }
        Ok(map)
    }

    /// The data of a header about headers.
    fn metadata(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > METADATA_BYTES_MAX {
            return Err(TarError::Metadata);
        }
        self.remaining = size;
        self.padding = padding(size);
        let mut bytes = Vec::new();
        self.by_ref().take(size).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(TarError::Truncated);
        }
        Ok(bytes)
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let mut rest = self.remaining.checked_add(self.padding).ok_or(TarError::Header("size"))?;
        while rest > 0 {
            let available = self.input.fill_buf()?.len();
            if available == 0 {
                return Err(TarError::Truncated);
            }
            let step = usize::try_from(rest).unwrap_or(usize::MAX).min(available);
            self.input.consume(step);
            rest -= step as u64;
        }
        (self.remaining, self.padding) = (0, 0);
        Ok(())
    }

    /// The next header; `None` at the end of the archive, which is two blocks of zeroes or simply no more bytes.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut zeroes = 0;
        loop {
            if self.input.fill_buf()?.is_empty() {
                return Ok(None);
            }
            self.input.read_exact(&mut block)?;
            if block != [0; BLOCK] {
                break;
            }
            zeroes += 1;
            if zeroes == 2 {
                return Ok(None);
            }
        }
        if zeroes != 0 {
            return Err(TarError::Header("data after the end"));
        }
        Header(&block).check()?;
        Ok(Some(block))
    }
}

impl<R: BufRead> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl<R: BufRead> BufRead for Reader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.remaining == 0 {
            return Ok(&[]);
        }
        let available = self.input.fill_buf()?;
        if available.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let length = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(available.len());
        Ok(&available[..length])
    }

    fn consume(&mut self, amount: usize) {
        self.input.consume(amount);
        self.remaining -= amount as u64;
    }
}

/// One block of 512 bytes, as a header.
struct Header<'a>(&'a [u8; BLOCK]);

impl Header<'_> {
    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn check(&self) -> Result<(), TarError> {
        let stated = octal(&self.0[148..156])?;
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (index, byte) in self.0.iter().enumerate() {
            let byte = if (148..156).contains(&index) { b' ' } else { *byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if stated == unsigned || stated == signed { Ok(()) } else { Err(TarError::Header("checksum")) }
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        let prefix = until_nul(&self.0[345..500]);
        if &self.0[257..263] != b"ustar\0" || prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    fn size(&self) -> Result<u64, TarError> {
        unsigned(&self.0[124..136])
    }

    fn id(&self, range: std::ops::Range<usize>) -> Result<u32, TarError> {
        u32::try_from(self.number(range)?).map_err(|_| TarError::Header("owner or device"))
    }

    fn number(&self, range: std::ops::Range<usize>) -> Result<i64, TarError> {
        number(&self.0[range])
    }
}

/// A header's number: octal digits, or two's complement in base 256 when the first bit is set.
fn number(bytes: &[u8]) -> Result<i64, TarError> {
    let first = bytes[0];
    if first & 0x80 == 0 {
        return octal(bytes);
    }
    let negative = first & 0x40 != 0;
    let mut value: i128 = if negative { -1 } else { 0 };
    for (index, byte) in bytes.iter().enumerate() {
        let byte = if index == 0 && !negative { byte & 0x7f } else { *byte };
        value = (value << 8) | i128::from(byte);
    }
    i64::try_from(value).map_err(|_| TarError::Header("number"))
}

fn unsigned(bytes: &[u8]) -> Result<u64, TarError> {
    u64::try_from(number(bytes)?).map_err(|_| TarError::Header("negative size"))
}

fn octal(bytes: &[u8]) -> Result<i64, TarError> {
    let text = until_nul(bytes).trim_ascii();
    let mut value = 0i64;
    for digit in text {
        if !(b'0'..=b'7').contains(digit) {
            return Err(TarError::Header("octal number"));
        }
        value = value
            .checked_mul(8)
            .and_then(|value| value.checked_add(i64::from(digit - b'0')))
            .ok_or(TarError::Header("octal number"))?;
    }
    Ok(value)
}

fn decimal(bytes: &[u8]) -> Result<u64, TarError> {
    let digits = !bytes.is_empty() && bytes.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(bytes).ok().filter(|_| digits);
    text.and_then(|text| text.parse().ok()).ok_or(TarError::Header("decimal number"))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

/// `length key=value\n`, again and again.
fn parse_pax(mut bytes: &[u8]) -> Result<Extended, TarError> {
    let bad = || TarError::Header("PAX record");
    let mut extended = Extended::default();
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|byte| *byte == b' ').ok_or_else(bad)?;
        let length = usize::try_from(decimal(&bytes[..space])?).map_err(|_| bad())?;
        if length > bytes.len() || length <= space + 2 || bytes[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &bytes[space + 1..length - 1];
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        extended.record(&record[..equals], &record[equals + 1..])?;
        bytes = &bytes[length..];
    }
    Ok(extended)
}

impl Extended {
    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if matches!(key, b"path" | b"linkpath" | b"GNU.sparse.name") && value.contains(&0) {
            return Err(TarError::Header("PAX name"));
        }
        let id = |value| u32::try_from(decimal(value)?).map_err(|_| TarError::Header("PAX owner"));
        match key {
            // An empty value takes an earlier one back.
            _ if value.is_empty() => {}
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(id(value)?),
            b"gid" => self.gid = Some(id(value)?),
            b"mtime" => self.mtime = Some(pax_time(value)?),
            b"GNU.sparse.name" => self.sparse_name = Some(value.to_vec()),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse_size = Some(decimal(value)?),
            b"GNU.sparse.major" => self.sparse_major = Some(decimal(value)?),
            b"GNU.sparse.minor" => self.sparse_minor = Some(decimal(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                self.sparse_map.get_or_insert_default().push(decimal(value)?)
            }
            b"GNU.sparse.map" => {
                self.sparse_map =
                    Some(value.split(|byte| *byte == b',').map(decimal).collect::<Result<_, _>>()?)
            }
            _ => {}
        }
        Ok(())
    }
}

/// `seconds[.fraction]`, possibly negative.
fn pax_time(value: &[u8]) -> Result<(i64, u32), TarError> {
    let bad = || TarError::Header("PAX time");
    let text = std::str::from_utf8(value).map_err(|_| bad())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let seconds: i64 = whole.parse().map_err(|_| bad())?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().map_err(|_| bad())?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Ok((seconds.checked_sub(1).ok_or_else(bad)?, 1_000_000_000 - nanoseconds));
    }
    Ok((seconds, nanoseconds))
}

/// Checks that a map lies within the file, ascends, and describes exactly the data that follows.
fn sparse(size: u64, map: &[u64], data: u64) -> Result<Sparse, TarError> {
    let bad = || TarError::Header("sparse map");
    if !map.len().is_multiple_of(2) {
        return Err(bad());
    }
    let mut segments = Vec::with_capacity(map.len() / 2);
    let (mut end, mut sum) = (0u64, 0u64);
    for piece in map.chunks_exact(2) {
        let (offset, length) = (piece[0], piece[1]);
        if offset < end {
            return Err(bad());
        }
        end = offset.checked_add(length).ok_or_else(bad)?;
        sum = sum.checked_add(length).ok_or_else(bad)?;
        if length > 0 {
            segments.push((offset, length));
        }
    }
    if end > size || sum != data {
        return Err(bad());
    }
    Ok(Sparse { size, segments })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
        let mut reader = Reader::new(bytes);
        let mut found = Vec::new();
        while let Some(entry) = reader.next()? {
            let mut data = Vec::new();
            reader.read_to_end(&mut data)?;
            found.push((entry, data));
        }
        Ok(found)
    }

    fn header(name: &str, kind: u8, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(3);
        header.set_cksum();
        header
    }

    fn with(parts: &[(&str, u8, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, kind, data) in parts {
            bytes.extend_from_slice(header(name, *kind, data.len() as u64).as_bytes());
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        }
        bytes.resize(bytes.len() + 2 * BLOCK, 0);
        bytes
    }

    fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while length != body + length.to_string().len() {
                length = body + length.to_string().len();
            }
            bytes.extend_from_slice(format!("{length} {key}=").as_bytes());
            bytes.extend_from_slice(value);
            bytes.push(b'\n');
        }
        bytes
    }

    #[test]
    fn plain_entries_are_read() {
        let found = entries(&with(&[("a", b'0', b"hello"), ("d/", b'5', b""), ("d/b", b'0', &[7; 1000])]))
            .expect("a tar");
        let names: Vec<_> =
            found.iter().map(|(entry, data)| (entry.path.as_slice(), entry.kind, data.len())).collect();
        assert_eq!(
            names,
            [
                (&b"a"[..], EntryKind::File, 5),
                (b"d/", EntryKind::Directory, 0),
                (b"d/b", EntryKind::File, 1000)
            ]
        );
        let (first, data) = &found[0];
        assert_eq!(
            (first.mode, first.uid, first.gid, first.mtime, data.as_slice()),
            (0o644, 1, 2, (3, 0), &b"hello"[..])
        );
    }

    #[test]
    fn what_gnu_tar_writes_is_read() {
        let long = "n".repeat(150);
        let link = "l".repeat(200);
        let mut builder = tar::Builder::new(Vec::new());
        let mut long_file = header("", b'0', 3);
        builder.append_data(&mut long_file, &long, &b"abc"[..]).expect("append");
        let mut symlink = tar::Header::new_gnu();
        symlink.set_entry_type(tar::EntryType::Symlink);
        symlink.set_size(0);
        symlink.set_uid(3_000_000_000);
        builder.append_link(&mut symlink, "s", &link).expect("append");
        let found = entries(&builder.into_inner().expect("a tar")).expect("a tar");
        assert_eq!((found[0].0.path.as_slice(), found[0].1.as_slice()), (long.as_bytes(), &b"abc"[..]));
        assert_eq!(
            (found[1].0.kind, found[1].0.link.as_slice(), found[1].0.uid),
            (EntryKind::Symlink, link.as_bytes(), 3_000_000_000)
        );
    }

    #[test]
    fn pax_records_override_the_header() {
        let records = pax(&[
            ("path", "ein/langer/Name ü".as_bytes()),
            ("mtime", b"-1.5"),
            ("uid", b"4000000000"),
            ("SCHILY.xattr.user.x", b"a\0b\nc"),
            ("unknown", b"x"),
        ]);
        let found = entries(&with(&[("", b'x', &records), ("short", b'0', b"data"), ("next", b'0', b"")]))
            .expect("a tar");
        let (entry, data) = &found[0];
        assert_eq!(entry.path, "ein/langer/Name ü".as_bytes());
        assert_eq!(
            (entry.mtime, entry.uid, data.as_slice()),
            ((-2, 500_000_000), 4_000_000_000, &b"data"[..])
        );
        assert_eq!(entry.xattrs, [(b"user.x".to_vec(), b"a\0b\nc".to_vec())]);
        assert_eq!(found[1].0.path, b"next", "records hold for one entry only");
    }

    #[test]
    fn sparse_files_of_every_dialect_have_the_same_map() {
        let expected = Sparse { size: 5000, segments: vec![(0, 3), (4096, 2)] };
        let map = |records: &[(&str, &[u8])], data: &[u8]| {
            let found = entries(&with(&[("", b'x', &pax(records)), ("f", b'0', data)])).expect("a tar");
            assert_eq!(found[0].0.sparse.as_ref(), Some(&expected));
            assert_eq!(found[0].1, b"abcde");
        };
        map(
            &[
                ("GNU.sparse.size", b"5000"),
                ("GNU.sparse.offset", b"0"),
                ("GNU.sparse.numbytes", b"3"),
                ("GNU.sparse.offset", b"4096"),
                ("GNU.sparse.numbytes", b"2"),
            ],
            b"abcde",
        );
        map(&[("GNU.sparse.size", b"5000"), ("GNU.sparse.map", b"0,3,4096,2")], b"abcde");
        let mut data = b"2\n0\n3\n4096\n2\n".to_vec();
        data.resize(BLOCK, 0);
        data.extend_from_slice(b"abcde");
        map(
            &[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"5000")],
            &data,
        );

        let mut old = header("f", b'S', 5);
        let bytes = old.as_mut_bytes();
        bytes[386..398].copy_from_slice(b"00000000000\0");
        bytes[398..410].copy_from_slice(b"00000000003\0");
        bytes[410..422].copy_from_slice(b"00000010000\0");
        bytes[422..434].copy_from_slice(b"00000000002\0");
        bytes[483..495].copy_from_slice(b"00000011610\0");
        old.set_cksum();
        let mut bytes = old.as_bytes().to_vec();
        bytes.extend_from_slice(b"abcde");
        bytes.resize(2 * BLOCK, 0);
        let found = entries(&bytes).expect("a tar");
        assert_eq!(found[0].0.sparse.as_ref(), Some(&expected));
    }

    #[test]
    fn a_sparse_map_that_lies_is_refused() {
        for map in ["0,3,4096", "0,3,1,2", "0,3,4999,2", "0,3,4096,3", "0,18446744073709551615,1,1"] {
            let records = pax(&[("GNU.sparse.size", b"5000"), ("GNU.sparse.map", map.as_bytes())]);
            assert!(entries(&with(&[("", b'x', &records), ("f", b'0', b"abcde")])).is_err(), "{map}");
        }
    }

    #[test]
    fn truncated_and_damaged_archives_are_refused() {
        let whole = with(&[("a", b'0', b"hello")]);
        assert!(matches!(entries(&whole[..100]), Err(TarError::Truncated)));
        assert!(matches!(entries(&whole[..515]), Err(TarError::Truncated)));
        let mut damaged = whole.clone();
        damaged[0] ^= 1;
        assert!(matches!(entries(&damaged), Err(TarError::Header("checksum"))));
        assert!(matches!(entries(&with(&[("a", b'Z', b"")])), Err(TarError::Type('Z'))));
        assert!(entries(&[]).expect("an empty input is an empty archive").is_empty());
    }

    #[test]
    fn what_an_archive_says_about_itself_is_bounded() {
        let huge = header("x", b'L', 10 << 30);
        assert!(matches!(entries(huge.as_bytes()), Err(TarError::Metadata)));
        let endless = with(&[("x", b'L', b"name".as_slice()); 20]);
        assert!(matches!(entries(&endless), Err(TarError::Metadata)));
    }

    #[test]
    fn numbers_in_base_256_are_read() {
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]).expect("a number"), 256);
        assert_eq!(number(&[0xff; 12]).expect("a number"), -1);
        assert!(number(&[0x80, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_headers_do_not_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), kind in any::<u8>()) {
            if bytes.len() >= BLOCK {
                bytes[156] = kind;
                let sum: u32 = bytes[..BLOCK].iter().enumerate().map(|(index, byte)| if (148..156).contains(&index) { 32 } else { u32::from(*byte) }).sum();
                bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            let _found = entries(&bytes);
        }

        #[test]
        fn arbitrary_pax_records_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _extended = parse_pax(&bytes);
        }
    }
}

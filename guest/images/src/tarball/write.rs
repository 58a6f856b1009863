//! Writes tar streams as Docker does: ustar headers, with a PAX header before an entry that does not fit one. The same
//! entries give the same bytes, always: layers are named by the digest of their tar.

use std::io::{self, Write};

use super::{BLOCK, Entry, EntryKind, padding};

/// The largest numbers that the octal fields of a header hold.
const ID_MAX: u32 = 0o7_777_777;
const SIZE_MAX: u64 = 0o77_777_777_777;
const NAME_BYTES: usize = 100;

/// Writes one archive, entry by entry.
pub(crate) struct Writer<W> {
    output: W,
    /// Data of the current entry that has not come yet.
    remaining: u64,
    padding: u64,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(output: W) -> Self {
        Self { output, remaining: 0, padding: 0 }
    }

    /// Begins an entry; of a file, `entry.size` bytes of data follow by [`Writer::data`]. Times are in whole seconds.
    pub(crate) fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        self.complete()?;
        let size = if entry.kind == EntryKind::File { entry.size } else { 0 };
        let mut path = entry.path.clone();
        if entry.kind == EntryKind::Directory && !path.ends_with(b"/") {
            path.push(b'/');
        }
        let records = records(entry, &path, size);
        if !records.is_empty() {
            let header = Header {
                path: &pax_name(&path),
                kind: b'x',
                size: records.len() as u64,
                mode: 0,
                uid: 0,
                gid: 0,
                seconds: 0,
                link: b"",
                device: None,
            };
            self.output.write_all(&header.bytes())?;
            self.output.write_all(&records)?;
            self.pad(padding(records.len() as u64))?;
        }
        let device = matches!(entry.kind, EntryKind::CharDevice | EntryKind::BlockDevice);
        let header = Header {
            path: &path,
            kind: kind(entry.kind),
            size,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            seconds: entry.mtime.0,
            link: &entry.link,
            device: device.then_some(entry.device),
        };
        self.output.write_all(&header.bytes())?;
        (self.remaining, self.padding) = (size, padding(size));
        Ok(())
    }

    /// The next bytes of the entry's data. More than it has is refused.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        let rest = self.remaining.checked_sub(bytes.len() as u64);
        self.remaining = rest.ok_or_else(|| io::Error::other("more data than the entry was said to have"))?;
        self.output.write_all(bytes)
    }

    /// Zeroes for the part of the data that has not come: a file may shrink while it is read.
    fn complete(&mut self) -> io::Result<()> {
        let rest = std::mem::take(&mut self.remaining);
        self.zeroes(rest)?;
        let padding = std::mem::take(&mut self.padding);
        self.pad(padding)
    }

    /// `count` zeroes of the entry's data: a hole.
    pub(crate) fn hole(&mut self, count: u64) -> io::Result<()> {
        let rest = self.remaining.checked_sub(count);
        self.remaining = rest.ok_or_else(|| io::Error::other("more data than the entry was said to have"))?;
        self.zeroes(count)
    }

    fn zeroes(&mut self, mut count: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        while count > 0 {
            let step = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROES.len());
            self.output.write_all(&ZEROES[..step])?;
            count -= step as u64;
        }
        Ok(())
    }

    fn pad(&mut self, count: u64) -> io::Result<()> {
        self.zeroes(count)
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.complete()?;
        self.zeroes(2 * BLOCK as u64)?;
        self.output.flush()?;
        Ok(self.output)
    }
}

fn kind(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::File => b'0',
        EntryKind::HardLink => b'1',
        EntryKind::Symlink => b'2',
        EntryKind::CharDevice => b'3',
        EntryKind::BlockDevice => b'4',
        EntryKind::Directory => b'5',
        EntryKind::Fifo => b'6',
    }
}

/// The name of a PAX header, as Go's `archive/tar` makes it; it is only seen by readers that do not know PAX.
fn pax_name(path: &[u8]) -> Vec<u8> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let slash = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    let mut name = [&path[..slash], b"PaxHeaders.0/", &path[slash..]].concat();
    name.truncate(NAME_BYTES);
    name
}

/// What does not fit into the header. Sorted by key, as Go writes them.
fn records(entry: &Entry, path: &[u8], size: u64) -> Vec<u8> {
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut put = |key: &[u8], value: &[u8]| records.push((key.to_vec(), value.to_vec()));
    if entry.gid > ID_MAX {
        put(b"gid", entry.gid.to_string().as_bytes());
    }
    if entry.link.len() > NAME_BYTES {
        put(b"linkpath", &entry.link);
    }
    if u64::try_from(entry.mtime.0).map_or(true, |seconds| seconds > SIZE_MAX) {
        put(b"mtime", entry.mtime.0.to_string().as_bytes());
    }
    if path.len() > NAME_BYTES {
        put(b"path", path);
    }
    if size > SIZE_MAX {
        put(b"size", size.to_string().as_bytes());
    }
    if entry.uid > ID_MAX {
        put(b"uid", entry.uid.to_string().as_bytes());
    }
    for (name, value) in &entry.xattrs {
        put(&[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    records.sort();
    let mut bytes = Vec::new();
    for (key, value) in records {
        // The length counts its own digits.
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        bytes.extend_from_slice(length.to_string().as_bytes());
        bytes.push(b' ');
        bytes.extend_from_slice(&key);
        bytes.push(b'=');
        bytes.extend_from_slice(&value);
        bytes.push(b'\n');
    }
    bytes
}

struct Header<'a> {
    path: &'a [u8],
    kind: u8,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    seconds: i64,
    link: &'a [u8],
    device: Option<(u32, u32)>,
}

impl Header<'_> {
    fn bytes(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let text = |block: &mut [u8; BLOCK], at: usize, text: &[u8]| {
            let length = text.len().min(NAME_BYTES);
            block[at..at + length].copy_from_slice(&text[..length]);
        };
        // What is too large is in a PAX record; 0 stands here.
        let octal = |block: &mut [u8; BLOCK], at: usize, digits: usize, value: u64| {
            let value = if value < 1 << (3 * digits) { value } else { 0 };
            block[at..at + digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
        };
        text(&mut block, 0, self.path);
        octal(&mut block, 100, 7, u64::from(self.mode & 0o7777));
        octal(&mut block, 108, 7, u64::from(self.uid));
        octal(&mut block, 116, 7, u64::from(self.gid));
        octal(&mut block, 124, 11, self.size);
        octal(&mut block, 136, 11, u64::try_from(self.seconds).unwrap_or(0));
        block[156] = self.kind;
        text(&mut block, 157, self.link);
        block[257..265].copy_from_slice(b"ustar\x0000");
        let (major, minor) = self.device.unwrap_or((0, 0));
        octal(&mut block, 329, 7, u64::from(major));
        octal(&mut block, 337, 7, u64::from(minor));
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
        block[154] = 0;
        block
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::super::Reader;
    use super::*;

    fn entry(kind: EntryKind, path: &[u8], size: u64) -> Entry {
        Entry {
            kind,
            path: path.to_vec(),
            link: Vec::new(),
            mode: 0o4755,
            uid: 1000,
            gid: 3_000_000_000,
            mtime: (1_700_000_000, 0),
            device: (0, 0),
            xattrs: Vec::new(),
            size,
            sparse: None,
        }
    }

    fn written(entries: &[(Entry, Vec<u8>)]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (entry, data) in entries {
            writer.entry(entry).expect("written");
            writer.data(data).expect("written");
        }
        writer.finish().expect("written")
    }

    #[test]
    fn what_does_not_fit_a_header_goes_before_it() {
        let mut long = entry(EntryKind::File, "ü".repeat(90).as_bytes(), 3);
        long.mtime = (-5, 0);
        long.xattrs = vec![(b"security.capability".to_vec(), vec![0, 10, 255])];
        let mut link = entry(EntryKind::Symlink, b"l", 0);
        link.link = vec![b'x'; 150];
        let mut device = entry(EntryKind::CharDevice, b"null", 0);
        device.device = (1, 3);
        let folder = entry(EntryKind::Directory, b"d", 0);
        let bytes = written(&[
            (long.clone(), b"abc".to_vec()),
            (link.clone(), Vec::new()),
            (device, Vec::new()),
            (folder, Vec::new()),
        ]);
        assert_eq!(bytes.len() % BLOCK, 0);
        let mut reader = Reader::new(&bytes[..]);
        let read = reader.next().expect("a tar").expect("an entry");
        assert_eq!((read.path, read.mtime, read.xattrs), (long.path, long.mtime, long.xattrs));
        assert_eq!((read.mode, read.uid, read.gid), (0o4755, 1000, 3_000_000_000));
        let mut data = Vec::new();
        reader.read_to_end(&mut data).expect("data");
        assert_eq!(data, b"abc");
        assert_eq!(reader.next().expect("a tar").expect("an entry").link, link.link);
        assert_eq!(reader.next().expect("a tar").expect("an entry").device, (1, 3));
        assert_eq!(reader.next().expect("a tar").expect("an entry").path, b"d/");
        assert!(reader.next().expect("a tar").is_none());
        // And the reader that others use agrees.
        let mut archive = tar::Archive::new(&bytes[..]);
        let count = archive.entries().expect("a tar").filter(|entry| entry.is_ok()).count();
        assert_eq!(count, 4);
    }

    #[test]
    fn data_that_stops_short_is_filled_up_and_too_much_is_refused() {
        let mut writer = Writer::new(Vec::new());
        writer.entry(&entry(EntryKind::File, b"f", 600)).expect("written");
        writer.data(b"abc").expect("written");
        writer.entry(&entry(EntryKind::File, b"g", 1)).expect("written");
        assert!(writer.data(b"xy").is_err());
        writer.hole(1).expect("written");
        let bytes = writer.finish().expect("written");
        let mut reader = Reader::new(&bytes[..]);
        assert_eq!(reader.next().expect("a tar").expect("an entry").size, 600);
        assert_eq!(reader.next().expect("a tar").expect("an entry").path, b"g");
    }

    #[test]
    fn an_empty_archive_is_dockers_empty_layer() {
        let bytes = written(&[]);
        let digest = crate::Digest::of(&bytes).to_string();
        assert_eq!(digest, "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            path in proptest::collection::vec(1u8.., 1..300),
            mode in 0u32..0o10000,
            uid: u32,
            seconds in -(1i64 << 40)..(1 << 40),
            value in proptest::collection::vec(any::<u8>(), 1..50),
            data in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut given = entry(EntryKind::File, &path, data.len() as u64);
            (given.mode, given.uid, given.mtime) = (mode, uid, (seconds, 0));
            given.xattrs = vec![(b"user.x".to_vec(), value)];
            let bytes = written(&[(given.clone(), data.clone())]);
            let mut reader = Reader::new(&bytes[..]);
            let read = reader.next().expect("a tar").expect("an entry");
            prop_assert_eq!(read.path, given.path);
            prop_assert_eq!((read.mode, read.uid, read.mtime, read.xattrs), (mode, uid, (seconds, 0), given.xattrs));
            let mut again = Vec::new();
            reader.read_to_end(&mut again).expect("data");
            prop_assert_eq!(again, data);
        }
    }
}

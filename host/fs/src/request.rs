//! Requests as the guest's kernel sends them: bytes in, a checked [`Operation`] out.
//!
//! Nothing is copied and nothing allocated; what the guest claims about lengths is checked against the bytes there are.

use std::ffi::CStr;

use rustix::io::Errno;

/// Length of the header every request begins with (`fuse_in_header`).
pub const HEADER_BYTES: usize = 40;
/// Length of the header of a write with its arguments; the data follows.
pub const WRITE_HEAD_BYTES: usize = HEADER_BYTES + 40;
/// The longest request that is no write: an extended attribute's name and value.
pub const REQUEST_BYTES_MAX: usize = 160 << 10;

const WRITE: u32 = 16;
const FSYNC: u32 = 20;
const FSYNC_FOLDER: u32 = 30;
const FALLOCATE: u32 = 43;
const COPY_FILE_RANGE: u32 = 47;
const SYNC_FS: u32 = 50;

/// Names are at most this long (`NAME_MAX`).
const NAME_BYTES_MAX: usize = 255;
/// Targets of symbolic links are at most this long (`PATH_MAX`, with the zero).
const TARGET_BYTES_MAX: usize = 4096;

/// Whether the request that begins with these bytes is a write, whose data need not be read with it.
pub fn is_write(header: &[u8]) -> bool {
    opcode(header) == Some(WRITE)
}

/// Whether the request that begins with these bytes may wait for a disk for long.
pub fn is_slow(header: &[u8]) -> bool {
    matches!(opcode(header), Some(FSYNC | FSYNC_FOLDER | FALLOCATE | COPY_FILE_RANGE | SYNC_FS))
}

fn opcode(header: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(header.get(4..8)?.try_into().ok()?))
}

/// What every request says (`fuse_in_header`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub opcode: u32,
    pub unique: u64,
    /// The file or folder it is about.
    pub node: u64,
    /// Who asks, in the guest.
    pub uid: u32,
    pub gid: u32,
    /// The thread, as the namespace numbers it in which the share is mounted; 0 for the kernel's own.
    pub process: u32,
}

/// One component of a path: not empty, no slash, neither `.` nor `..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(pub &'a CStr);

/// `fuse_setattr_in`; what is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub handle: Option<u64>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub accessed: Option<Time>,
    pub modified: Option<Time>,
    /// Take the set-user and set-group bits away, for what was written by somebody without the right to keep them.
    pub drop_privileges: bool,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    Now,
    At { seconds: u64, nanoseconds: u32 },
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    Init {
        major: u32,
        minor: u32,
        readahead: u32,
        flags: u64,
    },
    Destroy,
    Lookup {
        name: Name<'a>,
    },
    Forget {
        count: u64,
    },
    /// Pairs of node and count, 16 bytes each.
    BatchForget {
        list: &'a [u8],
    },
    GetAttributes {
        handle: Option<u64>,
    },
    SetAttributes(Changes),
    ReadLink,
    SymbolicLink {
        name: Name<'a>,
        target: &'a CStr,
    },
    MakeNode {
        name: Name<'a>,
        mode: u32,
    },
    MakeFolder {
        name: Name<'a>,
        mode: u32,
    },
    Unlink {
        name: Name<'a>,
    },
    RemoveFolder {
        name: Name<'a>,
    },
    Rename {
        from: Name<'a>,
        folder: u64,
        to: Name<'a>,
        flags: u32,
    },
    Link {
        node: u64,
        name: Name<'a>,
    },
    Open {
        flags: u32,
        drop_privileges: bool,
    },
    Create {
        name: Name<'a>,
        flags: u32,
        mode: u32,
    },
    /// A file without a name in a folder (`O_TMPFILE`).
    CreateUnnamed {
        flags: u32,
        mode: u32,
    },
    Read {
        handle: u64,
        offset: u64,
        size: u32,
    },
    Write {
        handle: u64,
        offset: u64,
        size: u32,
        drop_privileges: bool,
    },
    StatFs,
    Release {
        handle: u64,
    },
    Flush {
        handle: u64,
    },
    Sync {
        handle: u64,
        data_only: bool,
    },
    SyncFs,
    SetXattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
    },
    GetXattr {
        name: &'a CStr,
        size: u32,
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a CStr,
    },
    OpenFolder,
    ReadFolder {
        handle: u64,
        offset: u64,
        size: u32,
        plus: bool,
    },
    Allocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Seek {
        handle: u64,
        offset: u64,
        whence: u32,
    },
    Copy {
        from: u64,
        from_offset: u64,
        to: u64,
        to_offset: u64,
        length: u64,
        flags: u64,
    },
    /// Answered by nobody: what it would interrupt does not wait.
    Interrupt,
    /// Of a kind we do not do; the guest's kernel then does without.
    Unsupported,
}

/// Reads the header.
pub fn header(bytes: &[u8]) -> Option<Header> {
    let mut reader = Reader(bytes);
    let _length = reader.u32().ok()?;
    let header = Header {
        opcode: reader.u32().ok()?,
        unique: reader.u64().ok()?,
        node: reader.u64().ok()?,
        uid: reader.u32().ok()?,
        gid: reader.u32().ok()?,
        process: reader.u32().ok()?,
    };
    reader.skip(4).ok()?;
    Some(header)
}

/// Reads what follows the header, for a request of this kind. Of a write that is its arguments without the data.
pub fn operation(opcode: u32, bytes: &[u8]) -> Result<Operation<'_>, Errno> {
    let mut reader = Reader(bytes);
    let reader = &mut reader;
    Ok(match opcode {
        1 => Operation::Lookup { name: reader.name()? },
        2 => Operation::Forget { count: reader.u64()? },
        3 => {
            let flags = reader.u32()?;
            reader.skip(4)?;
            let handle = reader.u64()?;
            Operation::GetAttributes { handle: (flags & 1 != 0).then_some(handle) }
        }
        4 => Operation::SetAttributes(changes(reader)?),
        5 => Operation::ReadLink,
        6 => Operation::SymbolicLink { name: reader.name()?, target: reader.text(TARGET_BYTES_MAX)? },
        8 => {
            let mode = reader.u32()?;
            reader.skip(12)?;
            Operation::MakeNode { name: reader.name()?, mode }
        }
        9 => {
            let mode = reader.u32()?;
            reader.skip(4)?;
            Operation::MakeFolder { name: reader.name()?, mode }
        }
        10 => Operation::Unlink { name: reader.name()? },
        11 => Operation::RemoveFolder { name: reader.name()? },
        12 => {
            let folder = reader.u64()?;
            Operation::Rename { from: reader.name()?, folder, to: reader.name()?, flags: 0 }
        }
        13 => Operation::Link { node: reader.u64()?, name: reader.name()? },
        14 => Operation::Open { flags: reader.u32()?, drop_privileges: reader.u32()? & 1 != 0 },
        15 => {
            let (handle, offset, size) = (reader.u64()?, reader.u64()?, reader.u32()?);
            Operation::Read { handle, offset, size }
        }
        WRITE => {
            let (handle, offset, size) = (reader.u64()?, reader.u64()?, reader.u32()?);
            Operation::Write { handle, offset, size, drop_privileges: reader.u32()? & 4 != 0 }
        }
        17 => Operation::StatFs,
        18 | 29 => Operation::Release { handle: reader.u64()? },
        FSYNC | FSYNC_FOLDER => {
            let handle = reader.u64()?;
            Operation::Sync { handle, data_only: reader.u32()? & 1 != 0 }
        }
        21 => {
            let (size, flags) = (reader.u32()? as usize, reader.u32()?);
            let name = reader.text(NAME_BYTES_MAX + 1)?;
            Operation::SetXattr { name, value: reader.take(size)?, flags }
        }
        22 => {
            let size = reader.u32()?;
            reader.skip(4)?;
            Operation::GetXattr { name: reader.text(NAME_BYTES_MAX + 1)?, size }
        }
        23 => Operation::ListXattr { size: reader.u32()? },
        24 => Operation::RemoveXattr { name: reader.text(NAME_BYTES_MAX + 1)? },
        25 => Operation::Flush { handle: reader.u64()? },
        26 => init(reader)?,
        27 => Operation::OpenFolder,
        28 | 44 => {
            let (handle, offset, size) = (reader.u64()?, reader.u64()?, reader.u32()?);
            Operation::ReadFolder { handle, offset, size, plus: opcode == 44 }
        }
        35 => {
            let (flags, mode) = (reader.u32()?, reader.u32()?);
            reader.skip(8)?;
            Operation::Create { name: reader.name()?, flags, mode }
        }
        36 => Operation::Interrupt,
        38 => Operation::Destroy,
        42 => {
            let count = reader.u32()? as usize;
            reader.skip(4)?;
            let length = count.checked_mul(16).ok_or(Errno::INVAL)?;
            Operation::BatchForget { list: reader.take(length)? }
        }
        FALLOCATE => Operation::Allocate {
            handle: reader.u64()?,
            offset: reader.u64()?,
            length: reader.u64()?,
            mode: reader.u32()?,
        },
        45 => {
            let (folder, flags) = (reader.u64()?, reader.u32()?);
            reader.skip(4)?;
            Operation::Rename { from: reader.name()?, folder, to: reader.name()?, flags }
        }
        46 => Operation::Seek { handle: reader.u64()?, offset: reader.u64()?, whence: reader.u32()? },
        COPY_FILE_RANGE => {
            let (from, from_offset) = (reader.u64()?, reader.u64()?);
            let _node = reader.u64()?;
            let (to, to_offset) = (reader.u64()?, reader.u64()?);
            Operation::Copy { from, from_offset, to, to_offset, length: reader.u64()?, flags: reader.u64()? }
        }
        SYNC_FS => Operation::SyncFs,
        51 => Operation::CreateUnnamed { flags: reader.u32()?, mode: reader.u32()? },
        _ => Operation::Unsupported,
    })
}

fn init<'a>(reader: &mut Reader<'a>) -> Result<Operation<'a>, Errno> {
    let (major, minor, readahead) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let low = u64::from(reader.u32()?);
    // Kernels before 7.36 end here.
    let high = if low & super::server::INIT_EXTENDED != 0 { u64::from(reader.u32()?) } else { 0 };
    Ok(Operation::Init { major, minor, readahead, flags: high << 32 | low })
}

fn changes(reader: &mut Reader<'_>) -> Result<Changes, Errno> {
    let valid = reader.u32()?;
    reader.skip(4)?;
    let (handle, size) = (reader.u64()?, reader.u64()?);
    reader.skip(8)?;
    let (accessed, modified) = (reader.u64()?, reader.u64()?);
    reader.skip(8)?;
    let (accessed_nanoseconds, modified_nanoseconds) = (reader.u32()?, reader.u32()?);
    reader.skip(4)?;
    let mode = reader.u32()?;
    reader.skip(4)?;
    let (uid, gid) = (reader.u32()?, reader.u32()?);
    let has = |bit: u32| valid & 1 << bit != 0;
    let time = |set: u32, now: u32, seconds, nanoseconds| match (has(now), has(set)) {
        (true, _) => Some(Time::Now),
        (false, true) => Some(Time::At { seconds, nanoseconds }),
        (false, false) => None,
    };
    Ok(Changes {
        handle: has(6).then_some(handle),
        mode: has(0).then_some(mode),
        uid: has(1).then_some(uid),
        gid: has(2).then_some(gid),
        size: has(3).then_some(size),
        accessed: time(4, 7, accessed, accessed_nanoseconds),
        modified: time(5, 8, modified, modified_nanoseconds),
        drop_privileges: has(11),
    })
}

/// Takes values off the front of bytes; what is not there is `EINVAL`.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (front, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(front)
    }

    fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.take(count).map(drop)
    }

    fn u32(&mut self) -> Result<u32, Errno> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self) -> Result<u64, Errno> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*bytes))
    }

    /// A text that ends in zero, the zero counted.
    fn text(&mut self, bytes_max: usize) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        let length = text.to_bytes_with_nul().len();
        if length > bytes_max {
            return Err(Errno::NAMETOOLONG);
        }
        self.skip(length)?;
        Ok(text)
    }

    fn name(&mut self) -> Result<Name<'a>, Errno> {
        let name = self.text(NAME_BYTES_MAX + 1)?;
        is_component(name.to_bytes()).then_some(Name(name)).ok_or(Errno::INVAL)
    }
}

/// Whether a text without zeroes is one component of a path that leads down.
pub fn is_component(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.contains(&b'/')
}

/// The pairs of node and count in the list of a [`Operation::BatchForget`].
pub fn forgets(list: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    let (pairs, _) = list.as_chunks::<16>();
    pairs.iter().map(|pair| {
        let (node, count) = pair.split_at(8);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        (number(node), number(count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for bad in [&b"..\0"[..], b".\0", b"\0", b"a/b\0", b"/\0", b"unterminated", b""] {
            assert_eq!(operation(1, bad), Err(Errno::INVAL), "{bad:?}");
        }
        let mut long = vec![b'x'; 256];
        long.push(0);
        assert_eq!(operation(1, &long), Err(Errno::NAMETOOLONG));
        assert_eq!(operation(1, &long[1..]).map(drop), Ok(()));
        assert_eq!(operation(1, b"...\0"), Ok(Operation::Lookup { name: Name(c"...") }));
    }

    #[test]
    fn a_rename_has_two_names() {
        let mut bytes = 7u64.to_le_bytes().to_vec();
        bytes.extend([2, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(b"old\0new\0");
        let expected = Operation::Rename { from: Name(c"old"), folder: 7, to: Name(c"new"), flags: 2 };
        assert_eq!(operation(45, &bytes), Ok(expected));
        assert_eq!(operation(45, &bytes[..bytes.len() - 5]), Err(Errno::INVAL));
    }

    #[test]
    fn a_value_shorter_than_claimed_is_refused() {
        let mut bytes = 5u32.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(b"user.a\0four");
        assert_eq!(operation(21, &bytes), Err(Errno::INVAL));
        bytes.push(b's');
        let expected = Operation::SetXattr { name: c"user.a", value: b"fours", flags: 0 };
        assert_eq!(operation(21, &bytes), Ok(expected));
    }

    #[test]
    fn forgets_are_pairs() {
        let mut list = Vec::new();
        for number in [3u64, 1, u64::MAX, 2] {
            list.extend(number.to_le_bytes());
        }
        assert_eq!(forgets(&list).collect::<Vec<_>>(), [(3, 1), (u64::MAX, 2)]);
        let mut request = u32::MAX.to_le_bytes().to_vec();
        request.extend([0; 4]);
        request.extend(&list);
        assert_eq!(operation(42, &request), Err(Errno::INVAL));
    }
}

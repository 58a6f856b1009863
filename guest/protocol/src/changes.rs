//! Changes made outside the machine in folders that it shares, for the guest to repeat so that its own kernel tells of them.
//!
//! The stream ([`crate::port::CHANGES`]) begins with the guest's [`hello`]: the number of the thread that repeats. Then the
//! host sends batches: a length in four bytes, and as many bytes of records. The first one is empty and says that the host
//! watches. The guest answers each batch with one byte when it is done with it. The folders to be watched are those that the
//! repeating thread has open. Before it repeats the change with number N of a batch it looks [`announcement`] up in the root
//! of the share ([`crate::share::MOUNT`]), which fails with `ENOENT`.

/// The longest batch.
pub const BATCH_BYTES_MAX: usize = 256 << 10;

/// What the guest answers a batch with.
pub const DONE: u8 = 1;

/// What a new file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file with data.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A named pipe.
    Pipe,
    /// A socket's name.
    Socket,
}

const KINDS: [Kind; 5] = [Kind::File, Kind::Folder, Kind::Link, Kind::Pipe, Kind::Socket];

/// What happened to a file under its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touch {
    /// Its data changed.
    pub modified: bool,
    /// Somebody who had it open for writing closed it.
    pub closed: bool,
    /// Its owner, permissions, times or attributes changed.
    pub attributes: bool,
}

impl Touch {
    fn bits(self) -> u8 {
        u8::from(self.modified) | u8::from(self.closed) << 1 | u8::from(self.attributes) << 2
    }

    fn from_bits(bits: u8) -> Option<Self> {
        let has = |bit: u8| bits >> bit & 1 == 1;
        (bits < 8).then(|| Self { modified: has(0), closed: has(1), attributes: has(2) })
    }
}

/// A name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The folder's inode number in the guest.
    pub inode: u64,
    /// The folder, from the root of the share down. No zero bytes.
    pub folder: Vec<u8>,
    /// One path component; empty for the folder itself. No zero bytes.
    pub name: Vec<u8>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A name is new, and then this happened to the file.
    Appeared(Kind, Touch),
    /// This happened to a file.
    Touched(Touch),
    /// A name has gone.
    Vanished {
        /// It was a folder's.
        folder: bool,
    },
    /// A file has another name, which may have been another's.
    Renamed {
        /// It is a folder.
        folder: bool,
        /// The name it has now.
        to: Spot,
    },
    /// There was more in this folder than could be kept.
    Lost,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The name it is about.
    pub at: Spot,
    /// The file's inode number in the guest, if the guest knows the file; else 0.
    pub inode: u64,
    /// What happened.
    pub what: What,
}

/// A batch that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("changes of shared folders end early or are of an unknown kind")]
pub struct Malformed;

/// What the guest begins with.
pub fn hello(thread: u32) -> [u8; 4] {
    thread.to_le_bytes()
}

/// The thread of a [`hello`].
pub fn thread(hello: [u8; 4]) -> u32 {
    u32::from_le_bytes(hello)
}

const ANNOUNCEMENT: &str = ".change-";
const APART: &str = "-apart";

/// The name that says which change of the batch is repeated next. `apart`: a renaming as a going and a coming, because one of
/// the names is known in the guest as what it will be.
pub fn announcement(index: usize, apart: bool) -> String {
    format!("{ANNOUNCEMENT}{index}{}", if apart { APART } else { "" })
}

/// Reads an [`announcement`]; `None` for any other name.
pub fn announced(name: &[u8]) -> Option<(usize, bool)> {
    let number = std::str::from_utf8(name).ok()?.strip_prefix(ANNOUNCEMENT)?;
    match number.strip_suffix(APART) {
        Some(number) => Some((number.parse().ok()?, true)),
        None => Some((number.parse().ok()?, false)),
    }
}

impl Change {
    /// Adds the record of this change to a batch.
    pub fn encode(&self, batch: &mut Vec<u8>) {
        let (what, detail, to) = match &self.what {
            What::Appeared(kind, touch) => {
                let kind = KINDS.iter().position(|known| known == kind).unwrap_or_default() as u8;
                (0, kind << 3 | touch.bits(), None)
            }
            What::Touched(touch) => (1, touch.bits(), None),
            What::Vanished { folder } => (2, u8::from(*folder), None),
            What::Renamed { folder, to } => (3, u8::from(*folder), Some(to)),
            What::Lost => (4, 0, None),
        };
        batch.extend([what, detail]);
        batch.extend(self.inode.to_le_bytes());
        for spot in [Some(&self.at), to].into_iter().flatten() {
            batch.extend(spot.inode.to_le_bytes());
            for text in [&spot.folder, &spot.name] {
                batch.extend(text);
                batch.push(0);
            }
        }
    }
}

/// Reads all records of a batch.
pub fn decode(mut batch: &[u8]) -> Result<Vec<Change>, Malformed> {
    let mut changes = Vec::new();
    while let Some(([what, detail], rest)) = batch.split_first_chunk() {
        batch = rest;
        let inode = number(&mut batch)?;
        let at = spot(&mut batch)?;
        let flag = || match detail {
            0 | 1 => Ok(*detail == 1),
            _ => Err(Malformed),
        };
        let what = match what {
            0 => {
                let kind = KINDS.get(usize::from(detail >> 3)).copied().ok_or(Malformed)?;
                What::Appeared(kind, Touch::from_bits(detail & 7).ok_or(Malformed)?)
            }
            1 => What::Touched(Touch::from_bits(*detail).ok_or(Malformed)?),
            2 => What::Vanished { folder: flag()? },
            3 => What::Renamed { folder: flag()?, to: spot(&mut batch)? },
            4 if *detail == 0 => What::Lost,
            _ => return Err(Malformed),
        };
        changes.push(Change { at, inode, what });
    }
    if batch.is_empty() { Ok(changes) } else { Err(Malformed) }
}

fn number(bytes: &mut &[u8]) -> Result<u64, Malformed> {
    let (number, rest) = bytes.split_first_chunk().ok_or(Malformed)?;
    *bytes = rest;
    Ok(u64::from_le_bytes(*number))
}

fn spot(bytes: &mut &[u8]) -> Result<Spot, Malformed> {
    let inode = number(bytes)?;
    let mut text = || {
        let end = bytes.iter().position(|byte| *byte == 0).ok_or(Malformed)?;
        let text = bytes[..end].to_vec();
        *bytes = &bytes[end + 1..];
        Ok(text)
    };
    Ok(Spot { inode, folder: text()?, name: text()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_spot() -> impl Strategy<Value = Spot> {
        let text = || prop::collection::vec(1u8.., 0..20);
        (any::<u64>(), text(), text()).prop_map(|(inode, folder, name)| Spot { inode, folder, name })
    }

    fn any_change() -> impl Strategy<Value = Change> {
        let touch = || (0u8..8).prop_map(|bits| Touch::from_bits(bits).unwrap());
        let what = prop_oneof![
            (prop::sample::select(&KINDS[..]), touch()).prop_map(|(kind, touch)| What::Appeared(kind, touch)),
            touch().prop_map(What::Touched),
            any::<bool>().prop_map(|folder| What::Vanished { folder }),
            (any::<bool>(), any_spot()).prop_map(|(folder, to)| What::Renamed { folder, to }),
            Just(What::Lost),
        ];
        (any_spot(), any::<u64>(), what).prop_map(|(at, inode, what)| Change { at, inode, what })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(changes in prop::collection::vec(any_change(), 0..8)) {
            let mut batch = Vec::new();
            changes.iter().for_each(|change| change.encode(&mut batch));
            prop_assert_eq!(decode(&batch), Ok(changes));
            if !batch.is_empty() {
                prop_assert_eq!(decode(&batch[..batch.len() - 1]), Err(Malformed));
            }
        }

        #[test]
        fn whatever_is_read_is_written_the_same(batch in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(changes) = decode(&batch) {
                let mut again = Vec::new();
                changes.iter().for_each(|change| change.encode(&mut again));
                prop_assert_eq!(again, batch);
            }
        }
    }

    #[test]
    fn announcements_are_no_other_names() {
        assert_eq!(announced(announcement(17, false).as_bytes()), Some((17, false)));
        assert_eq!(announced(announcement(0, true).as_bytes()), Some((0, true)));
        for other in [&b".change-"[..], b".change-x", b"share0", b".change-1-apart-apart", b"\xff"] {
            assert_eq!(announced(other), None, "{other:?}");
        }
    }
}

//! The guest's side: requests as its kernel writes them.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;

use crate::ExportSpec;
use crate::fuzz::Bytes;
use crate::reply::Reply;
use crate::saved::Saved;
use crate::server::{Room, Server};

/// Room for an answer, as a kernel leaves it.
const ROOM_BYTES: usize = 1 << 17;

/// So many files may a server have open.
const DESCRIPTORS_MAX: usize = 1 << 12;

/// What a lookup answers, as far as tests look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub attributes: Shown,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    pub number: u64,
    pub size: u64,
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
}

pub struct Guest {
    pub server: Arc<Server>,
    /// Who asks.
    pub uid: u32,
    pub gid: u32,
    /// The thread that asks.
    pub process: u32,
}

pub struct Space(pub Vec<u8>);

impl Room for Space {
    fn remaining(&self) -> usize {
        ROOM_BYTES - self.0.len()
    }

    fn read_at(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize> {
        let mut bytes = vec![0; count];
        let count = rustix::io::pread(file, &mut bytes, offset)?;
        self.0.extend(&bytes[..count]);
        Ok(count)
    }
}

/// A name as it is sent.
pub fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

pub fn create_body(name: &str, flags: u32, mode: u32) -> Vec<u8> {
    let mut body = Vec::new();
    for word in [flags, mode, 0, 0] {
        body.extend(word.to_le_bytes());
    }
    body.extend(text(name));
    body
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn shown(bytes: &[u8]) -> Shown {
    Shown {
        number: number(bytes, 0),
        size: number(bytes, 8),
        mode: word(bytes, 60),
        links: word(bytes, 64),
        uid: word(bytes, 68),
        gid: word(bytes, 72),
    }
}

fn entry(bytes: &[u8]) -> Entry {
    Entry { node: number(bytes, 0), attributes: shown(&bytes[40..]) }
}

impl Guest {
    pub fn new() -> Self {
        Self::with_descriptors(DESCRIPTORS_MAX)
    }

    /// Of a server that may have few files open.
    pub fn with_descriptors(descriptors_max: usize) -> Self {
        Self { server: Arc::new(Server::new(descriptors_max)), uid: 0, gid: 0, process: 1 }
    }

    /// The same guest in a machine that was saved and goes on with another server, which has these exports.
    pub fn moved(&self, specs: impl IntoIterator<Item = ExportSpec>) -> Self {
        let saved = serde_json::to_string(&self.server.save().unwrap()).unwrap();
        let guest = Self { server: Arc::new(Server::new(DESCRIPTORS_MAX)), ..*self };
        for spec in specs {
            guest.server.add(spec).unwrap();
        }
        let saved: Saved = serde_json::from_str(&saved).unwrap();
        guest.server.restore(&saved).unwrap();
        // What came of it is kept as it was, but for what could not be found.
        assert_eq!(guest.server.save().unwrap().last_file, saved.last_file);
        guest
    }

    fn request(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut request = ((40 + body.len()) as u32).to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(1u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        for word in [self.uid, self.gid, self.process, 0] {
            request.extend(word.to_le_bytes());
        }
        request.extend(body);
        request
    }

    /// Asks; an answer without bytes is empty.
    pub fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut space = Space(Vec::new());
        match self.server.handle(&self.request(opcode, node, body), &mut Bytes(&[]), &mut space) {
            Reply::None => Ok(Vec::new()),
            Reply::Error(error) => Err(error),
            Reply::Bytes(bytes) => Ok(bytes),
            Reply::Data(count) => {
                assert_eq!(count, space.0.len());
                Ok(space.0)
            }
        }
    }

    pub fn lookup(&self, parent: u64, name: &str) -> Result<Entry, Errno> {
        self.ask(1, parent, &text(name)).map(|answer| entry(&answer))
    }

    pub fn forget(&self, node: u64, count: u64) {
        assert_eq!(self.ask(2, node, &count.to_le_bytes()), Ok(Vec::new()));
    }

    pub fn attributes(&self, node: u64) -> Result<Shown, Errno> {
        self.ask(3, node, &[0; 16]).map(|answer| shown(&answer[16..]))
    }

    /// Changes what a file is; `valid` says which fields count.
    pub fn change(
        &self,
        node: u64,
        valid: u32,
        (mode, uid, gid, size): (u32, u32, u32, u64),
    ) -> Result<Shown, Errno> {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&valid.to_le_bytes());
        body[16..24].copy_from_slice(&size.to_le_bytes());
        body[68..72].copy_from_slice(&mode.to_le_bytes());
        body[76..80].copy_from_slice(&uid.to_le_bytes());
        body[80..84].copy_from_slice(&gid.to_le_bytes());
        self.ask(4, node, &body).map(|answer| shown(&answer[16..]))
    }

    /// Changes the size by an open file.
    pub fn truncate(&self, node: u64, handle: u64, size: u64) -> Result<Shown, Errno> {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&u32::to_le_bytes(1 << 3 | 1 << 6));
        body[8..16].copy_from_slice(&handle.to_le_bytes());
        body[16..24].copy_from_slice(&size.to_le_bytes());
        self.ask(4, node, &body).map(|answer| shown(&answer[16..]))
    }

    pub fn create(&self, parent: u64, name: &str, flags: u32, mode: u32) -> Result<(Entry, u64), Errno> {
        let answer = self.ask(35, parent, &create_body(name, flags, mode))?;
        Ok((entry(&answer), number(&answer, 128)))
    }

    pub fn create_unnamed(&self, parent: u64, mode: u32) -> Result<(Entry, u64), Errno> {
        let answer = self.ask(51, parent, &create_body("", 2, mode))?;
        Ok((entry(&answer), number(&answer, 128)))
    }

    pub fn make_folder(&self, parent: u64, name: &str, mode: u32) -> Result<Entry, Errno> {
        let body = [mode.to_le_bytes().to_vec(), vec![0; 4], text(name)].concat();
        self.ask(9, parent, &body).map(|answer| entry(&answer))
    }

    pub fn make_node(&self, parent: u64, name: &str, mode: u32) -> Result<Entry, Errno> {
        let body = [mode.to_le_bytes().to_vec(), vec![0; 12], text(name)].concat();
        self.ask(8, parent, &body).map(|answer| entry(&answer))
    }

    pub fn symbolic_link(&self, parent: u64, name: &str, target: &str) -> Result<Entry, Errno> {
        self.ask(6, parent, &[text(name), text(target)].concat()).map(|answer| entry(&answer))
    }

    pub fn link(&self, node: u64, parent: u64, name: &str) -> Result<Entry, Errno> {
        let body = [node.to_le_bytes().to_vec(), text(name)].concat();
        self.ask(13, parent, &body).map(|answer| entry(&answer))
    }

    pub fn unlink(&self, parent: u64, name: &str) -> Result<(), Errno> {
        self.ask(10, parent, &text(name)).map(drop)
    }

    pub fn remove_folder(&self, parent: u64, name: &str) -> Result<(), Errno> {
        self.ask(11, parent, &text(name)).map(drop)
    }

    pub fn rename(
        &self,
        (from_folder, from): (u64, &str),
        (to_folder, to): (u64, &str),
        flags: u32,
    ) -> Result<(), Errno> {
        let mut body = to_folder.to_le_bytes().to_vec();
        body.extend(flags.to_le_bytes());
        body.extend([0; 4]);
        body.extend(text(from));
        body.extend(text(to));
        self.ask(45, from_folder, &body).map(drop)
    }

    /// Opens a file; its handle.
    pub fn open(&self, node: u64, flags: u32) -> Result<u64, Errno> {
        self.open_cached(node, flags).map(|(handle, _)| handle)
    }

    /// Opens a file; its handle, and whether cached pages may be kept.
    pub fn open_cached(&self, node: u64, flags: u32) -> Result<(u64, bool), Errno> {
        let answer = self.ask(14, node, &[flags.to_le_bytes(), [0; 4]].concat())?;
        Ok((number(&answer, 0), word(&answer, 8) & 2 != 0))
    }

    pub fn read(&self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(size.to_le_bytes());
        body.resize(40, 0);
        self.ask(15, 2, &body)
    }

    pub fn write(&self, handle: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        self.write_with(handle, offset, data, 0)
    }

    pub fn write_with(&self, handle: u64, offset: u64, data: &[u8], flags: u32) -> Result<u32, Errno> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend((data.len() as u32).to_le_bytes());
        body.extend(flags.to_le_bytes());
        body.resize(40, 0);
        let request = self.request(16, 2, &body);
        match self.server.handle(&request, &mut Bytes(data), &mut Space(Vec::new())) {
            Reply::Bytes(bytes) => Ok(word(&bytes, 0)),
            Reply::Error(error) => Err(error),
            other => panic!("{other:?}"),
        }
    }

    pub fn release(&self, handle: u64) {
        self.ask(18, 2, &[&handle.to_le_bytes()[..], &[0; 16]].concat()).unwrap();
    }

    /// Request with a handle, an offset and a length, such as those of `fallocate`.
    pub fn with_range(
        &self,
        opcode: u32,
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Result<Vec<u8>, Errno> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(mode.to_le_bytes());
        body.extend([0; 4]);
        self.ask(opcode, 2, &body)
    }

    /// All names in a folder, read in small pieces.
    pub fn names(&self, folder: u64) -> Vec<String> {
        let handle = self.open_folder(folder);
        let names = self.names_in(handle);
        self.ask(29, folder, &[&handle.to_le_bytes()[..], &[0; 16]].concat()).unwrap();
        names
    }

    /// Opens a folder; its handle.
    pub fn open_folder(&self, folder: u64) -> u64 {
        number(&self.ask(27, folder, &[0; 8]).unwrap(), 0)
    }

    /// All names in an open folder.
    pub fn names_in(&self, handle: u64) -> Vec<String> {
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let answer = self.read_folder(28, handle, offset, 100);
            if answer.is_empty() {
                break;
            }
            for (name, next) in entries(&answer) {
                names.push(name);
                offset = next;
            }
        }
        names.sort();
        names
    }

    /// Names with what they lead to, in one piece.
    pub fn names_plus(&self, folder: u64) -> Vec<(String, Entry)> {
        let handle = self.open_folder(folder);
        let mut answer = &self.read_folder(44, handle, 0, 1 << 16)[..];
        let mut names = Vec::new();
        while !answer.is_empty() {
            let (name, _) = entries(&answer[128..]).next().unwrap();
            names.push((name.clone(), entry(answer)));
            answer = &answer[128 + (24 + name.len()).next_multiple_of(8)..];
        }
        names.sort_by(|one, other| one.0.cmp(&other.0));
        names
    }

    fn read_folder(&self, opcode: u32, handle: u64, offset: u64, size: u32) -> Vec<u8> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(size.to_le_bytes());
        body.resize(40, 0);
        self.ask(opcode, 2, &body).unwrap()
    }
}

/// The names in an answer, each with where to go on.
fn entries(mut answer: &[u8]) -> impl Iterator<Item = (String, u64)> {
    std::iter::from_fn(move || {
        if answer.is_empty() {
            return None;
        }
        let length = word(answer, 16) as usize;
        let name = String::from_utf8(answer[24..24 + length].to_vec()).unwrap();
        let next = number(answer, 8);
        answer = &answer[(24 + length).next_multiple_of(8)..];
        Some((name, next))
    })
}

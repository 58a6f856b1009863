//! The fuzz target's entry: a guest that says anything, against a folder with something in it.

use std::io;
use std::os::fd::BorrowedFd;

use crate::{CachePolicy, ExportSpec, Owners, Payload, Room, Server};

/// A write's data in memory.
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl Payload for Bytes<'_> {
    fn remaining(&self) -> usize {
        self.0.len()
    }

    fn write_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let count = rustix::io::pwrite(file, self.0, offset)?;
        self.0 = &self.0[count..];
        Ok(count)
    }
}

struct Space(usize);

impl Room for Space {
    fn remaining(&self) -> usize {
        self.0
    }

    fn read_at(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize> {
        let mut bytes = vec![0; count.min(self.0)];
        let count = rustix::io::pread(file, &mut bytes, offset)?;
        self.0 -= count;
        Ok(count)
    }
}

/// Feeds requests to a server that shares `folder`: each begins with its length in two bytes.
pub fn requests(folder: &std::path::Path, mut data: &[u8]) {
    let server = Server::new(64);
    for (name, read_only) in [("a", false), ("b", true)] {
        let spec = ExportSpec {
            name: name.into(),
            path: folder.to_owned(),
            read_only,
            cache: CachePolicy::default(),
            owners: Owners::of_process(),
        };
        if server.add(spec).is_err() {
            return;
        }
    }
    while let Some((length, rest)) = data.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (request, rest) = rest.split_at(length);
        data = rest;
        let (head, payload) = match crate::is_write(request) {
            true => request.split_at(request.len().min(crate::WRITE_HEAD_BYTES)),
            false => (request, &[][..]),
        };
        let _answer = server.handle(head, &mut Bytes(payload), &mut Space(4096));
    }
}

//! The fuzz targets' entries: a guest that says anything, against a folder with something in it. Nothing may change beside it.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::saved::{Saved, SavedFile, SavedHandle};
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

/// Has `feed` work on a folder to share, and panics when something has changed beside it.
///
/// # Panics
///
/// Also when there is no place for files.
pub fn in_scratch(feed: impl FnOnce(&Path)) {
    let memory = Path::new("/dev/shm");
    let within = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let scratch = within.join(format!("engine-fuzz-fs-{}", std::process::id()));
    let (canary, shared) = (scratch.join("canary"), scratch.join("shared"));
    fs::create_dir_all(shared.join("folder")).expect("a folder to share");
    std::os::unix::fs::symlink(&scratch, shared.join("up")).expect("a link that leads up");
    fs::write(shared.join("file"), "inside").expect("a file");
    fs::write(&canary, "outside").expect("a file beside what is shared");
    feed(&shared);
    assert_eq!(fs::read(&canary).expect("the file outside"), b"outside");
    assert_eq!(fs::read_dir(&scratch).expect("the scratch folder").count(), 2, "something appeared outside");
    fs::remove_dir_all(&scratch).expect("the scratch folder can be removed");
}

/// Feeds requests to a server that shares `folder`: each begins with its length in two bytes.
pub fn requests(folder: &Path, data: &[u8]) {
    if let Some(server) = server(folder) {
        serve(&server, data);
    }
}

/// Feeds a saved state to such a server, which names files in and beside `folder`, and then requests.
pub fn saved(folder: &Path, mut data: &[u8]) {
    let Some(server) = server(folder) else { return };
    let mut byte = || {
        let (first, rest) = data.split_first().unwrap_or((&0, &[]));
        data = rest;
        usize::from(*first)
    };
    let files = (0..byte() % 8).map(|_| {
        let at = ["", "file", "folder", "up", "..", "../canary"][byte() % 6];
        let stat = rustix::fs::lstat(folder.join(at)).ok();
        let name = ["a", "b", "file", "folder", "up", "canary", "..", ""][byte() % 8];
        SavedFile {
            number: byte() as u64 % 10,
            export: ["a", "b", "c"][byte() % 3].to_owned(),
            device: stat.map_or(0, |stat| stat.st_dev),
            inode: stat.map_or(0, |stat| stat.st_ino),
            kind: [0o100000, 0o040000, 0o120000, 0][byte() % 4],
            lookups: byte() as u64,
            place: (byte() as u64 % 10, name.into()),
        }
    });
    let files: Vec<SavedFile> = files.collect();
    let handles = (0..byte() % 8).map(|_| SavedHandle {
        number: byte() as u64 % 10,
        file: byte() as u64 % 10,
        flags: Some(byte() as u32).filter(|flags| *flags < 200),
    });
    let handles: Vec<SavedHandle> = handles.collect();
    let state = Saved { devices: vec![byte() as u64], files, last_file: 8, handles, last_handle: 8 };
    match server.restore(&state) {
        Ok(()) => serve(&server, data),
        Err(_) => assert_eq!(server.held(), (0, 0), "something is left of a refused state"),
    }
}

/// A server of two exports.
fn server(folder: &Path) -> Option<Server> {
    let server = Server::new(64);
    for (name, read_only) in [("a", false), ("b", true)] {
        let spec = ExportSpec {
            name: name.into(),
            path: folder.to_owned(),
            read_only,
            cache: CachePolicy::default(),
            owners: Owners::of_process(),
        };
        server.add(spec).ok()?;
    }
    Some(server)
}

fn serve(server: &Server, mut data: &[u8]) {
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

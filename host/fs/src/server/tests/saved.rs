//! A machine that is saved, and goes on with another server.

use std::fs;

use rustix::io::Errno;

use super::guest::Guest;
use super::{ROOT, folder, spec};
use crate::ExportSpec;
use crate::saved::{Saved, SavedFile, SavedHandle};

#[test]
fn what_is_known_and_open_goes_on() {
    let inside = folder();
    let guest = Guest::new();
    guest.server.add(spec("one", inside.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let deep = guest.make_folder(root, "deep", 0o755).unwrap();
    let (file, handle) = guest.create(deep.node, "file", 2, 0o644).unwrap();
    guest.write(handle, 0, b"before").unwrap();
    let listing = guest.open_folder(deep.node);
    let top = guest.open_folder(ROOT);

    let guest = guest.moved([spec("one", inside.path())]);
    assert_eq!(guest.server.held(), (3, 3));
    let shown = guest.attributes(file.node).unwrap();
    assert_eq!((shown.number, shown.size), (file.attributes.number, 6));
    guest.write(handle, 6, b" and after").unwrap();
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"before and after");
    assert_eq!(guest.names_in(listing), [".", "..", "file"]);
    assert_eq!(guest.names_in(top), [".", "..", "one"]);
    // Lookups are counted on, and numbers of files and handles are never given twice.
    assert_eq!(guest.lookup(deep.node, "file").unwrap().node, file.node);
    guest.forget(file.node, 1);
    assert!(guest.attributes(file.node).is_ok());
    let second = guest.open(file.node, 0).unwrap();
    assert!(second > top);
    for handle in [handle, second, listing, top] {
        guest.release(handle);
    }
    guest.forget(file.node, 1);
    assert_eq!(guest.attributes(file.node).unwrap_err(), Errno::STALE);
    assert!(guest.lookup(deep.node, "file").unwrap().node > file.node);
}

#[test]
fn what_is_not_there_any_more_is_stale_and_nothing_else() {
    let (inside, other) = (folder(), folder());
    let guest = Guest::new();
    guest.server.add(spec("one", inside.path())).unwrap();
    guest.server.add(spec("two", other.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let made =
        ["kept", "replaced", "moved", "unlinked"].map(|name| guest.create(root, name, 2, 0o644).unwrap());
    guest.unlink(root, "unlinked").unwrap();
    let two = guest.lookup(ROOT, "two").unwrap().node;
    let (gone, gone_handle) = guest.create(two, "gone", 2, 0o644).unwrap();

    fs::rename(inside.path().join("moved"), inside.path().join("elsewhere")).unwrap();
    fs::rename(inside.path().join("replaced"), inside.path().join("aside")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", inside.path().join("replaced")).unwrap();
    let guest = guest.moved([spec("one", inside.path())]);
    let [(kept, handle), lost @ ..] = made;
    guest.write(handle, 0, b"kept").unwrap();
    assert_eq!(guest.attributes(kept.node).unwrap().size, 4);
    for (entry, handle) in lost.into_iter().chain([(gone, gone_handle)]) {
        assert_eq!(guest.attributes(entry.node).unwrap_err(), Errno::STALE);
        assert_eq!(guest.open(entry.node, 2).unwrap_err(), Errno::STALE);
        assert_eq!(guest.write(handle, 0, b"x").unwrap_err(), Errno::BADF);
    }
    assert_eq!(guest.lookup(two, "gone").unwrap_err(), Errno::STALE);
    // Found by its new name it is the file it was.
    assert_eq!(guest.lookup(root, "elsewhere").unwrap().node, lost[1].0.node);
}

#[test]
fn a_share_that_is_read_only_now_is_not_written_by_what_was_open() {
    let inside = folder();
    let guest = Guest::new();
    guest.server.add(spec("one", inside.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let (file, writing) = guest.create(root, "file", 2, 0o644).unwrap();
    guest.write(writing, 0, b"x").unwrap();
    let reading = guest.open(file.node, 0).unwrap();
    let guest = guest.moved([ExportSpec { read_only: true, ..spec("one", inside.path()) }]);
    assert_eq!(guest.write(writing, 0, b"y").unwrap_err(), Errno::BADF);
    assert_eq!(guest.read(reading, 0, 9).unwrap(), b"x");
}

/// A state says where a file is, and it is still only found below the share, and only as what it is.
#[test]
fn a_made_up_state_opens_nothing_else() {
    let (inside, outside) = (folder(), folder());
    fs::write(outside.path().join("canary"), "outside").unwrap();
    fs::create_dir(inside.path().join("way")).unwrap();
    std::os::unix::fs::symlink(outside.path(), inside.path().join("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        inside.path().join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    let identity = |path: std::path::PathBuf| {
        let stat = rustix::fs::lstat(path).unwrap();
        (stat.st_dev, stat.st_ino)
    };
    let file = |number, at: std::path::PathBuf, folder, name: &str, kind| {
        let (device, inode) = identity(at);
        let place = (folder, name.as_bytes().to_vec());
        SavedFile { number, export: "one".into(), device, inode, kind, lookups: 1, place }
    };
    let (regular, folder_kind) = (0o100000, 0o040000);
    let files = vec![
        file(2, inside.path().into(), ROOT, "one", folder_kind),
        // Through a link, and a folder that is above itself.
        file(3, inside.path().join("link"), 2, "link", folder_kind),
        file(4, outside.path().join("canary"), 3, "canary", regular),
        file(5, inside.path().join("way"), 5, "way", folder_kind),
        file(6, outside.path().into(), 5, "x", folder_kind),
        file(7, inside.path().join("pipe"), 2, "pipe", regular),
    ];
    let handles = (2..8).map(|file| SavedHandle { number: file, file, flags: Some(2) }).collect();
    let saved = Saved { files, last_file: 7, handles, last_handle: 7, ..Saved::default() };
    let guest = Guest::new();
    guest.server.add(spec("one", inside.path())).unwrap();
    guest.server.restore(&saved).unwrap();
    for number in 3..8 {
        assert_eq!(guest.attributes(number).unwrap_err(), Errno::STALE, "{number}");
        assert_eq!(guest.read(number, 0, 9).unwrap_err(), Errno::BADF, "{number}");
    }
    // The share itself is a folder.
    assert_eq!(guest.read(2, 0, 9).unwrap_err(), Errno::BADF);
}

#[test]
fn what_no_server_has_saved_is_refused() {
    let inside = folder();
    let guest = Guest::new();
    guest.server.add(spec("one", inside.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let (_, handle) = guest.create(root, "file", 2, 0o644).unwrap();
    let saved = guest.server.save().unwrap();
    let check = |change: &dyn Fn(&mut Saved), expected: &str| {
        let mut changed = saved.clone();
        change(&mut changed);
        let error = guest.server.restore(&changed).expect_err(expected).to_string();
        assert_eq!(error, format!("the saved state of the shared folders makes no sense: {expected}"));
        assert_eq!(guest.server.held(), (0, 0));
    };
    check(&|saved| saved.files[0].number = ROOT, "a file has a number that was never given");
    check(&|saved| saved.last_file = 2, "a file has a number that was never given");
    check(&|saved| saved.files[0].lookups = 0, "a file was never looked up");
    check(&|saved| saved.files.push(saved.files[0].clone()), "a file is there twice");
    check(&|saved| saved.files[1].number = saved.files[0].number, "a file is there twice");
    for name in ["", "..", ".", "a/b", "a\0b"] {
        check(&|saved| saved.files[1].place = (2, name.into()), "a file has no name of a file");
    }
    check(&|saved| saved.last_handle = 0, "an open file has a number that was never given");
    check(&|saved| saved.handles.push(saved.handles[0]), "an open file is there twice");
    check(&|saved| saved.devices = vec![0; 5000], "there are more devices than a host has");
    guest.server.restore(&saved).unwrap();
    guest.write(handle, 0, b"x").unwrap();
}

//! Files, folders, links and attributes.

use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::io::Errno;

use super::guest::{Guest, text};
use super::{ROOT, folder, spec};
use crate::ExportSpec;

/// Open for reading and writing.
const BOTH: u32 = 2;

pub(super) fn shared() -> (tempfile::TempDir, Guest, u64) {
    let folder = folder();
    let guest = Guest::new();
    guest.server.add(spec("one", folder.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    (folder, guest, root)
}

#[test]
fn what_one_side_writes_the_other_reads() {
    let (folder, guest, root) = shared();
    let (file, handle) = guest.create(root, "file", BOTH, 0o640).unwrap();
    assert_eq!(guest.write(handle, 0, b"from the guest"), Ok(14));
    assert_eq!(std::fs::read(folder.path().join("file")).unwrap(), b"from the guest");
    let on_host = std::fs::OpenOptions::new().write(true).open(folder.path().join("file")).unwrap();
    on_host.write_all_at(b"host!", 9).unwrap();
    assert_eq!(guest.read(handle, 5, 100).unwrap(), b"the host!");
    assert_eq!(guest.attributes(file.node).unwrap().size, 14);
    assert_eq!(guest.attributes(file.node).unwrap().mode, 0o100640);
    assert_eq!(guest.read(handle, 14, 1).unwrap(), b"");
    guest.release(handle);
    assert_eq!(guest.read(handle, 0, 1).unwrap_err(), Errno::BADF);
}

#[test]
fn a_cache_is_kept_only_while_nobody_else_writes() {
    let (folder, guest, root) = shared();
    let path = folder.path().join("file");
    std::fs::write(&path, "one").unwrap();
    let file = guest.lookup(root, "file").unwrap().node;
    assert!(!guest.open_cached(file, 0).unwrap().1, "the guest has nothing of it yet");
    assert!(guest.open_cached(file, 0).unwrap().1);
    std::fs::write(&path, "three").unwrap();
    assert!(!guest.open_cached(file, 0).unwrap().1);
    assert!(guest.open_cached(file, 0).unwrap().1);
}

#[test]
fn a_file_outlives_its_name_while_it_is_open() {
    let (_folder, guest, root) = shared();
    let (file, handle) = guest.create(root, "file", BOTH, 0o600).unwrap();
    guest.write(handle, 0, b"kept").unwrap();
    guest.unlink(root, "file").unwrap();
    assert_eq!(guest.lookup(root, "file").unwrap_err(), Errno::NOENT);
    assert_eq!(guest.read(handle, 0, 10).unwrap(), b"kept");
    assert_eq!(guest.attributes(file.node).unwrap().links, 0);
    // It can even be opened again, by what the kernel still knows.
    let again = guest.open(file.node, 0).unwrap();
    assert_eq!(guest.read(again, 0, 10).unwrap(), b"kept");
    assert_eq!(guest.change(file.node, 1 << 3, (0, 0, 0, 2)).unwrap().size, 2);
}

#[test]
fn renaming_over_an_open_file_leaves_that_as_it_was() {
    let (_folder, guest, root) = shared();
    let (_, old) = guest.create(root, "config", BOTH, 0o600).unwrap();
    let (new, handle) = guest.create(root, "config.tmp", BOTH, 0o600).unwrap();
    guest.write(old, 0, b"old").unwrap();
    guest.write(handle, 0, b"new").unwrap();
    guest.rename((root, "config.tmp"), (root, "config"), 0).unwrap();
    assert_eq!(guest.read(old, 0, 3).unwrap(), b"old");
    assert_eq!(guest.lookup(root, "config").unwrap().node, new.node);
    guest.create(root, "other", BOTH, 0o600).unwrap();
    assert_eq!(guest.rename((root, "other"), (root, "config"), 1).unwrap_err(), Errno::EXIST);
    guest.rename((root, "other"), (root, "config"), 2).unwrap();
    assert_eq!(guest.lookup(root, "other").unwrap().node, new.node);
    assert_eq!(guest.rename((root, "other"), (root, "x"), 4).unwrap_err(), Errno::INVAL);
}

#[test]
fn folders_are_listed_in_pieces_and_with_what_is_in_them() {
    let (folder, guest, root) = shared();
    let mut expected = vec![".".to_owned(), "..".to_owned()];
    for number in 0..300 {
        let name = format!("a file with a name of some length {number:03}");
        std::fs::write(folder.path().join(&name), "x").unwrap();
        expected.push(name);
    }
    assert_eq!(guest.names(root), expected);
    let before = guest.server.held().0;
    let all = guest.names_plus(root);
    assert_eq!(all.len(), 302);
    assert!(all[2..].iter().all(|(_, entry)| entry.node > ROOT && entry.attributes.size == 1));
    assert_eq!((all[0].1.node, all[1].1.node), (0, 0));
    // Each entry counts as a lookup.
    assert_eq!(guest.server.held().0, before + 300);
    guest.forget(all[2].1.node, 1);
    assert_eq!(guest.server.held().0, before + 299);
}

#[test]
fn hard_links_are_one_file() {
    let (folder, guest, root) = shared();
    let (file, handle) = guest.create(root, "one", BOTH, 0o600).unwrap();
    let below = guest.make_folder(root, "below", 0o755).unwrap().node;
    let link = guest.link(file.node, below, "two").unwrap();
    assert_eq!((link.node, link.attributes.links), (file.node, 2));
    guest.write(handle, 0, b"x").unwrap();
    assert_eq!(std::fs::read(folder.path().join("below/two")).unwrap(), b"x");
    assert_eq!(guest.link(below, root, "loop").unwrap_err(), Errno::PERM);
    // A link to a link is one to the link, not to what it leads to.
    let symbolic = guest.symbolic_link(root, "symbolic", "one").unwrap();
    let linked = guest.link(symbolic.node, root, "symbolic2").unwrap();
    assert_eq!(linked.node, symbolic.node);
}

#[test]
fn a_file_without_a_name_can_be_given_one() {
    let (folder, guest, root) = shared();
    let (file, handle) = guest.create_unnamed(root, 0o644).unwrap();
    guest.write(handle, 0, b"whole").unwrap();
    assert_eq!(guest.names(root), [".", ".."]);
    guest.link(file.node, root, "at once").unwrap();
    assert_eq!(std::fs::read(folder.path().join("at once")).unwrap(), b"whole");
}

#[test]
fn case_and_unicode_are_kept() {
    let (folder, guest, root) = shared();
    for name in ["README", "readme", "straße", "e\u{301}", "\u{e9}", "名前", " ", "a\nb"] {
        let (file, _) = guest.create(root, name, BOTH, 0o600).unwrap();
        assert_eq!(guest.lookup(root, name).unwrap().node, file.node);
        assert!(folder.path().join(name).exists());
    }
    assert_eq!(guest.names(root).len(), 10);
}

#[test]
fn space_is_allocated_punched_sought_and_copied() {
    let (folder, guest, root) = shared();
    let (_, handle) = guest.create(root, "file", BOTH, 0o600).unwrap();
    guest.with_range(43, handle, 0, 1 << 20, 0).unwrap();
    assert_eq!(std::fs::metadata(folder.path().join("file")).unwrap().len(), 1 << 20);
    guest.write(handle, 0, &[7; 8192]).unwrap();
    let (_, copy) = guest.create(root, "copy", BOTH, 0o600).unwrap();
    let mut body = Vec::new();
    for value in [handle, 4096, 0, copy, 100, 50, 0] {
        body.extend(value.to_le_bytes());
    }
    assert_eq!(guest.ask(47, 2, &body).unwrap()[0], 50);
    assert_eq!(guest.read(copy, 99, 10).unwrap(), [0, 7, 7, 7, 7, 7, 7, 7, 7, 7]);
    assert_eq!(guest.with_range(43, handle, 0, 10, 0x8000).unwrap_err(), Errno::OPNOTSUPP);
    assert!(guest.ask(20, 2, &[&handle.to_le_bytes()[..], &[0; 8]].concat()).is_ok());
}

#[test]
fn attributes_of_users_are_kept_and_others_refused() {
    let (folder, guest, root) = shared();
    let (file, _) = guest.create(root, "file", BOTH, 0o600).unwrap();
    let set = |name: &str, value: &[u8]| {
        let mut body = (value.len() as u32).to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(text(name));
        body.extend(value);
        guest.ask(21, file.node, &body)
    };
    let get = |name: &str, size: u32| {
        let body = [size.to_le_bytes().to_vec(), vec![0; 4], text(name)].concat();
        guest.ask(22, file.node, &body)
    };
    set("user.mime", b"text").unwrap();
    assert_eq!(get("user.mime", 0).unwrap()[..4], 4u32.to_le_bytes());
    assert_eq!(get("user.mime", 100).unwrap(), b"text");
    assert_eq!(get("user.mime", 2).unwrap_err(), Errno::RANGE);
    assert_eq!(get("user.none", 100).unwrap_err(), Errno::NODATA);
    for own in
        ["security.capability", "trusted.overlay.opaque", "system.posix_acl_access", "user.engine.owner"]
    {
        assert_eq!(set(own, b"0:0:4777:600").unwrap_err(), Errno::OPNOTSUPP, "{own}");
        assert_eq!(get(own, 100).unwrap_err(), Errno::OPNOTSUPP, "{own}");
    }
    let path = folder.path().join("file");
    rustix::fs::setxattr(&path, "user.engine.owner", b"1:1:644:600", rustix::fs::XattrFlags::empty())
        .unwrap();
    assert_eq!(guest.ask(23, file.node, &[100, 0, 0, 0, 0, 0, 0, 0]).unwrap(), b"user.mime\0");
    guest.ask(24, file.node, &text("user.mime")).unwrap();
    assert_eq!(guest.ask(24, file.node, &text("user.engine.owner")).unwrap_err(), Errno::OPNOTSUPP);
}

#[test]
fn what_is_shared_to_be_read_is_not_changed() {
    let one = folder();
    std::fs::write(one.path().join("file"), "x").unwrap();
    std::fs::create_dir(one.path().join("sub")).unwrap();
    let guest = Guest::new();
    guest.server.add(ExportSpec { read_only: true, ..spec("one", one.path()) }).unwrap();
    guest.server.add(spec("two", one.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let file = guest.lookup(root, "file").unwrap().node;
    let handle = guest.open(file, 0).unwrap();
    assert_eq!(guest.read(handle, 0, 9).unwrap(), b"x");
    let refused = [
        guest.open(file, 1).map(drop),
        guest.open(file, BOTH).map(drop),
        guest.create(root, "new", BOTH, 0o600).map(drop),
        guest.create_unnamed(root, 0o600).map(drop),
        guest.make_folder(root, "new", 0o700).map(drop),
        guest.make_node(root, "new", 0o010600).map(drop),
        guest.symbolic_link(root, "new", "x").map(drop),
        guest.link(file, root, "new").map(drop),
        guest.unlink(root, "file"),
        guest.remove_folder(root, "sub"),
        guest.rename((root, "file"), (root, "new"), 0),
        guest.change(file, 1, (0o777, 0, 0, 0)).map(drop),
        guest.change(file, 1 << 3, (0, 0, 0, 0)).map(drop),
        guest.write(handle, 0, b"y").map(drop),
        guest.with_range(43, handle, 0, 100, 0).map(drop),
    ];
    assert!(refused.iter().all(|result| *result == Err(Errno::ROFS)), "{refused:?}");
    // Nor by way of another export that has the same files and may be written to.
    let other = guest.lookup(ROOT, "two").unwrap().node;
    assert_eq!(guest.link(file, other, "new").unwrap_err(), Errno::ROFS);
    assert_eq!(guest.rename((other, "file"), (root, "new"), 0).unwrap_err(), Errno::ROFS);
    assert_eq!(std::fs::metadata(one.path().join("file")).unwrap().nlink(), 1);
}

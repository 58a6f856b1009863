//! A guest that knows more files than the server may have open.

use std::fs;

use rustix::io::Errno;

use super::guest::Guest;
use super::{ROOT, folder, spec};

/// A share whose server may have few files open.
fn tight(descriptors_max: usize) -> (tempfile::TempDir, Guest, u64) {
    let folder = folder();
    let guest = Guest::with_descriptors(descriptors_max);
    guest.server.add(spec("one", folder.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    (folder, guest, root)
}

/// Makes the server close what it can.
fn crowd(guest: &Guest, root: u64) {
    for number in 0..400 {
        guest.make_node(root, &format!("crowd{number}"), 0o100644).unwrap();
    }
}

#[test]
fn a_hundred_thousand_files_are_known_by_a_few_descriptors() {
    const FOLDERS: usize = 100;
    const FILES: usize = 1_000;
    let (inside, guest, root) = tight(256);
    let mut known = Vec::new();
    for number in 0..FOLDERS {
        let path = inside.path().join(format!("d{number}"));
        fs::create_dir(&path).unwrap();
        // Links are the cheapest files.
        for file in 0..FILES {
            std::os::unix::fs::symlink(format!("{number}/{file}"), path.join(format!("f{file}"))).unwrap();
        }
        let folder = guest.lookup(root, &format!("d{number}")).unwrap();
        for file in 0..FILES {
            known.push((guest.lookup(folder.node, &format!("f{file}")).unwrap(), number, file));
        }
        assert!(guest.server.descriptors() <= 128, "{}", guest.server.descriptors());
    }
    assert_eq!(guest.server.held().0, 1 + FOLDERS + FOLDERS * FILES);
    // Each is still the file it was.
    for (entry, folder, file) in known.iter().step_by(37).chain(known.iter().rev().step_by(41)) {
        assert_eq!(guest.attributes(entry.node).unwrap().number, entry.attributes.number);
        assert_eq!(guest.ask(5, entry.node, &[]).unwrap(), format!("{folder}/{file}").as_bytes());
    }
    assert!(guest.server.descriptors() <= 128);
    for (entry, ..) in &known {
        guest.forget(entry.node, 1);
    }
    assert_eq!(guest.server.held().0, 1 + FOLDERS);
}

#[test]
fn a_file_is_found_again_wherever_the_guest_moved_it() {
    let (inside, guest, root) = tight(64);
    let deep = guest.make_folder(root, "a", 0o755).unwrap().node;
    let deeper = guest.make_folder(deep, "b", 0o755).unwrap().node;
    let file = guest.make_node(deeper, "file", 0o100644).unwrap();
    let other = guest.make_node(root, "other", 0o100644).unwrap();
    crowd(&guest, root);
    guest.rename((root, "a"), (root, "moved"), 0).unwrap();
    guest.rename((deeper, "file"), (deeper, "called otherwise"), 0).unwrap();
    // Each takes the other's place.
    guest.rename((deeper, "called otherwise"), (root, "other"), 2).unwrap();
    crowd_again(&guest, root);
    assert_eq!(guest.attributes(file.node).unwrap().number, file.attributes.number);
    assert_eq!(guest.attributes(other.node).unwrap().number, other.attributes.number);
    let handle = guest.open(file.node, 1).unwrap();
    guest.write(handle, 0, b"here").unwrap();
    assert_eq!(fs::read(inside.path().join("other")).unwrap(), b"here");
    assert!(inside.path().join("moved/b/called otherwise").exists());
}

fn crowd_again(guest: &Guest, root: u64) {
    for number in 0..400 {
        guest.lookup(root, &format!("crowd{number}")).unwrap();
    }
}

#[test]
fn what_is_open_or_lost_its_name_keeps_its_descriptor() {
    let (_inside, guest, root) = tight(64);
    let (open, handle) = guest.create(root, "open", 2, 0o644).unwrap();
    let gone = guest.make_node(root, "gone", 0o100644).unwrap();
    let replaced = guest.make_node(root, "replaced", 0o100644).unwrap();
    guest.make_node(root, "new", 0o100644).unwrap();
    let (unnamed, second) = guest.create_unnamed(root, 0o600).unwrap();
    crowd(&guest, root);
    guest.unlink(root, "open").unwrap();
    guest.unlink(root, "gone").unwrap();
    guest.rename((root, "new"), (root, "replaced"), 0).unwrap();
    crowd_again(&guest, root);
    for entry in [open, gone, replaced, unnamed] {
        let shown = guest.attributes(entry.node).unwrap();
        assert_eq!((shown.number, shown.links), (entry.attributes.number, 0));
    }
    guest.release(handle);
    guest.release(second);
}

/// What the host did meanwhile is no way out: a file that is not there any more is stale, whatever took its name.
#[test]
fn a_file_that_the_host_replaced_is_not_found_again() {
    let (inside, guest, root) = tight(64);
    let outside = folder();
    fs::write(outside.path().join("canary"), "outside").unwrap();
    fs::create_dir_all(inside.path().join("a/b")).unwrap();
    for name in ["a/b/canary", "kept"] {
        fs::write(inside.path().join(name), "inside").unwrap();
    }
    let above = guest.lookup(root, "a").unwrap().node;
    let within = guest.lookup(above, "b").unwrap().node;
    let canary = guest.lookup(within, "canary").unwrap().node;
    let kept = guest.lookup(root, "kept").unwrap().node;
    crowd(&guest, root);
    fs::rename(inside.path().join("a/b"), inside.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(outside.path(), inside.path().join("a/b")).unwrap();
    fs::rename(inside.path().join("kept"), outside.path().join("taken")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", inside.path().join("kept")).unwrap();
    for number in [within, canary, kept] {
        assert_eq!(guest.attributes(number).unwrap_err(), Errno::STALE);
        assert_eq!(guest.open(number, 2).unwrap_err(), Errno::STALE);
    }
    // Looked up by its new name it is the same file again.
    let found = guest.lookup(root, "elsewhere").unwrap().node;
    assert_eq!(guest.lookup(found, "canary").unwrap().node, canary);
    let handle = guest.open(canary, 0).unwrap();
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"inside");
}

/// The host gives inode numbers away again.
#[test]
fn a_number_stands_for_one_kind_of_file() {
    let (inside, guest, root) = tight(64);
    let link = inside.path().join("link");
    std::os::unix::fs::symlink("x", &link).unwrap();
    let known = guest.lookup(root, "link").unwrap();
    crowd(&guest, root);
    fs::remove_file(&link).unwrap();
    for number in 0..200 {
        let name = format!("d{number}");
        fs::create_dir(inside.path().join(&name)).unwrap();
        let folder = guest.lookup(root, &name).unwrap();
        assert_ne!(folder.node, known.node);
        assert_eq!(guest.names(folder.node), [".", ".."]);
    }
    assert_eq!(guest.attributes(known.node).unwrap_err(), Errno::STALE);
    guest.forget(known.node, 1);
    assert!(guest.lookup(root, "d0").is_ok());
}

#[test]
fn a_guest_that_holds_everything_is_refused_more() {
    let (_inside, guest, root) = tight(64);
    let mut refused = None;
    for _ in 0..200 {
        if let Err(error) = guest.create_unnamed(root, 0o600) {
            refused = Some(error);
            break;
        }
    }
    assert_eq!(refused, Some(Errno::NFILE));
    assert!(guest.server.descriptors() <= 64);
}

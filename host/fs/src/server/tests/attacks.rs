//! A hostile guest and what lies outside of its exports.

use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use super::files::shared;
use super::guest::text;
use super::{ROOT, folder, spec};

const SECRET: &[u8] = b"the canary outside";

#[test]
fn no_name_leads_up_or_across() {
    let (_folder, guest, root) = shared();
    for name in ["..", ".", "../canary", "/etc/passwd", "a/../..", ""] {
        assert_eq!(guest.lookup(root, name).unwrap_err(), Errno::INVAL, "{name:?}");
        assert_eq!(guest.create(root, name, 2, 0o600).unwrap_err(), Errno::INVAL, "{name:?}");
        assert_eq!(guest.unlink(root, name).unwrap_err(), Errno::INVAL, "{name:?}");
        assert_eq!(guest.make_folder(root, name, 0o700).unwrap_err(), Errno::INVAL, "{name:?}");
        assert_eq!(guest.rename((root, name), (root, "x"), 0).unwrap_err(), Errno::INVAL);
        assert_eq!(guest.symbolic_link(root, name, "x").unwrap_err(), Errno::INVAL);
    }
}

#[test]
fn links_are_shown_and_never_followed() {
    let outside = folder();
    std::fs::write(outside.path().join("canary"), SECRET).unwrap();
    let (inside, guest, root) = shared();
    let canary = outside.path().join("canary");
    symlink(&canary, inside.path().join("host-made")).unwrap();
    symlink(outside.path(), inside.path().join("folder")).unwrap();
    guest.symbolic_link(root, "guest-made", canary.to_str().unwrap()).unwrap();
    for name in ["host-made", "guest-made"] {
        let link = guest.lookup(root, name).unwrap();
        assert_eq!(link.attributes.mode & 0o170000, 0o120000);
        assert_eq!(guest.ask(5, link.node, &[]).unwrap(), canary.to_str().unwrap().as_bytes());
        assert_eq!(guest.open(link.node, 0).unwrap_err(), Errno::LOOP);
        assert_eq!(guest.change(link.node, 1 << 3, (0, 0, 0, 0)).unwrap_err(), Errno::LOOP);
        assert!(guest.create(root, name, 2 | 0o1000, 0o600).is_err());
        // Times are the link's own.
        guest.change(link.node, 1 << 7 | 1 << 8 | 1 << 4 | 1 << 5, (0, 0, 0, 0)).unwrap();
    }
    let link = guest.lookup(root, "folder").unwrap().node;
    assert_eq!(guest.lookup(link, "canary").unwrap_err(), Errno::NOTDIR);
    assert_eq!(guest.create(link, "new", 2, 0o600).unwrap_err(), Errno::NOTDIR);
    assert_eq!(guest.unlink(link, "canary").unwrap_err(), Errno::NOTDIR);
    assert_eq!(guest.ask(27, link, &[0; 8]).unwrap_err(), Errno::NOTDIR);
    assert_eq!(std::fs::read(&canary).unwrap(), SECRET);
}

#[test]
fn numbers_that_were_not_given_out_are_nobodys() {
    let (_folder, guest, root) = shared();
    for number in [0, root + 1, root + 1000, u64::MAX] {
        assert_eq!(guest.attributes(number).unwrap_err(), Errno::STALE);
        assert_eq!(guest.lookup(number, "x").unwrap_err(), Errno::STALE);
        assert_eq!(guest.read(number, 0, 1).unwrap_err(), Errno::BADF);
        assert_eq!(guest.write(number, 0, b"x").unwrap_err(), Errno::BADF);
    }
}

#[test]
fn devices_are_neither_made_nor_opened() {
    let (inside, guest, root) = shared();
    for kind in [0o020000, 0o060000, 0o000000, 0o150000] {
        assert_eq!(guest.make_node(root, "device", kind | 0o666).unwrap_err(), Errno::PERM);
    }
    let pipe = guest.make_node(root, "pipe", 0o010644).unwrap();
    assert_eq!(pipe.attributes.mode, 0o010644);
    // Nobody waits for the other end.
    assert_eq!(guest.open(pipe.node, 0).unwrap_err(), Errno::NXIO);
    assert_eq!(guest.create(root, "pipe", 1, 0o600).unwrap_err(), Errno::NXIO);
    guest.make_node(root, "socket", 0o140600).unwrap();
    assert_eq!(guest.make_node(root, "plain", 0o100600).unwrap().attributes.size, 0);
    assert!(inside.path().join("plain").is_file());
}

#[test]
fn nothing_passes_from_one_export_to_another() {
    let (one, two) = (folder(), folder());
    std::fs::write(two.path().join("canary"), SECRET).unwrap();
    let guest = super::Guest::new();
    guest.server.add(spec("one", one.path())).unwrap();
    guest.server.add(spec("two", two.path())).unwrap();
    let (here, there) = (guest.lookup(ROOT, "one").unwrap().node, guest.lookup(ROOT, "two").unwrap().node);
    let canary = guest.lookup(there, "canary").unwrap().node;
    assert_eq!(guest.link(canary, here, "canary").unwrap_err(), Errno::XDEV);
    assert_eq!(guest.rename((there, "canary"), (here, "canary"), 0).unwrap_err(), Errno::XDEV);
    assert_eq!(guest.lookup(here, "canary").unwrap_err(), Errno::NOENT);
}

/// A name that is now a folder of ours and now a link out of it, while the guest goes through it all the time.
#[test]
fn a_name_that_changes_under_a_lookup_does_not_lead_outside() {
    const ROUNDS: usize = 3_000;
    let outside = folder();
    std::fs::write(outside.path().join("canary"), SECRET).unwrap();
    let (inside, guest, root) = shared();
    std::fs::create_dir(inside.path().join("real")).unwrap();
    std::fs::write(inside.path().join("real/canary"), "ours").unwrap();
    symlink(outside.path(), inside.path().join("link")).unwrap();
    std::fs::create_dir(inside.path().join("name")).unwrap();
    let over = AtomicBool::new(false);
    let read = std::thread::scope(|scope| {
        scope.spawn(|| {
            let exchange = |one: &str| {
                let (one, name) = (inside.path().join(one), inside.path().join("name"));
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(rustix::fs::CWD, one, rustix::fs::CWD, name, flags).unwrap();
            };
            while !over.load(Ordering::Relaxed) {
                exchange("link");
                exchange("real");
                exchange("real");
                exchange("link");
            }
        });
        let mut read = 0;
        for _ in 0..ROUNDS {
            let Ok(entry) = guest.lookup(root, "name") else { continue };
            // Whatever it was then, what is below it is ours.
            if let Ok(file) = guest.lookup(entry.node, "canary")
                && let Ok(handle) = guest.open(file.node, 2)
            {
                assert_eq!(guest.read(handle, 0, 100).unwrap(), b"ours");
                guest.write(handle, 0, b"ours").unwrap();
                guest.release(handle);
                read += 1;
            }
            let _made = guest.create(entry.node, "new", 2, 0o600).map(|(_, handle)| guest.release(handle));
            let _gone = guest.unlink(entry.node, "new");
            let _linked = guest.ask(6, entry.node, &[text("l"), text("x")].concat());
            let _gone = guest.unlink(entry.node, "l");
        }
        over.store(true, Ordering::Relaxed);
        read
    });
    // Without any race won the test says nothing; the folder is as often there as the link.
    assert!(read > 0);
    assert_eq!(std::fs::read(outside.path().join("canary")).unwrap(), SECRET);
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

/// Everything at once: the guest moves folders and links files into each other while it goes through them, the host
/// swaps a folder for a link that leads out, and the server finds files again that it had closed.
#[test]
fn no_race_of_renames_and_links_leads_outside() {
    const ROUNDS: usize = 1_500;
    let outside = folder();
    std::fs::write(outside.path().join("canary"), SECRET).unwrap();
    let inside = folder();
    let guest = super::Guest::with_descriptors(32);
    guest.server.add(spec("one", inside.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    for name in ["a", "b", "a/deep", "spare"] {
        std::fs::create_dir(inside.path().join(name)).unwrap();
        std::fs::write(inside.path().join(name).join("canary"), "ours").unwrap();
    }
    symlink(outside.path(), inside.path().join("link")).unwrap();
    let over = AtomicBool::new(false);
    let swap = |one: &str, other: &str| {
        let (one, other) = (inside.path().join(one), inside.path().join(other));
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        // Either may have been moved by the guest just now.
        let _swapped = rustix::fs::renameat_with(rustix::fs::CWD, one, rustix::fs::CWD, other, flags);
    };
    let mut leaked = None;
    let read = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                swap("b", "link");
                swap("link", "b");
                swap("a", "spare");
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let Ok(a) = guest.lookup(root, "a") else { continue };
                let _moved = guest.rename((a.node, "deep"), (root, "deep"), 0);
                let _back = guest.rename((root, "deep"), (a.node, "deep"), 0);
                let _swapped = guest.rename((root, "a"), (root, "b"), 2);
                for name in ["a", "b"] {
                    let Ok(folder) = guest.lookup(root, name) else { continue };
                    let Ok(file) = guest.lookup(folder.node, "canary") else { continue };
                    let _linked = guest.link(file.node, root, "linked");
                    let _gone = guest.unlink(root, "linked");
                }
            }
        });
        let mut read = 0;
        for round in 0..ROUNDS {
            let Ok(folder) = guest.lookup(root, if round % 2 == 0 { "b" } else { "a" }) else { continue };
            let below = guest.lookup(folder.node, "deep").unwrap_or(folder);
            // Others push its descriptor out.
            for number in 0..12 {
                let _known = guest.make_node(root, &format!("crowd{number}"), 0o100644);
                let _known = guest.lookup(root, &format!("crowd{number}"));
            }
            for place in [folder.node, below.node] {
                let _made = guest.create(place, "new", 2, 0o600).map(|(_, handle)| guest.release(handle));
                let _gone = guest.unlink(place, "new");
                let Ok(file) = guest.lookup(place, "canary") else { continue };
                let Ok(handle) = guest.open(file.node, 2) else { continue };
                let found = guest.read(handle, 0, 100);
                if found.as_deref() != Ok(b"ours") {
                    leaked = Some(found);
                }
                let _written = guest.write(handle, 0, b"ours");
                guest.release(handle);
                read += 1;
            }
        }
        over.store(true, Ordering::Relaxed);
        read
    });
    assert_eq!(leaked, None);
    assert!(read > 0);
    assert_eq!(std::fs::read(outside.path().join("canary")).unwrap(), SECRET);
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

//! Changes made on the host, told to the guest and repeated by it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use guest_protocol::changes::{self, Change, DONE, Kind, Touch, What, announcement};
use rustix::io::Errno;

use super::ROOT;
use super::files::shared;
use super::guest::{Guest, text};
use crate::watch::Step;

const REPEATER: u32 = 4711;

/// The guest's repeating thread.
struct Repeating {
    guest: Guest,
    stream: UnixStream,
    follower: Option<std::thread::JoinHandle<()>>,
}

impl Repeating {
    /// Watches the root of the export `one`.
    fn of(guest: &Guest) -> (Self, u64) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = Arc::clone(&guest.server);
        let follower = std::thread::spawn(move || server.follow(&OwnedFd::from(theirs)).unwrap());
        let repeater = Guest { server: Arc::clone(&guest.server), uid: 0, gid: 0, process: REPEATER };
        let mut repeating = Self { guest: repeater, stream: ours, follower: Some(follower) };
        repeating.stream.write_all(&changes::hello(REPEATER)).unwrap();
        assert_eq!(repeating.batch(), []);
        let root = guest.lookup(ROOT, "one").unwrap().node;
        repeating.guest.ask(27, root, &[0; 8]).unwrap();
        repeating.done();
        (repeating, root)
    }

    fn batch(&mut self) -> Vec<Change> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).unwrap();
        let mut batch = vec![0; u32::from_le_bytes(length) as usize];
        self.stream.read_exact(&mut batch).unwrap();
        changes::decode(&batch).unwrap()
    }

    fn done(&mut self) {
        self.stream.write_all(&[DONE]).unwrap();
    }

    /// Changes up to one of the name `last`, nothing of which is repeated.
    fn until(&mut self, last: &str) -> Vec<(String, What)> {
        let mut all = Vec::new();
        loop {
            for change in self.batch() {
                all.push((String::from_utf8(change.at.name).unwrap(), change.what));
            }
            self.done();
            if all.iter().any(|(name, _)| name == last) {
                return all;
            }
        }
    }

    fn announce(&self, index: usize, apart: bool) {
        let name = announcement(index, apart);
        assert_eq!(self.guest.lookup(ROOT, &name).unwrap_err(), Errno::NOENT);
    }
}

impl Drop for Repeating {
    fn drop(&mut self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        let follower = self.follower.take().map_or(Ok(()), std::thread::JoinHandle::join);
        assert!(std::thread::panicking() || follower.is_ok());
    }
}

fn state(path: &Path) -> (u64, i64, i64, i64, i64, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (found.ino(), found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec(), found.mode())
}

#[test]
fn a_batch_that_is_cut_off_changes_nothing() {
    let (one, guest, _) = shared();
    let (file, again) = (one.path().join("file"), one.path().join("again"));
    fs::write(&file, "x").unwrap();
    let (mut repeating, root) = Repeating::of(&guest);
    fs::remove_file(&file).unwrap();
    assert_eq!(repeating.batch().len(), 1);
    // It is there again before the guest has removed it, and the stream breaks off for what the guest says.
    fs::write(&file, "new").unwrap();
    fs::write(&again, "new").unwrap();
    repeating.stream.write_all(&[DONE + 1]).unwrap();
    assert_eq!(repeating.stream.read(&mut [0; 1 << 12]).unwrap(), 0);
    repeating.guest.unlink(root, "file").unwrap();
    repeating.stream.shutdown(std::net::Shutdown::Both).unwrap();
    repeating.guest.unlink(root, "again").unwrap();
    assert!(file.exists() && again.exists());
    let follower = repeating.follower.take().unwrap();
    follower.join().unwrap_err();
    guest.unlink(root, "again").unwrap();
    assert!(!again.exists());
}

#[test]
fn what_the_host_does_is_told_and_what_the_guest_does_is_not() {
    let (one, guest, _) = shared();
    fs::write(one.path().join("old"), "x").unwrap();
    let (mut repeating, root) = Repeating::of(&guest);
    // The guest's own.
    let (file, handle) = guest.create(root, "mine", 2, 0o644).unwrap();
    guest.write(handle, 0, b"data").unwrap();
    guest.release(handle);
    guest.change(file.node, 1, (0o600, 0, 0, 0)).unwrap();
    guest.rename((root, "mine"), (root, "mine too"), 0).unwrap();
    guest.unlink(root, "mine too").unwrap();
    guest.make_folder(root, "folder", 0o755).unwrap();
    // The host's.
    fs::write(one.path().join("new"), "data").unwrap();
    fs::remove_file(one.path().join("old")).unwrap();
    fs::create_dir(one.path().join("sub")).unwrap();
    fs::rename(one.path().join("new"), one.path().join("folder/moved")).unwrap();
    fs::write(one.path().join("last"), "").unwrap();
    let told = repeating.until("last");
    let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
    for own in ["mine", "mine too", "folder"] {
        assert!(!names.contains(&own), "{told:?}");
    }
    assert!(told.contains(&("old".into(), What::Vanished { folder: false })), "{told:?}");
    assert!(told.contains(&("sub".into(), What::Appeared(Kind::Folder, Touch::default()))), "{told:?}");
    let moved = told.iter().find_map(|(name, what)| match what {
        What::Renamed { to, .. } if name == "new" => Some(to),
        _ => None,
    });
    let moved = moved.unwrap_or_else(|| panic!("{told:?}"));
    assert_eq!((&moved.folder[..], &moved.name[..]), (&b"one/folder"[..], &b"moved"[..]));
}

#[test]
fn repeating_changes_nothing_on_the_host() {
    let (one, guest, _) = shared();
    for name in ["kept", "gone", "from"] {
        fs::write(one.path().join(name), name).unwrap();
    }
    let (mut repeating, root) = Repeating::of(&guest);
    let (gone, from) = (guest.lookup(root, "gone").unwrap(), guest.lookup(root, "from").unwrap());
    fs::write(one.path().join("new"), "data").unwrap();
    fs::remove_file(one.path().join("gone")).unwrap();
    fs::rename(one.path().join("from"), one.path().join("to")).unwrap();
    fs::write(one.path().join("kept"), "changed").unwrap();
    let names = ["new", "kept", "to"];
    let before = names.map(|name| state(&one.path().join(name)));
    let folder_before = state(one.path());
    // They may come in more than one batch.
    let mut seen = BTreeSet::new();
    while seen.len() < 4 {
        for (index, change) in repeating.batch().into_iter().enumerate() {
            repeating.announce(index, false);
            let asks = &repeating.guest;
            let name = String::from_utf8(change.at.name).unwrap();
            let first = seen.insert(name.clone());
            match (name.as_str(), change.what) {
                // The end of what was told before.
                ("new" | "kept", What::Touched(_)) if !first => {}
                ("new", What::Appeared(Kind::File, _)) => {
                    assert_eq!(asks.lookup(root, "new").unwrap_err(), Errno::NOENT);
                    // Others see it.
                    assert_eq!(asks.make_folder(root, "new", 0o755).unwrap_err(), Errno::EXIST);
                    let made = asks.make_node(root, "new", 0o100_600).unwrap();
                    assert_eq!(guest.lookup(root, "new").unwrap().node, made.node);
                    // Now it is there.
                    assert_eq!(asks.lookup(root, "new").unwrap().node, made.node);
                    let handle = asks.open(made.node, 1).unwrap();
                    assert_eq!(asks.write(handle, 0, b"evil").unwrap_err(), Errno::PERM);
                    assert_eq!(asks.change(made.node, 1 << 3, (0, 0, 0, 0)).unwrap().size, 4);
                    asks.release(handle);
                }
                ("gone", What::Vanished { folder: false }) => {
                    assert_eq!(guest.lookup(root, "gone").unwrap_err(), Errno::NOENT);
                    assert_eq!(asks.lookup(root, "gone").unwrap().node, gone.node);
                    asks.unlink(root, "gone").unwrap();
                    // The guest knows the file no more by that name; it is made up for who would remove it again.
                    assert_eq!(asks.lookup(root, "gone").unwrap_err(), Errno::NOENT);
                    repeating.announce(index, false);
                    assert_ne!(asks.lookup(root, "gone").unwrap().node, gone.node);
                }
                ("from", What::Renamed { to, .. }) => {
                    assert_eq!(to.name, b"to");
                    assert_eq!(asks.lookup(root, "from").unwrap().node, from.node);
                    assert_eq!(asks.lookup(root, "to").unwrap_err(), Errno::NOENT);
                    asks.rename((root, "from"), (root, "to"), 0).unwrap();
                    assert_eq!(guest.lookup(root, "to").unwrap().node, from.node);
                }
                ("kept", What::Touched(touch)) => {
                    assert!(touch.modified, "{touch:?}");
                    let kept = asks.lookup(root, "kept").unwrap();
                    assert_eq!(asks.change(kept.node, 1 << 5, (0, 0, 0, 0)).unwrap().size, 7);
                }
                other => panic!("{other:?}"),
            }
        }
        repeating.done();
    }
    assert_eq!(names.map(|name| state(&one.path().join(name))), before);
    assert_eq!(state(one.path()), folder_before);
    // Nothing else is anybody's to change by that thread, and nobody else is answered like it.
    let asks = &repeating.guest;
    assert_eq!(asks.create(root, "evil", 2, 0o644).unwrap_err(), Errno::PERM);
    assert_eq!(asks.unlink(root, "kept"), Ok(()));
    assert!(one.path().join("kept").exists());
    assert_eq!(guest.make_node(root, "to", 0o100_600).unwrap_err(), Errno::EXIST);
}

/// What is told may be gone by the time it is repeated, and is told to be gone next: who watches hears of both.
#[test]
fn what_is_gone_when_it_is_repeated_came_and_went() {
    let (one, guest, _) = shared();
    let (mut repeating, root) = Repeating::of(&guest);
    let path = one.path().join("name");
    for kind in [Kind::File, Kind::Folder] {
        let folder = kind == Kind::Folder;
        if folder {
            fs::create_dir(&path).unwrap()
        } else {
            fs::write(&path, "data").unwrap()
        }
        let came = repeating.batch().remove(0);
        assert!(matches!(came.what, What::Appeared(told, _) if told == kind), "{came:?}");
        if folder {
            fs::remove_dir(&path).unwrap()
        } else {
            fs::remove_file(&path).unwrap()
        }
        // It may be gone before it is described, too.
        let step = Step::Appeared { at: (root, c"name".into()), touch: Touch::default(), folder };
        let described = guest.server.describe(&step).unwrap().what;
        assert_eq!(described, What::Appeared(kind, Touch::default()));

        repeating.announce(0, false);
        let asks = &repeating.guest;
        assert_eq!(asks.lookup(root, "name").unwrap_err(), Errno::NOENT);
        let made = if folder {
            asks.make_folder(root, "name", 0o755)
        } else {
            asks.make_node(root, "name", 0o100_600)
        };
        assert_eq!(made.unwrap().attributes.mode >> 12, if folder { 4 } else { 8 });
        // It has come, and is not there.
        assert_eq!(asks.lookup(root, "name").unwrap_err(), Errno::NOENT);
        assert_eq!(guest.lookup(root, "name").unwrap_err(), Errno::NOENT);
        repeating.done();
        // What was pending of it went with it.
        let went = repeating.batch().remove(0);
        assert_eq!(went.what, What::Vanished { folder });
        repeating.announce(0, false);
        repeating.guest.lookup(root, "name").unwrap();
        repeating.guest.unlink(root, "name").unwrap();
        repeating.done();
    }
}

#[test]
fn a_file_that_the_guest_did_not_know_is_renamed_all_the_same() {
    let (one, guest, _) = shared();
    fs::write(one.path().join("page"), "old").unwrap();
    let (mut repeating, root) = Repeating::of(&guest);
    let old = guest.lookup(root, "page").unwrap();
    // As editors write.
    fs::write(one.path().join("page.new"), "newer").unwrap();
    fs::rename(one.path().join("page.new"), one.path().join("page")).unwrap();
    let index = loop {
        let batch = repeating.batch();
        match batch.iter().position(|change| matches!(change.what, What::Renamed { .. })) {
            Some(index) => break index,
            None => repeating.done(),
        }
    };
    repeating.announce(index, false);
    let asks = &repeating.guest;
    let new = asks.lookup(root, "page.new").unwrap();
    assert_eq!(new.attributes.size, 5);
    // What is replaced is the file that the guest knows by that name.
    assert_eq!(asks.lookup(root, "page").unwrap().node, old.node);
    asks.rename((root, "page.new"), (root, "page"), 0).unwrap();
    assert_eq!(guest.lookup(root, "page").unwrap().node, new.node);
    repeating.done();

    // And when the guest has found it by its new name before: the names part.
    fs::rename(one.path().join("page"), one.path().join("other")).unwrap();
    let found = guest.lookup(root, "other").unwrap();
    assert_eq!(found.node, new.node);
    let batch = repeating.batch();
    assert!(matches!(&batch[0].what, What::Renamed { to, .. } if to.name == b"other"), "{batch:?}");
    repeating.announce(0, false);
    let asks = &repeating.guest;
    assert_eq!(asks.lookup(root, "page").unwrap_err(), Errno::NOENT);
    repeating.announce(0, true);
    assert_ne!(asks.lookup(root, "page").unwrap().node, found.node);
    asks.unlink(root, "page").unwrap();
    assert_eq!(asks.lookup(root, "other").unwrap().node, found.node);
    repeating.done();
}

#[test]
fn only_what_is_bound_is_watched_and_only_for_so_long() {
    let (one, guest, _) = shared();
    for name in ["bound/deep", "other"] {
        fs::create_dir_all(one.path().join(name)).unwrap();
    }
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let bound = guest.lookup(root, "bound").unwrap().node;
    let deep = guest.lookup(bound, "deep").unwrap().node;
    let other = guest.lookup(root, "other").unwrap().node;
    let (repeating, _) = Repeating::of(&guest);
    let watched = || {
        let mut watched = guest.server.nodes.watched();
        watched.sort_unstable();
        watched
    };
    assert_eq!(watched(), [root, bound, deep, other]);
    // The first handle is the root's.
    repeating.guest.release(1);
    assert_eq!(watched(), [0u64; 0]);
    let answer = repeating.guest.ask(27, bound, &[0; 8]).unwrap();
    assert_eq!(watched(), [bound, deep]);
    let new = guest.make_folder(deep, "new", 0o755).unwrap().node;
    assert_eq!(watched(), [bound, deep, new]);
    guest.rename((deep, "new"), (other, "new"), 0).unwrap();
    guest.remove_folder(other, "new").unwrap();
    guest.forget(new, u64::MAX);
    assert_eq!(watched(), [bound, deep]);
    repeating.guest.release(u64::from_le_bytes(answer[..8].try_into().unwrap()));
    assert_eq!(watched(), [0u64; 0]);
    drop(repeating);
    assert_eq!(guest.server.held().1, 0);
    // Nobody repeats any more: that number is anybody's.
    let nobody = Guest { server: Arc::clone(&guest.server), uid: 0, gid: 0, process: REPEATER };
    nobody.ask(11, bound, &text("deep")).unwrap();
    assert!(!one.path().join("bound/deep").exists());
}

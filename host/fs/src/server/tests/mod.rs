//! The server as the guest's kernel speaks to it.

mod attacks;
mod changes;
mod data;
mod descriptors;
mod files;
mod guest;
mod owners;
mod random;
mod saved;

use std::time::Duration;

use rustix::io::Errno;

use self::guest::{Guest, create_body, text};
use super::*;
use crate::owner::Owners;
use crate::{CachePolicy, ExportSpec};

/// A folder to share; nothing in it is found again by the next test.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn spec(name: &str, path: &std::path::Path) -> ExportSpec {
    ExportSpec {
        name: name.into(),
        path: path.to_owned(),
        read_only: false,
        cache: CachePolicy::default(),
        owners: Owners::of_process(),
    }
}

#[test]
fn versions_and_features_are_agreed_on() {
    let guest = Guest::new();
    let init = |major: u32, minor: u32, flags: u64| {
        let mut body = Vec::new();
        for word in [major, minor, 1 << 20, flags as u32, (flags >> 32) as u32] {
            body.extend(word.to_le_bytes());
        }
        body.resize(64, 0);
        guest.ask(26, 0, &body)
    };
    let word = |answer: &[u8], at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
    let answer = init(7, 41, u64::MAX).unwrap();
    assert_eq!(answer.len(), 64);
    assert_eq!((word(&answer, 0), word(&answer, 4)), (7, 38));
    assert_eq!(u64::from(word(&answer, 12)), WANTED & 0xffff_ffff);
    assert_eq!(word(&answer, 20), DATA_BYTES_MAX);
    // What the kernel does not offer is not taken.
    assert_eq!(word(&init(7, 31, ASYNC_READ).unwrap(), 12), ASYNC_READ as u32);
    assert_eq!(init(7, 23, 0).unwrap_err(), Errno::PROTO);
    assert_eq!(word(&init(8, 0, 0).unwrap(), 0), 7);
}

#[test]
fn exports_come_and_go_while_the_guest_uses_them() {
    let (one, two) = (folder(), folder());
    std::fs::write(two.path().join("file"), "x").unwrap();
    let guest = Guest::new();
    assert_eq!(guest.lookup(ROOT, "one").unwrap_err(), Errno::NOENT);
    guest.server.add(spec("one", one.path())).unwrap();
    guest.server.add(spec("two", two.path())).unwrap();
    assert!(matches!(guest.server.add(spec("two", one.path())), Err(ExportError::Name(_))));
    assert!(matches!(guest.server.add(spec("a/b", one.path())), Err(ExportError::Name(_))));
    assert!(matches!(guest.server.add(spec("x", "/no/such".as_ref())), Err(ExportError::Open { .. })));
    assert_eq!(guest.names(ROOT), [".", "..", "one", "two"]);

    let root = guest.lookup(ROOT, "two").unwrap();
    let file = guest.lookup(root.node, "file").unwrap();
    let handle = guest.open(file.node, 0).unwrap();
    assert!(guest.server.remove("two") && !guest.server.remove("two"));
    assert_eq!(guest.lookup(ROOT, "two").unwrap_err(), Errno::NOENT);
    assert_eq!(guest.attributes(file.node).unwrap_err(), Errno::STALE);
    assert_eq!(guest.lookup(root.node, "file").unwrap_err(), Errno::STALE);
    assert_eq!(guest.read(handle, 0, 1).unwrap_err(), Errno::BADF);
    assert_eq!(guest.names(ROOT), [".", "..", "one"]);
    assert_eq!(guest.server.held(), (0, 0));
    // The name is free again, and is another folder.
    guest.server.add(spec("two", one.path())).unwrap();
    assert_eq!(guest.names(guest.lookup(ROOT, "two").unwrap().node), [".", ".."]);
}

#[test]
fn the_root_is_nobodys_to_change() {
    let one = folder();
    let guest = Guest::new();
    guest.server.add(spec("one", one.path())).unwrap();
    let mkdir = [0o755u32.to_le_bytes().to_vec(), vec![0; 4], text("x")].concat();
    assert_eq!(guest.ask(9, ROOT, &mkdir).unwrap_err(), Errno::ROFS);
    assert_eq!(guest.ask(11, ROOT, &text("one")).unwrap_err(), Errno::ROFS);
    assert_eq!(guest.ask(35, ROOT, &create_body("x", 2, 0o644)).unwrap_err(), Errno::ROFS);
    assert_eq!(guest.attributes(ROOT).unwrap().mode, 0o40700);
    assert_eq!(guest.ask(17, ROOT, &[]).unwrap().len(), 80);
}

#[test]
fn what_was_looked_up_is_kept_until_it_is_forgotten() {
    let one = folder();
    std::fs::write(one.path().join("file"), "x").unwrap();
    let guest = Guest::new();
    guest.server.add(spec("one", one.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let file = guest.lookup(root, "file").unwrap().node;
    assert_eq!(guest.lookup(root, "file").unwrap().node, file);
    assert_eq!(guest.server.held().0, 2);
    guest.forget(file, 1);
    assert!(guest.attributes(file).is_ok());
    guest.forget(file, 1);
    assert_eq!(guest.attributes(file).unwrap_err(), Errno::STALE);
    // A number is never given twice, and more than was looked up cannot be forgotten.
    let again = guest.lookup(root, "file").unwrap().node;
    assert_ne!(again, file);
    guest.forget(again, u64::MAX);
    guest.forget(root, 1);
    assert_eq!(guest.server.held(), (0, 0));
}

#[test]
fn a_guest_that_starts_over_finds_nothing_of_before() {
    let one = folder();
    let guest = Guest::new();
    guest.server.add(spec("one", one.path())).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let (file, handle) = guest.create(root, "file", 2, 0o644).unwrap();
    guest.ask(38, 0, &[]).unwrap();
    assert_eq!(guest.server.held(), (0, 0));
    assert_eq!(guest.attributes(file.node).unwrap_err(), Errno::STALE);
    assert_eq!(guest.read(handle, 0, 1).unwrap_err(), Errno::BADF);
    assert!(guest.lookup(ROOT, "one").is_ok());
}

#[test]
fn times_of_belief_are_the_exports() {
    let one = folder();
    let guest = Guest::new();
    let cache = CachePolicy { names: Duration::from_millis(2500), attributes: Duration::from_secs(7) };
    guest.server.add(ExportSpec { cache, ..spec("one", one.path()) }).unwrap();
    let answer = guest.ask(1, ROOT, &text("one")).unwrap();
    let word = |at: usize| u64::from_le_bytes(answer[at..at + 8].try_into().unwrap());
    assert_eq!((word(16), word(24)), (2, 7));
    assert_eq!(word(32), 500_000_000);
}

#[test]
fn nothing_a_guest_says_is_a_panic() {
    let one = folder();
    let guest = Guest::new();
    guest.server.add(spec("one", one.path())).unwrap();
    for opcode in 0..60 {
        for length in [0, 1, 8, 16, 24, 63, 200] {
            for node in [0, ROOT, 2, u64::MAX] {
                let _any = guest.ask(opcode, node, &vec![0xff; length]);
                let _any = guest.ask(opcode, node, &vec![0; length]);
            }
        }
    }
}

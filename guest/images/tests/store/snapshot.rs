//! Snapshots, mounted for real in a mount namespace of the test's own.

use std::{io::Cursor, path::Path, process::Command};

use guest_images::{Digest, Images, Kind};

use crate::{
    load::saved,
    maker::{MadeImage, MadeLayer, Store, silent, small},
};

const INSIDE: &str = "STORE_TEST_INSIDE";

/// Runs `test` once more as a process of its own in a new mount namespace. True inside; outside, false, when it has passed.
pub(crate) fn in_own_mounts(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if !rustix_is_root() {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED {test}: mounting needs root");
        }
        return false;
    }
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "--"])
        .arg(program)
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, "1");
    let output = command.output().expect("unshare");
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "the test has another name than it gives"
    );
    false
}

fn rustix_is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}

async fn loaded(store: &Store, image: &MadeImage) -> Images {
    let images = store.open();
    images.load(Cursor::new(saved(&[("x:1", image)])), silent).await.expect("loaded");
    images
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path.as_ref())
        .unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

#[tokio::test]
async fn a_mounted_snapshot_shows_the_layers_and_keeps_changes_to_itself() {
    if !in_own_mounts("snapshot::a_mounted_snapshot_shows_the_layers_and_keeps_changes_to_itself") {
        return;
    }
    let lower = MadeLayer::gzip(&[
        ("etc/", b""),
        ("etc/a", b"one"),
        ("gone", b"x"),
        ("dir/", b""),
        ("dir/old", b"old"),
    ]);
    let upper = MadeLayer::gzip(&[
        ("etc/b", b"two"),
        (".wh.gone", b""),
        ("dir/", b""),
        ("dir/.wh..wh..opq", b""),
        ("dir/new", b"new"),
    ]);
    let store = Store::new();
    let images = loaded(&store, &MadeImage::new(&[lower, upper])).await;
    let snapshotter = images.snapshotter();
    let chain = images.resolve("x:1").await.expect("found").chain();
    let (one, two) = (store.path().join("one"), store.path().join("two"));
    for (key, target) in [("one", &one), ("two", &two)] {
        snapshotter.prepare(key, chain).expect("prepared");
        snapshotter.mount(key, target).expect("mounted");
        snapshotter.mount(key, target).expect("mounted twice is mounted once");
    }
    assert_eq!(
        (read(one.join("etc/a")), read(one.join("etc/b")), read(one.join("dir/new"))),
        ("one".into(), "two".into(), "new".into())
    );
    assert!(!one.join("gone").exists() && !one.join("dir/old").exists());
    std::fs::write(one.join("etc/a"), "changed").expect("write");
    assert_eq!((read(one.join("etc/a")), read(two.join("etc/a"))), ("changed".into(), "one".into()));
    assert!(snapshotter.usage("one").expect("usage").inodes >= 2);
    assert_eq!(snapshotter.usage("two").expect("usage").inodes, 0);
    assert_eq!(snapshotter.list().expect("list").len(), 2);
    for (key, target) in [("one", &one), ("two", &two)] {
        snapshotter.unmount(key, target).expect("unmounted");
        snapshotter.unmount(key, target).expect("unmounted twice is fine");
        snapshotter.remove(key).expect("removed");
        snapshotter.remove(key).expect("removed twice is fine");
    }
    assert_eq!(store.files("snapshots"), [""; 0]);
}

#[tokio::test]
async fn a_hundred_and_fifty_layers_can_be_mounted() {
    if !in_own_mounts("snapshot::a_hundred_and_fifty_layers_can_be_mounted") {
        return;
    }
    let names: Vec<String> = (0..150).map(|index| format!("f{index}")).collect();
    let layers: Vec<MadeLayer> = names
        .iter()
        .map(|name| MadeLayer::plain(&[(name, name.as_bytes()), ("top", name.as_bytes())]))
        .collect();
    let store = Store::new();
    let images = loaded(&store, &MadeImage::new(&layers)).await;
    let target = store.path().join("mounted");
    images
        .snapshotter()
        .prepare("many", images.resolve("x:1").await.expect("found").chain())
        .expect("prepared");
    images.snapshotter().mount("many", &target).expect("mounted");
    assert_eq!(
        (read(target.join("f0")), read(target.join("f149")), read(target.join("top"))),
        ("f0".into(), "f149".into(), "f149".into())
    );
    images.snapshotter().unmount("many", &target).expect("unmounted");
}

#[tokio::test]
async fn folders_that_a_layer_only_implies_look_as_they_do_below() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut folder = tar::Header::new_gnu();
    folder.set_entry_type(tar::EntryType::Directory);
    folder.set_mode(0o1777);
    folder.set_size(0);
    builder.append_data(&mut folder, "tmp/", &b""[..]).expect("append");
    folder.set_mode(0o711);
    builder.append_data(&mut folder, "./", &b""[..]).expect("append");
    let tar = builder.into_inner().expect("a tar");
    let base = MadeLayer { blob: tar.clone(), tar, media_type: "application/vnd.oci.image.layer.v1.tar" };
    let store = Store::new();
    let images = loaded(&store, &MadeImage::new(&[base, MadeLayer::plain(&[("tmp/x", b"x")])])).await;
    let mounts = images
        .snapshotter()
        .prepare("c", images.resolve("x:1").await.expect("found").chain())
        .expect("prepared");
    let mode = |path: &Path| {
        std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).expect("metadata")) & 0o7777
    };
    assert_eq!(
        mode(&mounts.lower[0].join("tmp")),
        0o1777,
        "the upper layer's folder would hide the lower one's mode"
    );
    assert_eq!(mode(&mounts.lower[0]), 0o711);
    assert_eq!(mode(&mounts.upper), 0o711, "the container's root looks as the image's");
}

#[tokio::test]
async fn a_snapshot_on_nothing_is_a_folder() {
    if !in_own_mounts("snapshot::a_snapshot_on_nothing_is_a_folder") {
        return;
    }
    let store = Store::new();
    let images = store.open();
    let target = store.path().join("mounted");
    images.snapshotter().prepare("empty", None).expect("prepared");
    images.snapshotter().mount("empty", &target).expect("mounted");
    std::fs::write(target.join("x"), "x").expect("write");
    images.snapshotter().unmount("empty", &target).expect("unmounted");
    assert_eq!(images.snapshotter().usage("empty").expect("usage").inodes, 1);
}

#[tokio::test]
async fn changes_become_a_layer() {
    let store = Store::new();
    let images = loaded(&store, &small()).await;
    let parent = images.resolve("x:1").await.expect("found").chain();
    let snapshotter = images.snapshotter();
    let mounts = snapshotter.prepare("work", parent).expect("prepared");
    std::fs::write(mounts.upper.join("added"), "added").expect("write");
    let chain = snapshotter.commit("work", Digest::of(b"a diff")).expect("committed");
    assert_eq!(snapshotter.list().expect("list"), []);
    let mounts = snapshotter.prepare("next", Some(chain)).expect("prepared");
    assert_eq!((mounts.lower.len(), read(mounts.lower[0].join("added"))), (3, "added".into()));
}

#[tokio::test]
async fn bad_keys_and_missing_layers_are_refused() {
    let store = Store::new();
    let images = store.open();
    let snapshotter = images.snapshotter();
    for key in ["", "..", "a/b", "tmp-1", "-x", &"k".repeat(129), "ä"] {
        assert_eq!(snapshotter.prepare(key, None).expect_err(key).kind(), Kind::Invalid);
    }
    assert_eq!(
        snapshotter.prepare("x", Some(Digest::of(b"no layer").into())).expect_err("no layer").kind(),
        Kind::NotFound
    );
    snapshotter.prepare("x", None).expect("prepared");
    assert_eq!(snapshotter.prepare("x", None).expect_err("taken").kind(), Kind::Conflict);
    assert_eq!(snapshotter.mounts("y").expect_err("unknown").kind(), Kind::NotFound);
}

#[tokio::test]
async fn two_mounts_of_a_snapshot_are_one_file_system() {
    if !in_own_mounts("snapshot::two_mounts_of_a_snapshot_are_one_file_system") {
        return;
    }
    let store = Store::new();
    let images = loaded(&store, &small()).await;
    let chain = images.list().await.expect("listed")[0].chain();
    let snapshotter = images.snapshotter();
    snapshotter.prepare("twice", chain).expect("prepared");
    let (one, two) = (store.path().join("one"), store.path().join("two"));
    snapshotter.mount("twice", &one).expect("mounted");
    snapshotter.mount("twice", &two).expect("mounted");
    std::fs::write(one.join("new"), "seen").expect("written");
    assert_eq!(read(two.join("new")), "seen");
    // The second outlives the first, and a third joins it.
    snapshotter.unmount("twice", &one).expect("unmounted");
    snapshotter.mount_beside("twice", &one, Some(&two)).expect("mounted");
    std::fs::write(two.join("newer"), "seen").expect("written");
    assert_eq!(read(one.join("newer")), "seen");
    snapshotter.unmount("twice", &one).expect("unmounted");
    snapshotter.unmount("twice", &two).expect("unmounted");
}

#[tokio::test]
async fn a_place_that_goes_away_meanwhile_is_not_shown_empty() {
    if !in_own_mounts("snapshot::a_place_that_goes_away_meanwhile_is_not_shown_empty") {
        return;
    }
    let store = Store::new();
    let images = loaded(&store, &small()).await;
    let chain = images.list().await.expect("listed")[0].chain();
    let snapshotter = images.snapshotter();
    snapshotter.prepare("busy", chain).expect("prepared");
    let (one, two) = (store.path().join("one"), store.path().join("two"));
    snapshotter.mount("busy", &one).expect("mounted");
    std::fs::write(one.join("there"), "there").expect("written");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                snapshotter.unmount("busy", &one).expect("unmounted");
                snapshotter.mount("busy", &one).expect("mounted");
            }
        });
        for round in 0..300 {
            snapshotter.mount_beside("busy", &two, Some(&one)).expect("mounted");
            assert!(two.join("there").exists(), "round {round} shows an empty folder");
            snapshotter.unmount("busy", &two).expect("unmounted");
        }
    });
    snapshotter.unmount("busy", &one).expect("unmounted");
}

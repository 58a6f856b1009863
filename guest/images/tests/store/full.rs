//! A disk that is full, played by a small tmpfs in a mount namespace of the test's own.

use std::{io::Cursor, process::Command};

use guest_images::{Credentials, Error, Kind};

use crate::{
    load::saved,
    maker::{MadeImage, MadeLayer, Store, silent, small},
    server::{Content, Server},
    snapshot::in_own_mounts,
};

/// A store on a disk of three megabytes.
fn small_disk() -> Store {
    let store = Store::new();
    let folder = store.path().join("images");
    std::fs::create_dir(&folder).expect("a folder");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=3m", "tmpfs"]).arg(&folder).status();
    assert!(mounted.expect("mount").success());
    store
}

fn noise(length: u32) -> Vec<u8> {
    (0..length).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn assert_full(error: &Error, store: &Store) {
    assert_eq!(error.kind(), Kind::NoSpace, "{}", error.chain());
    assert!(error.to_string().starts_with("no space left on the disk that holds `"), "{error}");
    assert!(error.to_string().contains(&*store.path().to_string_lossy()), "{error}");
}

#[tokio::test]
async fn a_full_disk_is_said_and_what_was_begun_is_removed() {
    if !in_own_mounts("full::a_full_disk_is_said_and_what_was_begun_is_removed") {
        return;
    }
    // One that does not fit as a blob, one that does not fit unpacked, one that fits.
    let large = MadeImage::new(&[MadeLayer::plain(&[("noise", &noise(4 << 20))])]);
    let bloated = MadeImage::new(&[MadeLayer::gzip(&[("monotone", &vec![b'z'; 4 << 20])])]);
    let image = small();
    let content =
        Content::of("large:latest", &large).image("bloated:latest", &bloated).image("small:latest", &image);
    let server = Server::honest(content);
    let store = small_disk();
    let images = store.open();
    for name in ["large", "bloated"] {
        let pull = images.pull(&server.reference(name), None, &Credentials::Anonymous, silent).await;
        assert_full(&pull.expect_err(name), &store);
        images.collect_garbage().await.expect("collected");
        for folder in ["blobs/sha256", "layers"] {
            assert_eq!(store.files(folder), [""; 0], "{name} left something in {folder}");
        }
        store.assert_nothing_partial();
    }
    let load = images.load(Cursor::new(saved(&[("large:1", &large)])), silent).await;
    assert_full(&load.expect_err("load"), &store);
    store.assert_nothing_partial();
    images
        .pull(&server.reference("small"), None, &Credentials::Anonymous, silent)
        .await
        .expect("this one fits");
}

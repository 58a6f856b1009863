//! What a crash leaves: nothing half, nothing lost.
//!
//! A crash is played in two ways: the process is killed in the middle of its work, at moments that differ from round to round;
//! and the traces that a crash could leave are laid by hand before the store is opened.

use std::{
    io::Cursor,
    process::{Command, Stdio},
    time::Duration,
};

use guest_images::{Credentials, Digest, Kind, RemoveOptions};

use crate::{
    load::saved,
    maker::{MadeImage, MadeLayer, Store, database, silent, small},
    server::{Content, Server},
};

const FORCE: RemoveOptions = RemoveOptions { force: true, parents: true };
const VICTIM: &str = "STORE_TEST_VICTIM";

/// Not a test by itself: what the killed process does. It pulls the same image under ever new names.
#[tokio::test]
async fn victim() {
    let Ok(plan) = std::env::var(VICTIM) else { return };
    let (folder, domain) = plan.split_once('|').expect("folder and domain");
    let images = guest_images::Images::open(
        format!("{folder}/images").as_ref(),
        database(folder.as_ref()),
        guest_images::Options::default(),
    )
    .expect("a store");
    for name in ["a", "b", "c", "a", "b", "c", "a"] {
        let reference: guest_images::Reference = format!("{domain}/{name}").parse().expect("a name");
        images.pull(&reference, None, &Credentials::Anonymous, silent).await.expect("pulled");
        // Acknowledged: from here on it must be there.
        let acknowledged = format!("{folder}/acknowledged-{name}");
        std::fs::write(acknowledged, "").expect("write");
        if images.list().await.expect("list").len() == 3 {
            std::fs::remove_file(format!("{folder}/acknowledged-{name}")).expect("remove");
            images.remove(&reference.familiar(), FORCE, |_| Vec::new()).await.expect("removed");
        }
    }
}

#[tokio::test]
async fn a_process_killed_at_any_moment_leaves_a_whole_store() {
    let body: Vec<u8> =
        (0..400_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let shared = MadeLayer::gzip(&[("shared/big", &body), ("shared/etc/", b""), ("shared/etc/x", b"x")]);
    let made: Vec<MadeImage> = (0..3u8)
        .map(|index| {
            MadeImage::new(&[
                shared.clone(),
                MadeLayer::gzip(&[("own", &[index]), ("big", &body[..200_000])]),
            ])
        })
        .collect();
    let content = ["a:latest", "b:latest", "c:latest"]
        .iter()
        .zip(&made)
        .fold(Content::default(), |content, (name, image)| content.image(name, image));
    let server = Server::honest(content);
    let store = Store::new();
    for round in 0..12u64 {
        let mut victim = Command::new(std::env::current_exe().expect("this program"))
            .args(["crash::victim", "--exact"])
            .env(VICTIM, format!("{}|{}", store.path().display(), server.domain()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a victim");
        tokio::time::sleep(Duration::from_millis(20 + round * 37 % 400)).await;
        victim.kill().expect("killed");
        victim.wait().expect("gone");

        let images = store.open();
        assert_eq!(images.problems(), [""; 0], "round {round}");
        store.assert_no_leftovers();
        for (name, image) in ["a", "b", "c"].iter().zip(&made) {
            let found = images.resolve(&format!("{}/{name}", server.domain())).await;
            if store.path().join(format!("acknowledged-{name}")).exists()
                && let Err(error) = &found
            {
                panic!("round {round}: {name} was acknowledged and is gone: {error}");
            }
            let Ok(found) = found else { continue };
            assert_eq!(found.id, image.id());
            let key = format!("round-{round}-{name}");
            let mounts = images.snapshotter().prepare(&key, found.chain()).expect("every layer is there");
            assert_eq!(std::fs::read(mounts.lower[1].join("shared/big")).expect("big"), body);
            images.snapshotter().remove(&key).expect("removed");
        }
    }
    let images = store.open();
    for name in ["a", "b", "c"] {
        images
            .pull(&server.reference(name), None, &Credentials::Anonymous, silent)
            .await
            .expect("the store still works");
    }
    assert_eq!(images.list().await.expect("list").len(), 3);
}

#[tokio::test]
async fn an_acknowledged_image_survives_the_process() {
    let image = small();
    let store = Store::new();
    {
        let images = store.open();
        images.load(Cursor::new(saved(&[("x:1", &image)])), silent).await.expect("loaded");
        images
            .snapshotter()
            .prepare("container", images.resolve("x:1").await.expect("found").chain())
            .expect("prepared");
    }
    let images = store.open();
    assert_eq!(images.problems(), [""; 0]);
    assert_eq!(images.resolve("x:1").await.expect("found").id, image.id());
    assert_eq!(images.snapshotter().mounts("container").expect("mounts").lower.len(), 2);
}

#[tokio::test]
async fn leftovers_are_swept_at_the_next_start() {
    let store = Store::new();
    {
        let images = store.open();
        images.load(Cursor::new(saved(&[("x:1", &small())])), silent).await.expect("loaded");
    }
    let root = store.path().join("images");
    let orphan = Digest::of(b"orphan");
    for folder in ["layers/tmp-1-1/etc", "snapshots/tmp-2-2/fs", "snapshots/nobody/fs"] {
        std::fs::create_dir_all(root.join(folder)).expect("a folder");
    }
    std::fs::create_dir_all(root.join("layers").join(orphan.hex())).expect("a folder");
    std::fs::write(root.join("blobs/partial/ingest-1-1"), "x").expect("write");
    std::fs::write(root.join("blobs/sha256/nonsense"), "x").expect("write");
    std::fs::write(root.join("blobs/sha256").join(orphan.hex()), "not what it says").expect("write");
    let images = store.open();
    assert_eq!(images.problems(), [""; 0]);
    assert_eq!(
        (store.files("layers").len(), store.files("snapshots").len(), store.files("blobs/sha256").len()),
        (2, 0, 4)
    );
    // A blob without a row may be whole; the next download of it decides.
    assert_eq!(store.files("blobs/partial"), [orphan.hex()]);
}

#[tokio::test]
async fn a_leftover_that_lies_is_not_believed() {
    let layer = MadeLayer::gzip(&[("a", b"content")]);
    let image = MadeImage::new(std::slice::from_ref(&layer));
    let server = Server::honest(Content::of("x:latest", &image));
    let store = Store::new();
    drop(store.open());
    let blobs = store.path().join("images/blobs/sha256");
    std::fs::write(blobs.join(layer.digest().hex()), vec![0; layer.blob.len()]).expect("write");
    let images = store.open();
    let reference = server.reference("x");
    // The first try finds that the bytes are not the blob's and drops them, the second fetches it.
    let first = images.pull(&reference, None, &Credentials::Anonymous, silent).await;
    if let Err(error) = first {
        assert_eq!(error.kind(), Kind::Invalid);
        images.pull(&reference, None, &Credentials::Anonymous, silent).await.expect("pulled");
    }
    assert_eq!(std::fs::read(blobs.join(layer.digest().hex())).expect("the blob"), layer.blob);
}

#[tokio::test]
async fn missing_pieces_are_reported_and_healed_by_a_pull() {
    let image = small();
    let server = Server::honest(Content::of("x:latest", &image));
    let store = Store::new();
    let reference = server.reference("x");
    let layer = {
        let images = store.open();
        let pulled = images.pull(&reference, None, &Credentials::Anonymous, silent).await.expect("pulled");
        pulled.image.layers[1].clone()
    };
    let root = store.path().join("images");
    std::fs::remove_dir_all(root.join("layers").join(layer.chain_id.digest().hex())).expect("remove");
    std::fs::write(root.join("blobs/sha256").join(layer.digest.hex()), "short").expect("write");
    let images = store.open();
    assert_eq!(images.problems().len(), 2, "{:?}", images.problems());
    let found = images.resolve(&reference.familiar()).await.expect("still listed");
    let error = images.snapshotter().prepare("c", found.chain()).expect_err("damaged");
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().contains("is damaged"), "{error}");
    images.pull(&reference, None, &Credentials::Anonymous, silent).await.expect("healed");
    images.snapshotter().prepare("c", found.chain()).expect("prepared");
    drop(images);
    assert_eq!(store.open().problems(), [""; 0]);
}

#[tokio::test]
async fn a_pull_that_is_dropped_leaves_nothing_but_what_can_be_resumed() {
    let image = MadeImage::new(&[MadeLayer::gzip(&[("a", &[1; 100_000])]), MadeLayer::gzip(&[("b", b"b")])]);
    let stalled = image.layers[1].digest().to_string();
    let server = Server::start(Content::of("x:latest", &image), move |request| {
        request.path.contains(&stalled).then_some(crate::server::Answer::Stall)
    });
    let store = Store::new();
    let images = store.open();
    let reference = server.reference("x");
    let pull = images.pull(&reference, None, &Credentials::Anonymous, silent);
    assert!(tokio::time::timeout(Duration::from_secs(1), pull).await.is_err(), "the registry stalls");
    assert!(images.list().await.expect("list").is_empty());
    images.collect_garbage().await.expect("collected");
    assert_eq!(store.files("layers"), [""; 0]);
    assert_eq!(store.files("blobs/sha256"), [""; 0]);
}

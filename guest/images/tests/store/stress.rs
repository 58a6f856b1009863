//! Pulls, loads, removals, collections and containers all at once: whatever the order, nothing that is in use goes away, and the
//! store is consistent at the end.

use std::{collections::HashSet, io::Cursor, sync::Arc};

use guest_images::{Credentials, Findings, Images, Kind, RemoveOptions, check};

use crate::{
    load::saved,
    maker::{MadeImage, MadeLayer, Store, database, silent},
    server::{Content, Server},
};

const WORKERS: u64 = 6;
const STEPS: u64 = 40;
const NAMES: [&str; 3] = ["a", "b", "c"];

/// Deterministic noise; the seed is the worker's number.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }
}

/// Three images that share their lowest layer; two share another.
fn images() -> Vec<MadeImage> {
    let noise = |seed: u32, length: u32| -> Vec<u8> {
        (0..length).map(|index| ((index ^ seed).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    };
    let base = MadeLayer::gzip(&[("base/file", &noise(1, 60_000)), ("etc/", b"")]);
    let shared = MadeLayer::zstd(&[("shared", &noise(2, 30_000))]);
    (0..3u32)
        .map(|index| {
            let own = MadeLayer::gzip(&[("own", &noise(3 + index, 20_000))]);
            let layers =
                if index == 2 { vec![base.clone(), own] } else { vec![base.clone(), shared.clone(), own] };
            MadeImage::new(&layers)
        })
        .collect()
}

async fn work(number: u64, images: Images, server: Arc<Server>, made: Arc<Vec<MadeImage>>) {
    let mut dice = Dice(number);
    for step in 0..STEPS {
        let which = dice.roll(NAMES.len());
        let pulled = format!("{}/{}", server.domain(), NAMES[which]);
        match dice.roll(6) {
            0 | 1 => {
                let reference = server.reference(NAMES[which]);
                images.pull(&reference, None, &Credentials::Anonymous, silent).await.expect("pulled");
            }
            2 => {
                let archive = saved(&[("", &made[which])]);
                images.load(Cursor::new(archive), silent).await.expect("loaded");
            }
            3 => {
                let options = RemoveOptions { force: dice.roll(2) == 0, parents: true };
                match images.remove(&pulled, options, |_| Vec::new()).await {
                    Err(error) => assert!(
                        matches!(error.kind(), Kind::NotFound | Kind::Conflict),
                        "worker {number}, step {step}: {}",
                        error.chain()
                    ),
                    Ok(deleted) => assert!(!deleted.is_empty()),
                }
            }
            4 => {
                images.collect_garbage().await.expect("collected");
            }
            _ => run(&images, &made[which], &format!("{number}-{step}")).await,
        }
    }
}

/// A container's life: what it stands on is whole from the moment it was made, whatever goes on around it.
async fn run(images: &Images, made: &MadeImage, key: &str) {
    let Ok(image) = images.resolve(&made.id().to_string()).await else { return };
    let snapshotter = images.snapshotter();
    match snapshotter.prepare(key, image.chain()) {
        // Removed between the two.
        Err(error) => assert_eq!(error.kind(), Kind::NotFound, "{}", error.chain()),
        Ok(_) => {
            tokio::task::yield_now().await;
            let mounts = snapshotter.mounts(key).expect("every layer is there");
            assert_eq!(mounts.lower.len(), image.layers.len());
            let base = mounts.lower.last().expect("a layer").join("base/file");
            assert_eq!(std::fs::metadata(&base).expect("the lowest layer is whole").len(), 60_000);
            snapshotter.remove(key).expect("removed");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_the_order_nothing_in_use_goes_away() {
    let made = Arc::new(images());
    let content = NAMES
        .iter()
        .zip(made.iter())
        .fold(Content::default(), |content, (name, image)| content.image(&format!("{name}:latest"), image));
    let server = Arc::new(Server::honest(content));
    let store = Store::new();
    let images = store.open();
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..WORKERS {
        workers.spawn(work(number, images.clone(), server.clone(), made.clone()));
    }
    while let Some(worker) = workers.join_next().await {
        worker.expect("no worker panics");
    }
    for image in images.list().await.expect("listed") {
        images.snapshotter().prepare("last", image.chain()).expect("an image in the index is whole");
        images.snapshotter().remove("last").expect("removed");
    }
    drop(images);
    let folder = store.path().join("images");
    let findings = check(&folder, database(store.path()), &HashSet::new(), false).expect("checked");
    assert_eq!(findings.damage, [""; 0]);
    // Once everything is removed and collected nothing is left, on the disk either.
    let images = store.open();
    for image in images.list().await.expect("listed") {
        let options = RemoveOptions { force: true, parents: true };
        images.remove(&image.id.to_string(), options, |_| Vec::new()).await.expect("removed");
    }
    images.collect_garbage().await.expect("collected");
    drop(images);
    for folder in ["blobs/sha256", "layers", "snapshots"] {
        assert_eq!(store.files(folder), [""; 0], "{folder}");
    }
    assert_eq!(
        check(&folder, database(store.path()), &HashSet::new(), false).expect("checked"),
        Findings::default()
    );
}

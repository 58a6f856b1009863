//! Damage laid by hand, and what a check says and does about it.

use std::{collections::HashSet, fs, io::Cursor};

use guest_images::{Findings, Image, check};
use redb::TableDefinition;

use crate::{
    load::saved,
    maker::{MadeImage, Store, database, silent, small},
};

const NAMES: TableDefinition<'static, &str, &str> = TableDefinition::new("images_names");
const RECORDS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("images_records");

/// A store with an image, and a writable layer `used` on it.
async fn filled() -> (Store, Image) {
    let (store, made): (Store, MadeImage) = (Store::new(), small());
    let images = store.open();
    images.load(Cursor::new(saved(&[("shop:1", &made)])), silent).await.expect("loaded");
    let image = images.resolve("shop:1").await.expect("found");
    images.snapshotter().prepare("used", image.chain()).expect("prepared");
    (store, image)
}

fn found(store: &Store, repair: bool) -> Findings {
    let keys: HashSet<String> = ["used".to_owned()].into();
    check(&store.path().join("images"), database(store.path()), &keys, repair).expect("checked")
}

/// Told without a repair, mended by one, and nothing is found after that.
fn assert_mended(store: &Store, part: &str) {
    let told = found(store, false);
    assert!(told.damage.len() == 1 && told.damage[0].contains(part), "{told:?}");
    let mended = found(store, true);
    assert!(mended.damage.is_empty() && mended.repaired.len() == 1, "{mended:?}");
    assert!(mended.repaired[0].contains(part), "{mended:?}");
    assert_eq!(found(store, false), Findings::default());
}

/// Told, left by a repair, and told again.
fn assert_left(store: &Store, part: &str) {
    for repair in [false, true] {
        let told = found(store, repair);
        assert!(told.damage.iter().any(|sentence| sentence.contains(part)), "{part}: {told:?}");
        assert_eq!(told.repaired, [""; 0]);
    }
}

#[tokio::test]
async fn a_whole_store_is_clean() {
    let (store, _) = filled().await;
    for repair in [false, true] {
        assert_eq!(found(&store, repair), Findings::default());
    }
    assert_eq!(store.open().problems(), [""; 0]);
}

#[tokio::test]
async fn the_damaged_blob_of_an_unpacked_layer_is_forgotten() {
    let (store, image) = filled().await;
    let blob = store.path().join("images/blobs/sha256").join(image.layers[0].digest.hex());
    let mut bytes = fs::read(&blob).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes).expect("written");
    assert_mended(&store, &format!("blob {} holds sha256:", image.layers[0].digest));
    let images = store.open();
    images.resolve("shop:1").await.expect("still there");
    assert_eq!(images.snapshotter().mounts("used").expect("mounts").lower.len(), 2);
}

#[tokio::test]
async fn a_name_without_an_image_is_removed() {
    let (store, _) = filled().await;
    let transaction = database(store.path()).begin_write().expect("a transaction");
    let nowhere = "ab".repeat(32);
    transaction
        .open_table(NAMES)
        .expect("a table")
        .insert("docker.io/library/ghost:1", nowhere.as_str())
        .expect("inserted");
    transaction.commit().expect("committed");
    assert_mended(&store, "the name `docker.io/library/ghost:1` stands for the image abab");
}

#[tokio::test]
async fn what_cannot_be_put_right_is_left_and_said() {
    let (store, image) = filled().await;
    let root = store.path().join("images");
    let layer = root.join("layers").join(image.layers[1].chain_id.digest().hex());
    fs::write(layer.join("intruder"), "").expect("written");
    assert_left(&store, &format!("layer {} has changed in `", image.layers[1].chain_id));

    fs::remove_dir_all(&layer).expect("removed");
    assert_left(&store, &format!("layer {} is gone from `", image.layers[1].chain_id));

    fs::write(root.join("blobs/sha256").join(image.id.hex()), "x").expect("written");
    let sentence = format!("blob {} has 1 bytes instead of", image.id);
    assert_left(&store, &sentence);
    assert!(found(&store, false).damage.iter().any(|told| told.contains("remove and pull again sha256:")));

    fs::remove_dir_all(root.join("snapshots/used/work")).expect("removed");
    assert_left(&store, "the writable layer `used` has lost its folder `work`");

    let transaction = database(store.path()).begin_write().expect("a transaction");
    let key = image.id.hex();
    transaction.open_table(RECORDS).expect("a table").insert(key.as_str(), &b"{"[..]).expect("inserted");
    transaction.commit().expect("committed");
    assert_left(&store, &format!("the record of image `{key}` cannot be read"));
}

#[tokio::test]
async fn leftovers_are_no_damage_and_a_repair_removes_them() {
    let (store, image) = filled().await;
    let root = store.path().join("images");
    store.open().snapshotter().prepare("orphan", image.chain()).expect("prepared");
    for folder in ["layers/tmp-1-1/x", "snapshots/tmp-1-2"] {
        fs::create_dir_all(root.join(folder)).expect("a folder");
    }
    fs::write(root.join("blobs/partial/ingest-1-1"), "half").expect("written");
    fs::write(root.join("blobs/partial").join("cd".repeat(32)), "kept for the next try").expect("written");
    let told = found(&store, false);
    assert_eq!((told.damage.len(), told.repaired.len(), told.leftovers.len()), (0, 0, 4), "{told:?}");
    let repaired = found(&store, true);
    assert_eq!((repaired.damage.len(), repaired.repaired.len()), (0, 4), "{repaired:?}");
    assert_eq!(found(&store, false), Findings::default());
    assert_eq!(store.files("blobs/partial"), ["cd".repeat(32)]);
}

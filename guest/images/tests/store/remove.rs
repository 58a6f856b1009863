//! Names, ids, tags and removal.

use std::io::Cursor;

use guest_images::{Deleted, Digest, Images, InUse, Kind, RemoveOptions};

use crate::{
    load::saved,
    maker::{MadeImage, MadeLayer, Store, silent, small},
};

const PLAIN: RemoveOptions = RemoveOptions { force: false, parents: true };
const FORCE: RemoveOptions = RemoveOptions { force: true, parents: true };

async fn loaded(store: &Store, images: &[(&str, &MadeImage)]) -> Images {
    let opened = store.open();
    opened.load(Cursor::new(saved(images)), silent).await.expect("loaded");
    opened
}

fn unused(_: &Digest) -> Vec<InUse> {
    Vec::new()
}

#[tokio::test]
async fn images_are_found_by_name_and_by_id() {
    let image = small();
    let store = Store::new();
    let images = loaded(&store, &[("shop:latest", &image)]).await;
    let hex = image.id().hex();
    for name in [
        "shop",
        "shop:latest",
        "docker.io/library/shop",
        &hex,
        &format!("sha256:{hex}"),
        &hex[..6],
        &format!("sha256:{}", &hex[..8]),
    ] {
        assert_eq!(
            images.resolve(name).await.unwrap_or_else(|error| panic!("{name}: {error}")).id,
            image.id()
        );
    }
    for (name, said) in [
        ("other", "No such image: other:latest"),
        ("shop:2", "No such image: shop:2"),
        ("x.y/z", "No such image: x.y/z:latest"),
    ] {
        let error = images.resolve(name).await.expect_err(name);
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::NotFound, said));
    }
    assert_eq!(images.resolve("Bad Name").await.expect_err("bad").kind(), Kind::Invalid);
}

#[tokio::test]
async fn the_beginning_of_two_ids_is_ambiguous() {
    let made: Vec<MadeImage> =
        (0..17u8).map(|index| MadeImage::new(&[MadeLayer::plain(&[("f", &[index])])])).collect();
    let store = Store::new();
    let named: Vec<(&str, &MadeImage)> = made.iter().map(|image| ("", image)).collect();
    let images = loaded(&store, &named).await;
    // Of seventeen ids two begin with the same digit.
    let mut digits: Vec<String> = made.iter().map(|image| image.id().hex()[..1].to_owned()).collect();
    digits.sort();
    let twice = digits.windows(2).find(|pair| pair[0] == pair[1]).expect("seventeen ids")[0].clone();
    let error = images.resolve(&twice).await.expect_err("ambiguous");
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().starts_with(&format!("the image id `{twice}` is ambiguous")), "{error}");
}

#[tokio::test]
async fn untagging_keeps_the_image_until_its_last_name_goes() {
    let image = small();
    let store = Store::new();
    let images = loaded(&store, &[("shop:1", &image)]).await;
    images.tag("shop:1", &"other".parse().expect("a name")).await.expect("tagged");
    assert_eq!(images.resolve("other").await.expect("found").repo_tags, ["other:latest", "shop:1"]);
    assert_eq!(
        images.remove("shop:1", PLAIN, unused).await.expect("untagged"),
        [Deleted::Untagged("shop:1".parse().expect("a name"))]
    );
    let chains: Vec<Deleted> = images
        .resolve("other")
        .await
        .expect("found")
        .layers
        .iter()
        .rev()
        .map(|layer| Deleted::Layer(layer.chain_id))
        .collect();
    let mut expected =
        vec![Deleted::Untagged("other:latest".parse().expect("a name")), Deleted::Image(image.id())];
    expected.extend(chains);
    assert_eq!(images.remove("other", PLAIN, unused).await.expect("deleted"), expected);
    assert!(images.list().await.expect("list").is_empty());
    for folder in ["blobs/sha256", "layers"] {
        assert_eq!(store.files(folder), [""; 0]);
    }
    assert_eq!(
        images.remove("other", PLAIN, unused).await.expect_err("gone").to_string(),
        "No such image: other:latest"
    );
}

#[tokio::test]
async fn what_a_container_stands_on_stays() {
    let image = small();
    let store = Store::new();
    let images = loaded(&store, &[("shop:1", &image)]).await;
    let chain = images.resolve("shop:1").await.expect("found").chain();
    images.snapshotter().prepare("container", chain).expect("prepared");
    let stopped = |_: &Digest| vec![InUse { container: "c".repeat(64), running: false }];
    let refused = images.remove("shop:1", PLAIN, stopped).await.expect_err("in use");
    assert_eq!(refused.kind(), Kind::Conflict);
    assert_eq!(
        refused.to_string(),
        format!(
            "conflict: unable to remove repository reference \"shop:1\" (must force) - container cccccccccccc is using its referenced image {}",
            image.id().short()
        )
    );
    images.remove("shop:1", FORCE, stopped).await.expect("forced");
    assert_eq!(store.files("layers").len(), 2, "the container's layers stay");
    assert_eq!(images.snapshotter().mounts("container").expect("mounts").lower.len(), 2);
    images.snapshotter().remove("container").expect("removed");
    assert!(images.collect_garbage().await.expect("collected") > 0);
    assert_eq!(store.files("layers"), [""; 0]);
}

#[tokio::test]
async fn tags_that_cannot_be_are_refused() {
    let image = small();
    let store = Store::new();
    let images = loaded(&store, &[("shop:1", &image)]).await;
    let digest = format!("x@{}", image.id()).parse().expect("a name");
    assert_eq!(
        images.tag("shop:1", &digest).await.expect_err("digest").to_string(),
        "refusing to create a tag with a digest reference"
    );
    let algorithm = "sha256:x".parse().expect("a name");
    assert_eq!(images.tag("shop:1", &algorithm).await.expect_err("sha256").kind(), Kind::Invalid);
    assert_eq!(
        images.tag("nothing", &"x".parse().expect("a name")).await.expect_err("nothing").kind(),
        Kind::NotFound
    );
}

#[tokio::test]
async fn an_image_with_a_damaged_configuration_can_be_removed() {
    let image = small();
    let store = Store::new();
    let images = loaded(&store, &[("shop:1", &image)]).await;
    std::fs::write(images.content().path(&image.id()), "damaged").expect("written");
    assert_eq!(images.resolve("shop:1").await.expect_err("damaged").kind(), Kind::Corrupt);
    assert!(images.list().await.expect("listed").is_empty());
    let deleted = images.remove("shop:1", PLAIN, unused).await.expect("removed");
    assert_eq!(deleted[1], Deleted::Image(image.id()));
    assert_eq!(store.files("blobs/sha256"), [""; 0]);
    // It can come again.
    images.load(Cursor::new(saved(&[("shop:1", &image)])), silent).await.expect("loaded");
    images.resolve("shop:1").await.expect("whole");
}

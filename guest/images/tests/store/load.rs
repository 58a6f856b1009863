//! Archives: `docker save`, old and new, and OCI layouts.

use std::io::{Cursor, Write};

use guest_images::{Digest, Kind};
use serde_json::json;

use crate::maker::{Heard, MadeImage, MadeLayer, OCI_INDEX, Store, silent, small, tar};

/// What `docker save` writes: plain layers, and the table at the end.
pub(crate) fn saved(images: &[(&str, &MadeImage)]) -> Vec<u8> {
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut table = Vec::new();
    for (name, image) in images {
        let config = format!("blobs/sha256/{}", image.id().hex());
        let layers: Vec<String> =
            image.layers.iter().map(|layer| format!("blobs/sha256/{}", layer.diff_id().hex())).collect();
        files.extend(layers.iter().cloned().zip(image.layers.iter().map(|layer| layer.tar.clone())));
        files.push((config.clone(), image.config.clone()));
        let names = if name.is_empty() { json!(null) } else { json!([name]) };
        table.push(json!({"Config": config, "RepoTags": names, "Layers": layers}));
    }
    files.push(("manifest.json".to_owned(), serde_json::to_vec(&table).expect("JSON")));
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(name, data)| (name.as_str(), data.as_slice())).collect();
    tar(&files)
}

/// An OCI layout with an index on the way.
fn layout(name: &str, image: &MadeImage) -> Vec<u8> {
    let platform = guest_images::Platform::host();
    let inner = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        {"mediaType": crate::maker::OCI_MANIFEST, "digest": image.digest(), "size": image.manifest.len(), "platform": platform}]}).to_string().into_bytes();
    let index = json!({"schemaVersion": 2, "manifests": [
        {"mediaType": OCI_INDEX, "digest": Digest::of(&inner), "size": inner.len(), "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1"}}]}).to_string().into_bytes();
    let mut blobs = vec![inner, image.manifest.clone(), image.config.clone()];
    blobs.extend(image.layers.iter().map(|layer| layer.blob.clone()));
    let named: Vec<(String, Vec<u8>)> =
        blobs.into_iter().map(|blob| (format!("blobs/sha256/{}", Digest::of(&blob).hex()), blob)).collect();
    let mut files: Vec<(&str, &[u8])> = vec![
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", &index),
        ("blobs/", b""),
        ("blobs/sha256/", b""),
    ];
    files.extend(named.iter().map(|(name, data)| (name.as_str(), data.as_slice())));
    tar(&files)
}

#[tokio::test]
async fn a_saved_archive_is_loaded_in_every_compression() {
    let image = small();
    let plain = saved(&[("shop:1", &image)]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).expect("gzip");
    for archive in
        [plain.clone(), gzip.finish().expect("gzip"), zstd::encode_all(&plain[..], 1).expect("zstd")]
    {
        let store = Store::new();
        let images = store.open();
        let heard = Heard::default();
        let loaded = images.load(Cursor::new(archive), heard.listener()).await.expect("loaded");
        assert_eq!(
            (loaded.len(), loaded[0].id, &loaded[0].names[..]),
            (1, image.id(), &["shop:1".to_owned()][..])
        );
        assert_eq!(heard.lines().last().map(String::as_str), Some("Loaded image: shop:1"));
        let found = images.resolve("shop:1").await.expect("found");
        assert_eq!((found.layers.len(), found.repo_digests.len()), (2, 0));
        // Manifest, configuration and two layers; the table itself is not kept.
        assert_eq!(store.files("blobs/sha256").len(), 4);
        store.assert_nothing_partial();
    }
}

#[tokio::test]
async fn several_images_share_their_layers() {
    let shared = MadeLayer::gzip(&[("shared", b"s")]);
    let (one, two) =
        (MadeImage::new(&[shared.clone(), MadeLayer::gzip(&[("one", b"1")])]), MadeImage::new(&[shared]));
    let store = Store::new();
    let images = store.open();
    let heard = Heard::default();
    let loaded = images
        .load(Cursor::new(saved(&[("one:1", &one), ("", &two)])), heard.listener())
        .await
        .expect("loaded");
    assert_eq!(loaded.iter().map(|image| image.id).collect::<Vec<_>>(), [one.id(), two.id()]);
    assert!(heard.lines().contains(&format!("Loaded image ID: {}", two.id())));
    assert_eq!(store.files("layers").len(), 2);
}

#[tokio::test]
async fn a_layout_keeps_its_manifest() {
    let image = small();
    let store = Store::new();
    let images = store.open();
    let loaded =
        images.load(Cursor::new(layout("docker.io/library/shop:1", &image)), silent).await.expect("loaded");
    assert_eq!(loaded[0].names, ["shop:1"]);
    assert_eq!(images.resolve("shop:1").await.expect("found").manifest_digest, image.digest());
}

#[tokio::test]
async fn old_archives_link_layers_that_repeat() {
    let layer = MadeLayer::plain(&[("a", b"a")]);
    let image = MadeImage::new(&[layer.clone(), layer.clone()]);
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, data).expect("append");
    };
    add("one/layer.tar", &layer.tar);
    add("config.json", &image.config);
    add(
        "manifest.json",
        json!([{"Config": "config.json", "RepoTags": ["x:1"], "Layers": ["one/layer.tar", "two/layer.tar"]}])
            .to_string()
            .as_bytes(),
    );
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "two/layer.tar", "../one/layer.tar").expect("append");
    let store = Store::new();
    let images = store.open();
    images.load(Cursor::new(builder.into_inner().expect("a tar")), silent).await.expect("loaded");
    assert_eq!(images.resolve("x:1").await.expect("found").layers.len(), 2);
}

#[tokio::test]
async fn bad_archives_are_refused_and_leave_nothing() {
    let image = small();
    let whole = saved(&[("x:1", &image)]);
    let table = |text: &str| tar(&[("manifest.json", text.as_bytes())]);
    let mut lying = layout("x:1", &image);
    // The index still names the blob by its digest, but the content is another.
    let position =
        lying.windows(7).position(|window| window == b"/hello\"").expect("the command in the configuration");
    lying[position + 1] = b'j';
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("truncated", whole[..whole.len() / 2].to_vec()),
        ("noise", b"hello, this is not an archive".repeat(100)),
        ("empty", Vec::new()),
        ("no table", tar(&[("a", b"b")])),
        ("bad table", table("{}")),
        ("missing files", table(r#"[{"Config":"c","RepoTags":["x:1"],"Layers":["l"]}]"#)),
        ("leads out", table(r#"[{"Config":"../../etc/passwd","RepoTags":["x:1"],"Layers":[]}]"#)),
        ("bad name", saved(&[("NOT A NAME", &image)])),
        ("lying", lying),
    ];
    for (what, archive) in cases {
        let store = Store::new();
        let images = store.open();
        let error = images.load(Cursor::new(archive), silent).await.expect_err(what);
        assert_eq!(error.kind(), Kind::Invalid, "{what}: {}", error.chain());
        assert!(images.list().await.expect("list").is_empty(), "{what}");
        for folder in ["blobs/sha256", "layers"] {
            assert_eq!(store.files(folder), [""; 0], "{what} left something in {folder}");
        }
        store.assert_nothing_partial();
    }
}

//! Pushing: what is there is not sent, what breaks off goes on, and what arrives is what was pulled.

use std::{io::Cursor, time::Duration};

use guest_images::{Credentials, Digest, Kind, Options, Reference, RemoveOptions};

use crate::{
    load::saved,
    maker::{Heard, MadeImage, MadeLayer, OCI_MANIFEST, Store, silent, small},
    server::{Answer, Content, Server},
    shelf::Shelf,
};

const ANYONE: Credentials = Credentials::Anonymous;

fn noise(length: u32) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

fn shelf_server() -> (Shelf, Server) {
    let shelf = Shelf::default();
    let server = Server::start(Content::default(), shelf.handler());
    (shelf, server)
}

fn quick() -> Options {
    Options { retry_pause: Duration::from_millis(10), ..Options::default() }
}

#[tokio::test]
async fn what_was_pulled_is_pushed_byte_for_byte_and_found_the_next_time() {
    let image = small();
    let source = Server::honest(Content::of("a:1", &image));
    let (shelf, target) = shelf_server();
    let store = Store::new();
    let images = store.open();
    images.pull(&source.reference("a:1"), None, &ANYONE, silent).await.expect("pulled");
    let name = target.reference("team/a:1");
    images.tag(&format!("{}/a:1", source.domain()), &name).await.expect("tagged");

    let heard = Heard::default();
    images.push(&name, None, &ANYONE, heard.listener()).await.expect("pushed");
    assert_eq!(shelf.manifest("team/a:1"), Some((OCI_MANIFEST.to_owned(), image.manifest.clone())));
    for layer in &image.layers {
        assert_eq!(shelf.blob(&layer.digest().to_string()).as_ref(), Some(&layer.blob));
    }
    assert_eq!(shelf.blob(&image.id().to_string()), Some(image.config.clone()));
    let lines = heard.lines();
    let short: Vec<String> = image.layers.iter().map(|layer| layer.diff_id().short()).collect();
    // The top first, as dockerd.
    assert_eq!(
        lines[..3],
        [
            format!("The push refers to repository [{}/team/a]", target.domain()),
            format!("{} Preparing", short[1]),
            format!("{} Preparing", short[0])
        ]
    );
    assert!(short.iter().all(|id| lines.contains(&format!("{id} Pushed"))), "{lines:?}");
    let end = format!("1: digest: {} size: {}", image.digest(), image.manifest.len());
    assert_eq!(lines.last(), Some(&end));
    let found = images.resolve(&name.familiar()).await.expect("found");
    assert!(found.repo_digests.contains(&format!("{}/team/a@{}", target.domain(), image.digest())));

    let (heard, before) = (Heard::default(), target.count("/uploads/"));
    images.push(&name, None, &ANYONE, heard.listener()).await.expect("pushed again");
    assert!(short.iter().all(|id| heard.lines().contains(&format!("{id} Layer already exists"))));
    assert_eq!(target.count("/uploads/"), before, "nothing is sent twice");
}

#[tokio::test]
async fn a_neighbour_lends_its_layers() {
    let image = small();
    let (shelf, server) = shelf_server();
    let store = Store::new();
    let images = store.open();
    images.load(Cursor::new(saved(&[("x:1", &image)])), silent).await.expect("loaded");
    let (first, second) = (server.reference("first:1"), server.reference("deep/second:1"));
    for name in [&first, &second] {
        images.tag("x:1", name).await.expect("tagged");
    }
    images.push(&first, None, &ANYONE, silent).await.expect("pushed");
    let heard = Heard::default();
    images.push(&second, None, &ANYONE, heard.listener()).await.expect("pushed");
    let mounted = heard.lines().iter().filter(|line| line.ends_with("Mounted from first")).count();
    assert_eq!(mounted, 2, "{:?}", heard.lines());
    assert_eq!(shelf.manifest("first:1"), shelf.manifest("deep/second:1"));
}

#[tokio::test]
async fn plain_layers_are_packed_and_always_the_same_way() {
    let image =
        MadeImage::new(&[MadeLayer::plain(&[("a", &noise(300_000))]), MadeLayer::plain(&[("b", b"b")])]);
    let (store, mut digests) = (Store::new(), Vec::new());
    let images = store.open();
    images.load(Cursor::new(saved(&[("x:1", &image)])), silent).await.expect("loaded");
    let blobs = store.files("blobs/sha256");
    for _ in 0..2 {
        let (shelf, server) = shelf_server();
        let name = server.reference("x:1");
        images.tag("x:1", &name).await.expect("tagged");
        images.push(&name, None, &ANYONE, silent).await.expect("pushed");
        let (media_type, manifest) = shelf.manifest("x:1").expect("a manifest");
        assert_eq!(media_type, "application/vnd.docker.distribution.manifest.v2+json");
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("JSON");
        for (layer, made) in manifest["layers"].as_array().expect("layers").iter().zip(&image.layers) {
            assert_eq!(layer["mediaType"], "application/vnd.docker.image.rootfs.diff.tar.gzip");
            let blob = shelf.blob(layer["digest"].as_str().expect("a digest")).expect("there");
            let mut plain = Vec::new();
            std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&blob[..]), &mut plain)
                .expect("gzip");
            assert_eq!(plain, made.tar);
        }
        digests.push(manifest.to_string());
        // Pulled by someone else, it is the same image.
        let other = Store::new();
        let pulled = other.open().pull(&name, None, &ANYONE, silent).await.expect("pulled");
        assert_eq!(pulled.image.id, image.id());
        assert_eq!(store.files("blobs/sha256"), blobs, "what was packed for the push is not kept");
    }
    assert_eq!(digests[0], digests[1]);
}

#[tokio::test]
async fn an_upload_that_breaks_off_goes_on_where_it_stopped() {
    let image = MadeImage::new(&[MadeLayer::gzip(&[("big", &noise(3_000_000))])]);
    let source = Server::honest(Content::of("a:1", &image));
    let (shelf, target) = shelf_server();
    let store = Store::new();
    let images = store.open_with(quick());
    images.pull(&source.reference("a:1"), None, &ANYONE, silent).await.expect("pulled");
    let name = target.reference("a:1");
    images.tag(&format!("{}/a:1", source.domain()), &name).await.expect("tagged");
    target.cut_next_upload(1_500_000);
    let heard = Heard::default();
    images.push(&name, None, &ANYONE, heard.listener()).await.expect("pushed");
    assert_eq!(shelf.blob(&image.layers[0].digest().to_string()).as_ref(), Some(&image.layers[0].blob));
    let ranges: Vec<String> = target
        .requests()
        .into_iter()
        .filter(|request| request.method == "PATCH")
        .filter_map(|request| request.headers.get("content-range").cloned())
        .collect();
    let last = image.layers[0].blob.len() - 1;
    assert_eq!(ranges, [format!("0-{last}"), format!("1500000-{last}")]);
    assert!(heard.lines().iter().any(|line| line.contains("Retrying in 1 second")), "{:?}", heard.lines());
}

#[tokio::test]
async fn a_layer_outlives_the_image_that_brought_its_blob() {
    // The same files, packed in two ways: the second image finds the layer unpacked and fetches no blob.
    let files: &[(&str, &[u8])] = &[("shared", b"shared")];
    let first = MadeImage::new(&[MadeLayer::gzip(files), MadeLayer::gzip(&[("first", b"1")])]);
    let second = MadeImage::new(&[MadeLayer::zstd(files), MadeLayer::gzip(&[("second", b"2")])]);
    let source = Server::honest(Content::of("first:1", &first).image("second:1", &second));
    let (shelf, target) = shelf_server();
    let store = Store::new();
    let images = store.open();
    for name in ["first:1", "second:1"] {
        images.pull(&source.reference(name), None, &ANYONE, silent).await.expect("pulled");
    }
    let force = RemoveOptions { force: true, parents: true };
    images.remove(&format!("{}/first:1", source.domain()), force, |_| Vec::new()).await.expect("removed");
    drop(images);
    let images = store.open();
    let name = target.reference("second:1");
    images.tag(&format!("{}/second:1", source.domain()), &name).await.expect("tagged");
    images.push(&name, None, &ANYONE, silent).await.expect("pushed");
    assert_eq!(shelf.blob(&first.layers[0].digest().to_string()), Some(first.layers[0].blob.clone()));
    let other = Store::new();
    let pulled = other.open().pull(&name, None, &ANYONE, silent).await.expect("pulled");
    assert_eq!(pulled.image.id, second.id());
    images.remove(&name.familiar(), force, |_| Vec::new()).await.expect("untagged");
    images.remove(&format!("{}/second:1", source.domain()), force, |_| Vec::new()).await.expect("removed");
    assert_eq!(store.files("blobs/sha256"), [""; 0], "the last image takes everything along");
}

#[tokio::test]
async fn every_tag_is_pushed_and_pulled() {
    let (image, other) = (small(), MadeImage::new(&[MadeLayer::gzip(&[("other", b"x")])]));
    let (shelf, server) = shelf_server();
    let store = Store::new();
    let images = store.open();
    images.load(Cursor::new(saved(&[("x:1", &image), ("x:2", &other)])), silent).await.expect("loaded");
    for (from, to) in [("x:1", "all:one"), ("x:2", "all:two"), ("x:1", "allother:one")] {
        images.tag(from, &server.reference(to)).await.expect("tagged");
    }
    let repository: Reference = format!("{}/all", server.domain()).parse().expect("a name");
    images.push(&repository, None, &ANYONE, silent).await.expect("pushed");
    assert!(shelf.manifest("all:one").is_some() && shelf.manifest("all:two").is_some());
    assert!(shelf.manifest("allother:one").is_none());

    let lists = shelf.clone();
    let reader = Server::start(Content::default(), move |request| match request.path.as_str() {
        "/v2/all/tags/list" => Some(Answer::Full(
            200,
            vec![("link".to_owned(), "</v2/all/tags/list?last=one>; rel=\"next\"".to_owned())],
            br#"{"name":"all","tags":["one"]}"#.to_vec(),
        )),
        "/v2/all/tags/list?last=one" => Some(Answer::status(200, r#"{"name":"all","tags":["two"]}"#)),
        _ => lists.answer(request),
    });
    let (store, heard) = (Store::new(), Heard::default());
    let images = store.open();
    let repository: Reference = format!("{}/all", reader.domain()).parse().expect("a name");
    let pulled = images.pull_all_tags(&repository, None, &ANYONE, heard.listener()).await.expect("pulled");
    assert_eq!(pulled.len(), 2);
    let said: Vec<String> = heard.lines().into_iter().filter(|line| line.starts_with("Status")).collect();
    assert_eq!(said, [format!("Status: Downloaded newer image for {}/all", reader.domain())]);
    images.resolve(&format!("{}/all:two", reader.domain())).await.expect("found");
}

#[tokio::test]
async fn what_cannot_be_pushed_is_said_in_dockers_words() {
    let server = Server::start(Content::default(), |request| {
        (request.path != "/v2/").then(|| {
            Answer::status(
                403,
                r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#,
            )
        })
    });
    let store = Store::new();
    let images = store.open();
    images.load(Cursor::new(saved(&[("x:1", &small())])), silent).await.expect("loaded");
    let domain = server.domain();
    images.tag("x:1", &server.reference("x:1")).await.expect("tagged");
    let said = async |name: String| {
        let name: Reference = name.parse().expect("a name");
        images.push(&name, None, &ANYONE, silent).await.expect_err("refused")
    };
    assert_eq!(
        said(format!("{domain}/y:1")).await.to_string(),
        format!("An image does not exist locally with the tag: {domain}/y")
    );
    assert_eq!(said(format!("{domain}/x:2")).await.to_string(), format!("tag does not exist: {domain}/x:2"));
    assert_eq!(
        said(format!("{domain}/x@{}", Digest::of(b"x"))).await.to_string(),
        "cannot push a digest reference"
    );
    let denied = said(format!("{domain}/x:1")).await;
    assert_eq!(
        (denied.kind(), denied.to_string().as_str()),
        (Kind::Forbidden, "denied: requested access to the resource is denied")
    );
    store.assert_nothing_partial();
}

#[tokio::test]
async fn a_registry_that_lies_about_an_upload_is_refused() {
    let image = small();
    for (location, why) in [
        ("file:///etc/passwd", "sends uploads to a `file:` address: refused"),
        ("ftp://127.0.0.1/x", "sends uploads to a `ftp:` address: refused"),
    ] {
        let server = Server::start(Content::default(), move |request| {
            (request.method == "POST")
                .then(|| Answer::Full(202, vec![("location".to_owned(), location.to_owned())], Vec::new()))
        });
        let store = Store::new();
        let images = store.open();
        images.load(Cursor::new(saved(&[("x:1", &image)])), silent).await.expect("loaded");
        images.tag("x:1", &server.reference("x:1")).await.expect("tagged");
        let error = images.push(&server.reference("x:1"), None, &ANYONE, silent).await.expect_err("refused");
        assert!(error.to_string().contains(why), "{error}");
    }
    let shelf = Shelf::default();
    let inner = shelf.clone();
    let server = Server::start(Content::default(), move |request| {
        if request.method == "PUT" && request.path.contains("/manifests/") {
            let other = ("docker-content-digest".to_owned(), Digest::of(b"other").to_string());
            return Some(Answer::Full(201, vec![other], Vec::new()));
        }
        inner.answer(request)
    });
    let store = Store::new();
    let images = store.open();
    images.load(Cursor::new(saved(&[("x:1", &image)])), silent).await.expect("loaded");
    images.tag("x:1", &server.reference("x:1")).await.expect("tagged");
    let error = images.push(&server.reference("x:1"), None, &ANYONE, silent).await.expect_err("refused");
    assert!(error.to_string().contains("stored the manifest sha256:"), "{error}");
    let found = images.resolve("x:1").await.expect("found");
    assert!(found.repo_digests.is_empty(), "a push that failed names nothing: {:?}", found.repo_digests);
}

//! Pulling what an honest registry has.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use guest_images::{Credentials, Kind, Options, Platform, Secret};
use serde_json::json;

use crate::{
    maker::{Heard, MadeImage, MadeLayer, Store, silent, small},
    server::{Answer, Content, Server},
};

const ANYONE: Credentials = Credentials::Anonymous;

#[tokio::test]
async fn a_pulled_image_has_its_names_layers_and_configuration() {
    let image = small();
    let server = Server::honest(Content::of("a/b:1", &image));
    let store = Store::new();
    let images = store.open();
    let heard = Heard::default();
    let pulled =
        images.pull(&server.reference("a/b:1"), None, &ANYONE, heard.listener()).await.expect("pulled");
    assert_eq!((pulled.image.id, pulled.digest, pulled.up_to_date), (image.id(), image.digest(), false));
    let found = images.resolve(&format!("{}/a/b:1", server.domain())).await.expect("found");
    assert_eq!(found.repo_tags, [format!("{}/a/b:1", server.domain())]);
    assert_eq!(found.repo_digests, [format!("{}/a/b@{}", server.domain(), image.digest())]);
    assert_eq!(found.config.config.cmd.as_deref(), Some(&["/hello".to_owned()][..]));
    assert_eq!(found.config_json.as_bytes(), image.config);
    assert_eq!(found.size, 11);
    let layers = store.files("layers");
    assert_eq!(layers.len(), 2);
    assert!(found.layers.iter().all(|layer| layers.contains(&layer.chain_id.digest().hex())));
    store.assert_nothing_partial();

    let lines = heard.lines();
    let short = |index: usize| image.layers[index].digest().short();
    assert_eq!(lines[0], "1 Pulling from a/b");
    assert_eq!(
        lines[1..3],
        [format!("{} Pulling fs layer", short(0)), format!("{} Pulling fs layer", short(1))]
    );
    for state in ["Verifying Checksum", "Download complete", "Pull complete"] {
        assert!(lines.contains(&format!("{} {state}", short(0))), "{lines:?}");
    }
    let end = [
        format!("Digest: {}", image.digest()),
        format!("Status: Downloaded newer image for {}/a/b:1", server.domain()),
    ];
    assert_eq!(lines[lines.len() - 2..], end);

    // All in one header: of several, a proxy may pass on only one.
    let requests = server.requests();
    let asked = requests.iter().find(|request| request.path.contains("/manifests/")).expect("a manifest");
    for kind in [crate::maker::OCI_INDEX, crate::maker::OCI_MANIFEST] {
        assert!(asked.headers["accept"].contains(kind), "{asked:?}");
    }
}

#[tokio::test]
async fn a_second_pull_fetches_no_layer() {
    let image = small();
    let server = Server::honest(Content::of("x:latest", &image));
    let store = Store::new();
    let images = store.open();
    images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect("pulled");
    let before = server.count("/blobs/");
    let heard = Heard::default();
    let again =
        images.pull(&server.reference("x"), None, &ANYONE, heard.listener()).await.expect("pulled again");
    assert!(again.up_to_date);
    assert_eq!(server.count("/blobs/"), before);
    let digest = format!("Digest: {}", image.digest());
    assert_eq!(
        heard.lines(),
        [
            "latest Pulling from x".to_owned(),
            digest,
            format!("Status: Image is up to date for {}/x:latest", server.domain())
        ]
    );
}

#[tokio::test]
async fn every_compression_is_unpacked() {
    let image = MadeImage::new(&[
        MadeLayer::gzip(&[("a", b"1")]),
        MadeLayer::zstd(&[("b", b"2")]),
        MadeLayer::plain(&[("c", b"3")]),
    ]);
    let server = Server::honest(Content::of("x:latest", &image));
    let store = Store::new();
    let images = store.open();
    let pulled = images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect("pulled");
    for (layer, (name, content)) in pulled.image.layers.iter().zip([("a", "1"), ("b", "2"), ("c", "3")]) {
        let file = store.path().join("images/layers").join(layer.chain_id.digest().hex()).join(name);
        assert_eq!(std::fs::read_to_string(file).expect(name), content);
    }
}

#[tokio::test]
async fn a_layer_that_two_images_share_is_fetched_once() {
    let shared = MadeLayer::gzip(&[("shared", &[7; 200_000])]);
    let first = MadeImage::new(&[shared.clone(), MadeLayer::gzip(&[("first", b"1")])]);
    let second = MadeImage::new(&[shared.clone(), MadeLayer::gzip(&[("second", b"2")])]);
    let content = Content::of("first:latest", &first).image("second:latest", &second);
    // Slow enough that both pulls want it at the same time.
    let slow = shared.digest().to_string();
    let server = Server::start(content, move |request| {
        if request.path.contains(&slow) {
            std::thread::sleep(Duration::from_millis(300));
        }
        None
    });
    let store = Store::new();
    let images = store.open();
    let (first_reference, second_reference) = (server.reference("first"), server.reference("second"));
    let pulls = (
        images.pull(&first_reference, None, &ANYONE, silent),
        images.pull(&second_reference, None, &ANYONE, silent),
    );
    let (one, two) = tokio::join!(pulls.0, pulls.1);
    assert_eq!(one.expect("first").image.layers[0], two.expect("second").image.layers[0]);
    assert_eq!(server.count(&shared.digest().to_string()), 1);
    assert_eq!(store.files("layers").len(), 3);
}

#[tokio::test]
async fn a_pull_that_is_dropped_does_not_take_the_other_along() {
    let shared = MadeLayer::gzip(&[("shared", &[7; 100])]);
    let image = MadeImage::new(std::slice::from_ref(&shared));
    let slow = shared.digest().to_string();
    let server = Server::start(Content::of("x:latest", &image).image("y:latest", &image), move |request| {
        if request.path.contains(&slow) {
            std::thread::sleep(Duration::from_millis(500));
        }
        None
    });
    let store = Store::new();
    let images = store.open();
    let (first, reference) = (images.clone(), server.reference("x"));
    let dropped = tokio::spawn(async move { first.pull(&reference, None, &ANYONE, silent).await });
    while server.count(&shared.digest().to_string()) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (second, reference) = (images.clone(), server.reference("y"));
    let kept = tokio::spawn(async move { second.pull(&reference, None, &ANYONE, silent).await });
    while server.count("/v2/y/manifests") == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    dropped.abort();
    kept.await.expect("joined").expect("pulled");
    assert_eq!(server.count(&shared.digest().to_string()), 1);
}

#[tokio::test]
async fn a_broken_connection_is_taken_up_where_it_broke() {
    let layer = MadeLayer::plain(&[("big", &[9; 400_000])]);
    let image = MadeImage::new(std::slice::from_ref(&layer));
    let tries = Arc::new(AtomicUsize::new(0));
    let (digest, blob) = (layer.digest().to_string(), layer.blob.clone());
    let server = Server::start(Content::of("x:latest", &image), move |request| {
        let cut = request.path.contains(&digest) && tries.fetch_add(1, Ordering::SeqCst) == 0;
        cut.then(|| Answer::Cut(blob[..150_000].to_vec(), blob.len() as u64))
    });
    let store = Store::new();
    let images = store.open();
    let heard = Heard::default();
    images.pull(&server.reference("x"), None, &ANYONE, heard.listener()).await.expect("pulled");
    let ranges: Vec<_> = server
        .requests()
        .into_iter()
        .filter(|request| request.path.contains(&layer.digest().to_string()))
        .map(|request| request.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges, [None, Some("bytes=150000-".to_owned())]);
    assert!(heard.lines().contains(&format!("{} Retrying in 1 second", layer.digest().short())));
    store.assert_nothing_partial();
}

#[tokio::test]
async fn a_registry_that_is_unwell_is_asked_again() {
    let image = small();
    let tries = Arc::new(AtomicUsize::new(0));
    let server = Server::start(Content::of("x:latest", &image), move |request| {
        (request.path.contains("/manifests/") && tries.fetch_add(1, Ordering::SeqCst) == 0)
            .then(|| Answer::status(503, "busy"))
    });
    Store::new().open().pull(&server.reference("x"), None, &ANYONE, silent).await.expect("pulled");
    assert_eq!(server.count("/manifests/"), 2);
}

#[tokio::test]
async fn the_platform_of_this_machine_is_chosen() {
    let host = Platform::host();
    let (ours, theirs) = (
        MadeImage::of(&host.architecture, &[MadeLayer::gzip(&[("ours", b"")])]),
        MadeImage::of("s390x", &[MadeLayer::gzip(&[("theirs", b"")])]),
    );
    let entry = |image: &MadeImage, os: &str, architecture: &str| json!({"mediaType": crate::maker::OCI_MANIFEST, "digest": image.digest(), "size": image.manifest.len(), "platform": {"os": os, "architecture": architecture}});
    let index = json!({"schemaVersion": 2, "mediaType": crate::maker::OCI_INDEX, "manifests": [
        entry(&theirs, "unknown", "unknown"), entry(&theirs, "linux", "s390x"), entry(&ours, "linux", &host.architecture)]});
    let index = index.to_string().into_bytes();
    let content = Content::of("x:ours", &ours).image("x:theirs", &theirs).index("x:latest", &index);
    let server = Server::honest(content);
    let store = Store::new();
    let images = store.open();
    let pulled = images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect("pulled");
    assert_eq!((pulled.image.id, pulled.digest), (ours.id(), guest_images::Digest::of(&index)));
    let other = images
        .pull(&server.reference("x"), Some(&"linux/s390x".parse().expect("a platform")), &ANYONE, silent)
        .await
        .expect("pulled");
    assert_eq!(other.image.id, theirs.id());
    let none = images
        .pull(&server.reference("x"), Some(&"linux/riscv64".parse().expect("a platform")), &ANYONE, silent)
        .await
        .expect_err("no such platform");
    assert_eq!(
        (none.kind(), none.to_string().as_str()),
        (Kind::NotFound, "no matching manifest for linux/riscv64 in the manifest list entries")
    );
    let wrong = images
        .pull(&server.reference("x:theirs"), Some(&host), &ANYONE, silent)
        .await
        .expect_err("another platform");
    assert!(
        wrong.to_string().ends_with(&format!(
            "was found but its platform (linux/s390x) does not match the specified platform ({host})"
        )),
        "{wrong}"
    );
}

#[tokio::test]
async fn pulls_by_digest_are_verified_and_named_by_it() {
    let image = small();
    let server = Server::honest(Content::of("x:latest", &image));
    let store = Store::new();
    let images = store.open();
    let reference = server.reference(&format!("x@{}", image.digest()));
    let pulled = images.pull(&reference, None, &ANYONE, silent).await.expect("pulled");
    assert_eq!((pulled.image.repo_tags.len(), pulled.image.repo_digests), (0, vec![reference.familiar()]));
    images.resolve(&reference.familiar()).await.expect("found");
}

#[tokio::test]
async fn tokens_and_passwords_are_sent_where_they_belong() {
    let image = small();
    let domain = Arc::new(std::sync::OnceLock::<String>::new());
    let realm = domain.clone();
    let server = Server::start(Content::of("x:latest", &image), move |request| {
        let authorization = request.headers.get("authorization").map(String::as_str);
        if request.path.starts_with("/token") {
            let known = authorization == Some("Basic YW5hOnNlY3JldA==");
            return Some(if known {
                Answer::status(200, r#"{"token":"t0ken"}"#)
            } else {
                Answer::status(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"who?"}]}"#)
            });
        }
        (authorization != Some("Bearer t0ken") && request.path != "/v2/").then(|| {
            let challenge = format!(
                r#"Bearer realm="http://{}/token",service="here",scope="repository:x:pull""#,
                realm.get().expect("domain")
            );
            Answer::Full(401, vec![("www-authenticate".to_owned(), challenge)], Vec::new())
        })
    });
    domain.set(server.domain()).expect("once");
    let store = Store::new();
    let images = store.open();
    let ana = Credentials::Basic { username: "ana".to_owned(), password: Secret::new("secret") };
    images.pull(&server.reference("x"), None, &ana, silent).await.expect("pulled");
    let asked: Vec<String> = server
        .requests()
        .into_iter()
        .map(|request| request.path)
        .filter(|path| path.starts_with("/token"))
        .collect();
    // One token serves the whole pull.
    assert_eq!(asked, ["/token?service=here&scope=repository%3Ax%3Apull&account=ana"]);

    let store = Store::new();
    let images = store.open();
    let denied = images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect_err("anonymous");
    assert_eq!(denied.kind(), Kind::NotFound);
    assert!(
        denied.to_string().starts_with(&format!(
            "pull access denied for {}/x, repository does not exist or may require 'docker login': ",
            server.domain()
        )),
        "{denied}"
    );
    let bob = Credentials::Basic { username: "bob".to_owned(), password: Secret::new("wrong") };
    assert_eq!(
        images.pull(&server.reference("x"), None, &bob, silent).await.expect_err("bob").kind(),
        Kind::Unauthorized
    );
}

#[tokio::test]
async fn a_missing_tag_is_said_in_dockers_words() {
    let server = Server::honest(Content::default());
    let error =
        Store::new().open().pull(&server.reference("x:y"), None, &ANYONE, silent).await.expect_err("missing");
    assert_eq!(error.kind(), Kind::NotFound);
    assert_eq!(
        error.to_string(),
        format!("manifest for {}/x:y not found: manifest unknown: manifest unknown", server.domain())
    );
}

#[tokio::test]
async fn an_unreachable_registry_is_named() {
    // A port that was free a moment ago.
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let reference = format!("127.0.0.1:{port}/x").parse().expect("a reference");
    let error = Store::new().open().pull(&reference, None, &ANYONE, silent).await.expect_err("nobody there");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert_eq!(error.to_string(), format!("registry `127.0.0.1:{port}` cannot be reached"));
    assert!(error.chain().to_lowercase().contains("refused"), "{}", error.chain());
}

#[tokio::test]
async fn bundled_images_come_before_any_registry() {
    let image = small();
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("hello.tar"), crate::load::saved(&[("hello:latest", &image)]))
        .expect("write");
    let store = Store::new();
    let images =
        store.open_with(Options { bundled: Some(folder.path().to_path_buf()), ..Options::default() });
    for name in ["hello", "docker.io/library/hello:latest"] {
        let heard = Heard::default();
        let pulled = images
            .pull(&name.parse().expect("a name"), None, &ANYONE, heard.listener())
            .await
            .expect("bundled");
        assert_eq!((pulled.image.id, pulled.image.repo_tags), (image.id(), vec!["hello:latest".to_owned()]));
        assert_eq!(heard.lines()[0], "latest Pulling from library/hello");
    }
}

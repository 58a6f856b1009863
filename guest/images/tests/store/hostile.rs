//! Registries and images that lie: refused with a sentence, and nothing kept.

use guest_images::{Credentials, Digest, Error, Kind, Limits, Options, Secret};
use serde_json::json;

use crate::{
    maker::{MadeImage, MadeLayer, Store, silent, small, tar},
    server::{Answer, Content, Request, Server},
};

/// Pulls `x` and hands back the refusal, after making sure that nothing of it was kept.
async fn refused(
    content: Content,
    special: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
) -> Error {
    let honest: Vec<String> = content
        .blobs
        .iter()
        .filter(|(name, blob)| **name == Digest::of(blob).to_string())
        .map(|(name, _)| name["sha256:".len()..].to_owned())
        .collect();
    let server = Server::start(content, special);
    let store = Store::new();
    let options =
        Options { limits: Limits { layer_entries_max: 100, ..Limits::default() }, ..Options::default() };
    let images = store.open_with(options);
    let error = images
        .pull(&server.reference("x"), None, &Credentials::Anonymous, silent)
        .await
        .expect_err("refused");
    assert!(images.list().await.expect("list").is_empty());
    images.collect_garbage().await.expect("collected");
    assert_eq!(store.files("blobs/sha256"), [""; 0], "blobs were kept");
    assert_eq!(store.files("layers"), [""; 0], "layers were kept");
    // An honest layer that was on its way when another was refused may be taken up again.
    assert!(store.files("blobs/partial").iter().all(|name| honest.contains(name)), "a lie was kept");
    store.assert_no_leftovers();
    error
}

fn one_layer() -> (MadeImage, MadeLayer) {
    let layer = MadeLayer::gzip(&[("a", b"content")]);
    (MadeImage::new(std::slice::from_ref(&layer)), layer)
}

#[tokio::test]
async fn a_blob_with_another_digest_is_refused() {
    let (image, layer) = one_layer();
    let mut content = Content::of("x:latest", &image);
    let mut lie = layer.blob.clone();
    lie[20] ^= 1;
    content.blobs.insert(layer.digest().to_string(), lie.clone());
    let error = refused(content, |_| None).await;
    assert_eq!(error.kind(), Kind::Invalid);
    assert_eq!(
        error.to_string(),
        format!(
            "blob {} arrived with the digest {}: refused, nothing of it was kept",
            layer.digest(),
            Digest::of(&lie)
        )
    );
}

#[tokio::test]
async fn a_blob_that_is_too_long_is_refused() {
    let (image, layer) = one_layer();
    let mut content = Content::of("x:latest", &image);
    content.blobs.insert(layer.digest().to_string(), [layer.blob.clone(), vec![0; 10]].concat());
    let error = refused(content, |_| None).await;
    assert_eq!(
        error.to_string(),
        format!(
            "blob {} is larger than the {} bytes that the manifest says: refused",
            layer.digest(),
            layer.blob.len()
        )
    );
}

#[tokio::test]
async fn an_endless_body_is_cut_off() {
    let (image, layer) = one_layer();
    let digest = layer.digest().to_string();
    let error = refused(Content::of("x:latest", &image), move |request| {
        request.path.contains(&digest).then_some(Answer::Endless)
    })
    .await;
    assert!(error.to_string().contains("is larger than the"), "{error}");
    let error = refused(Content::of("x:latest", &image), |request| {
        request.path.contains("/manifests/").then_some(Answer::Endless)
    })
    .await;
    assert!(error.to_string().contains("gave a manifest of more than 4194304 bytes: refused"), "{error}");
}

#[tokio::test]
async fn a_manifest_with_another_digest_is_refused() {
    let image = small();
    let manifest = image.manifest.clone();
    let header = ("docker-content-digest".to_owned(), Digest::of(b"other").to_string());
    let error = refused(Content::of("x:latest", &image), move |request| {
        request
            .path
            .contains("/manifests/")
            .then(|| Answer::Full(200, vec![header.clone()], manifest.clone()))
    })
    .await;
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("gave a manifest with the digest"), "{error}");

    let server = Server::start(Content::default(), |request| {
        request.path.contains("/manifests/").then(|| Answer::status(200, "{}"))
    });
    let reference = server.reference(&format!("x@{}", image.digest()));
    let store = Store::new();
    let error =
        store.open().pull(&reference, None, &Credentials::Anonymous, silent).await.expect_err("refused");
    assert!(error.to_string().contains(&format!("for {}: refused", image.digest())), "{error}");
}

#[tokio::test]
async fn redirects_in_a_circle_are_refused() {
    let error = refused(Content::default(), |request| {
        request
            .path
            .contains("/manifests/")
            .then(|| Answer::Full(307, vec![("location".to_owned(), request.path.clone())], Vec::new()))
    })
    .await;
    assert!(error.to_string().ends_with("redirects in a way that is not followed"), "{error}");
    assert!(error.chain().contains("more than 10 redirects"), "{}", error.chain());
}

#[tokio::test]
async fn blobs_behind_a_redirect_are_fetched_without_the_registrys_token() {
    let (image, layer) = one_layer();
    let elsewhere = Server::honest(Content::of("x:latest", &image));
    let (digest, target) =
        (layer.digest().to_string(), format!("http://{}/v2/x/blobs/{}", elsewhere.domain(), layer.digest()));
    let server = Server::start(Content::of("x:latest", &image), move |request| {
        if request.path.contains("/manifests/") && !request.headers.contains_key("authorization") {
            return Some(Answer::Full(
                401,
                vec![("www-authenticate".to_owned(), "Basic realm=x".to_owned())],
                Vec::new(),
            ));
        }
        request
            .path
            .contains(&digest)
            .then(|| Answer::Full(307, vec![("location".to_owned(), target.clone())], Vec::new()))
    });
    let store = Store::new();
    let credentials = Credentials::Basic { username: "ana".to_owned(), password: Secret::new("secret") };
    store.open().pull(&server.reference("x"), None, &credentials, silent).await.expect("pulled");
    let asked = elsewhere.requests();
    assert_eq!(asked.len(), 1);
    assert!(!asked[0].headers.contains_key("authorization"), "the other host learned the password");
}

#[tokio::test]
async fn a_layer_with_another_diff_id_is_refused() {
    let layer = MadeLayer::gzip(&[("a", b"content")]);
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"other")]}});
    let image = MadeImage::with_config(config.to_string().into_bytes(), std::slice::from_ref(&layer));
    let error = refused(Content::of("x:latest", &image), |_| None).await;
    assert_eq!(
        error.to_string(),
        format!(
            "layer {} unpacks to {}, but the configuration of the image says {}: refused",
            layer.digest(),
            layer.diff_id(),
            Digest::of(b"other")
        )
    );
}

#[tokio::test]
async fn hostile_layers_are_refused() {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..9].copy_from_slice(b"../escape");
    header.set_size(0);
    header.set_mode(0o644);
    header.set_cksum();
    let escape = [header.as_bytes().to_vec(), vec![0; 1024]].concat();
    let many = tar(&(0..101).map(|_| ("d/", &b""[..])).collect::<Vec<_>>());
    let truncated = {
        let whole = tar(&[("a", &[1; 2000])]);
        whole[..1200].to_vec()
    };
    for (tar, why) in [
        (escape, "leads out of it"),
        (many, "has more than the limit of 100 entries"),
        (truncated, "cannot be unpacked"),
        (b"no tar at all".to_vec(), "cannot be unpacked"),
    ] {
        let layer =
            MadeLayer { blob: tar.clone(), tar, media_type: "application/vnd.oci.image.layer.v1.tar" };
        let image = MadeImage::new(&[MadeLayer::gzip(&[("good", b"layer")]), layer]);
        let error = refused(Content::of("x:latest", &image), |_| None).await;
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.to_string().ends_with(why), "{error}");
    }
}

#[tokio::test]
async fn documents_of_the_wrong_kind_are_refused() {
    for body in ["", "{", "[]", "null", r#"{"schemaVersion":2}"#, "<html>login</html>"] {
        let error = refused(Content::default(), move |request| {
            request.path.contains("/manifests/").then(|| Answer::status(200, body))
        })
        .await;
        assert_eq!(error.kind(), Kind::Invalid, "{body}: {error}");
    }
}

#[tokio::test]
async fn an_index_that_leads_to_itself_is_refused() {
    // A digest cannot be in its own preimage, so the registry must lie about one of them.
    let entry = json!({"mediaType": crate::maker::OCI_INDEX, "digest": Digest::of(b"x"), "size": 3, "platform": {"os": "linux", "architecture": guest_images::Platform::host().architecture}});
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    let error = refused(Content::default(), move |request| {
        request.path.contains("/manifests/").then(|| Answer::status(200, &index))
    })
    .await;
    assert!(error.to_string().contains(": refused"), "{error}");
}

#[tokio::test]
async fn a_missing_blob_is_named() {
    let (image, layer) = one_layer();
    let mut content = Content::of("x:latest", &image);
    content.blobs.remove(&layer.digest().to_string());
    let error = refused(content, |_| None).await;
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains(&format!("does not have blob {}", layer.digest())), "{error}");
}

#[tokio::test]
async fn an_image_for_another_system_is_refused() {
    let config =
        json!({"architecture": "amd64", "os": "windows", "rootfs": {"type": "layers", "diff_ids": []}});
    let image = MadeImage::with_config(config.to_string().into_bytes(), &[]);
    let error = refused(Content::of("x:latest", &image), |_| None).await;
    assert_eq!(
        error.to_string(),
        "image operating system \"windows\" cannot be used on this platform: it runs linux"
    );
}

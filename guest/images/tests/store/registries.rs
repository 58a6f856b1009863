//! Login, search, what a name stands for; and that secrets stay where they belong.

use std::{
    io::Write,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
};

use guest_images::{Credentials, Kind, Options, Platform, Secret};
use serde_json::json;

use crate::{
    maker::{MadeImage, MadeLayer, OCI_INDEX, Store, silent, small},
    server::{Answer, Content, Request, Server},
    shelf::Shelf,
};

const PASSWORD: &str = "p4ssw0rd-marker";

fn ana() -> Credentials {
    Credentials::Basic { username: "ana".to_owned(), password: Secret::new(PASSWORD) }
}

/// `ana:p4ssw0rd-marker`.
const ANA: &str = "Basic YW5hOnA0c3N3MHJkLW1hcmtlcg==";

fn challenge(text: &str) -> Answer {
    Answer::Full(401, vec![("www-authenticate".to_owned(), text.to_owned())], Vec::new())
}

fn bearer(request: &Request) -> Option<&str> {
    request.headers.get("authorization")?.strip_prefix("Bearer ")
}

/// A registry that sends to its own token server, which answers a login with a refresh token.
fn with_tokens(shelf: Shelf) -> Server {
    let domain = Arc::new(OnceLock::<String>::new());
    let realm = domain.clone();
    let server = Server::start(Content::default(), move |request| {
        let realm =
            format!("Bearer realm=\"http://{}/token\",service=\"here\"", realm.get().expect("a domain"));
        if request.path.starts_with("/token") {
            let form = String::from_utf8_lossy(&request.body);
            let known = request.headers.get("authorization").map(String::as_str) == Some(ANA)
                || form.contains("refresh_token=r3fresh-marker") && form.contains("grant_type=refresh_token");
            let offline = request.path.contains("offline_token=true");
            let token = if offline {
                json!({"access_token": "t0ken-marker", "refresh_token": "r3fresh-marker"})
            } else {
                json!({"token": "t0ken-marker", "expires_in": 60})
            };
            return Some(if known {
                Answer::status(200, &token.to_string())
            } else {
                Answer::status(401, r#"{"details":"incorrect username or password"}"#)
            });
        }
        if bearer(request) != Some("t0ken-marker") {
            return Some(challenge(&realm));
        }
        shelf.answer(request)
    });
    domain.set(server.domain()).expect("once");
    server
}

#[tokio::test]
async fn a_login_is_really_checked() {
    let basic = Server::start(Content::default(), |request| {
        (request.headers.get("authorization").map(String::as_str) != Some(ANA))
            .then(|| challenge("Basic realm=\"x\""))
    });
    let images = Store::new().open();
    assert_eq!(images.login(&basic.domain(), &ana()).await.expect("let in"), None);
    assert_eq!(images.login(&format!("http://{}/v1/", basic.domain()), &ana()).await.expect("let in"), None);
    let bob = Credentials::Basic { username: "bob".to_owned(), password: Secret::new("x") };
    let error = images.login(&basic.domain(), &bob).await.expect_err("not bob");
    assert_eq!(error.kind(), Kind::Unauthorized);
    assert_eq!(
        error.to_string(),
        format!("login attempt to http://{}/v2/ failed with status: 401 Unauthorized", basic.domain())
    );

    let tokens = with_tokens(Shelf::default());
    let error = images.login(&tokens.domain(), &bob).await.expect_err("not bob");
    assert_eq!(error.kind(), Kind::Unauthorized);
    assert_eq!(
        error.to_string(),
        format!("Get \"http://{}/v2/\": unauthorized: incorrect username or password", tokens.domain())
    );
    for nonsense in ["a b", "x/../y z", "exa mple:5000", "UPPER case"] {
        assert_eq!(images.login(nonsense, &ana()).await.expect_err(nonsense).kind(), Kind::Invalid);
    }
}

#[tokio::test]
async fn an_identity_token_is_given_and_taken() {
    let shelf = Shelf::default();
    let server = with_tokens(shelf.clone());
    let store = Store::new();
    let images = store.open();
    // The shelf itself knows nothing at `/v2/`, and a login wants an answer there.
    let error = images.login(&server.domain(), &ana()).await;
    assert!(
        error.is_err()
            || error.is_ok_and(|token| token.is_some_and(|token| token.reveal() == "r3fresh-marker"))
    );
    images
        .load(std::io::Cursor::new(crate::load::saved(&[("x:1", &small())])), silent)
        .await
        .expect("loaded");
    images.tag("x:1", &server.reference("x:1")).await.expect("tagged");
    let identity = Credentials::IdentityToken(Secret::new("r3fresh-marker"));
    images.push(&server.reference("x:1"), None, &identity, silent).await.expect("pushed");
    assert!(shelf.manifest("x:1").is_some());
    let scopes: Vec<String> = server
        .requests()
        .into_iter()
        .filter(|request| request.path.starts_with("/token") && request.method == "POST")
        .map(|request| String::from_utf8_lossy(&request.body).into_owned())
        .collect();
    assert!(scopes.iter().all(|form| form.contains("scope=repository%3Ax%3Apull%2Cpush")), "{scopes:?}");
}

/// Collects everything that is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("log").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn search_files(folder: &Path, needles: &[&str]) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            search_files(&path, needles);
            continue;
        }
        let bytes = std::fs::read(&path).expect("a file");
        for needle in needles {
            let found = bytes.windows(needle.len()).any(|window| window == needle.as_bytes());
            assert!(!found, "`{needle}` is in {}", path.display());
        }
    }
}

#[tokio::test]
async fn no_secret_is_logged_or_stored() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    // For all threads: with one of its own only, a line that another test's thread comes by first is switched off for good.
    tracing::subscriber::set_global_default(subscriber).expect("the only one");
    let shelf = Shelf::default();
    let server = with_tokens(shelf);
    let store = Store::new();
    let images = store.open();
    images
        .load(std::io::Cursor::new(crate::load::saved(&[("x:1", &small())])), silent)
        .await
        .expect("loaded");
    images.tag("x:1", &server.reference("x:1")).await.expect("tagged");
    for credentials in [
        ana(),
        Credentials::IdentityToken(Secret::new("r3fresh-marker")),
        Credentials::RegistryToken(Secret::new("t0ken-marker")),
    ] {
        images.push(&server.reference("x:1"), None, &credentials, silent).await.expect("pushed");
        images.pull(&server.reference("x:1"), None, &credentials, silent).await.expect("pulled");
        let missing =
            images.pull(&server.reference("x:2"), None, &credentials, silent).await.expect_err("missing");
        assert!(!missing.chain().contains("marker"), "{}", missing.chain());
        // However it ends, nothing of it may be seen.
        let _login = images.login(&server.domain(), &credentials).await;
    }
    drop(images);
    let needles = [PASSWORD, &ANA["Basic ".len()..], "r3fresh-marker", "t0ken-marker"];
    let said = String::from_utf8_lossy(&log.0.lock().expect("log")).into_owned();
    assert!(said.contains("pushed"), "the log was not heard");
    for needle in needles {
        let line = said.lines().find(|line| line.contains(needle));
        assert_eq!(line, None, "`{needle}` was logged");
    }
    search_files(store.path(), &needles);
}

#[tokio::test]
async fn token_servers_that_lie_are_refused() {
    let image = small();
    for (realm, why) in [
        ("file:///etc/passwd", "which is not reached by HTTP: refused"),
        ("no url", "names a token server that is no URL"),
        ("", "names a token server that is no URL"),
    ] {
        let server = Server::start(Content::of("x:latest", &image), move |_| {
            Some(challenge(&format!("Bearer realm=\"{realm}\",service=\"s\"")))
        });
        let error = Store::new()
            .open()
            .pull(&server.reference("x"), None, &ana(), silent)
            .await
            .expect_err("refused");
        assert!(error.to_string().contains(why), "{error}");
    }
    type Case = (fn() -> Answer, &'static str);
    let answers: [Case; 5] = [
        (|| Answer::Endless, "answered with more than 1048576 bytes: refused"),
        (|| Answer::status(200, "{}"), "gave no token"),
        (|| Answer::status(200, r#"{"token":""}"#), "gave no token"),
        (|| Answer::status(200, "<html>"), "gave no token"),
        (|| Answer::status(200, "{\"token\":\"a\\nb\"}"), "gave no token"),
    ];
    for (answer, why) in answers {
        let domain = Arc::new(OnceLock::<String>::new());
        let realm = domain.clone();
        let server = Server::start(Content::of("x:latest", &image), move |request| {
            if request.path.starts_with("/token") {
                return Some(answer());
            }
            Some(challenge(&format!("Bearer realm=\"http://{}/token\"", realm.get().expect("a domain"))))
        });
        domain.set(server.domain()).expect("once");
        let error = Store::new()
            .open()
            .pull(&server.reference("x"), None, &ana(), silent)
            .await
            .expect_err("refused");
        assert!(error.to_string().ends_with(why), "{error}");
    }
}

#[tokio::test]
async fn redirects_lead_only_to_http() {
    let server = Server::start(Content::default(), |request| {
        request.path.contains("/manifests/").then(|| {
            Answer::Full(307, vec![("location".to_owned(), "file:///etc/passwd".to_owned())], Vec::new())
        })
    });
    let error =
        Store::new().open().pull(&server.reference("x"), None, &ana(), silent).await.expect_err("refused");
    assert!(
        error.to_string().contains("redirects in a way that is not followed")
            || error.chain().contains("307"),
        "{}",
        error.chain()
    );
}

#[tokio::test]
async fn a_rate_limit_is_said_and_not_made_worse() {
    let server = Server::start(Content::default(), |request| {
        request.path.contains("/manifests/").then(|| {
            Answer::status(429, r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit."}]}"#)
        })
    });
    let error = Store::new()
        .open()
        .pull(&server.reference("x"), None, &Credentials::Anonymous, silent)
        .await
        .expect_err("limited");
    assert_eq!(error.to_string(), "toomanyrequests: You have reached your pull rate limit.");
    assert_eq!(server.count("/manifests/"), 1);
}

#[tokio::test]
async fn an_index_is_searched() {
    let server = Server::start(Content::default(), |request| {
        (request.path == "/v1/search?q=team%2Fword&n=7").then(|| {
            let found = json!({"num_results": 1, "results": [
                {"name": "team/word", "description": null, "star_count": 3, "is_official": true, "is_automated": true}]});
            Answer::status(200, &found.to_string())
        })
    });
    let images = Store::new().open();
    let term = |words: &str| format!("{}/{words}", server.domain());
    let found = images.search(&term("team/word"), 7, &Credentials::Anonymous).await.expect("found");
    assert_eq!((found.len(), found[0].name.as_str(), found[0].star_count), (1, "team/word", 3));
    assert!(found[0].is_official && !found[0].is_automated);
    let error = images.search(&term("other"), 7, &Credentials::Anonymous).await.expect_err("404");
    assert!(error.to_string().starts_with("Unexpected status code 404"), "{error}");
    let error = images.search("https://x.example/y", 7, &Credentials::Anonymous).await.expect_err("a scheme");
    assert_eq!(error.kind(), Kind::Invalid);
}

#[tokio::test]
async fn what_a_name_stands_for_is_told_without_a_pull() {
    let image = MadeImage::of("arm64", &[MadeLayer::gzip(&[("a", b"a")])]);
    let platforms = [("amd64", ""), ("arm64", "v8")];
    let entries: Vec<_> = platforms
        .iter()
        .map(|(architecture, variant)| {
            json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": image.digest(), "size": 1,
                "platform": Platform { os: "linux".to_owned(), architecture: (*architecture).to_owned(), variant: (*variant).to_owned() }})
        })
        .collect();
    let index = json!({"schemaVersion": 2, "manifests": entries}).to_string();
    let server = Server::honest(Content::of("x:one", &image).index("x:many", index.as_bytes()));
    let store = Store::new();
    let images = store.open_with(Options::default());
    let many = images.remote(&server.reference("x:many"), &Credentials::Anonymous).await.expect("told");
    assert_eq!((many.media_type.as_str(), many.size), (OCI_INDEX, index.len() as u64));
    let shown: Vec<String> = many.platforms.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["linux/amd64", "linux/arm64/v8"]);
    let one = images.remote(&server.reference("x:one"), &Credentials::Anonymous).await.expect("told");
    assert_eq!((one.digest, one.platforms[0].architecture.as_str()), (image.digest(), "arm64"));
    let error =
        images.remote(&server.reference("x:none"), &Credentials::Anonymous).await.expect_err("nothing");
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (Kind::NotFound, "manifest unknown: manifest unknown")
    );
    assert_eq!(store.files("blobs/sha256"), [""; 0]);
}

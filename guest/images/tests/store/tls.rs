//! Registries with certificates: trusted by a folder of their own, asked for ours, and refused when wrong.

use std::{path::Path, sync::Arc};

use guest_images::{Credentials, Images, Kind, Options, Secret};
use rcgen::{CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};

use crate::{
    maker::{Store, silent, small},
    server::{Answer, Content, Server},
};

const ANYONE: Credentials = Credentials::Anonymous;

/// An authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
    der: CertificateDer<'static>,
}

/// A certificate and its key.
pub(crate) struct Pair {
    pub(crate) pem: String,
    pub(crate) key_pem: String,
    der: CertificateDer<'static>,
    key_der: Vec<u8>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("signed");
        Self { pem: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    pub(crate) fn certify(&self, name: &str) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        Pair {
            pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            der: certificate.der().clone(),
            key_der: key.serialize_der(),
        }
    }
}

/// A server's side; `clients` signs whom it lets in.
fn tls(pair: &Pair, clients: Option<&Authority>) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions");
    let builder = match clients {
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add(authority.der.clone()).expect("a root");
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .expect("a verifier");
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.key_der.clone()));
    Arc::new(builder.with_single_cert(vec![pair.der.clone()], key).expect("a certificate"))
}

/// Writes what belongs into `certs.d/<registry>`.
fn trust(certificates: &Path, server: &Server, files: &[(&str, &str)]) {
    let folder = certificates.join(server.domain());
    std::fs::create_dir_all(&folder).expect("a folder");
    for (name, text) in files {
        std::fs::write(folder.join(name), text).expect("write");
    }
}

fn open(store: &Store) -> Images {
    store.open_with(Options { certificates: Some(store.path().join("certs.d")), ..Options::default() })
}

#[tokio::test]
async fn an_authority_in_the_registrys_folder_is_believed_and_another_is_not() {
    let (image, ours, theirs) = (small(), Authority::new(), Authority::new());
    let server = Server::start_with(
        Content::of("x:latest", &image),
        |_| None,
        Some(tls(&ours.certify("127.0.0.1"), None)),
    );
    let store = Store::new();
    let certificates = store.path().join("certs.d");
    let images = open(&store);
    trust(&certificates, &server, &[("ca.crt", &theirs.pem)]);
    let error = images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect_err("a stranger");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("has a certificate that is not trusted"), "{}", error.chain());
    // Read again each time: no restart is needed.
    trust(&certificates, &server, &[("ca.crt", &ours.pem)]);
    images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect("pulled");
}

#[tokio::test]
async fn a_certificate_that_vouches_for_itself_is_believed_when_it_is_the_one() {
    let vouching = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        // As `openssl req -x509` makes it.
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("signed");
        Pair {
            pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            der: certificate.der().clone(),
            key_der: key.serialize_der(),
        }
    };
    for (name, fits) in [("127.0.0.1", true), ("registry.example", false)] {
        let pair = vouching(name);
        let server = Server::start_with(Content::of("x:latest", &small()), |_| None, Some(tls(&pair, None)));
        let store = Store::new();
        let (images, certificates) = (open(&store), store.path().join("certs.d"));
        trust(&certificates, &server, &[("ca.crt", &vouching(name).pem)]);
        images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect_err("not this one");
        trust(&certificates, &server, &[("ca.crt", &pair.pem)]);
        let pulled = images.pull(&server.reference("x"), None, &ANYONE, silent).await;
        assert_eq!(pulled.is_ok(), fits, "{name}");
    }
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let authority = Authority::new();
    let server = Server::start_with(
        Content::of("x:latest", &small()),
        |_| None,
        Some(tls(&authority.certify("registry.example"), None)),
    );
    let store = Store::new();
    let images = open(&store);
    trust(&store.path().join("certs.d"), &server, &[("ca.crt", &authority.pem)]);
    let error = images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect_err("another name");
    assert!(error.to_string().contains("not trusted"), "{}", error.chain());
}

#[tokio::test]
async fn a_registry_on_this_computer_may_have_any_certificate_unless_it_has_a_folder() {
    let server = Server::start_with(
        Content::of("x:latest", &small()),
        |_| None,
        Some(tls(&Authority::new().certify("whatever"), None)),
    );
    open(&Store::new()).pull(&server.reference("x"), None, &ANYONE, silent).await.expect("pulled");
}

#[tokio::test]
async fn our_certificate_is_shown_to_the_registry_it_is_for() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let server = Server::start_with(
        Content::of("x:latest", &small()),
        |_| None,
        Some(tls(&authority.certify("127.0.0.1"), Some(&clients))),
    );
    let store = Store::new();
    let certificates = store.path().join("certs.d");
    let images = open(&store);
    trust(&certificates, &server, &[("ca.crt", &authority.pem)]);
    images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect_err("it wants to know us");
    let own = clients.certify("engine");
    trust(&certificates, &server, &[("client.cert", &own.pem), ("client.key", &own.key_pem)]);
    images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect("pulled");
    std::fs::remove_file(certificates.join(server.domain()).join("client.key")).expect("removed");
    let error = images.pull(&server.reference("x"), None, &ANYONE, silent).await.expect_err("half a pair");
    assert!(
        error.to_string().starts_with("missing key client.key for client certificate client.cert"),
        "{error}"
    );
}

#[tokio::test]
async fn a_redirect_or_a_token_server_without_encryption_is_not_followed() {
    let (image, authority) = (small(), Authority::new());
    let plain = Server::start(Content::of("x:latest", &image), |request| {
        request.path.starts_with("/token").then(|| Answer::status(200, r#"{"token":"t"}"#))
    });
    let pair = authority.certify("127.0.0.1");
    let digest = image.layers[0].digest().to_string();
    let target = format!("http://{}/v2/x/blobs/{digest}", plain.domain());
    let redirecting = Server::start_with(
        Content::of("x:latest", &image),
        move |request| {
            request
                .path
                .contains(&digest)
                .then(|| Answer::Full(307, vec![("location".to_owned(), target.clone())], Vec::new()))
        },
        Some(tls(&pair, None)),
    );
    let store = Store::new();
    let images = open(&store);
    trust(&store.path().join("certs.d"), &redirecting, &[("ca.crt", &authority.pem)]);
    let error = images.pull(&redirecting.reference("x"), None, &ANYONE, silent).await.expect_err("refused");
    assert!(error.chain().contains("a redirect from HTTPS to HTTP"), "{}", error.chain());

    let realm = format!("Bearer realm=\"http://{}/token\",service=\"s\"", plain.domain());
    let challenging = Server::start_with(
        Content::of("x:latest", &image),
        move |request| {
            (!request.headers.contains_key("authorization"))
                .then(|| Answer::Full(401, vec![("www-authenticate".to_owned(), realm.clone())], Vec::new()))
        },
        Some(tls(&pair, None)),
    );
    trust(&store.path().join("certs.d"), &challenging, &[("ca.crt", &authority.pem)]);
    let ana = Credentials::Basic { username: "ana".to_owned(), password: Secret::new("marker") };
    let error = images.pull(&challenging.reference("x"), None, &ana, silent).await.expect_err("refused");
    assert!(error.to_string().contains("wants the password sent to its token server"), "{error}");
    assert_eq!(plain.count("/"), 0, "nothing went there");
}

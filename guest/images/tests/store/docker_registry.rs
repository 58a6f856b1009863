//! The good path against the registry that everyone runs (`docker-registry`, the distribution project's).

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use guest_images::{Credentials, Kind, Options, Reference, Secret};

use crate::maker::{Heard, MadeImage, MadeLayer, OCI_MANIFEST, Store, silent};

struct Registry {
    child: Child,
    domain: String,
    _folder: tempfile::TempDir,
}

impl Registry {
    /// `None`, said aloud, where the program is not installed.
    fn start() -> Option<Self> {
        Self::start_with(|_| (String::new(), String::new()))
    }

    /// `more` adds to the settings, at their end and to what is said of HTTP; it may put files into the folder.
    fn start_with(more: impl Fn(&Path) -> (String, String)) -> Option<Self> {
        let program = "/usr/bin/docker-registry";
        if !Path::new(program).exists() {
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED: {program} is not installed");
            }
            return None;
        }
        // The program cannot be asked which port it got, so a free one is found first; should another process take it in
        // between, the next is tried.
        for _ in 0..20 {
            let port = std::net::TcpListener::bind("127.0.0.1:0")
                .expect("a port")
                .local_addr()
                .expect("an address")
                .port();
            let folder = tempfile::tempdir().expect("a folder");
            let config = folder.path().join("config.yml");
            let data = folder.path().join("data");
            let (rest, http) = more(folder.path());
            std::fs::write(&config, format!("version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"{http}}}\n{rest}", data.display())).expect("write");
            let child = Command::new(program)
                .arg("serve")
                .arg(&config)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("the registry");
            let mut registry = Self { child, domain: format!("127.0.0.1:{port}"), _folder: folder };
            let deadline = Instant::now() + Duration::from_secs(30);
            while Instant::now() < deadline && registry.child.try_wait().expect("its state").is_none() {
                if TcpStream::connect(&registry.domain).is_ok() {
                    return Some(registry);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        panic!("docker-registry did not start");
    }

    fn request(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> (u16, Option<String>) {
        let mut stream = TcpStream::connect(&self.domain).expect("connected");
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", self.domain, body.len()).expect("sent");
        stream.write_all(body).expect("sent");
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).expect("answered");
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let mut location = None;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).expect("a header");
            match header.trim_end().split_once(": ") {
                Some((name, value)) if name.eq_ignore_ascii_case("location") => {
                    location = Some(value.to_owned())
                }
                Some(_) => {}
                None => break,
            }
        }
        reader.read_to_end(&mut Vec::new()).expect("the body");
        (status, location)
    }

    fn push(&self, repository: &str, tag: &str, image: &MadeImage) {
        let blobs = image
            .layers
            .iter()
            .map(|layer| (layer.digest(), &layer.blob))
            .chain([(image.id(), &image.config)]);
        for (digest, blob) in blobs {
            let (status, location) =
                self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"");
            assert_eq!(status, 202);
            let location = location.expect("an upload");
            let path = location.split_once(&self.domain).map_or(location.as_str(), |(_, path)| path);
            let joint = if path.contains('?') { '&' } else { '?' };
            let (status, _) = self.request(
                "PUT",
                &format!("{path}{joint}digest={digest}"),
                "application/octet-stream",
                blob,
            );
            assert_eq!(status, 201);
        }
        let (status, _) =
            self.request("PUT", &format!("/v2/{repository}/manifests/{tag}"), OCI_MANIFEST, &image.manifest);
        assert_eq!(status, 201);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

#[tokio::test]
async fn what_is_pushed_is_pulled() {
    let Some(registry) = Registry::start() else { return };
    let noise: Vec<u8> =
        (0..3_000_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let image = MadeImage::new(&[
        MadeLayer::gzip(&[("base/", b""), ("base/big", &noise)]),
        MadeLayer::zstd(&[("second", b"2")]),
        MadeLayer::gzip(&[("third", b"3"), ("base/.wh.big", b"")]),
    ]);
    registry.push("team/shop", "1.0", &image);
    let store = Store::new();
    let images = store.open();
    let reference = format!("{}/team/shop:1.0", registry.domain).parse().expect("a name");
    let heard = Heard::default();
    let pulled =
        images.pull(&reference, None, &Credentials::Anonymous, heard.listener()).await.expect("pulled");
    assert_eq!((pulled.image.id, pulled.digest, pulled.image.layers.len()), (image.id(), image.digest(), 3));
    let base = store
        .path()
        .join("images/layers")
        .join(pulled.image.layers[0].chain_id.digest().hex())
        .join("base/big");
    assert_eq!(std::fs::read(base).expect("big"), noise);
    assert_eq!(heard.lines().iter().filter(|line| line.ends_with("Pull complete")).count(), 3);
    store.assert_nothing_partial();

    let missing = images
        .pull(
            &format!("{}/team/shop:2", registry.domain).parse().expect("a name"),
            None,
            &Credentials::Anonymous,
            silent,
        )
        .await
        .expect_err("no such tag");
    assert_eq!(missing.kind(), Kind::NotFound);
    assert_eq!(
        missing.to_string(),
        format!("manifest for {}/team/shop:2 not found: manifest unknown: manifest unknown", registry.domain)
    );
    let nowhere = images
        .pull(
            &format!("{}/nothing", registry.domain).parse().expect("a name"),
            None,
            &Credentials::Anonymous,
            silent,
        )
        .await
        .expect_err("no such repository");
    assert_eq!(nowhere.kind(), Kind::NotFound);
}

/// A password file with `ana` and `pw-of-ana`.
const HTPASSWD: &str = "ana:$2b$04$gXfJACtFuCMEL8nQkJoA7O7NUNz8qHrH3ihzd.LKPh9EXVjFC6AHO\n";

#[tokio::test]
async fn a_registry_with_a_password_and_a_certificate_is_pushed_to_and_pulled_from() {
    let authority = crate::tls::Authority::new();
    let pair = authority.certify("127.0.0.1");
    let started = Registry::start_with(|folder| {
        for (name, text) in [("htpasswd", HTPASSWD), ("server.crt", &pair.pem), ("server.key", &pair.key_pem)]
        {
            std::fs::write(folder.join(name), text).expect("write");
        }
        let folder = folder.display();
        (
            format!("auth: {{htpasswd: {{realm: here, path: {folder}/htpasswd}}}}\n"),
            format!(", tls: {{certificate: {folder}/server.crt, key: {folder}/server.key}}"),
        )
    });
    let Some(registry) = started else { return };
    let store = Store::new();
    let certificates = store.path().join("certs.d");
    std::fs::create_dir_all(certificates.join(&registry.domain)).expect("a folder");
    std::fs::write(certificates.join(&registry.domain).join("ca.crt"), &authority.pem).expect("write");
    let options = || Options { certificates: Some(certificates.clone()), ..Options::default() };
    let images = store.open_with(options());
    let image = MadeImage::new(&[MadeLayer::plain(&[("a", b"a")]), MadeLayer::gzip(&[("b", b"b")])]);
    images.load(std::io::Cursor::new(crate::load::saved(&[("x:1", &image)])), silent).await.expect("loaded");
    let name: Reference = format!("{}/team/x:1", registry.domain).parse().expect("a name");
    images.tag("x:1", &name).await.expect("tagged");

    let credentials =
        |password: &str| Credentials::Basic { username: "ana".to_owned(), password: Secret::new(password) };
    let (ana, eve) = (credentials("pw-of-ana"), credentials("guessed"));
    images.login(&registry.domain, &ana).await.expect("let in");
    let refused = images.login(&registry.domain, &eve).await.expect_err("kept out");
    assert_eq!(
        refused.to_string(),
        format!("login attempt to https://{}/v2/ failed with status: 401 Unauthorized", registry.domain)
    );
    let refused = images.push(&name, None, &Credentials::Anonymous, silent).await.expect_err("kept out");
    assert_eq!(
        (refused.kind(), refused.to_string().as_str()),
        (Kind::Unauthorized, "no basic auth credentials")
    );
    let refused = images.push(&name, None, &eve, silent).await.expect_err("kept out");
    assert_eq!(refused.to_string(), "unauthorized: authentication required");
    let heard = Heard::default();
    images.push(&name, None, &ana, heard.listener()).await.expect("pushed");
    assert_eq!(
        heard.lines().iter().filter(|line| line.ends_with("Pushed")).count(),
        2,
        "{:?}",
        heard.lines()
    );
    let beside: Reference = format!("{}/team/y:1", registry.domain).parse().expect("a name");
    images.tag("x:1", &beside).await.expect("tagged");
    let heard = Heard::default();
    images.push(&beside, None, &ana, heard.listener()).await.expect("pushed");
    assert_eq!(
        heard.lines().iter().filter(|line| line.ends_with("Mounted from team/x")).count(),
        2,
        "{:?}",
        heard.lines()
    );

    let other = Store::new();
    let pulled = other.open_with(options()).pull(&name, None, &ana, silent).await.expect("pulled");
    assert_eq!(pulled.image.id, image.id());
    let all = other
        .open_with(options())
        .pull_all_tags(&format!("{}/team/x", registry.domain).parse().expect("a name"), None, &ana, silent)
        .await;
    assert_eq!(all.expect("every tag").len(), 1);
}

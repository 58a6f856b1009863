//! `Registry`: Debian's `docker-registry` on a loopback port of its own, and pushing test images into it.

use crate::command::wait_until;
use crate::image::{Blob, TestImage, digest};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

pub struct Registry {
    child: Child,
    address: SocketAddr,
    _folder: TempDir,
}

impl Registry {
    /// Starts one on the loopback interface.
    pub fn start() -> Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST, |program| Command::new(program))
    }

    /// The same, with TLS: files with its certificate and key, and with the authority that its clients' are of.
    pub fn start_secure(certificate: &Path, key: &Path, clients: &Path) -> Result<Self> {
        let tls = json!({ "certificate": certificate, "key": key, "clientcas": [clients] });
        Self::start_with(&format!("  tls: {tls}\n"), Ipv4Addr::LOCALHOST, |program| Command::new(program))
    }

    /// Starts one on `ip`; `program` makes the command, in whatever namespace that address is. The port is free a moment
    /// before; the next try takes another.
    pub(crate) fn start_at(ip: Ipv4Addr, program: impl Fn(&str) -> Command) -> Result<Self> {
        Self::start_with("", ip, program)
    }

    /// `http`: more lines of that section of its settings.
    fn start_with(http: &str, ip: Ipv4Addr, program: impl Fn(&str) -> Command) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("engine-registry-").tempdir()?;
        let config = folder.path().join("config.yml");
        for _ in 0..5 {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            let address = SocketAddr::from((ip, port));
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n{http}",
                folder.path().join("data").display()
            );
            std::fs::write(&config, text)?;
            let mut child = program("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("cannot start `docker-registry`: run installer/setup --tests")?;
            let answers = wait_until("the registry answers", || {
                if child.try_wait()?.is_some() {
                    bail!("the registry ended at once");
                }
                Ok(TcpStream::connect(address).ok().map(drop))
            });
            if answers.is_ok() {
                return Ok(Self { child, address, _folder: folder });
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        bail!("the registry found no free port in five tries")
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Pushes `image` as `name:tag`; returns the manifest's digest.
    pub fn push(&self, image: &TestImage, name: &str, tag: &str) -> Result<String> {
        let config = image.config();
        self.push_blob(name, &Blob { digest: digest(&config), bytes: config.clone() })?;
        let mut layers = Vec::new();
        for layer in &image.layers {
            let blob = layer.gzip()?;
            self.push_blob(name, &blob)?;
            layers.push(json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": blob.digest,
                "size": blob.bytes.len(),
            }));
        }
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": kind,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len() },
            "layers": layers,
        })
        .to_string()
        .into_bytes();
        self.request("PUT", &format!("/v2/{name}/manifests/{tag}"), kind, &manifest, 201)?;
        Ok(digest(&manifest))
    }

    fn push_blob(&self, name: &str, blob: &Blob) -> Result<()> {
        let head = self.request("POST", &format!("/v2/{name}/blobs/uploads/"), "", &[], 202)?;
        let location = head
            .lines()
            .find_map(|line| line.split_once(": ").filter(|(key, _)| key.eq_ignore_ascii_case("location")))
            .context("the registry names no upload location")?
            .1;
        let path = location.find("/v2/").map_or(location, |at| &location[at..]);
        let separator = if path.contains('?') { '&' } else { '?' };
        let path = format!("{path}{separator}digest={}", blob.digest);
        self.request("PUT", &path, "application/octet-stream", &blob.bytes, 201).map(drop)
    }

    /// One request on a connection of its own; the response's head.
    fn request(&self, method: &str, path: &str, kind: &str, body: &[u8], expected: u16) -> Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.address,
            body.len()
        )?;
        stream.write_all(body)?;
        let mut response = Vec::new();
        stream.read_to_end(&mut response)?;
        let text = String::from_utf8_lossy(&response).into_owned();
        let status = text.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
        if status != Some(expected) {
            bail!("the registry answered {status:?} to {method} {path}: {text}");
        }
        Ok(text)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Test images: a static busybox with its applets, and layers of made-up files, as docker archives and registry blobs.

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;
use tar::{EntryType, Header};

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 47] = [
    "awk",
    "cat",
    "chmod",
    "cp",
    "date",
    "dd",
    "df",
    "echo",
    "env",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "ip",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mknod",
    "mount",
    "nc",
    "nslookup",
    "ping",
    "printf",
    "ps",
    "pwd",
    "rm",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "tail",
    "test",
    "touch",
    "tr",
    "traceroute",
    "true",
    "tty",
    "uname",
    "wget",
];

/// One layer, an uncompressed tar.
#[derive(Clone)]
pub struct Layer {
    pub tar: Vec<u8>,
}

/// An image of some layers.
#[derive(Clone)]
pub struct TestImage {
    pub layers: Vec<Layer>,
    config: Value,
}

/// A layer as a registry holds it.
pub struct Blob {
    pub digest: String,
    pub bytes: Vec<u8>,
}

pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

impl Layer {
    /// The busybox root file system.
    pub fn busybox() -> Result<Self> {
        let program = std::fs::read(BUSYBOX)
            .with_context(|| format!("the test images need `{BUSYBOX}`: run installer/setup --tests"))?;
        let mut tar = tar::Builder::new(Vec::new());
        for (dir, mode) in [
            ("bin", 0o755),
            ("etc", 0o755),
            ("root", 0o700),
            ("tmp", 0o1777),
            ("home", 0o755),
            ("var", 0o755),
        ] {
            append(&mut tar, EntryType::Directory, &format!("{dir}/"), mode, &[], "")?;
        }
        append(&mut tar, EntryType::Regular, "bin/busybox", 0o755, &program, "")?;
        for applet in APPLETS {
            append(&mut tar, EntryType::Symlink, &format!("bin/{applet}"), 0o777, &[], "busybox")?;
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home:/bin/sh\n";
        append(&mut tar, EntryType::Regular, "etc/passwd", 0o644, passwd.as_bytes(), "")?;
        append(
            &mut tar,
            EntryType::Regular,
            "etc/group",
            0o644,
            b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n",
            "",
        )?;
        Ok(Self { tar: tar.into_inner()? })
    }

    /// Files by path and content.
    pub fn files<'a>(files: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> Result<Self> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files {
            append(&mut tar, EntryType::Regular, path, 0o644, &content, "")?;
        }
        Ok(Self { tar: tar.into_inner()? })
    }

    /// One executable file at the root.
    pub fn program(name: &str, bytes: &[u8]) -> Result<Self> {
        let mut tar = tar::Builder::new(Vec::new());
        append(&mut tar, EntryType::Regular, name, 0o755, bytes, "")?;
        Ok(Self { tar: tar.into_inner()? })
    }

    /// One file of `bytes` pseudo-random bytes that hardly compress; the seed makes layers differ.
    pub fn noise(path: &str, bytes: usize, seed: u64) -> Result<Self> {
        let mut state = seed | 1;
        let mut content = Vec::with_capacity(bytes + 8);
        while content.len() < bytes {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(&state.to_le_bytes());
        }
        content.truncate(bytes);
        Self::files([(path, content)])
    }

    /// Exactly these entries, whatever they are: for hostile archives. `(kind, path, content or link target)`.
    pub fn raw(entries: &[(EntryType, &str, &str)]) -> Result<Self> {
        let mut bytes = Vec::new();
        for (kind, path, text) in entries {
            let link = matches!(kind, EntryType::Symlink | EntryType::Link);
            let content = if link { "" } else { text };
            let mut header = Header::new_ustar();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            // Written into the header directly: the crate refuses the very paths that are wanted here.
            let old = header.as_old_mut();
            old.name[..path.len()].copy_from_slice(path.as_bytes());
            if link {
                old.linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(content.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        Ok(Self { tar: bytes })
    }

    /// The tar made of a folder.
    pub fn folder(path: &Path) -> Result<Self> {
        let mut tar = tar::Builder::new(Vec::new());
        tar.follow_symlinks(false);
        tar.append_dir_all(".", path).with_context(|| format!("cannot read `{}`", path.display()))?;
        Ok(Self { tar: tar.into_inner()? })
    }

    pub fn diff_id(&self) -> String {
        digest(&self.tar)
    }

    pub fn gzip(&self) -> Result<Blob> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&self.tar)?;
        let bytes = encoder.finish()?;
        Ok(Blob { digest: digest(&bytes), bytes })
    }
}

impl TestImage {
    pub fn new(layers: Vec<Layer>) -> Self {
        Self { layers, config: json!({ "Env": ["PATH=/bin"], "Cmd": ["sh"] }) }
    }

    /// The busybox image.
    pub fn busybox() -> Result<Self> {
        Ok(Self::new(vec![Layer::busybox()?]))
    }

    /// The image's defaults for containers, such as `{"Cmd": ["sh"]}`.
    pub fn with_config(mut self, config: Value) -> Self {
        self.config = config;
        self
    }

    /// The configuration blob.
    pub fn config(&self) -> Vec<u8> {
        let history: Vec<Value> = self.layers.iter().map(|_| json!({ "created_by": "test" })).collect();
        let diff_ids: Vec<String> = self.layers.iter().map(Layer::diff_id).collect();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "created": "2026-01-01T00:00:00Z",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": history,
        });
        config.to_string().into_bytes()
    }

    /// What `docker save` would write, under the name `tag`.
    pub fn archive(&self, tag: &str) -> Result<Vec<u8>> {
        let config = self.config();
        let config_name = format!("{}.json", hex::encode(Sha256::digest(&config)));
        let mut tar = tar::Builder::new(Vec::new());
        append(&mut tar, EntryType::Regular, &config_name, 0o644, &config, "")?;
        let mut names = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let name = format!("layer{number}/layer.tar");
            append(&mut tar, EntryType::Regular, &name, 0o644, &layer.tar, "")?;
            names.push(name);
        }
        let manifest = json!([{ "Config": config_name, "RepoTags": [tag], "Layers": names }]).to_string();
        append(&mut tar, EntryType::Regular, "manifest.json", 0o644, manifest.as_bytes(), "")?;
        Ok(tar.into_inner()?)
    }
}

fn append(
    tar: &mut tar::Builder<Vec<u8>>,
    kind: EntryType,
    path: &str,
    mode: u32,
    content: &[u8],
    link: &str,
) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    header.set_mtime(1_767_225_600);
    if link.is_empty() {
        tar.append_data(&mut header, path, content)?;
    } else {
        tar.append_link(&mut header, path, link)?;
    }
    Ok(())
}

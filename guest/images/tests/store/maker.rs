//! Makes small images and stores to put them in.

use std::{
    io::Write,
    path::Path,
    sync::{Arc, Mutex},
};

use guest_images::{Digest, Images, Limits, Options, Progress};
use serde_json::{Value, json};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// One layer: its tar, and its blob.
#[derive(Clone)]
pub(crate) struct MadeLayer {
    pub(crate) tar: Vec<u8>,
    pub(crate) blob: Vec<u8>,
    pub(crate) media_type: &'static str,
}

impl MadeLayer {
    /// Files with their contents, packed with gzip.
    pub(crate) fn gzip(files: &[(&str, &[u8])]) -> Self {
        let tar = tar(files);
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&tar).expect("gzip");
        Self {
            tar,
            blob: packed.finish().expect("gzip"),
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
        }
    }

    pub(crate) fn zstd(files: &[(&str, &[u8])]) -> Self {
        let tar = tar(files);
        Self {
            blob: zstd::encode_all(&tar[..], 1).expect("zstd"),
            tar,
            media_type: "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    pub(crate) fn plain(files: &[(&str, &[u8])]) -> Self {
        let tar = tar(files);
        Self { blob: tar.clone(), tar, media_type: "application/vnd.oci.image.layer.v1.tar" }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }

    pub(crate) fn diff_id(&self) -> Digest {
        Digest::of(&self.tar)
    }

    pub(crate) fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest(), "size": self.blob.len()})
    }
}

/// A tar of files (and, for names that end in a slash, folders).
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        let folder = name.ends_with('/');
        header.set_entry_type(if folder { tar::EntryType::Directory } else { tar::EntryType::Regular });
        header.set_mode(if folder { 0o755 } else { 0o644 });
        header.set_size(data.len() as u64);
        header.set_mtime(1_000_000_000);
        builder.append_data(&mut header, name, *data).expect("a tar");
    }
    builder.into_inner().expect("a tar")
}

/// An image: its layers, configuration and manifest.
#[derive(Clone)]
pub(crate) struct MadeImage {
    pub(crate) layers: Vec<MadeLayer>,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

impl MadeImage {
    pub(crate) fn new(layers: &[MadeLayer]) -> Self {
        Self::of("amd64", layers)
    }

    pub(crate) fn of(architecture: &str, layers: &[MadeLayer]) -> Self {
        let diff_ids: Vec<Digest> = layers.iter().map(MadeLayer::diff_id).collect();
        let config = json!({
            "created": "2026-01-01T00:00:00Z", "architecture": architecture, "os": "linux",
            "config": {"Cmd": ["/hello"], "Env": ["PATH=/bin"], "Labels": null},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "COPY"}],
        });
        Self::with_config(config.to_string().into_bytes(), layers)
    }

    pub(crate) fn with_config(config: Vec<u8>, layers: &[MadeLayer]) -> Self {
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config), "size": config.len()},
            "layers": layers.iter().map(MadeLayer::descriptor).collect::<Vec<_>>(),
        });
        Self { layers: layers.to_vec(), config, manifest: manifest.to_string().into_bytes() }
    }

    pub(crate) fn id(&self) -> Digest {
        Digest::of(&self.config)
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }
}

/// Two small layers, one of them with a change to the other.
pub(crate) fn small() -> MadeImage {
    MadeImage::new(&[
        MadeLayer::gzip(&[("etc/", b""), ("etc/a", b"one"), ("hello", b"hello")]),
        MadeLayer::gzip(&[("etc/b", b"two")]),
    ])
}

/// The database in a folder. A new one gets its name when it is whole: redb cannot open one whose making was cut off.
pub(crate) fn database(folder: &Path) -> Arc<redb::Database> {
    let (new, path) = (folder.join("db.new"), folder.join("db"));
    if !path.exists() {
        // What a killed process began is begun again.
        let _absent = std::fs::remove_file(&new);
        drop(redb::Database::create(&new).expect("a database"));
        std::fs::rename(&new, &path).expect("renamed");
    }
    Arc::new(redb::Database::create(path).expect("a database"))
}

/// A store in a temporary folder, which can be opened again.
pub(crate) struct Store {
    pub(crate) folder: tempfile::TempDir,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    pub(crate) fn open(&self) -> Images {
        self.open_with(Options::default())
    }

    pub(crate) fn open_with(&self, options: Options) -> Images {
        let options = Options { limits: Limits { layer_bytes_max: 1 << 30, ..options.limits }, ..options };
        Images::open(&self.path().join("images"), database(self.path()), options).expect("a store")
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Every file and folder of the store but the database, relative and sorted.
    pub(crate) fn files(&self, below: &str) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.path().join("images").join(below))
            .expect("the store's folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Nothing lies around that no row names, not even a download to take up again.
    pub(crate) fn assert_nothing_partial(&self) {
        assert_eq!(self.files("blobs/partial"), [""; 0], "downloads left over");
        self.assert_no_leftovers();
    }

    /// No temporary folders.
    pub(crate) fn assert_no_leftovers(&self) {
        for folder in ["layers", "snapshots"] {
            let temporary: Vec<_> =
                self.files(folder).into_iter().filter(|name| name.starts_with("tmp-")).collect();
            assert_eq!(temporary, [""; 0], "left over in {folder}");
        }
    }
}

/// Collects progress.
#[derive(Clone, Default)]
pub(crate) struct Heard(Arc<Mutex<Vec<Progress>>>);

impl Heard {
    pub(crate) fn listener(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let heard = self.0.clone();
        move |progress| heard.lock().expect("listener").push(progress)
    }

    /// `id status` of every line, without those that count.
    pub(crate) fn lines(&self) -> Vec<String> {
        let heard = self.0.lock().expect("listener");
        let plain = heard.iter().filter(|progress| progress.detail().is_none());
        plain
            .map(|progress| {
                progress.id().map_or_else(|| progress.status(), |id| format!("{id} {}", progress.status()))
            })
            .collect()
    }
}

/// Does nothing with progress.
pub(crate) fn silent(_: Progress) {}

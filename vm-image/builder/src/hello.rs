//! A container image of one static program, as `docker save` writes one: a docker-archive and an OCI layout in one tar.
//!
//! The same program gives the same bytes: fixed times, owners and order, an uncompressed layer (the initramfs is compressed
//! as a whole), and no field in the config that depends on when it was made.

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const MEDIA_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MEDIA_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const MEDIA_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const MEDIA_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Images need a date; this one is older than any engine that could ask.
const CREATED: &str = "2020-01-01T00:00:00Z";

/// Makes the archive of image `name:latest` that runs `/name`.
pub(crate) fn image(name: &str, program: &[u8]) -> Result<Vec<u8>> {
    let layer = archive(&[(name, 0o755, program)])?;
    let layer_digest = digest(&layer);
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "created": CREATED,
        "config": { "Cmd": [format!("/{name}")], "Env": ["PATH=/"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer_digest}")] },
        "history": [{ "created": CREATED, "created_by": format!("COPY {name} /{name}") }],
    }))?;
    let config_digest = digest(&config);
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "config": descriptor(MEDIA_CONFIG, &config),
        "layers": [descriptor(MEDIA_LAYER, &layer)],
    }))?;
    let mut entry = descriptor(MEDIA_MANIFEST, &manifest);
    entry["annotations"] = json!({
        "io.containerd.image.name": format!("docker.io/library/{name}:latest"),
        "org.opencontainers.image.ref.name": "latest",
    });
    let index =
        serde_json::to_vec(&json!({ "schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [entry] }))?;
    let docker = serde_json::to_vec(&json!([{
        "Config": blob_path(&config_digest),
        "RepoTags": [format!("{name}:latest")],
        "Layers": [blob_path(&layer_digest)],
    }]))?;
    let mut blobs = [layer, config, manifest].map(|blob| (blob_path(&digest(&blob)), blob));
    blobs.sort();
    let mut files: Vec<(&str, u32, &[u8])> =
        blobs.iter().map(|(path, blob)| (path.as_str(), 0o644, blob.as_slice())).collect();
    files.push(("index.json", 0o644, &index));
    files.push(("manifest.json", 0o644, &docker));
    files.push(("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#));
    archive(&files)
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{}", digest(blob)), "size": blob.len() })
}

fn blob_path(digest: &str) -> String {
    format!("blobs/sha256/{digest}")
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn archive(files: &[(&str, u32, &[u8])]) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, mode, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder.append_data(&mut header, path, *content)?;
    }
    Ok(builder.into_inner()?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;

    fn files(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(bytes);
        let mut files = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(entry.path().unwrap().to_str().unwrap().to_owned(), content);
        }
        files
    }

    fn parse(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn both_formats_lead_to_the_same_config_and_layer() {
        let files = files(&image("hello", b"program").unwrap());
        let docker = &parse(&files["manifest.json"])[0];
        assert_eq!(docker["RepoTags"][0], "hello:latest");
        let index = parse(&files["index.json"]);
        let manifest = index["manifests"][0]["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let manifest = parse(&files[&blob_path(manifest)]);
        let path = |descriptor: &Value| {
            blob_path(descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap())
        };
        assert_eq!(docker["Config"], path(&manifest["config"]));
        assert_eq!(docker["Layers"][0], path(&manifest["layers"][0]));
        let config = parse(&files[docker["Config"].as_str().unwrap()]);
        assert_eq!(config["config"]["Cmd"][0], "/hello");
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
    }

    #[test]
    fn every_blob_has_the_digest_it_is_named_by() {
        for (path, content) in files(&image("hello", b"program").unwrap()) {
            if let Some(name) = path.strip_prefix("blobs/sha256/") {
                assert_eq!(name, digest(&content));
            }
        }
    }

    #[test]
    fn the_layer_holds_the_program_and_the_same_program_gives_the_same_bytes() {
        let bytes = image("hello", b"program").unwrap();
        let outer = files(&bytes);
        let docker = &parse(&outer["manifest.json"])[0];
        let layer = files(&outer[docker["Layers"][0].as_str().unwrap()]);
        assert_eq!(layer["hello"], b"program");
        assert_eq!(bytes, image("hello", b"program").unwrap());
        assert_ne!(bytes, image("hello", b"another").unwrap());
    }
}

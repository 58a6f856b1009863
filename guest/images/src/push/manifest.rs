//! The manifest of a push: the one that the image came with, or one of Docker's form made from what was sent.

use super::Push;
use crate::{
    Image, Result,
    download::blocking,
    manifest::{DOCKER_LAYER, DOCKER_MANIFEST, Descriptor, Document, MANIFEST_BYTES_MAX, OCI_LAYER},
};

/// The bytes of a manifest and what they are.
pub(super) struct Sent {
    pub(super) bytes: Vec<u8>,
    pub(super) media_type: String,
}

impl Push {
    /// The manifest for layers as they are at the registry now.
    pub(super) async fn manifest_for(
        &self,
        image: &Image,
        config: &Descriptor,
        layers: &[Descriptor],
    ) -> Result<Sent> {
        let (content, digest) = (self.images.0.content.clone(), image.manifest_digest);
        let stored = blocking(move || content.read(&digest, MANIFEST_BYTES_MAX)).await?;
        if let Document::Manifest(manifest) = Document::parse(&stored)?
            && manifest.config.digest == config.digest
            && manifest.layers.len() == layers.len()
            && manifest.layers.iter().zip(layers).all(|(stored, sent)| stored.digest == sent.digest)
        {
            return Ok(Sent { bytes: stored, media_type: manifest.stated_media_type().to_owned() });
        }
        Ok(Sent { bytes: docker_manifest(config, layers), media_type: DOCKER_MANIFEST.to_owned() })
    }
}

/// Written as Go's encoder writes it with an indentation of three, so that the same layers have the same manifest whoever
/// pushed them.
fn docker_manifest(config: &Descriptor, layers: &[Descriptor]) -> Vec<u8> {
    let object = |indent: &str, media_type: &str, blob: &Descriptor| {
        format!(
            "{{\n{indent}   \"mediaType\": \"{media_type}\",\n{indent}   \"size\": {},\n{indent}   \"digest\": \"{}\"\n{indent}}}",
            blob.size, blob.digest
        )
    };
    let listed: Vec<String> = layers
        .iter()
        .map(|layer| format!("      {}", object("      ", docker_layer(&layer.media_type), layer)))
        .collect();
    let listed = if listed.is_empty() { "[]".to_owned() } else { format!("[\n{}\n   ]", listed.join(",\n")) };
    format!(
        "{{\n   \"schemaVersion\": 2,\n   \"mediaType\": \"{DOCKER_MANIFEST}\",\n   \"config\": {},\n   \"layers\": {listed}\n}}",
        object("   ", &config.media_type, config)
    )
    .into_bytes()
}

/// Docker's name of a layer's type.
fn docker_layer(media_type: &str) -> &'static str {
    match media_type {
        text if text.ends_with("zstd") => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        OCI_LAYER | "application/vnd.docker.image.rootfs.diff.tar" => {
            "application/vnd.docker.image.rootfs.diff.tar"
        }
        _ => DOCKER_LAYER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Digest, manifest::DOCKER_CONFIG};

    #[test]
    fn a_made_manifest_is_gos_and_reads_back() {
        let blob =
            |text: &[u8], media_type: &str| Descriptor::new(media_type, Digest::of(text), text.len() as u64);
        let config = blob(b"config", DOCKER_CONFIG);
        let layers =
            [blob(b"one", "application/vnd.oci.image.layer.v1.tar+gzip"), blob(b"two", DOCKER_LAYER)];
        let bytes = docker_manifest(&config, &layers);
        let text = String::from_utf8(bytes.clone()).expect("text");
        assert!(text.starts_with("{\n   \"schemaVersion\": 2,\n   \"mediaType\": \"application/vnd.docker.distribution.manifest.v2+json\",\n   \"config\": {\n      \"mediaType\": \"application/vnd.docker.container.image.v1+json\",\n      \"size\": 6,\n      \"digest\": \"sha256:"), "{text}");
        let Ok(Document::Manifest(manifest)) = Document::parse(&bytes) else { panic!("{text}") };
        assert_eq!(manifest.layers.len(), 2);
        assert!(manifest.layers.iter().all(|layer| layer.media_type == DOCKER_LAYER));
        let Ok(Document::Manifest(empty)) = Document::parse(&docker_manifest(&config, &[])) else {
            panic!("no layers")
        };
        assert!(empty.layers.is_empty());
    }
}

//! What a pull or a load tells its caller while it works, in the words of Docker's JSON progress.

use crate::{Digest, Reference};

/// One step. Everything a client prints can be made from these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// `Pulling from library/debian`, with the tag, or the whole reference by digest, as id.
    PullingFrom(Reference),
    /// One layer moved on. `id` is the short form of the blob's digest (12 digits).
    Layer {
        /// The short form of the layer's digest.
        id: String,
        /// What it is doing.
        state: LayerProgress,
    },
    /// `Digest: sha256:…` of what the name stood for at the registry.
    Digest(Digest),
    /// `Status: Downloaded newer image for debian:latest`.
    Downloaded(Reference),
    /// `Status: Image is up to date for debian:latest`.
    UpToDate(Reference),
    /// `The push refers to repository [docker.io/library/debian]`.
    PushingTo(Reference),
    /// One layer of a push moved on. `id` is the short form of its diff id.
    Upload {
        /// The short form of the layer's diff id.
        id: String,
        /// What it is doing.
        state: UploadProgress,
    },
    /// `latest: digest: sha256:… size: 528`: the registry has the manifest.
    Pushed {
        /// The tag.
        tag: String,
        /// The manifest's digest.
        digest: Digest,
        /// The manifest's size.
        size: u64,
    },
    /// `Loaded image: debian:latest`, from an archive; or an id, for an image to which the archive gave no name.
    Loaded(String),
}

/// What one layer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerProgress {
    /// It is needed and not here.
    PullingFsLayer,
    /// It waits for its turn.
    Waiting,
    /// Bytes have arrived.
    Downloading {
        /// Bytes here.
        current: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The transfer failed and is tried again after a pause.
    Retrying {
        /// The pause.
        seconds: u64,
    },
    /// All bytes are here.
    VerifyingChecksum,
    /// The blob is verified and stored.
    DownloadComplete,
    /// The blob is being unpacked.
    Extracting {
        /// Bytes of the blob read.
        current: u64,
        /// Bytes of the blob.
        total: u64,
    },
    /// The layer is ready.
    PullComplete,
    /// The layer was here before.
    AlreadyExists,
    /// A layer of an archive is being read.
    Loading {
        /// Bytes of the blob read.
        current: u64,
        /// Bytes of the blob.
        total: u64,
    },
}

/// What one layer of a push is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UploadProgress {
    /// It is part of the image.
    Preparing,
    /// It waits for its turn.
    Waiting,
    /// The registry has it.
    Exists,
    /// The registry had it in another repository.
    Mounted {
        /// The repository, without the registry.
        from: String,
    },
    /// Bytes are on their way.
    Pushing {
        /// Bytes sent.
        current: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The transfer failed and is tried again after a pause.
    Retrying {
        /// The pause.
        seconds: u64,
    },
    /// The registry has it now.
    Pushed,
}

impl UploadProgress {
    /// Docker's word for it.
    pub fn status(&self) -> String {
        match self {
            Self::Preparing => "Preparing".to_owned(),
            Self::Waiting => "Waiting".to_owned(),
            Self::Exists => "Layer already exists".to_owned(),
            Self::Mounted { from } => format!("Mounted from {from}"),
            Self::Pushing { .. } => "Pushing".to_owned(),
            Self::Retrying { seconds } => retrying(*seconds),
            Self::Pushed => "Pushed".to_owned(),
        }
    }
}

fn retrying(seconds: u64) -> String {
    format!("Retrying in {seconds} second{}", if seconds == 1 { "" } else { "s" })
}

impl LayerProgress {
    /// Docker's word for it.
    pub fn status(&self) -> String {
        match self {
            Self::PullingFsLayer => "Pulling fs layer".to_owned(),
            Self::Waiting => "Waiting".to_owned(),
            Self::Downloading { .. } => "Downloading".to_owned(),
            Self::Retrying { seconds } => retrying(*seconds),
            Self::VerifyingChecksum => "Verifying Checksum".to_owned(),
            Self::DownloadComplete => "Download complete".to_owned(),
            Self::Extracting { .. } => "Extracting".to_owned(),
            Self::PullComplete => "Pull complete".to_owned(),
            Self::AlreadyExists => "Already exists".to_owned(),
            Self::Loading { .. } => "Loading layer".to_owned(),
        }
    }

    /// Bytes done and bytes in all, for the states that count (`progressDetail`).
    pub fn detail(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Downloading { current, total }
            | Self::Extracting { current, total }
            | Self::Loading { current, total } => Some((current, total)),
            _ => None,
        }
    }
}

impl Progress {
    /// The id of Docker's progress line: a layer, or what a `Pulling from` line is about.
    pub fn id(&self) -> Option<String> {
        match self {
            Self::PullingFrom(reference) => Some(match (reference.digest(), reference.tag()) {
                (Some(digest), _) => format!("{}@{digest}", reference.name()),
                (None, tag) => tag.unwrap_or("latest").to_owned(),
            }),
            Self::Layer { id, .. } | Self::Upload { id, .. } => Some(id.clone()),
            _ => None,
        }
    }

    /// Bytes done and bytes in all, for the steps that count (`progressDetail`).
    pub fn detail(&self) -> Option<(u64, u64)> {
        match self {
            Self::Layer { state, .. } => state.detail(),
            Self::Upload { state: UploadProgress::Pushing { current, total }, .. } => {
                Some((*current, *total))
            }
            _ => None,
        }
    }

    /// The text of Docker's progress line. ([`Progress::Loaded`] is a `stream` line with dockerd, not a status.)
    pub fn status(&self) -> String {
        match self {
            Self::PullingFrom(reference) => format!("Pulling from {}", reference.path()),
            Self::Layer { state, .. } => state.status(),
            Self::Upload { state, .. } => state.status(),
            Self::PushingTo(reference) => format!("The push refers to repository [{}]", reference.name()),
            Self::Pushed { tag, digest, size } => format!("{tag}: digest: {digest} size: {size}"),
            Self::Digest(digest) => format!("Digest: {digest}"),
            Self::Downloaded(reference) => {
                format!("Status: Downloaded newer image for {}", reference.familiar())
            }
            Self::UpToDate(reference) => format!("Status: Image is up to date for {}", reference.familiar()),
            Self::Loaded(id) if id.starts_with("sha256:") => format!("Loaded image ID: {id}"),
            Self::Loaded(name) => format!("Loaded image: {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_as_dockers_do() {
        let reference: Reference = "debian".parse().expect("a name");
        let reference = reference.with_default_tag();
        let line = Progress::PullingFrom(reference.clone());
        assert_eq!(
            (line.id().as_deref(), line.status().as_str()),
            (Some("latest"), "Pulling from library/debian")
        );
        let digest = format!("sha256:{}", "a".repeat(64));
        let pinned = Progress::PullingFrom(format!("debian@{digest}").parse().expect("a name"));
        assert_eq!(pinned.id(), Some(format!("docker.io/library/debian@{digest}")));
        assert_eq!(
            Progress::Downloaded(reference).status(),
            "Status: Downloaded newer image for debian:latest"
        );
        let layer = LayerProgress::Downloading { current: 1, total: 2 };
        assert_eq!((layer.status().as_str(), layer.detail()), ("Downloading", Some((1, 2))));
        assert_eq!(LayerProgress::Retrying { seconds: 1 }.status(), "Retrying in 1 second");
    }
}

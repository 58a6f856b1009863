//! Questions to registries that change nothing here: who is let in, what is there to find, what a name stands for.

use crate::{
    Credentials, Digest, Error, Images, Kind, Platform, Reference, Result, SearchResult, Secret,
    manifest::{self, CONFIG_BYTES_MAX, Document},
    registry::{Failure, Repository},
};

/// What a name stands for at its registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteManifest {
    /// A manifest or an index, in the words of its specification.
    pub media_type: String,
    /// Which.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// What it runs on.
    pub platforms: Vec<Platform>,
}

impl Images {
    /// Shows `credentials` to the registry at `address` (a name or a URL; empty for Docker Hub). Answers the token to show
    /// instead from now on, where the registry gave one. Nothing of it is kept.
    pub async fn login(&self, address: &str, credentials: &Credentials) -> Result<Option<Secret>> {
        self.0.registries.login(address, credentials).await
    }

    /// Asks an index for repositories that have to do with `term`.
    pub async fn search(
        &self,
        term: &str,
        limit: u32,
        credentials: &Credentials,
    ) -> Result<Vec<SearchResult>> {
        self.0.registries.search(term, limit, credentials).await
    }

    /// Asks the registry of `reference` what it stands for, without pulling it.
    pub async fn remote(&self, reference: &Reference, credentials: &Credentials) -> Result<RemoteManifest> {
        let reference = reference.clone().with_default_tag();
        let mut failure = Error::new(Kind::Internal, "there is no registry to ask");
        for place in self.0.registries.to_pull(&reference, credentials).await {
            let found = match place {
                Ok(place) => look(&place, &reference).await,
                Err(error) => Err(error),
            };
            match found {
                Ok(found) => return Ok(found),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

async fn look(place: &Repository, reference: &Reference) -> Result<RemoteManifest> {
    let plainly = |failure: Failure| match failure {
        Failure::Passing(error) | Failure::Final(error) => error,
        Failure::Refused(refusal) => refusal.plainly(),
    };
    let top =
        place.manifest(reference.tag().unwrap_or("latest"), reference.digest()).await.map_err(plainly)?;
    let (media_type, platforms) = match Document::parse(&top.bytes)? {
        Document::Index(index) => {
            let media_type = index.stated_media_type().to_owned();
            (media_type, index.manifests.into_iter().filter_map(|entry| entry.platform).collect())
        }
        Document::Manifest(manifest) => {
            let limit = usize::try_from(CONFIG_BYTES_MAX).unwrap_or(usize::MAX);
            let config = place.small_blob(&manifest.config.digest, limit).await.map_err(plainly)?;
            let config = manifest::parse_config(&config, None)?;
            let platform =
                Platform { os: config.os, architecture: config.architecture, variant: config.variant };
            let known = !platform.os.is_empty() || !platform.architecture.is_empty();
            (manifest.stated_media_type().to_owned(), known.then_some(platform).into_iter().collect())
        }
    };
    Ok(RemoteManifest { media_type, digest: top.digest, size: top.bytes.len() as u64, platforms })
}

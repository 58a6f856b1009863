//! One repository at one registry, as one operation sees it: manifests, tags and blobs, read.

use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, future::BoxFuture};
use reqwest::{
    Client, RequestBuilder, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, HeaderMap, HeaderValue, LINK, RANGE},
};
use serde::Deserialize;

use super::{
    SMALL_TIMEOUT,
    authority::Authority,
    challenge,
    client::{self, Bounded, bounded},
    refusal::{Failure, Refusal},
};
use crate::{
    Digest, Error, Kind, Reference, Result,
    download::{BlobSource, Body},
    manifest,
};

/// Tries for a small thing when the registry answers that it is unwell.
const TRIES: u32 = 3;
const TAGS_BYTES_MAX: usize = 4 << 20;
/// Tags of one repository at most, and pages that may bring them.
const TAGS_MAX: usize = 100_000;

/// One repository.
pub(crate) struct Repository {
    pub(super) client: Client,
    /// Without a limit on how long a body may take to be sent.
    pub(super) patient: Client,
    /// `https://registry:port/v2/path`.
    pub(super) base: String,
    pub(super) domain: String,
    pub(super) reference: Reference,
    pub(super) authority: Authority,
}

/// A manifest as it came.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
}

#[derive(Deserialize)]
struct Tags {
    #[serde(default, deserialize_with = "crate::image::nullable")]
    tags: Vec<String>,
}

impl Repository {
    /// The name it was opened for.
    pub(crate) fn reference(&self) -> &Reference {
        &self.reference
    }

    /// A failure as the end of a pull.
    pub(crate) fn pull_error(&self, failure: Failure) -> Error {
        match failure {
            Failure::Passing(error) | Failure::Final(error) => error,
            Failure::Refused(refusal) => refusal.of_pull(&self.reference, self.authority.is_anonymous()),
        }
    }

    /// A failure as the end of a push.
    pub(crate) fn push_error(&self, failure: Failure) -> Error {
        match failure {
            Failure::Passing(error) | Failure::Final(error) => error,
            Failure::Refused(refusal) => refusal.of_push(self.authority.is_anonymous()),
        }
    }

    /// The manifest or index that a tag or digest stands for. When asked by digest, the content is verified.
    pub(crate) async fn manifest(&self, tag: &str, by_digest: Option<&Digest>) -> Result<Fetched, Failure> {
        let wanted = by_digest.map_or_else(|| tag.to_owned(), Digest::to_string);
        let fetched = self.persistently(|| self.try_manifest(&wanted)).await?;
        if let Some(expected) = by_digest.filter(|expected| **expected != fetched.digest) {
            return Err(Failure::Final(Error::invalid(format!(
                "registry `{}` gave a manifest with the digest {} for {expected}: refused",
                self.domain, fetched.digest
            ))));
        }
        Ok(fetched)
    }

    /// Tries again, a few times, what may pass; nothing takes longer than the time for small things.
    async fn persistently<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        work: impl Fn() -> F,
    ) -> Result<T, Failure> {
        let mut tries = 1;
        loop {
            match tokio::time::timeout(SMALL_TIMEOUT, work()).await {
                Ok(Err(Failure::Passing(error))) if tries < TRIES => {
                    tracing::debug!(registry = self.domain, error = %error.chain(), "asked again");
                    tokio::time::sleep(Duration::from_millis(300) * 2u32.pow(tries)).await;
                    tries += 1;
                }
                Ok(result) => return result,
                Err(_) => {
                    return Err(Failure::Final(Error::new(
                        Kind::Unavailable,
                        format!(
                            "registry `{}` did not answer for {} within {SMALL_TIMEOUT:?}",
                            self.domain,
                            self.reference.familiar()
                        ),
                    )));
                }
            }
        }
    }

    async fn try_manifest(&self, wanted: &str) -> Result<Fetched, Failure> {
        let mut headers = HeaderMap::new();
        // One header of many kinds: a proxy may pass on only one of many headers, and the registry then gives us a
        // manifest of another kind.
        let accept = HeaderValue::try_from(manifest::ACCEPT.join(", "))
            .map_err(|error| Failure::Final(Error::invalid(error.to_string())))?;
        headers.insert(ACCEPT, accept);
        let response = self.get(&format!("{}/manifests/{wanted}", self.base), headers).await?;
        if !response.status().is_success() {
            return Err(refused(response).await);
        }
        let stated = response
            .headers()
            .get("docker-content-digest")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let limit = usize::try_from(manifest::MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
        let bytes = self.whole(response, limit, "a manifest").await?;
        let digest = Digest::of(&bytes);
        // Other algorithms than ours cannot be compared, and need not be: the content decides.
        if let Some(stated) = stated.and_then(|stated| stated.parse::<Digest>().ok())
            && stated != digest
        {
            return Err(Failure::Final(Error::invalid(format!(
                "registry `{}` gave a manifest with the digest {digest} and called it {stated}: refused",
                self.domain
            ))));
        }
        Ok(Fetched { bytes, digest })
    }

    /// A body that must be small.
    async fn whole(&self, response: Response, limit: usize, what: &str) -> Result<Vec<u8>, Failure> {
        bounded(response, limit).await.map_err(|failure| match failure {
            Bounded::Broken(source) => Failure::Passing(client::unreachable(&self.domain, source)),
            Bounded::Exceeded(limit) => Failure::Final(Error::invalid(format!(
                "registry `{}` gave {what} of more than {limit} bytes: refused",
                self.domain
            ))),
        })
    }

    /// Every tag.
    pub(crate) async fn tags(&self) -> Result<Vec<String>, Failure> {
        let base = self.base_url()?;
        let mut next = Some(format!("{}/tags/list", self.base));
        let mut tags = Vec::new();
        while let Some(url) = next.take() {
            let (mut page, link) = self
                .persistently(|| async {
                    let response = self.get(&url, HeaderMap::new()).await?;
                    if !response.status().is_success() {
                        return Err(refused(response).await);
                    }
                    let link = response
                        .headers()
                        .get(LINK)
                        .and_then(|link| challenge::next_page(link.to_str().ok()?))
                        .map(str::to_owned);
                    let bytes = self.whole(response, TAGS_BYTES_MAX, "a list of tags").await?;
                    let page: Tags = serde_json::from_slice(&bytes).map_err(|source| {
                        Failure::Final(Error::because(
                            Kind::Invalid,
                            format!("registry `{}` gave a list of tags that cannot be read", self.domain),
                            source,
                        ))
                    })?;
                    Ok((page.tags, link))
                })
                .await?;
            let empty = page.is_empty();
            tags.append(&mut page);
            if tags.len() > TAGS_MAX {
                return Err(Failure::Final(Error::invalid(format!(
                    "registry `{}` lists more than {TAGS_MAX} tags: refused",
                    self.domain
                ))));
            }
            // A page that brings nothing must not lead on for ever.
            next = link
                .filter(|_| !empty)
                .map(|link| self.same_place(&base, &link))
                .transpose()?
                .map(String::from);
        }
        Ok(tags)
    }

    pub(super) fn base_url(&self) -> Result<Url, Failure> {
        Url::parse(&self.base).map_err(|source| {
            Failure::Final(Error::because(
                Kind::Invalid,
                format!("registry `{}` has no valid address", self.domain),
                source,
            ))
        })
    }

    /// A link of the registry's to itself.
    fn same_place(&self, base: &Url, link: &str) -> Result<Url, Failure> {
        base.join(link).ok().filter(|url| url.origin() == base.origin()).ok_or_else(|| {
            Failure::Final(Error::invalid(format!(
                "registry `{}` continues its list of tags elsewhere: refused",
                self.domain
            )))
        })
    }

    /// The size of a blob, when the registry has it.
    pub(crate) async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, Failure> {
        let url = format!("{}/blobs/{digest}", self.base);
        let response = tokio::time::timeout(SMALL_TIMEOUT, self.send(|| Ok(self.client.head(&url))))
            .await
            .map_err(|_| {
            Failure::Passing(Error::new(
                Kind::Unavailable,
                format!("registry `{}` did not answer in time", self.domain),
            ))
        })??;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => {
                let size =
                    response.headers().get(CONTENT_LENGTH).and_then(|size| size.to_str().ok()?.parse().ok());
                Ok(Some(size.unwrap_or(0)))
            }
            _ => Err(refused(response).await),
        }
    }

    /// A small blob, verified.
    pub(crate) async fn small_blob(&self, digest: &Digest, bytes_max: usize) -> Result<Vec<u8>, Failure> {
        let url = format!("{}/blobs/{digest}", self.base);
        let bytes = self
            .persistently(|| async {
                let response = self.get(&url, HeaderMap::new()).await?;
                if !response.status().is_success() {
                    return Err(refused(response).await);
                }
                self.whole(response, bytes_max, "a configuration").await
            })
            .await?;
        if Digest::of(&bytes) != *digest {
            return Err(Failure::Final(Error::invalid(format!(
                "blob {digest} arrived with the digest {}: refused",
                Digest::of(&bytes)
            ))));
        }
        Ok(bytes)
    }

    async fn open_blob(&self, digest: Digest, offset: u64) -> Result<Body, Failure> {
        let mut headers = HeaderMap::new();
        if offset > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={offset}-"))
        {
            headers.insert(RANGE, range);
        }
        let response = self.get(&format!("{}/blobs/{digest}", self.base), headers).await?;
        let offset = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let begins = response
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|value| challenge::range_start(value.to_str().ok()?));
                if begins != Some(offset) {
                    return Err(Failure::Final(Error::invalid(format!(
                        "registry `{}` answered with another part of blob {digest} than was asked for",
                        self.domain
                    ))));
                }
                offset
            }
            StatusCode::OK => 0,
            StatusCode::NOT_FOUND => {
                return Err(Failure::Final(Error::not_found(format!(
                    "registry `{}` does not have blob {digest} of {}",
                    self.domain,
                    self.reference.familiar()
                ))));
            }
            _ => return Err(refused(response).await),
        };
        let domain = self.domain.clone();
        let stream =
            response.bytes_stream().map_err(move |source| client::unreachable(&domain, source)).boxed();
        Ok(Body { offset, stream })
    }

    async fn get(&self, url: &str, headers: HeaderMap) -> Result<Response, Failure> {
        self.send(|| Ok(self.client.get(url).headers(headers.clone()))).await
    }

    /// Sends a request to the registry, answering its challenge once.
    pub(super) async fn send(
        &self,
        make: impl Fn() -> Result<RequestBuilder, Failure>,
    ) -> Result<Response, Failure> {
        let mut challenged = false;
        loop {
            let header = self.authority.header().await;
            let mut request = make()?;
            if let Some(header) = &header {
                request = request.header(AUTHORIZATION, header);
            }
            let response = request.send().await.map_err(|source| client::failure(&self.domain, source))?;
            if response.status() != StatusCode::UNAUTHORIZED
                || challenged
                || !self.authority.answer(header.as_ref(), &response).await?
            {
                return Ok(response);
            }
            challenged = true;
        }
    }
}

/// An answer that is not what was asked for.
pub(super) async fn refused(response: Response) -> Failure {
    let refusal = Refusal::of(response).await;
    if refusal.is_passing() { Failure::Passing(refusal.plainly()) } else { Failure::Refused(refusal) }
}

impl BlobSource for Repository {
    fn open(&self, digest: Digest, offset: u64) -> BoxFuture<'_, Result<Body>> {
        Box::pin(async move {
            self.open_blob(digest, offset).await.map_err(|failure| match failure {
                Failure::Passing(error) => error,
                failure => {
                    let error = self.pull_error(failure);
                    // `Unavailable` would be tried again.
                    if error.kind() == Kind::Unavailable { error.with_kind(Kind::Internal) } else { error }
                }
            })
        })
    }
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Repository").field("base", &self.base).finish_non_exhaustive()
    }
}

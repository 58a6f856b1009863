//! The other direction: blobs and manifests to a registry (OCI distribution specification, "Pushing").

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use reqwest::{
    Response, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE},
};
use tokio_util::io::ReaderStream;

use super::{
    SMALL_TIMEOUT, challenge, client,
    refusal::Failure,
    repository::{Repository, refused},
};
use crate::{Digest, Error, Kind};

/// Blobs up to this size go in one request.
const WHOLE_BYTES_MAX: u64 = 1 << 20;
const PIECE_BYTES: usize = 256 << 10;
/// How long a registry may take nothing of a body, or not answer after it.
const STALL_MAX: Duration = Duration::from_secs(120);

/// An upload under way: where it goes, and how much of it is there.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    location: Url,
    offset: u64,
}

/// What became of the wish to mount a blob from another repository.
pub(crate) enum Mount {
    /// It is there.
    Mounted,
    /// The registry began an upload instead.
    Upload(Session),
}

/// Opens the blob at an offset, as often as it is asked to.
pub(crate) type Opener<'a> = dyn Fn(u64) -> crate::Result<File> + Send + Sync + 'a;

impl Repository {
    /// Begins an upload.
    pub(crate) async fn begin(&self) -> Result<Session, Failure> {
        match self.post(&format!("{}/blobs/uploads/", self.base)).await? {
            Mount::Upload(session) => Ok(session),
            Mount::Mounted => Err(self.nonsense("began no upload")),
        }
    }

    /// Asks for a blob of another repository at the same registry.
    pub(crate) async fn mount(&self, digest: &Digest, from: &str) -> Result<Mount, Failure> {
        let mut url = self.base_url()?;
        url.set_path(&format!("{}/blobs/uploads/", url.path()));
        url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        self.post(url.as_str()).await
    }

    async fn post(&self, url: &str) -> Result<Mount, Failure> {
        let request = || Ok(self.client.post(url).header(CONTENT_LENGTH, 0).timeout(SMALL_TIMEOUT));
        let response = self.send(request).await?;
        match response.status() {
            StatusCode::CREATED => Ok(Mount::Mounted),
            StatusCode::ACCEPTED => {
                Ok(Mount::Upload(Session { location: self.location(&response, None)?, offset: 0 }))
            }
            _ => Err(refused(response).await),
        }
    }

    /// Sends what is missing of a blob of `size` bytes. After a failure that may pass, [`Self::resume`] and call it again.
    pub(crate) async fn send_blob(
        &self,
        session: &mut Session,
        digest: &Digest,
        size: u64,
        open: &Opener<'_>,
        sent: &Arc<AtomicU64>,
    ) -> Result<(), Failure> {
        let whole = size <= WHOLE_BYTES_MAX && session.offset == 0;
        if !whole && session.offset < size {
            let (from, location) = (session.offset, session.location.clone());
            let response = self
                .send_body(&location, sent, |body| {
                    let request = self
                        .patient
                        .patch(location.clone())
                        .header(CONTENT_TYPE, "application/octet-stream")
                        .header(CONTENT_RANGE, format!("{from}-{}", size - 1))
                        .header(CONTENT_LENGTH, size - from);
                    Ok(request.body(body.stream(open, from)?))
                })
                .await?;
            if response.status() != StatusCode::ACCEPTED {
                return Err(refused(response).await);
            }
            session.location = self.location(&response, Some(&session.location))?;
            session.offset = size;
        }
        let mut location = session.location.clone();
        location.query_pairs_mut().append_pair("digest", &digest.to_string());
        let response = self
            .send_body(&location, sent, |body| {
                let request =
                    self.patient.put(location.clone()).header(CONTENT_TYPE, "application/octet-stream");
                Ok(if whole {
                    request.header(CONTENT_LENGTH, size).body(body.stream(open, 0)?)
                } else {
                    request.header(CONTENT_LENGTH, 0)
                })
            })
            .await?;
        if response.status() == StatusCode::CREATED { Ok(()) } else { Err(refused(response).await) }
    }

    /// Asks how much of an upload arrived before it broke off. `None` when the registry has forgotten it.
    pub(crate) async fn resume(&self, session: &Session) -> Result<Option<Session>, Failure> {
        let ours = self.is_ours(&session.location)?;
        let request = || Ok(self.client.get(session.location.clone()).timeout(SMALL_TIMEOUT));
        let response = if ours {
            self.send(request).await?
        } else {
            request()?.send().await.map_err(|source| client::failure(&self.domain, source))?
        };
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => {
                let range = response
                    .headers()
                    .get(RANGE)
                    .and_then(|range| challenge::range_length(range.to_str().ok()?));
                let location = self.location(&response, Some(&session.location))?;
                Ok(Some(Session { location, offset: range.unwrap_or(0) }))
            }
            _ => Err(refused(response).await),
        }
    }

    /// Stores a manifest under a tag.
    pub(crate) async fn put_manifest(
        &self,
        tag: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), Failure> {
        let url = format!("{}/manifests/{tag}", self.base);
        let request = || {
            Ok(self
                .client
                .put(&url)
                .header(CONTENT_TYPE, media_type)
                .timeout(SMALL_TIMEOUT)
                .body(bytes.to_vec()))
        };
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(refused(response).await);
        }
        let (digest, stated) = (Digest::of(bytes), response.headers().get("docker-content-digest"));
        match stated.and_then(|stated| stated.to_str().ok()?.parse::<Digest>().ok()) {
            Some(stated) if stated != digest => {
                Err(self.nonsense(&format!("stored the manifest {digest} as {stated}")))
            }
            _ => Ok(()),
        }
    }

    fn nonsense(&self, what: &str) -> Failure {
        Failure::Final(Error::new(Kind::Unavailable, format!("registry `{}` {what}", self.domain)))
    }

    /// Where the next request of an upload goes.
    fn location(&self, response: &Response, last: Option<&Url>) -> Result<Url, Failure> {
        let stated = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let base = self.base_url()?;
        let url = match (stated, last) {
            (Some(stated), _) => {
                response.url().join(stated).map_err(|_| self.nonsense("sends uploads to what is no URL"))?
            }
            (None, Some(last)) => last.clone(),
            (None, None) => return Err(self.nonsense("does not say where an upload goes")),
        };
        let allowed = match base.scheme() {
            "https" => url.scheme() == "https",
            _ => matches!(url.scheme(), "http" | "https"),
        };
        if !allowed || !url.has_host() {
            return Err(Failure::Final(Error::invalid(format!(
                "registry `{}` sends uploads to a `{}:` address: refused",
                self.domain,
                url.scheme()
            ))));
        }
        Ok(url)
    }

    fn is_ours(&self, url: &Url) -> Result<bool, Failure> {
        Ok(self.base_url()?.origin() == url.origin())
    }

    /// Sends a request with a long body; gives up when nothing of it is taken for too long.
    async fn send_body(
        &self,
        location: &Url,
        sent: &Arc<AtomicU64>,
        make: impl Fn(&Pieces) -> Result<reqwest::RequestBuilder, Failure>,
    ) -> Result<Response, Failure> {
        let pieces = Pieces { sent: sent.clone() };
        let ours = self.is_ours(location)?;
        let send = async {
            if ours {
                return self.send(|| make(&pieces)).await;
            }
            // Another host is not shown who we are.
            let mut request =
                make(&pieces)?.build().map_err(|source| client::failure(&self.domain, source))?;
            request.headers_mut().remove(AUTHORIZATION);
            self.patient.execute(request).await.map_err(|source| client::failure(&self.domain, source))
        };
        let mut send = std::pin::pin!(send);
        let mut last = sent.load(Ordering::Relaxed);
        loop {
            match tokio::time::timeout(STALL_MAX, &mut send).await {
                Ok(result) => return result,
                Err(_) => {
                    let now = sent.load(Ordering::Relaxed);
                    if now == last {
                        return Err(Failure::Passing(Error::new(
                            Kind::Unavailable,
                            format!("registry `{}` took nothing of an upload for {STALL_MAX:?}", self.domain),
                        )));
                    }
                    last = now;
                }
            }
        }
    }
}

/// Makes bodies that count.
struct Pieces {
    sent: Arc<AtomicU64>,
}

impl Pieces {
    fn stream(&self, open: &Opener<'_>, from: u64) -> Result<reqwest::Body, Failure> {
        let file = tokio::fs::File::from_std(open(from).map_err(Failure::Final)?);
        let sent = self.sent.clone();
        sent.store(from, Ordering::Relaxed);
        let pieces = ReaderStream::with_capacity(file, PIECE_BYTES).inspect(move |piece| {
            if let Ok(piece) = piece {
                sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        });
        Ok(reqwest::Body::wrap_stream(pieces))
    }
}

//! Downloads of blobs: each blob at most once at a time, however many pulls want it, and a few at a time over all.
//!
//! A download is a task that lives as long as anyone waits for it. It takes up what an earlier try left, checks that the
//! body never exceeds what the manifest promised, tries again with growing pauses when the connection breaks, and hands
//! the bytes to a blocking thread that writes and hashes.

use std::{
    collections::HashMap,
    io::Write,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, future::BoxFuture, stream::BoxStream};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::{ContentStore, Digest, Error, Kind, Options, Result, content::Ingest};

/// Tries in all, for a connection that brings a few bytes each time.
const TRIES_MAX: u32 = 50;
/// Pieces on their way to the disk.
const PIECES: usize = 32;

/// Where blobs come from.
pub(crate) trait BlobSource: Send + Sync {
    /// Opens a blob from `offset` on. The body says where it begins in truth: a server may ignore the wish.
    fn open(&self, digest: Digest, offset: u64) -> BoxFuture<'_, Result<Body>>;
}

/// The bytes of a blob as they arrive.
pub(crate) struct Body {
    pub(crate) offset: u64,
    pub(crate) stream: BoxStream<'static, Result<Bytes>>,
}

/// How a download stands.
#[derive(Debug, Clone)]
pub(crate) enum State {
    Waiting,
    Downloading(u64),
    Retrying(Duration),
    Verifying,
    Done(Result<()>),
}

/// The downloads under way.
#[derive(Clone)]
pub(crate) struct Downloads(Arc<Inner>);

struct Inner {
    content: ContentStore,
    permits: Semaphore,
    flights: Mutex<HashMap<Digest, Weak<Flight>>>,
    /// Tries in a row that bring nothing.
    attempts: u32,
    /// The first pause before another try; it doubles each time.
    pause: Duration,
}

/// One download. The task ends with the last that waits for it.
struct Flight {
    state: watch::Receiver<State>,
    task: tokio::task::AbortHandle,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Downloads {
    pub(crate) fn new(content: ContentStore, options: &Options) -> Self {
        Self(Arc::new(Inner {
            content,
            permits: Semaphore::new(options.concurrent_downloads.max(1)),
            flights: Mutex::default(),
            attempts: options.download_attempts.max(1),
            pause: options.retry_pause,
        }))
    }

    /// Fetches a blob unless it is here; `watch` hears of its progress. Safe to drop: the download stops when no one else
    /// wants it, and what arrived is kept.
    pub(crate) async fn fetch(
        &self,
        digest: Digest,
        size: u64,
        source: &Arc<dyn BlobSource>,
        mut watch: impl FnMut(&State) + Send,
    ) -> Result<()> {
        let content = self.0.content.clone();
        let here = blocking(move || {
            // A blob whose file is gone or cut is fetched again.
            Ok(content.size(&digest)?.is_some() && content.open_blob(&digest).is_ok())
        })
        .await?;
        if here {
            return Ok(());
        }
        let flight = self.join(digest, size, source);
        let mut state = flight.state.clone();
        loop {
            let now = state.borrow_and_update().clone();
            watch(&now);
            if let State::Done(result) = now {
                return result;
            }
            if state.changed().await.is_err() {
                return Err(Error::new(Kind::Internal, format!("the download of {digest} was stopped")));
            }
        }
    }

    fn join(&self, digest: Digest, size: u64, source: &Arc<dyn BlobSource>) -> Arc<Flight> {
        let mut flights = self.0.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let running = flights.get(&digest).and_then(Weak::upgrade);
        if let Some(flight) = running.filter(|flight| !matches!(*flight.state.borrow(), State::Done(_))) {
            return flight;
        }
        let (sender, state) = watch::channel(State::Waiting);
        let (inner, source) = (self.0.clone(), source.clone());
        let task = tokio::spawn(async move {
            let result = inner.download(digest, size, source.as_ref(), &sender).await;
            sender.send_replace(State::Done(result));
        });
        let flight = Arc::new(Flight { state, task: task.abort_handle() });
        flights.retain(|_, flight| flight.strong_count() > 0);
        flights.insert(digest, Arc::downgrade(&flight));
        flight
    }
}

impl Inner {
    async fn download(
        &self,
        digest: Digest,
        size: u64,
        source: &dyn BlobSource,
        state: &watch::Sender<State>,
    ) -> Result<()> {
        let _permit =
            self.permits.acquire().await.map_err(|_| Error::new(Kind::Internal, "downloads have ended"))?;
        let content = self.content.clone();
        let mut ingest = blocking(move || content.resume(&digest, size)).await?;
        let mut fruitless = 0;
        for _ in 0..TRIES_MAX {
            let before = ingest.length();
            let failure;
            (ingest, failure) = self.attempt(digest, size, source, ingest, state).await?;
            let Some(failure) = failure else {
                state.send_replace(State::Verifying);
                guest_fault::point("pull-blob-arrived");
                return blocking(move || ingest.finish(Some((digest, size)))).await.map(|_| ());
            };
            fruitless = if ingest.length() > before { 1 } else { fruitless + 1 };
            if failure.kind() != Kind::Unavailable || fruitless >= self.attempts {
                if failure.kind() == Kind::NoSpace || failure.kind() == Kind::Invalid {
                    ingest.discard();
                }
                return Err(failure);
            }
            let pause = self.pause * 2u32.pow((fruitless - 1).min(10));
            tracing::debug!(blob = %digest, error = %failure.chain(), ?pause, "download is tried again");
            state.send_replace(State::Retrying(pause));
            tokio::time::sleep(pause).await;
        }
        Err(Error::new(Kind::Unavailable, format!("the download of {digest} broke off {TRIES_MAX} times")))
    }

    /// One request. Gives the blob so far back, and why it is not whole.
    async fn attempt(
        &self,
        digest: Digest,
        size: u64,
        source: &dyn BlobSource,
        mut ingest: Ingest,
        state: &watch::Sender<State>,
    ) -> Result<(Ingest, Option<Error>)> {
        if ingest.length() == size && size > 0 {
            return Ok((ingest, None));
        }
        state.send_replace(State::Downloading(ingest.length()));
        let body = match source.open(digest, ingest.length()).await {
            Ok(body) => body,
            Err(failure) => return Ok((ingest, Some(failure))),
        };
        if body.offset != ingest.length() {
            ingest.restart()?;
        }
        let mut length = ingest.length();
        let (pieces, mut queue) = mpsc::channel::<Bytes>(PIECES);
        let writer = tokio::task::spawn_blocking(move || {
            while let Some(piece) = queue.blocking_recv() {
                if let Err(source) = ingest.write_all(&piece) {
                    let failure = ingest.failed(source);
                    return (ingest, Some(failure));
                }
            }
            (ingest, None)
        });
        let mut stream = body.stream;
        let mut failure = None;
        while let Some(piece) = stream.next().await {
            match piece {
                Ok(piece) => {
                    length += piece.len() as u64;
                    if length > size {
                        failure = Some(Error::invalid(format!(
                            "blob {digest} is larger than the {size} bytes that the manifest says: refused"
                        )));
                        break;
                    }
                    if pieces.send(piece).await.is_err() {
                        break;
                    }
                    state.send_replace(State::Downloading(length));
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        drop(pieces);
        let (ingest, write_failure) = writer
            .await
            .map_err(|source| Error::because(Kind::Internal, "the writer of a blob has stopped", source))?;
        let short = || {
            Error::new(
                Kind::Unavailable,
                format!("blob {digest} ended after {} of {size} bytes", ingest.length()),
            )
        };
        let failure = write_failure.or(failure).or_else(|| (ingest.length() < size).then(short));
        Ok((ingest, failure))
    }
}

/// Runs disk work on a blocking thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(source) if source.is_panic() => std::panic::resume_unwind(source.into_panic()),
        Err(source) => Err(Error::because(Kind::Internal, "the engine is stopping", source)),
    }
}

//! Taking over a connection: `101 UPGRADED`, then raw bytes both ways. A client that does not ask for the upgrade gets
//! the output as an ordinary body.

use std::future::Future;

use bytes::Bytes;
use guest_api::ApiVersion;
use guest_api::frame::{MULTIPLEXED, RAW};
use hyper::ext::ReasonPhrase;
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::request::Call;
use super::respond::{self, Response};

/// Bytes between a stream and a client that did not ask for the upgrade.
const PIPE_BYTES: usize = 64 << 10;
/// From this version on frames have a content type of their own.
const MULTIPLEXED_SINCE: ApiVersion = ApiVersion::new(1, 42);

/// The client's end of a stream.
pub enum Client {
    Upgraded(TokioIo<Upgraded>),
    /// Output only; there is no input.
    Body(DuplexStream),
}

/// Answers, and hands the client's end of the stream to `work` once it is there.
pub fn hijack<F>(
    tasks: &TaskTracker,
    call: Call,
    tty: bool,
    work: impl FnOnce(Client) -> F + Send + 'static,
) -> Response
where
    F: Future<Output = ()> + Send + 'static,
{
    let kind = if tty || call.version < MULTIPLEXED_SINCE { RAW } else { MULTIPLEXED };
    let wants_upgrade = call.headers.contains_key(UPGRADE);
    let (gone, also_gone) = (call.gone(), call.gone());
    if wants_upgrade {
        let upgrade = hyper::upgrade::on(call.request);
        tasks.spawn(async move {
            match upgrade.await {
                Ok(upgraded) => tokio::select! {
                    () = work(Client::Upgraded(TokioIo::new(upgraded))) => {}
                    () = gone => {}
                },
                // The client went before the answer reached it.
                Err(error) => tracing::debug!(%error, "a client left before its stream began"),
            }
        });
        let mut response = respond::with_status(101, respond::empty_body());
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        response.headers_mut().insert(UPGRADE, HeaderValue::from_static("tcp"));
        response.extensions_mut().insert(ReasonPhrase::from_static(b"UPGRADED"));
        respond::content_type(&mut response, kind);
        return response;
    }
    let (ours, mut theirs) = tokio::io::duplex(PIPE_BYTES);
    let (batches, body) = mpsc::channel(4);
    let work = work(Client::Body(ours));
    tasks.spawn(async move {
        tokio::select! {
            () = work => {}
            () = gone => {}
        }
    });
    tasks.spawn(async move {
        // There is no input: say so at once.
        if theirs.shutdown().await.is_err() {
            return;
        }
        let mut buffer = vec![0; PIPE_BYTES];
        while let Ok(count @ 1..) = theirs.read(&mut buffer).await {
            if batches.send(Ok(Bytes::copy_from_slice(&buffer[..count]))).await.is_err() {
                return;
            }
        }
    });
    let mut response = respond::with_status(200, respond::stream(body, also_gone));
    respond::content_type(&mut response, kind);
    response
}

//! The body of a request, which never ends unread without a word.
//!
//! A client whose connection is closed while it still writes may never read the answer, so what a handler leaves of a
//! body is taken and thrown away for a while, as much as dockerd takes.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};

const DISCARDED_MAX_BYTES: usize = 256 << 10;
const DISCARDED_TIME_MAX: Duration = Duration::from_secs(1);

/// What the client sends. Dropped before its end, the rest is read beside the answer.
pub struct RequestBody(Option<Incoming>);

impl From<Incoming> for RequestBody {
    fn from(body: Incoming) -> Self {
        Self(Some(body))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.0 else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.0 = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let Some(body) = self.0.take().filter(|body| !body.is_end_stream()) else { return };
        // Outside a runtime there is no connection any more.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let rest = Limited::new(body, DISCARDED_MAX_BYTES).collect();
            // Nothing in it matters, nor how it ends.
            runtime.spawn(async move { drop(tokio::time::timeout(DISCARDED_TIME_MAX, rest).await) });
        }
    }
}

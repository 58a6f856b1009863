//! Making answers: JSON, errors in dockerd's form, streams flushed record by record.

use std::io;

use bytes::Bytes;
use futures_util::StreamExt;
use guest_api::error::ErrorBody;
use guest_api::version::NEWEST;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use hyper::header::{CONTENT_TYPE, HeaderValue, LOCATION};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::failure::Failure;

pub type Body = UnsyncBoxBody<Bytes, io::Error>;
pub type Response = hyper::Response<Body>;
pub type Answer = Result<Response, Failure>;

pub fn empty_body() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn full_body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// An answer without a body.
pub fn empty(status: u16) -> Response {
    with_status(status, empty_body())
}

pub fn with_status(status: u16, body: Body) -> Response {
    let mut response = hyper::Response::new(body);
    *response.status_mut() =
        hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    response
}

pub fn json<T: Serialize + ?Sized>(status: u16, value: &T) -> Answer {
    let mut bytes =
        serde_json::to_vec(value).map_err(|error| Failure::internal("cannot write the answer", &error))?;
    bytes.push(b'\n');
    let mut response = with_status(status, full_body(bytes));
    content_type(&mut response, "application/json");
    Ok(response)
}

pub fn text(status: u16, text: &'static str) -> Response {
    let mut response = with_status(status, full_body(text));
    content_type(&mut response, "text/plain; charset=utf-8");
    response
}

/// `{"message": …}` with the kind's status; 304 has no body.
pub fn error(failure: &Failure) -> Response {
    let status = failure.kind.status();
    if status == 304 {
        return empty(status);
    }
    let body = ErrorBody { message: failure.message.clone() };
    json(status, &body).unwrap_or_else(|_| empty(status))
}

pub fn content_type(response: &mut Response, value: &'static str) {
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(value));
}

/// A body whose records are sent as they come, until the client has `gone`. The head of the answer goes out at once.
pub fn stream(
    batches: mpsc::Receiver<io::Result<Bytes>>,
    gone: impl Future<Output = ()> + Send + 'static,
) -> Body {
    let frames = ReceiverStream::new(batches).map(|batch| batch.map(Frame::data)).take_until(gone);
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

/// A body of JSON records, one a line, until the client has `gone`.
pub fn json_lines<T: Serialize + Send + 'static>(
    records: mpsc::Receiver<T>,
    gone: impl Future<Output = ()> + Send + 'static,
) -> Response {
    let frames = ReceiverStream::new(records).map(|record| {
        let mut bytes = serde_json::to_vec(&record).map_err(io::Error::other)?;
        bytes.extend_from_slice(b"\r\n");
        Ok(Frame::data(Bytes::from(bytes)))
    });
    let frames = frames.take_until(gone);
    let mut response = hyper::Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)));
    content_type(&mut response, "application/json");
    response
}

/// Which of the common headers an answer carries, as an extension of it; all of them without one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Headers {
    /// dockerd finds the route first: a path that leads nowhere has none.
    None,
    /// It checks the version next.
    NotExperimental,
}

/// A path or method that leads nowhere.
pub fn page_not_found() -> Answer {
    let body = ErrorBody { message: "page not found".to_owned() };
    let mut response = json(404, &body)?;
    response.extensions_mut().insert(Headers::None);
    Ok(response)
}

/// A path with `//` or `..` in it leads to the one without.
pub fn moved(location: &str) -> Answer {
    let mut response = empty(301);
    let location = HeaderValue::from_str(location)
        .map_err(|_| Failure::invalid(format!("the path {location:?} cannot be written in a header")))?;
    response.headers_mut().insert(LOCATION, location);
    response.extensions_mut().insert(Headers::None);
    Ok(response)
}

/// A version outside of what is spoken.
pub fn wrong_version(failure: &Failure) -> Response {
    let mut response = error(failure);
    response.extensions_mut().insert(Headers::NotExperimental);
    response
}

/// Adds the headers of every answer.
pub fn finish(mut response: Response, head: bool, experimental: bool) -> Response {
    let which = response.extensions_mut().remove::<Headers>();
    let headers = response.headers_mut();
    let mut set = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    if which != Some(Headers::None) {
        set("api-version", &NEWEST.to_string());
        set("ostype", "linux");
        set("server", concat!("engine/", env!("CARGO_PKG_VERSION"), " (linux)"));
    }
    if which.is_none() {
        set("docker-experimental", if experimental { "true" } else { "false" });
    }
    if head {
        *response.body_mut() = empty_body();
    }
    response
}

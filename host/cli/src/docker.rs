//! `Docker`: the Docker API over one unix socket. A connection per request: they are local and cheap, and streams
//! never wait behind each other.

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use guest_api::ErrorBody;
use guest_api::image::AuthConfig;
use guest_api::registry::encode_auth;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use tokio::net::UnixStream;

/// The version we speak: `guest-api`'s newest.
const PREFIX: &str = "/v1.51";

/// An answer of the engine that is not a success.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Error response from daemon: {}", self.message)
    }
}

impl std::error::Error for ApiError {}

pub(crate) type Body = BoxBody<Bytes, std::io::Error>;

/// A hijacked connection: raw bytes both ways, and what the engine had sent already.
pub(crate) struct Hijacked {
    pub(crate) stream: UnixStream,
    pub(crate) read_ahead: Bytes,
    /// Output comes in frames that name the stream.
    pub(crate) multiplexed: bool,
}

#[derive(Clone)]
pub(crate) struct Docker {
    socket: PathBuf,
}

impl Docker {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Whether the engine answers.
    pub(crate) async fn ping(&self) -> Result<()> {
        self.send(Method::HEAD, "/_ping", empty()).await.map(drop)
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        json(self.send(Method::GET, path, empty()).await?).await
    }

    /// The answer as it is, with its nulls, which typed answers count as absent.
    pub(crate) async fn get_value(&self, path: &str) -> Result<serde_json::Value> {
        let body = body(self.send(Method::GET, path, empty()).await?).await?;
        serde_json::from_slice(&body).context("the engine's answer is not understood")
    }

    /// Posts nothing and expects nothing back. 304 is a success: it is so already.
    pub(crate) async fn post(&self, path: &str) -> Result<()> {
        self.send(Method::POST, path, empty()).await.map(drop)
    }

    pub(crate) async fn post_json<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        json(self.send(Method::POST, path, full(serde_json::to_vec(body)?)).await?).await
    }

    /// Posts a body and expects nothing back.
    pub(crate) async fn post_body(&self, path: &str, body: &impl Serialize) -> Result<()> {
        self.send(Method::POST, path, full(serde_json::to_vec(body)?)).await.map(drop)
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<Response<Incoming>> {
        self.send(Method::DELETE, path, empty()).await
    }

    /// The response as soon as its headers are there; the body is the caller's to read.
    pub(crate) async fn stream(&self, method: Method, path: &str, body: Body) -> Result<Response<Incoming>> {
        self.send(method, path, body).await
    }

    /// Asks for something that needs a registry, with the credentials for it.
    pub(crate) async fn with_registry(&self, path: &str, auth: &AuthConfig) -> Result<Response<Incoming>> {
        let mut request = request(Method::POST, path, empty())?;
        let mut value = hyper::header::HeaderValue::try_from(encode_auth(auth)?)?;
        value.set_sensitive(true);
        request.headers_mut().insert("x-registry-auth", value);
        check(self.exchange(request).await?).await
    }

    pub(crate) async fn hijack(&self, path: &str, body: Option<Vec<u8>>) -> Result<Hijacked> {
        let mut request = request(Method::POST, path, body.map_or_else(empty, full))?;
        let headers = request.headers_mut();
        headers.insert(hyper::header::CONNECTION, hyper::header::HeaderValue::from_static("Upgrade"));
        headers.insert(hyper::header::UPGRADE, hyper::header::HeaderValue::from_static("tcp"));
        let response = self.exchange(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            check(response).await?;
            return Err(anyhow!("the engine did not hand over the connection for `{path}`"));
        }
        let kind = response.headers().get(hyper::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let multiplexed = kind == Some(guest_api::frame::MULTIPLEXED);
        let upgraded = hyper::upgrade::on(response).await.context("the engine broke off the connection")?;
        let parts = upgraded
            .downcast::<TokioIo<UnixStream>>()
            .map_err(|_| anyhow!("the connection is of an unknown kind"))?;
        Ok(Hijacked { stream: parts.io.into_inner(), read_ahead: parts.read_buf, multiplexed })
    }

    async fn send(&self, method: Method, path: &str, body: Body) -> Result<Response<Incoming>> {
        check(self.exchange(request(method, path, body)?).await?).await
    }

    async fn exchange(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        let lost = || format!("lost the engine at `{}`", self.socket.display());
        let stream = UnixStream::connect(&self.socket).await.with_context(|| {
            format!("cannot connect to the engine at `{}`: is it running?", self.socket.display())
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.with_context(lost)?;
        // Ends with the response body, or with the upgrade.
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.with_context(lost)
    }
}

fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>> {
    Ok(Request::builder()
        .method(method)
        .uri(format!("{PREFIX}{path}"))
        .header(hyper::header::HOST, "docker")
        .header(hyper::header::USER_AGENT, concat!("engine/", env!("CARGO_PKG_VERSION")))
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(body)?)
}

pub(crate) fn empty() -> Body {
    full(Vec::new())
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed()
}

async fn check(response: Response<Incoming>) -> Result<Response<Incoming>> {
    let status = response.status();
    if status.is_success() || status == StatusCode::NOT_MODIFIED || status == StatusCode::SWITCHING_PROTOCOLS
    {
        return Ok(response);
    }
    let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let message = match serde_json::from_slice::<ErrorBody>(&body) {
        Ok(body) => body.message,
        Err(_) if body.is_empty() => format!("it answered {status} without saying why"),
        Err(_) => String::from_utf8_lossy(&body).into_owned(),
    };
    Err(ApiError { status, message }.into())
}

async fn body(response: Response<Incoming>) -> Result<Bytes> {
    Ok(response.into_body().collect().await.context("the engine broke off its answer")?.to_bytes())
}

async fn json<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T> {
    guest_api::decode(&body(response).await?).context("the engine's answer is not understood")
}

/// Reads a body as records of one JSON value a line.
pub(crate) struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    pub(crate) fn new(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), buffer: Vec::new() }
    }

    /// The next record, `None` at the end.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(
                    serde_json::from_slice(&line).context("the engine's answer is not understood")?,
                ));
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame.context("the engine broke off its answer")?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                None if self.buffer.iter().all(u8::is_ascii_whitespace) => return Ok(None),
                None => self.buffer.push(b'\n'),
            }
        }
    }
}

/// Percent-encodes one query value or path segment.
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// An image reference in a path: its slashes stay.
pub(crate) fn encode_name(name: &str) -> String {
    name.split('/').map(encode).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_percent_encoded() {
        assert_eq!(encode("a b/{\"x\":1}"), "a%20b%2F%7B%22x%22%3A1%7D");
        assert_eq!(encode_name("host:5000/a/b"), "host%3A5000/a/b");
    }
}

//! One request, taken apart: version, path segments, query, body.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use guest_api::version::{NEWEST, OLDEST};
use guest_api::{ApiVersion, Filters};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, Method};
use jiff::Timestamp;
use serde::de::DeserializeOwned;

use super::address;
use super::body::RequestBody;
use super::listener::Hangup;
use crate::failure::Failure;

/// Longest JSON body read: a create with a large environment fits many times.
const BODY_MAX_BYTES: usize = 8 << 20;

/// A request taken apart.
pub struct Call {
    pub method: Method,
    pub version: ApiVersion,
    /// The path after the version, split at slashes, decoded.
    pub segments: Vec<String>,
    pub query: Query,
    pub headers: HeaderMap,
    pub request: hyper::Request<RequestBody>,
    pub hangup: Arc<Hangup>,
}

impl Call {
    /// Fails when the version is one that is not spoken.
    pub fn new(request: hyper::Request<Incoming>, hangup: Arc<Hangup>) -> Result<Self, Failure> {
        let (version, segments) = split_path(request.uri().path())?;
        Ok(Self {
            method: request.method().clone(),
            version,
            segments,
            query: Query::parse(request.uri().query().unwrap_or_default()),
            headers: request.headers().clone(),
            request: request.map(RequestBody::from),
            hangup,
        })
    }

    /// Resolves when the client has gone. For answers that may take long to say anything.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let hangup = self.hangup.clone();
        async move { hangup.happened().await }
    }

    /// Reads the whole body as JSON; no body is an empty object.
    pub async fn json<T: DeserializeOwned>(self) -> Result<T, Failure> {
        let (content_type, bytes) = self.body().await?;
        if bytes.is_empty() {
            return decode(b"{}");
        }
        content_type?;
        decode(&bytes)
    }

    /// Reads the whole body as JSON; it has to be there.
    pub async fn required_json<T: DeserializeOwned>(self) -> Result<T, Failure> {
        let (content_type, bytes) = self.body().await?;
        if bytes.is_empty() {
            return Err(Failure::invalid("invalid JSON: got EOF while reading request body"));
        }
        content_type?;
        decode(&bytes)
    }

    /// The body, and whether its type is JSON's: the complaint about that waits until it is known that there is one.
    async fn body(self) -> Result<(Result<(), Failure>, Bytes), Failure> {
        let content_type = check_content_type(self.headers.get(CONTENT_TYPE));
        let body = Limited::new(self.request.into_body(), BODY_MAX_BYTES).collect().await;
        let bytes = body.map_err(|error| {
            if error.downcast_ref::<LengthLimitError>().is_some() {
                return Failure::invalid(format!("the request body is larger than {BODY_MAX_BYTES} bytes"));
            }
            Failure::invalid(format!("cannot read the request body: {error}"))
        })?;
        Ok((content_type, bytes.to_bytes()))
    }
}

/// In dockerd's words.
fn check_content_type(given: Option<&HeaderValue>) -> Result<(), Failure> {
    let text = given.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).unwrap_or_default();
    let kind = text.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(Failure::invalid(format!("unsupported Content-Type header ({text}): must be 'application/json'")))
}

/// Reads one JSON object; `null` is an empty one. Fuzzed.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    let bytes = if bytes.trim_ascii() == b"null" { b"{}" } else { bytes };
    // The reader would take a list as the members in order.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(Failure::invalid("invalid JSON: a list where an object is expected"));
    }
    guest_api::decode(bytes).map_err(|error| {
        if error.is_eof() {
            return Failure::invalid("invalid JSON: unexpected EOF");
        }
        if error.to_string().starts_with("trailing characters") {
            return Failure::invalid("unexpected content after JSON");
        }
        Failure::invalid(format!("invalid JSON: {error}"))
    })
}

/// Splits `/v1.44/containers/json`; the version is the newest when there is none.
fn split_path(path: &str) -> Result<(ApiVersion, Vec<String>), Failure> {
    let mut segments: Vec<String> =
        path.trim_start_matches('/').split('/').map(|part| address::percent_decode(part, false)).collect();
    let Some(text) =
        segments.first().and_then(|first| first.strip_prefix('v')).filter(|text| is_version(text))
    else {
        return Ok((NEWEST, segments));
    };
    // A path that is nothing but a version leads nowhere.
    if segments.len() < 2 {
        return Ok((NEWEST, segments));
    }
    // dockerd compares all numbers that are there.
    let numbers: Vec<u32> = text.split('.').map(|part| part.parse().unwrap_or(0)).collect();
    let bound = |version: ApiVersion| vec![version.major, version.minor];
    if numbers < bound(OLDEST) {
        return Err(Failure::invalid(format!(
            "client version {text} is too old. Minimum supported API version is {OLDEST}, please upgrade your \
             client to a newer version"
        )));
    }
    if numbers > bound(NEWEST) {
        return Err(Failure::invalid(format!(
            "client version {text} is too new. Maximum supported API version is {NEWEST}"
        )));
    }
    let version = ApiVersion::new(numbers[0], numbers.get(1).copied().unwrap_or(0));
    segments.remove(0);
    Ok((version, segments))
}

fn is_version(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}

/// The query of a request. Of a repeated name the first counts, unless all are asked for.
#[derive(Debug, Default)]
pub struct Query(HashMap<String, Vec<String>>);

impl Query {
    pub fn parse(text: &str) -> Self {
        Self(address::pairs(text))
    }

    /// A value; empty when absent.
    pub fn text(&self, name: &str) -> &str {
        self.texts(name).first().map_or("", String::as_str)
    }

    /// All values of a name that may be repeated.
    pub fn texts(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// Docker's idea of true: anything but nothing, 0, no, false and none.
    pub fn flag(&self, name: &str) -> bool {
        !matches!(self.text(name).trim().to_ascii_lowercase().as_str(), "" | "0" | "no" | "false" | "none")
    }

    /// A number; `None` when absent.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Failure> {
        match self.text(name) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                Failure::invalid(format!("invalid value '{text}' for query parameter '{name}'"))
            }),
        }
    }

    /// A moment as unix seconds with up to nine decimals; `None` when absent or 0.
    pub fn moment(&self, name: &str) -> Result<Option<Timestamp>, Failure> {
        address::moment(self.text(name)).map_err(|()| {
            Failure::invalid(format!("invalid value '{}' for query parameter '{name}'", self.text(name)))
        })
    }

    pub fn filters(&self) -> Result<Filters, Failure> {
        Filters::parse(self.text("filters")).map_err(|_| Failure::invalid("invalid filter"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_taken_off_the_path() {
        let split = |path: &str| {
            split_path(path).map(|(version, segments)| (version.to_string(), segments.join("|")))
        };
        assert_eq!(split("/v1.44/containers/json").unwrap(), ("1.44".into(), "containers|json".into()));
        assert_eq!(split("/_ping").unwrap(), ("1.51".into(), "_ping".into()));
        assert_eq!(split("/version").unwrap().1, "version");
        assert_eq!(split("/images/a%2Fb%20c/json").unwrap().1, "images|a/b c|json");
        let old = split("/v1.12/_ping").unwrap_err().message;
        assert!(old.starts_with(
            "client version 1.12 is too old. Minimum supported API version is 1.24, please upgrade"
        ));
        assert!(split("/v1.99/_ping").unwrap_err().message.contains("too new"));
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("all=1&name=a%2Fb+c&none&f=false&all=0&bad=%zz");
        assert!(query.flag("all") && !query.flag("f") && !query.flag("none") && !query.flag("absent"));
        assert_eq!(query.text("name"), "a/b c");
        assert_eq!(query.text("bad"), "%zz");
        assert_eq!(query.texts("all"), ["1", "0"]);
        assert_eq!(query.texts("absent"), [""; 0]);
        assert_eq!(query.number::<i64>("all").unwrap(), Some(1));
        assert!(query.number::<i64>("name").unwrap_err().message.contains("'a/b c'"));
    }

    #[test]
    fn wrong_bodies_are_refused_in_dockerds_words() {
        let refused = |bytes: &[u8]| decode::<guest_api::exec::ExecStart>(bytes).unwrap_err().message;
        assert!(decode::<guest_api::exec::ExecStart>(b"null").is_ok());
        assert_eq!(refused(b"{"), "invalid JSON: unexpected EOF");
        assert_eq!(refused(b"{} {}"), "unexpected content after JSON");
        assert!(refused(b"[]").starts_with("invalid JSON: "));
        let content_type = |text: &'static str| check_content_type(Some(&HeaderValue::from_static(text)));
        assert!(content_type("application/json; charset=utf-8").is_ok());
        assert_eq!(
            content_type("text/plain").unwrap_err().message,
            "unsupported Content-Type header (text/plain): must be 'application/json'"
        );
    }

    #[test]
    fn versions_are_compared_number_by_number() {
        let refused = |path: &str| split_path(path).unwrap_err().message;
        assert!(refused("/v1.4.5/info").starts_with("client version 1.4.5 is too old"));
        assert!(refused("/v99/info").ends_with(&format!("Maximum supported API version is {NEWEST}")));
        assert!(refused("/v1/info").contains("too old"));
        assert_eq!(split_path("/v1.40").unwrap().1, ["v1.40"]);
        assert_eq!(split_path("/vx/info").unwrap().1, ["vx", "info"]);
    }
}

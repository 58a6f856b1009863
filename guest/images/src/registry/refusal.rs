//! Answers of a registry that are not what was asked for, and the sentences they become: dockerd's, because clients match on
//! them.

use reqwest::{Response, StatusCode};
use serde::Deserialize;

use super::client::bounded;
use crate::{Error, Kind, Reference};

const ERROR_BYTES_MAX: usize = 64 << 10;
/// Characters of a registry's own words that are passed on.
const WORDS_MAX: usize = 1000;

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Another try may help.
    Passing(Error),
    /// It will not.
    Final(Error),
    /// The registry said no.
    Refused(Refusal),
}

/// What a registry said instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    status: StatusCode,
    /// `MANIFEST_UNKNOWN`, …; never empty.
    code: String,
    message: String,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Body {
    errors: Vec<Entry>,
    /// Docker Hub's token server and its rate limit.
    details: String,
    message: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    code: String,
    message: String,
}

impl Refusal {
    /// Reads what the registry has to say, as far as it is bearable.
    pub(super) async fn of(response: Response) -> Self {
        let status = response.status().as_u16();
        let body = bounded(response, ERROR_BYTES_MAX).await.unwrap_or_default();
        Self::read(status, &body)
    }

    pub(super) fn read(status: u16, bytes: &[u8]) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
        let body = serde_json::from_slice::<Body>(bytes).unwrap_or_default();
        let first = body.errors.into_iter().next().unwrap_or_default();
        let (mut code, mut message) = (plain(&first.code).to_ascii_uppercase(), plain(&first.message));
        if message.is_empty() {
            message = plain(if body.details.is_empty() { &body.message } else { &body.details });
        }
        let (usual_code, usual_message) = match status {
            StatusCode::UNAUTHORIZED => ("UNAUTHORIZED", "authentication required"),
            StatusCode::FORBIDDEN => ("DENIED", "requested access to the resource is denied"),
            StatusCode::TOO_MANY_REQUESTS => ("TOOMANYREQUESTS", "too many requests: try again later"),
            StatusCode::NOT_FOUND => ("NOT_FOUND", "not found"),
            _ => ("UNKNOWN", ""),
        };
        if code.is_empty() {
            usual_code.clone_into(&mut code);
        }
        if message.is_empty() {
            message = match (code.as_str(), usual_message) {
                ("MANIFEST_UNKNOWN", _) => "manifest unknown".to_owned(),
                ("NAME_UNKNOWN", _) => "repository name not known to registry".to_owned(),
                (_, "") => format!("the registry answered {status}"),
                (_, usual) => usual.to_owned(),
            };
        }
        Self { status, code, message }
    }

    /// The registry wants other credentials, or any.
    pub(super) fn is_unauthorized(&self) -> bool {
        self.status == StatusCode::UNAUTHORIZED
    }

    /// `toomanyrequests: You have reached your pull rate limit`.
    pub(crate) fn text(&self) -> String {
        format!("{}: {}", self.code.to_ascii_lowercase().replace('_', " "), self.message)
    }

    fn kind(&self) -> Kind {
        match self.status {
            StatusCode::NOT_FOUND => Kind::NotFound,
            StatusCode::UNAUTHORIZED => Kind::Unauthorized,
            StatusCode::FORBIDDEN => Kind::Forbidden,
            StatusCode::BAD_REQUEST => Kind::Invalid,
            _ => Kind::Unavailable,
        }
    }

    /// Whether the same request may be answered otherwise a moment later. A rate limit is not: another request makes it
    /// worse.
    pub(super) fn is_passing(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::REQUEST_TIMEOUT
    }

    /// In the registry's own words.
    pub(crate) fn plainly(&self) -> Error {
        Error::new(self.kind(), self.text())
    }

    /// As the end of a pull. `anonymous` when no credentials were shown.
    pub(super) fn of_pull(&self, reference: &Reference, anonymous: bool) -> Error {
        let name = reference.familiar_name();
        let denied = |cause: &str| {
            Error::not_found(format!(
                "pull access denied for {name}, repository does not exist or may require 'docker login': {cause}"
            ))
        };
        match (self.status, self.code.as_str()) {
            (_, "DENIED") => denied(&self.text()),
            (StatusCode::NOT_FOUND, "NAME_UNKNOWN") => {
                Error::not_found(format!("repository {name} not found: {}", self.text()))
            }
            (StatusCode::NOT_FOUND, code) => {
                let cause = if code == "NOT_FOUND" {
                    "manifest unknown: manifest unknown".to_owned()
                } else {
                    self.text()
                };
                Error::not_found(format!("manifest for {} not found: {cause}", reference.familiar()))
            }
            (StatusCode::UNAUTHORIZED, _) if anonymous => denied("no basic auth credentials"),
            (StatusCode::UNAUTHORIZED, _) => Error::new(
                Kind::Unauthorized,
                format!(
                    "registry `{}` does not accept these credentials for {name}: {}",
                    reference.domain(),
                    self.text()
                ),
            ),
            (StatusCode::TOO_MANY_REQUESTS, _) => self.plainly(),
            _ => Error::new(
                Kind::Unavailable,
                format!(
                    "registry `{}` answered {} for {}: {}",
                    reference.domain(),
                    self.status,
                    reference.familiar(),
                    self.text()
                ),
            ),
        }
    }

    /// As the end of a push.
    pub(super) fn of_push(&self, anonymous: bool) -> Error {
        if self.is_unauthorized() && anonymous {
            return Error::new(Kind::Unauthorized, "no basic auth credentials");
        }
        self.plainly()
    }
}

/// Foreign words on one line, and not too many of them.
fn plain(text: &str) -> String {
    text.chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .take(WORDS_MAX)
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(status: u16, body: &str) -> Refusal {
        Refusal::read(status, body.as_bytes())
    }

    #[test]
    fn the_words_are_dockerds() {
        let reference: Reference = "team/shop:1".parse().expect("a name");
        let pull = |status, body: &str| read(status, body).of_pull(&reference, true).to_string();
        assert_eq!(
            pull(
                404,
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{"Tag":"1"}}]}"#
            ),
            "manifest for team/shop:1 not found: manifest unknown: manifest unknown"
        );
        assert_eq!(pull(404, ""), "manifest for team/shop:1 not found: manifest unknown: manifest unknown");
        assert_eq!(
            pull(
                403,
                r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#
            ),
            "pull access denied for team/shop, repository does not exist or may require 'docker login': denied: requested access to the resource is denied"
        );
        assert_eq!(
            pull(
                404,
                r#"{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known to registry"}]}"#
            ),
            "repository team/shop not found: name unknown: repository name not known to registry"
        );
        assert_eq!(
            pull(
                429,
                r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit."}]}"#
            ),
            "toomanyrequests: You have reached your pull rate limit."
        );
        assert_eq!(pull(429, "<html>"), "toomanyrequests: too many requests: try again later");
    }

    #[test]
    fn a_push_is_refused_in_the_registrys_words() {
        assert_eq!(read(401, "").of_push(true).to_string(), "no basic auth credentials");
        assert_eq!(
            read(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#)
                .of_push(false)
                .to_string(),
            "unauthorized: authentication required"
        );
        assert_eq!(
            read(401, r#"{"details":"incorrect username or password"}"#).text(),
            "unauthorized: incorrect username or password"
        );
    }

    #[test]
    fn foreign_words_stay_on_one_line() {
        let refusal = read(
            400,
            &format!(r#"{{"errors":[{{"code":"A\nB","message":"x\u001b[2J{}"}}]}}"#, "y".repeat(5000)),
        );
        let text = refusal.text();
        assert!(!text.contains(char::is_control) && text.len() < 1100, "{text}");
    }

    #[test]
    fn a_rate_limit_is_not_tried_again() {
        assert!(!read(429, "").is_passing());
        assert!(read(503, "").is_passing());
    }
}

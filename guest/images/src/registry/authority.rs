//! Who we are to one registry: answers its challenges with a password or with tokens from the server it names.
//!
//! A password goes to the registry that it is for and to the token server that this registry names, and never over plain HTTP
//! when the registry itself is reached by HTTPS.

use std::collections::BTreeSet;

use base64::Engine as _;
use reqwest::{
    Client, Response, Url,
    header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use super::{
    challenge::Challenge,
    client::{self, bounded},
    refusal::{Failure, Refusal},
};
use crate::{Credentials, Error, Kind, credentials::Secret};

const TOKEN_BYTES_MAX: usize = 1 << 20;
/// What token servers know Docker's clients by.
const CLIENT_ID: &str = "docker";

/// Our standing at one registry. Shared by the requests of one operation.
pub(super) struct Authority {
    client: Client,
    domain: String,
    /// Whether the registry is reached by HTTPS, so that passwords must be too.
    encrypted: bool,
    credentials: Credentials,
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    header: Option<HeaderValue>,
    /// What tokens were asked for so far; a new one is asked for all of it.
    scopes: BTreeSet<String>,
    refresh: Option<Secret>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Token {
    token: Option<Secret>,
    access_token: Option<Secret>,
    refresh_token: Option<Secret>,
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

impl Authority {
    pub(super) fn new(
        client: Client,
        domain: &str,
        encrypted: bool,
        credentials: Credentials,
        scope: Option<String>,
    ) -> Self {
        let header = match &credentials {
            Credentials::RegistryToken(token) => header(format!("Bearer {}", token.reveal())),
            _ => None,
        };
        let state = State { header, scopes: scope.into_iter().collect(), refresh: None };
        Self {
            client,
            domain: domain.to_owned(),
            encrypted,
            credentials,
            state: tokio::sync::Mutex::new(state),
        }
    }

    pub(super) fn is_anonymous(&self) -> bool {
        self.credentials == Credentials::Anonymous
    }

    /// What requests carry at the moment.
    pub(super) async fn header(&self) -> Option<HeaderValue> {
        self.state.lock().await.header.clone()
    }

    /// A refresh token that the token server gave along.
    pub(super) async fn refresh_token(&self) -> Option<Secret> {
        self.state.lock().await.refresh.clone()
    }

    /// Answers the challenge of `refused`, which carried `stale`. `false` when there is nothing (more) to say.
    pub(super) async fn answer(
        &self,
        stale: Option<&HeaderValue>,
        refused: &Response,
    ) -> Result<bool, Failure> {
        let challenges: Vec<Challenge> = refused
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| Challenge::parse(value.to_str().ok()?))
            .collect();
        let mut state = self.state.lock().await;
        // Another request of this operation may have renewed it in the meantime.
        if state.header.as_ref() != stale {
            return Ok(true);
        }
        if matches!(self.credentials, Credentials::RegistryToken(_)) {
            return Ok(false);
        }
        if let Some(challenge) = challenges.iter().find(|challenge| challenge.scheme == "bearer") {
            state
                .scopes
                .extend(challenge.scope.iter().flat_map(|scope| scope.split_whitespace()).map(str::to_owned));
            let token = self.token(challenge, &state.scopes).await?;
            if token.refresh_token.as_ref().is_some_and(|token| !token.is_empty()) {
                state.refresh = token.refresh_token;
            }
            let token = token
                .token
                .filter(|token| !token.is_empty())
                .or(token.access_token)
                .filter(|token| !token.is_empty());
            state.header = token.and_then(|token| header(format!("Bearer {}", token.reveal())));
            if state.header.is_none() {
                return Err(self.unusable("gave no token"));
            }
            return Ok(true);
        }
        if challenges.iter().any(|challenge| challenge.scheme == "basic")
            && let Credentials::Basic { username, password } = &self.credentials
        {
            let answer = basic(username, password);
            let new = answer.is_some() && answer.as_ref() != stale;
            state.header = answer;
            return Ok(new);
        }
        Ok(false)
    }

    fn unusable(&self, what: &str) -> Failure {
        Failure::Final(Error::new(
            Kind::Unavailable,
            format!("the token server of registry `{}` {what}", self.domain),
        ))
    }

    async fn token(&self, challenge: &Challenge, scopes: &BTreeSet<String>) -> Result<Token, Failure> {
        let url = Url::parse(&challenge.realm).map_err(|source| {
            Failure::Final(Error::because(
                Kind::Unavailable,
                format!("registry `{}` names a token server that is no URL", self.domain),
                source,
            ))
        })?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(Failure::Final(Error::invalid(format!(
                "registry `{}` names the token server `{}:`, which is not reached by HTTP: refused",
                self.domain,
                url.scheme()
            ))));
        }
        if self.encrypted && url.scheme() == "http" && !self.is_anonymous() {
            return Err(Failure::Final(Error::invalid(format!(
                "registry `{}` is reached by HTTPS, but wants the password sent to its token server `{}` without: refused",
                self.domain,
                url.host_str().unwrap_or("")
            ))));
        }
        let request = match &self.credentials {
            Credentials::IdentityToken(token) => {
                let scope = scopes.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
                let form = [
                    ("grant_type", "refresh_token"),
                    ("service", challenge.service.as_deref().unwrap_or_default()),
                    ("scope", &scope),
                    ("client_id", CLIENT_ID),
                    ("refresh_token", token.reveal()),
                ];
                let mut encoded = url.clone();
                let body = encoded
                    .query_pairs_mut()
                    .clear()
                    .extend_pairs(form)
                    .finish()
                    .query()
                    .unwrap_or("")
                    .to_owned();
                self.client.post(url).header("content-type", "application/x-www-form-urlencoded").body(body)
            }
            credentials => {
                let mut url = url;
                {
                    let mut query = url.query_pairs_mut();
                    if let Some(service) = &challenge.service {
                        query.append_pair("service", service);
                    }
                    for scope in scopes {
                        query.append_pair("scope", scope);
                    }
                    if let Credentials::Basic { username, .. } = credentials {
                        query.append_pair("account", username);
                        // Nothing to be done in a repository: this is a login, which may be worth a longer-lived token.
                        if scopes.is_empty() {
                            query.append_pair("client_id", CLIENT_ID).append_pair("offline_token", "true");
                        }
                    }
                }
                let request = self.client.get(url);
                match credentials {
                    Credentials::Basic { username, password } => match basic(username, password) {
                        Some(header) => request.header(AUTHORIZATION, header),
                        None => request,
                    },
                    _ => request,
                }
            }
        };
        let response = request
            .timeout(super::SMALL_TIMEOUT)
            .send()
            .await
            .map_err(|source| client::failure(&self.domain, source))?;
        if !response.status().is_success() {
            let refusal = Refusal::of(response).await;
            return Err(if refusal.is_passing() {
                Failure::Passing(refusal.plainly())
            } else {
                Failure::Refused(refusal)
            });
        }
        match bounded(response, TOKEN_BYTES_MAX).await {
            // The parser's words could repeat the token.
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|_| self.unusable("gave no token")),
            Err(client::Bounded::Exceeded(limit)) => {
                Err(self.unusable(&format!("answered with more than {limit} bytes: refused")))
            }
            Err(client::Bounded::Broken(source)) => Err(client::failure(&self.domain, source)),
        }
    }
}

pub(super) fn basic(username: &str, password: &Secret) -> Option<HeaderValue> {
    let pair = format!("{username}:{}", password.reveal());
    header(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
}

/// A header whose value is never printed.
fn header(value: String) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(&value).ok()?;
    header.set_sensitive(true);
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_with_secrets_are_marked() {
        let header = basic("ana", &Secret::new("secret")).expect("a header");
        assert_eq!(header.to_str().expect("text"), "Basic YW5hOnNlY3JldA==");
        assert!(!format!("{header:?}").contains("YW5h"));
        assert!(super::header("line\nbreak".to_owned()).is_none());
    }
}

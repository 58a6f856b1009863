//! A registry over HTTP (OCI distribution specification 1.1): manifests and blobs, tokens, redirects.
//!
//! Everything a registry says is bounded and checked: a manifest by size and digest, a blob by whoever reads it
//! ([`download`](crate::download)), redirects by number and never from HTTPS to HTTP, every wait by a time limit. The sentences
//! that Docker's clients match on are dockerd's.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use base64::Engine as _;
use futures_util::{StreamExt, TryStreamExt, future::BoxFuture};
use reqwest::{
    Client, Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE, WWW_AUTHENTICATE},
    redirect::Policy,
};
use serde::Deserialize;

use crate::{
    Credentials, Digest, Error, Kind, Reference, Result,
    download::{BlobSource, Body},
    manifest,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two pieces of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// For a small answer as a whole.
const SMALL_TIMEOUT: Duration = Duration::from_secs(120);
const REDIRECTS_MAX: usize = 10;
const TOKEN_BYTES_MAX: usize = 1 << 20;
const ERROR_BYTES_MAX: usize = 64 << 10;
/// Tries for a manifest when the registry answers that it is unwell.
const TRIES: u32 = 3;
const USER_AGENT: &str = concat!("engine/", env!("CARGO_PKG_VERSION"));

/// The way to every registry. Connections are kept and shared.
#[derive(Debug)]
pub(crate) struct Registries {
    insecure: Vec<Insecure>,
    mirrors: Vec<String>,
    /// Checks certificates.
    strict: OnceLock<Result<Client>>,
    /// Does not; for registries that were named insecure.
    lenient: OnceLock<Result<Client>>,
    /// Does not, and never goes through a proxy.
    local: OnceLock<Result<Client>>,
    /// What an insecure registry turned out to speak.
    schemes: Mutex<std::collections::HashMap<String, &'static str>>,
}

/// One entry of the list of insecure registries.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Insecure {
    Name(String),
    Network(IpAddr, u8),
}

/// One repository at one registry, as one pull sees it.
pub(crate) struct Repository {
    client: Client,
    /// `https://registry:port/v2/path`.
    base: String,
    domain: String,
    reference: Reference,
    credentials: Credentials,
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// A manifest as it came.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
}

impl Registries {
    /// Fails when a network in the list cannot be read.
    pub(crate) fn new(insecure: &[String], mirrors: &[String]) -> Result<Self> {
        let mut all = vec![
            Insecure::Network(IpAddr::from([127, 0, 0, 0]), 8),
            Insecure::Network(IpAddr::from([0u16, 0, 0, 0, 0, 0, 0, 1]), 128),
            Insecure::Name("localhost".to_owned()),
        ];
        for entry in insecure {
            all.push(Insecure::parse(entry)?);
        }
        let mirrors = mirrors.iter().map(|mirror| mirror.trim_end_matches('/').to_owned()).collect();
        Ok(Self {
            insecure: all,
            mirrors,
            strict: OnceLock::new(),
            lenient: OnceLock::new(),
            local: OnceLock::new(),
            schemes: Mutex::default(),
        })
    }

    /// The places to ask for a repository: mirrors of Docker Hub first, then the registry itself.
    pub(crate) async fn repositories(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<Vec<Repository>> {
        let mut found = Vec::new();
        if reference.is_default_domain() {
            for mirror in &self.mirrors {
                let domain = mirror.split_once("://").map_or(mirror.as_str(), |(_, rest)| rest);
                let domain = domain.split('/').next().unwrap_or(domain);
                let client = if mirror.starts_with("http://") {
                    self.insecure_client(domain)?
                } else {
                    self.strict()?
                };
                found.push(Repository::new(
                    client,
                    format!("{mirror}/v2/{}", reference.path()),
                    domain,
                    reference,
                    Credentials::Anonymous,
                ));
            }
        }
        let domain = if reference.is_default_domain() { "registry-1.docker.io" } else { reference.domain() };
        let (client, scheme) = if self.is_insecure(domain).await {
            let client = self.insecure_client(domain)?;
            let scheme = self.scheme(&client, domain).await?;
            (client, scheme)
        } else {
            (self.strict()?, "https")
        };
        found.push(Repository::new(
            client,
            format!("{scheme}://{domain}/v2/{}", reference.path()),
            domain,
            reference,
            credentials.clone(),
        ));
        Ok(found)
    }

    /// Whether `domain` may be spoken to without a certificate. Names are looked up when a network is in the list beyond
    /// our own, as dockerd does.
    async fn is_insecure(&self, domain: &str) -> bool {
        let (host, address) = host_of(domain);
        let named =
            |entry: &Insecure| matches!(entry, Insecure::Name(name) if name == domain || name == host);
        if self.insecure.iter().any(named) {
            return true;
        }
        let within = |address: IpAddr| {
            self.insecure.iter().any(|entry| matches!(entry, Insecure::Network(network, bits) if contains(*network, *bits, address)))
        };
        if let Some(address) = address {
            return within(address);
        }
        let only_loopback = self.insecure.iter().all(|entry| match entry {
            Insecure::Network(network, _) => network.is_loopback(),
            Insecure::Name(_) => true,
        });
        if only_loopback {
            return false;
        }
        match tokio::time::timeout(CONNECT_TIMEOUT, tokio::net::lookup_host((host, 443))).await {
            Ok(Ok(addresses)) => addresses.map(|address: SocketAddr| address.ip()).any(within),
            _ => false,
        }
    }

    /// HTTPS where an insecure registry speaks it, else HTTP; found out once.
    async fn scheme(&self, client: &Client, domain: &str) -> Result<&'static str> {
        let known = self.schemes.lock().unwrap_or_else(PoisonError::into_inner).get(domain).copied();
        if let Some(scheme) = known {
            return Ok(scheme);
        }
        for scheme in ["https", "http"] {
            match client.get(format!("{scheme}://{domain}/v2/")).timeout(CONNECT_TIMEOUT).send().await {
                Ok(_) => {
                    self.schemes
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(domain.to_owned(), scheme);
                    return Ok(scheme);
                }
                Err(source) if scheme == "http" => return Err(unreachable(domain, source)),
                Err(_) => {}
            }
        }
        Ok("http")
    }

    fn strict(&self) -> Result<Client> {
        self.strict.get_or_init(|| build(|builder| builder)).clone()
    }

    fn insecure_client(&self, domain: &str) -> Result<Client> {
        let (host, address) = host_of(domain);
        if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
            return self
                .local
                .get_or_init(|| build(|builder| builder.tls_danger_accept_invalid_certs(true).no_proxy()))
                .clone();
        }
        self.lenient.get_or_init(|| build(|builder| builder.tls_danger_accept_invalid_certs(true))).clone()
    }
}

fn build(adapt: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder) -> Result<Client> {
    // Someone else in this program may have chosen one already, which is as good.
    let _chosen = rustls::crypto::ring::default_provider().install_default();
    let redirects = Policy::custom(|attempt| {
        if attempt.previous().len() > REDIRECTS_MAX {
            return attempt.error(format!("more than {REDIRECTS_MAX} redirects"));
        }
        if attempt.url().scheme() != "https"
            && attempt.previous().last().is_some_and(|last| last.scheme() == "https")
        {
            return attempt.error("a redirect from HTTPS to HTTP");
        }
        attempt.follow()
    });
    adapt(Client::builder())
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(redirects)
        .build()
        .map_err(|source| {
            Error::because(
                Kind::Internal,
                "secure connections cannot be set up (are there CA certificates in /etc/ssl/certs?)",
                source,
            )
        })
}

impl Insecure {
    fn parse(entry: &str) -> Result<Self> {
        let entry = entry.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
        let Some((network, bits)) = entry.split_once('/') else { return Ok(Self::Name(entry.to_owned())) };
        let bad = || {
            Error::invalid(format!(
                "`{entry}` in the list of insecure registries is neither a host nor a network"
            ))
        };
        let network: IpAddr = network.parse().map_err(|_| bad())?;
        let most = if network.is_ipv4() { 32 } else { 128 };
        let bits = bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(bad)?;
        Ok(Self::Network(network, bits))
    }
}

/// The host without its port, and the address it spells, if any.
fn host_of(domain: &str) -> (&str, Option<IpAddr>) {
    if let Some((host, _)) = domain.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, host.parse().ok());
    }
    let host = domain.split_once(':').map_or(domain, |(host, _)| host);
    (host, host.parse().ok())
}

fn contains(network: IpAddr, bits: u8, address: IpAddr) -> bool {
    let prefix = |value: u128, width: u32| if bits == 0 { 0 } else { value >> (width - u32::from(bits)) };
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            prefix(u128::from(network.to_bits()), 32) == prefix(u128::from(address.to_bits()), 32)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            prefix(network.to_bits(), 128) == prefix(address.to_bits(), 128)
        }
        _ => false,
    }
}

fn unreachable(domain: &str, source: reqwest::Error) -> Error {
    let what = if source.is_timeout() { "did not answer in time" } else { "cannot be reached" };
    Error::because(Kind::Unavailable, format!("registry `{domain}` {what}"), source.without_url())
}

impl Repository {
    fn new(
        client: Client,
        base: String,
        domain: &str,
        reference: &Reference,
        credentials: Credentials,
    ) -> Self {
        let fixed = match &credentials {
            Credentials::RegistryToken(token) => secret(format!("Bearer {token}")),
            _ => None,
        };
        Self {
            client,
            base,
            domain: domain.to_owned(),
            reference: reference.clone(),
            credentials,
            authorization: tokio::sync::Mutex::new(fixed),
        }
    }

    /// The manifest or index that a tag or digest stands for. When asked by digest, the content is verified.
    pub(crate) async fn manifest(&self, by_digest: Option<&Digest>) -> Result<Fetched> {
        let wanted = match by_digest {
            Some(digest) => digest.to_string(),
            None => self.reference.tag().unwrap_or("latest").to_owned(),
        };
        let mut tries = 1;
        loop {
            match tokio::time::timeout(SMALL_TIMEOUT, self.try_manifest(&wanted)).await {
                Ok(Ok(fetched)) => {
                    if let Some(expected) = by_digest.filter(|expected| **expected != fetched.digest) {
                        return Err(Error::invalid(format!(
                            "registry `{}` gave a manifest with the digest {} for {expected}: refused",
                            self.domain, fetched.digest
                        )));
                    }
                    return Ok(fetched);
                }
                Ok(Err(Failure::Passing(error))) if tries < TRIES => {
                    tracing::debug!(registry = self.domain, error = %error.chain(), "the manifest is asked for again");
                    tokio::time::sleep(Duration::from_millis(300) * 2u32.pow(tries)).await;
                    tries += 1;
                }
                Ok(Err(Failure::Passing(error) | Failure::Final(error))) => return Err(error),
                Err(_) => {
                    return Err(Error::new(
                        Kind::Unavailable,
                        format!(
                            "registry `{}` did not deliver the manifest of {} within {SMALL_TIMEOUT:?}",
                            self.domain,
                            self.reference.familiar()
                        ),
                    ));
                }
            }
        }
    }

    async fn try_manifest(&self, wanted: &str) -> Result<Fetched, Failure> {
        let mut headers = HeaderMap::new();
        for media_type in manifest::ACCEPT {
            headers.append(ACCEPT, HeaderValue::from_static(media_type));
        }
        let response = self.send(&format!("{}/manifests/{wanted}", self.base), headers).await?;
        if !response.status().is_success() {
            return Err(self.refusal(response).await);
        }
        let stated = response
            .headers()
            .get("docker-content-digest")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let bytes = bounded(response, usize::try_from(manifest::MANIFEST_BYTES_MAX).unwrap_or(usize::MAX))
            .await
            .map_err(|failure| match failure {
                Bounded::Broken(source) => Failure::Passing(unreachable(&self.domain, source)),
                Bounded::Exceeded(limit) => Failure::Final(Error::invalid(format!(
                    "registry `{}` gave a manifest of more than {limit} bytes: refused",
                    self.domain
                ))),
            })?;
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

    async fn open_blob(&self, digest: Digest, offset: u64) -> Result<Body, Failure> {
        let mut headers = HeaderMap::new();
        if offset > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={offset}-"))
        {
            headers.insert(RANGE, range);
        }
        let response = self.send(&format!("{}/blobs/{digest}", self.base), headers).await?;
        let offset = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let begins = response
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|value| value.to_str().ok())
                    .and_then(range_start);
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
            _ => return Err(self.refusal(response).await),
        };
        let domain = self.domain.clone();
        let stream = response.bytes_stream().map_err(move |source| unreachable(&domain, source)).boxed();
        Ok(Body { offset, stream })
    }

    /// Sends a GET, answering the registry's challenge once.
    async fn send(&self, url: &str, headers: HeaderMap) -> Result<Response, Failure> {
        let mut challenged = false;
        loop {
            let authorization = self.authorization.lock().await.clone();
            let mut request = self.client.get(url).headers(headers.clone());
            if let Some(authorization) = &authorization {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = request.send().await.map_err(|source| self.failure(source))?;
            if response.status() != StatusCode::UNAUTHORIZED || challenged {
                return Ok(response);
            }
            challenged = true;
            let challenges: Vec<String> = response
                .headers()
                .get_all(WWW_AUTHENTICATE)
                .iter()
                .filter_map(|value| value.to_str().ok())
                .map(str::to_owned)
                .collect();
            let mut current = self.authorization.lock().await;
            // Another request of this pull may have renewed it in the meantime.
            if *current == authorization {
                match self.authorize(&challenges).await? {
                    Some(answer) => *current = Some(answer),
                    None => return Ok(response),
                }
            }
        }
    }

    /// What to answer a challenge with; `None` when there is nothing to say.
    async fn authorize(&self, challenges: &[String]) -> Result<Option<HeaderValue>, Failure> {
        let parsed: Vec<Challenge> = challenges.iter().filter_map(|text| Challenge::parse(text)).collect();
        if let Some(challenge) = parsed.iter().find(|challenge| challenge.scheme == "bearer") {
            return self.token(challenge).await.map(Some);
        }
        if let (true, Credentials::Basic { username, password }) =
            (parsed.iter().any(|challenge| challenge.scheme == "basic"), &self.credentials)
        {
            return Ok(basic(username, password));
        }
        Ok(None)
    }

    async fn token(&self, challenge: &Challenge) -> Result<HeaderValue, Failure> {
        let url = reqwest::Url::parse(&challenge.realm).map_err(|source| {
            Failure::Final(Error::because(
                Kind::Unavailable,
                format!(
                    "registry `{}` names the token server `{}`, which is no URL",
                    self.domain, challenge.realm
                ),
                source,
            ))
        })?;
        let scope =
            challenge.scope.clone().unwrap_or_else(|| format!("repository:{}:pull", self.reference.path()));
        let request = if let Credentials::IdentityToken(token) = &self.credentials {
            let service = challenge.service.clone().unwrap_or_default();
            let form = [
                ("grant_type", "refresh_token"),
                ("service", &service),
                ("scope", &scope),
                ("client_id", "engine"),
                ("refresh_token", token),
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
        } else {
            let mut url = url;
            if let Some(service) = &challenge.service {
                url.query_pairs_mut().append_pair("service", service);
            }
            url.query_pairs_mut().append_pair("scope", &scope);
            let request = self.client.get(url);
            match &self.credentials {
                Credentials::Basic { username, password } => match basic(username, password) {
                    Some(header) => request.header(AUTHORIZATION, header),
                    None => request,
                },
                _ => request,
            }
        };
        let response = request.send().await.map_err(|source| self.failure(source))?;
        let status = response.status();
        if !status.is_success() {
            return Err(self.refusal(response).await);
        }
        let bytes = bounded(response, TOKEN_BYTES_MAX).await;
        let token = bytes
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Token>(&bytes).ok())
            .and_then(|token| token.token.or(token.access_token))
            .filter(|token| !token.is_empty());
        let header = token.and_then(|token| secret(format!("Bearer {token}")));
        header.ok_or_else(|| {
            Failure::Final(Error::new(
                Kind::Unavailable,
                format!("the token server of registry `{}` gave no token", self.domain),
            ))
        })
    }

    fn failure(&self, source: reqwest::Error) -> Failure {
        if source.is_redirect() {
            return Failure::Final(Error::because(
                Kind::Invalid,
                format!("registry `{}` redirects in a way that is not followed", self.domain),
                source.without_url(),
            ));
        }
        let passing = source.is_timeout() || !source.is_connect();
        let error = unreachable(&self.domain, source);
        if passing { Failure::Passing(error) } else { Failure::Final(error) }
    }

    /// An answer that is not what was asked for, in dockerd's words.
    async fn refusal(&self, response: Response) -> Failure {
        let status = response.status();
        let body = bounded(response, ERROR_BYTES_MAX).await.unwrap_or_default();
        let first = serde_json::from_slice::<Errors>(&body)
            .ok()
            .and_then(|errors| errors.errors.into_iter().next())
            .unwrap_or_default();
        let code = first.code.to_ascii_uppercase();
        let words = |fallback: &str| match (code.is_empty(), first.message.is_empty()) {
            (true, true) => fallback.to_owned(),
            (true, false) => first.message.clone(),
            (false, _) => format!(
                "{}: {}",
                code.to_ascii_lowercase().replace('_', " "),
                if first.message.is_empty() { fallback } else { &first.message }
            ),
        };
        let name = self.reference.familiar_name();
        let denied = |cause: String| {
            Failure::Final(Error::not_found(format!(
                "pull access denied for {name}, repository does not exist or may require 'docker login': {cause}"
            )))
        };
        match (status, code.as_str()) {
            (_, "DENIED") => denied(words("requested access to the resource is denied")),
            (StatusCode::NOT_FOUND, "NAME_UNKNOWN") => Failure::Final(Error::not_found(format!(
                "repository {name} not found: {}",
                words("repository name not known to registry")
            ))),
            (StatusCode::NOT_FOUND, _) => Failure::Final(Error::not_found(format!(
                "manifest for {} not found: {}",
                self.reference.familiar(),
                words("manifest unknown: manifest unknown")
            ))),
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _)
                if self.credentials == Credentials::Anonymous =>
            {
                denied(words("no basic auth credentials"))
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => Failure::Final(Error::new(
                Kind::Unauthorized,
                format!(
                    "registry `{}` does not accept these credentials for {name}: {}",
                    self.domain,
                    words("unauthorized: authentication required")
                ),
            )),
            _ => {
                let error = Error::new(
                    Kind::Unavailable,
                    format!(
                        "registry `{}` answered {status} for {}: {}",
                        self.domain,
                        self.reference.familiar(),
                        words("no reason given")
                    ),
                );
                let passing = status.is_server_error()
                    || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
                if passing { Failure::Passing(error) } else { Failure::Final(error) }
            }
        }
    }
}

impl BlobSource for Repository {
    fn open(&self, digest: Digest, offset: u64) -> BoxFuture<'_, Result<Body>> {
        Box::pin(async move {
            self.open_blob(digest, offset).await.map_err(|failure| match failure {
                Failure::Passing(error) => error,
                // `Unavailable` would be tried again.
                Failure::Final(error)
                    if error.kind() == Kind::Unavailable && std::error::Error::source(&error).is_none() =>
                {
                    Error::new(Kind::Internal, error.to_string())
                }
                Failure::Final(error) => error,
            })
        })
    }
}

/// Whether another try may help.
enum Failure {
    Passing(Error),
    Final(Error),
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<RegistryError>,
}

#[derive(Default, Deserialize)]
struct RegistryError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// `Bearer realm="…",service="…",scope="…"`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Challenge {
    /// In lower case.
    scheme: String,
    realm: String,
    service: Option<String>,
    scope: Option<String>,
}

impl Challenge {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let mut challenge = Self { scheme: scheme.to_ascii_lowercase(), ..Self::default() };
        while let Some((name, after)) = rest.trim_start_matches([' ', ',']).split_once('=') {
            let value;
            if let Some(quoted) = after.strip_prefix('"') {
                let (mut unquoted, mut characters, mut end) = (String::new(), quoted.char_indices(), None);
                while let Some((index, character)) = characters.next() {
                    match character {
                        '"' => {
                            end = Some(index + 1);
                            break;
                        }
                        '\\' => unquoted.extend(characters.next().map(|(_, escaped)| escaped)),
                        other => unquoted.push(other),
                    }
                }
                rest = &quoted[end?..];
                value = unquoted;
            } else {
                let end = after.find(',').unwrap_or(after.len());
                value = after[..end].trim().to_owned();
                rest = &after[end..];
            }
            match name.trim().to_ascii_lowercase().as_str() {
                "realm" => challenge.realm = value,
                "service" => challenge.service = Some(value),
                "scope" => challenge.scope = Some(value),
                _ => {}
            }
        }
        Some(challenge)
    }
}

/// The first number of `bytes 5-9/10`.
fn range_start(text: &str) -> Option<u64> {
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    secret(format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"))
    ))
}

/// A header whose value is never printed.
fn secret(value: String) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(&value).ok()?;
    header.set_sensitive(true);
    Some(header)
}

enum Bounded {
    Broken(reqwest::Error),
    Exceeded(usize),
}

/// Reads a body of at most `limit` bytes.
async fn bounded(mut response: Response, limit: usize) -> Result<Vec<u8>, Bounded> {
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(Bounded::Broken)? {
        if bytes.len() + piece.len() > limit {
            return Err(Bounded::Exceeded(limit));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Repository").field("base", &self.base).finish_non_exhaustive()
    }
}

/// So that a repository can be shared by the downloads of a pull.
pub(crate) type SharedRepository = Arc<Repository>;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges_are_read() {
        let challenge = Challenge::parse(
            r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push""#,
        );
        let expected = Challenge {
            scheme: "bearer".to_owned(),
            realm: "https://auth.example/token".to_owned(),
            service: Some("registry.example".to_owned()),
            scope: Some("repository:a/b:pull,push".to_owned()),
        };
        assert_eq!(challenge, Some(expected));
        assert_eq!(
            Challenge::parse("Basic realm=x").map(|challenge| challenge.scheme),
            Some("basic".to_owned())
        );
        assert_eq!(Challenge::parse(r#"Bearer realm="unfinished"#), None);
    }

    #[tokio::test]
    async fn loopback_is_always_insecure_and_others_only_when_listed() {
        let registries = Registries::new(
            &["host.docker.internal".to_owned(), "10.1.0.0/16".to_owned(), "r.example:5000".to_owned()],
            &[],
        )
        .expect("a list");
        for domain in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:80",
            "127.9.9.9",
            "[::1]:5000",
            "host.docker.internal:5000",
            "10.1.2.3:1",
            "r.example:5000",
        ] {
            assert!(registries.is_insecure(domain).await, "{domain}");
        }
        for domain in ["10.2.0.1", "192.0.2.1:5000"] {
            assert!(!registries.is_insecure(domain).await, "{domain}");
        }
        assert!(Registries::new(&["10.0.0.0/33".to_owned()], &[]).is_err());
    }

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(range_start("bytes 5-9/10"), Some(5));
        assert_eq!(range_start("5-9"), None);
    }

    proptest! {
        #[test]
        fn arbitrary_challenges_do_not_panic(text in "\\PC{0,80}") {
            let _challenge = Challenge::parse(&text);
        }
    }
}

//! HTTP clients, one for each way in which a server is trusted. Connections are kept and shared.
//!
//! Redirects are bounded in number and never lead from HTTPS to anything else; what was shown to one host is not shown to
//! the next.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use reqwest::{Client, ClientBuilder, Identity, NoProxy, Proxy, Response, redirect::Policy};

use super::{certificates::Certificates, refusal::Failure, verifier};
use crate::{Digest, Error, Kind, Result};

pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two pieces of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const REDIRECTS_MAX: usize = 10;
const USER_AGENT: &str = concat!("engine/", env!("CARGO_PKG_VERSION"));

/// The way out to the internet. `Debug` hides the passwords that an address may hold.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    /// For `http://`.
    pub http: Option<String>,
    /// For `https://`.
    pub https: Option<String>,
    /// Hosts, domains and networks reached directly, with commas between.
    pub exceptions: Option<String>,
}

impl Proxies {
    /// What the environment says (`HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY`, in capitals or not).
    pub fn from_environment() -> Self {
        let read = |name: &str| {
            [name.to_owned(), name.to_ascii_lowercase()]
                .iter()
                .find_map(|name| std::env::var(name).ok())
                .filter(|value| !value.is_empty())
        };
        Self { http: read("HTTP_PROXY"), https: read("HTTPS_PROXY"), exceptions: read("NO_PROXY") }
    }
}

impl fmt::Debug for Proxies {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = |address: &Option<String>| address.as_deref().map(shown);
        formatter
            .debug_struct("Proxies")
            .field("http", &hidden(&self.http))
            .field("https", &hidden(&self.https))
            .field("exceptions", &self.exceptions)
            .finish()
    }
}

/// How a server is trusted and reached.
pub(super) struct Trust {
    /// Whether its certificate must be good.
    pub(super) checked: bool,
    /// Whether it is on this computer, and so never behind a proxy.
    pub(super) local: bool,
    pub(super) certificates: Certificates,
}

/// All clients made so far.
pub(super) struct Clients {
    proxies: Proxies,
    made: Mutex<HashMap<Key, Client>>,
}

/// What tells clients apart.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    patient: bool,
    checked: bool,
    local: bool,
    certificates: Option<Digest>,
}

/// Clients for certificates that have changed since are forgotten beyond this many.
const CLIENTS_MAX: usize = 64;

impl Clients {
    /// Fails when a proxy's address cannot be read.
    pub(super) fn new(proxies: Proxies) -> Result<Self> {
        let _tried: ClientBuilder = proxied(Client::builder(), &proxies)?;
        Ok(Self { proxies, made: Mutex::default() })
    }

    /// `patient`: an answer may take as long as the body of its request. Whoever sends one watches it.
    pub(super) fn client(&self, trust: &Trust, patient: bool) -> Result<Client> {
        let certificates = trust.certificates.fingerprint();
        let key = Key { patient, checked: trust.checked, local: trust.local, certificates };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&key) {
            return Ok(client.clone());
        }
        let client = self.build(trust, patient)?;
        if made.len() >= CLIENTS_MAX {
            made.clear();
        }
        made.insert(key, client.clone());
        Ok(client)
    }

    fn build(&self, trust: &Trust, patient: bool) -> Result<Client> {
        // Someone else in this program may have chosen one already, which is as good.
        let _chosen = rustls::crypto::ring::default_provider().install_default();
        let mut builder =
            Client::builder().user_agent(USER_AGENT).connect_timeout(CONNECT_TIMEOUT).redirect(redirects());
        if !patient {
            builder = builder.read_timeout(READ_TIMEOUT);
        }
        builder = if trust.local { builder.no_proxy() } else { proxied(builder, &self.proxies)? };
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(Kind::Invalid, format!("the certificates of a registry cannot be used: {source}"))
        };
        // Read in either case, so that what is wrong with them is said.
        let (authorities, own) = (trust.certificates.authorities()?, trust.certificates.own()?);
        if !trust.checked {
            builder = builder.tls_danger_accept_invalid_certs(true);
            if let Some(pem) = trust.certificates.own_pem() {
                builder =
                    builder.identity(Identity::from_pem(pem).map_err(|source| unusable(source.into()))?);
            }
        } else if !trust.certificates.is_empty() {
            let config =
                verifier::client_config(authorities, own).map_err(|source| unusable(source.into()))?;
            builder = builder.tls_backend_preconfigured(config);
        }
        builder.build().map_err(|source| {
            Error::because(
                Kind::Internal,
                "secure connections cannot be set up (are there CA certificates in /etc/ssl/certs?)",
                source,
            )
        })
    }
}

impl fmt::Debug for Clients {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Clients").field("proxies", &self.proxies).finish_non_exhaustive()
    }
}

fn proxied(mut builder: ClientBuilder, proxies: &Proxies) -> Result<ClientBuilder> {
    let exceptions = proxies.exceptions.as_deref().and_then(NoProxy::from_string);
    builder = builder.no_proxy();
    type Scheme = fn(&str) -> reqwest::Result<Proxy>;
    let ways: [(&Option<String>, Scheme); 2] =
        [(&proxies.http, |address| Proxy::http(address)), (&proxies.https, |address| Proxy::https(address))];
    for (address, scheme) in ways {
        let Some(address) = address else { continue };
        let proxy = scheme(address).map_err(|source| {
            Error::because(
                Kind::Invalid,
                format!("the proxy `{}` is not a URL", shown(address)),
                source.without_url(),
            )
        })?;
        builder = builder.proxy(proxy.no_proxy(exceptions.clone()));
    }
    Ok(builder)
}

/// An address without the name and password that it may hold.
fn shown(address: &str) -> String {
    address.rsplit_once('@').map_or_else(|| address.to_owned(), |(_, host)| format!("…@{host}"))
}

fn redirects() -> Policy {
    Policy::custom(|attempt| {
        if attempt.previous().len() > REDIRECTS_MAX {
            return attempt.error(format!("more than {REDIRECTS_MAX} redirects"));
        }
        let (from, to) = (attempt.previous().last().map(|last| last.scheme()), attempt.url().scheme());
        if !matches!(to, "http" | "https") {
            let refusal = format!("a redirect to `{to}:`");
            return attempt.error(refusal);
        }
        if to != "https" && from == Some("https") {
            return attempt.error("a redirect from HTTPS to HTTP");
        }
        attempt.follow()
    })
}

/// Why a body could not be read.
pub(super) enum Bounded {
    Broken(reqwest::Error),
    Exceeded(usize),
}

/// Reads a body of at most `limit` bytes.
pub(super) async fn bounded(mut response: Response, limit: usize) -> Result<Vec<u8>, Bounded> {
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(Bounded::Broken)? {
        if bytes.len() + piece.len() > limit {
            return Err(Bounded::Exceeded(limit));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// A failure on the way to a registry, or back.
pub(super) fn failure(domain: &str, source: reqwest::Error) -> Failure {
    if source.is_redirect() {
        return Failure::Final(Error::because(
            Kind::Invalid,
            format!("registry `{domain}` redirects in a way that is not followed"),
            source.without_url(),
        ));
    }
    let passing = source.is_timeout() || !(source.is_connect() || source.is_builder());
    let error = unreachable(domain, source);
    if passing { Failure::Passing(error) } else { Failure::Final(error) }
}

pub(super) fn unreachable(domain: &str, source: reqwest::Error) -> Error {
    let text = if is_untrusted(&source) {
        format!(
            "registry `{domain}` has a certificate that is not trusted (its authority's belongs into the folder certs.d/{domain} as ca.crt)"
        )
    } else if causes(&source).any(|cause| cause.contains("InvalidContentType")) {
        format!(
            "registry `{domain}` answers without encryption (http: server gave HTTP response to HTTPS client): name it in insecure-registries if that is wanted"
        )
    } else {
        let what = if source.is_timeout() { "did not answer in time" } else { "cannot be reached" };
        format!("registry `{domain}` {what}")
    };
    Error::because(Kind::Unavailable, text, source.without_url())
}

/// Whether a server was refused for its certificate.
pub(super) fn is_untrusted(error: &reqwest::Error) -> bool {
    causes(error).any(|cause| cause.contains("invalid peer certificate"))
}

fn causes(error: &reqwest::Error) -> impl Iterator<Item = String> {
    let first: &dyn std::error::Error = error;
    std::iter::successors(Some(first), |error| error.source()).map(ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_passwords_of_proxies_are_not_shown() {
        let proxies =
            Proxies { https: Some("http://ana:marker@proxy:3128".to_owned()), ..Proxies::default() };
        let text = format!("{proxies:?}");
        assert!(text.contains("proxy:3128") && !text.contains("marker"), "{text}");
        let bad = Proxies { http: Some("http://ana:marker@:::".to_owned()), ..Proxies::default() };
        let error = Clients::new(bad).expect_err("no URL");
        assert!(!error.chain().contains("marker"), "{}", error.chain());
    }
}

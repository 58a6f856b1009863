//! Registries over HTTP (OCI distribution specification 1.1): manifests, tags and blobs in both directions, tokens, login, search.
//!
//! - `client`, `certificates`, `verifier`, `insecure`: how a registry is reached and trusted.
//! - `authority`, `challenge`: who we are to it.
//! - `repository`, `upload`: what is read and written there. `refusal`: when it says no, in dockerd's words.
//! - `login`, `search`: the two questions that concern no repository.
//!
//! Everything a registry says is bounded and checked: a manifest by size and digest, a blob by whoever reads it
//! ([`download`](crate::download)), redirects by number and scheme, every wait by a time limit.

mod authority;
mod certificates;
pub(crate) mod challenge;
mod client;
mod fetch;
mod insecure;
mod login;
mod refusal;
mod repository;
mod search;
mod upload;
mod verifier;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use reqwest::{Client, StatusCode, Url};

pub use client::Proxies;
pub(crate) use refusal::Failure;
pub(crate) use repository::{Fetched, Repository};
pub use search::SearchResult;
pub(crate) use upload::{Mount, Session};

use crate::{Credentials, Error, Kind, Reference, Result, download::blocking};
use authority::Authority;
use certificates::Certificates;
use client::{CONNECT_TIMEOUT, Clients, Trust};
use insecure::{Insecure, Listed};

/// For a small answer as a whole.
const SMALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Docker Hub's registry, which has another name than its images.
const DEFAULT_REGISTRY: &str = "registry-1.docker.io";

/// The way to every registry.
#[derive(Debug)]
pub(crate) struct Registries {
    insecure: Insecure,
    mirrors: Vec<Url>,
    certificates: Option<PathBuf>,
    clients: Clients,
    /// What an insecure registry turned out to speak.
    schemes: Mutex<HashMap<String, &'static str>>,
}

/// So that a repository can be shared by the downloads of a pull.
pub(crate) type SharedRepository = Arc<Repository>;

impl Registries {
    /// Fails when a network, a mirror or a proxy cannot be read.
    pub(crate) fn new(
        insecure: &[String],
        mirrors: &[String],
        certificates: Option<PathBuf>,
        proxies: Proxies,
    ) -> Result<Self> {
        Ok(Self {
            insecure: Insecure::new(insecure)?,
            mirrors: mirrors.iter().map(|mirror| mirror_url(mirror)).collect::<Result<_>>()?,
            certificates,
            clients: Clients::new(proxies)?,
            schemes: Mutex::default(),
        })
    }

    /// The places to ask for a repository: mirrors of Docker Hub first, then the registry itself. A mirror is not shown the
    /// registry's credentials.
    pub(crate) async fn to_pull(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Vec<Result<Repository>> {
        let mut found = Vec::new();
        let scope = format!("repository:{}:pull", reference.path());
        if reference.is_default_domain() {
            for mirror in &self.mirrors {
                found.push(self.mirror(mirror, reference, scope.clone()).await);
            }
        }
        found.push(self.open(registry_of(reference), reference, credentials.clone(), Some(scope)).await);
        found
    }

    /// The place to push to.
    pub(crate) async fn to_push(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<Repository> {
        let scope = format!("repository:{}:pull,push", reference.path());
        self.open(registry_of(reference), reference, credentials.clone(), Some(scope)).await
    }

    async fn mirror(&self, mirror: &Url, reference: &Reference, scope: String) -> Result<Repository> {
        let host = mirror.host_str().unwrap_or_default();
        let domain = mirror.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let (client, patient) = self.clients(&domain).await?;
        let base = format!("{}/v2/{}", mirror.as_str().trim_end_matches('/'), reference.path());
        Ok(Repository {
            authority: Authority::new(
                client.clone(),
                &domain,
                mirror.scheme() == "https",
                Credentials::Anonymous,
                Some(scope),
            ),
            client,
            patient,
            base,
            domain,
            reference: reference.clone(),
        })
    }

    /// Finds out how a registry is reached.
    async fn open(
        &self,
        domain: &str,
        reference: &Reference,
        credentials: Credentials,
        scope: Option<String>,
    ) -> Result<Repository> {
        let (client, patient) = self.clients(domain).await?;
        let scheme = match self.insecure.lists(domain).await {
            Listed::No => "https",
            _ => self.scheme(&client, domain).await?,
        };
        Ok(Repository {
            authority: Authority::new(client.clone(), domain, scheme == "https", credentials, scope),
            client,
            patient,
            base: format!("{scheme}://{domain}/v2/{}", reference.path()),
            domain: domain.to_owned(),
            reference: reference.clone(),
        })
    }

    /// The client for short requests to a registry, and the one for long bodies.
    async fn clients(&self, domain: &str) -> Result<(Client, Client)> {
        let certificates = match self.certificates.clone() {
            Some(folder) => {
                let domain = domain.to_owned();
                blocking(move || Certificates::read(&folder, &domain)).await?
            }
            None => Certificates::default(),
        };
        // Who gave a registry on this computer its own authority wants it checked.
        let checked = match self.insecure.lists(domain).await {
            Listed::No => true,
            Listed::ByNetwork => certificates.has_authorities(),
            Listed::ByName => false,
        };
        let trust = Trust { checked, local: insecure::is_local(domain), certificates };
        Ok((self.clients.client(&trust, false)?, self.clients.client(&trust, true)?))
    }

    /// HTTPS where an insecure registry speaks it, else HTTP; remembered as long as it is true.
    async fn scheme(&self, client: &Client, domain: &str) -> Result<&'static str> {
        let known = self.schemes.lock().unwrap_or_else(PoisonError::into_inner).get(domain).copied();
        let order = if known == Some("http") { ["http", "https"] } else { ["https", "http"] };
        let mut failure = None;
        for scheme in order {
            match client.get(format!("{scheme}://{domain}/v2/")).timeout(CONNECT_TIMEOUT).send().await {
                // So a server of TLS answers who does without.
                Ok(answer) if scheme == "http" && answer.status() == StatusCode::BAD_REQUEST => {}
                Ok(_) => {
                    self.schemes
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(domain.to_owned(), scheme);
                    return Ok(scheme);
                }
                // A certificate that was to be checked and is wrong is no reason to do without.
                Err(source) if client::is_untrusted(&source) => {
                    return Err(client::unreachable(domain, source));
                }
                Err(source) => failure = Some(source),
            }
        }
        self.schemes.lock().unwrap_or_else(PoisonError::into_inner).remove(domain);
        Err(failure.map_or_else(
            || Error::new(Kind::Internal, "there was no way to try"),
            |source| client::unreachable(domain, source),
        ))
    }
}

fn registry_of(reference: &Reference) -> &str {
    if reference.is_default_domain() { DEFAULT_REGISTRY } else { reference.domain() }
}

/// Checks a mirror as dockerd does.
fn mirror_url(text: &str) -> Result<Url> {
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let bad = |why: &str| {
        Error::invalid(format!(
            "invalid mirror: \"{}\" {why}",
            whole.rsplit_once('@').map_or(whole.as_str(), |(_, rest)| rest)
        ))
    };
    let url = Url::parse(&whole).map_err(|_| bad("is not a valid URI"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad("must use http:// or https://"));
    }
    if !url.has_host() {
        return Err(bad("names no host"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("has a query or fragment at its end"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("must not hold a name or a password"));
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_checked_at_the_start() {
        for good in [
            "http://127.0.0.1:5000",
            "https://mirror.example/",
            "mirror.example:5000",
            "https://m.example/hub",
        ] {
            mirror_url(good).expect(good);
        }
        for bad in [
            "ftp://m.example",
            "https://ana:secret@m.example",
            "https://m.example/?x=1",
            "https://m.example/#x",
            "http://",
        ] {
            let said = mirror_url(bad).expect_err(bad).to_string();
            assert!(said.starts_with("invalid mirror") && !said.contains("secret"), "{said}");
        }
    }
}

//! Checking credentials without using them for anything: what `docker login` asks for.

use reqwest::StatusCode;

use super::{DEFAULT_REGISTRY, Registries, SMALL_TIMEOUT, refusal::Failure, repository::Repository};
use crate::{Credentials, Error, Kind, Reference, Result, credentials::Secret};

impl Registries {
    /// Shows `credentials` to the registry at `address` (a name or a URL; empty for Docker Hub). Answers the token to use
    /// instead from now on, where the registry gave one.
    pub(crate) async fn login(&self, address: &str, credentials: &Credentials) -> Result<Option<Secret>> {
        let domain =
            address.strip_prefix("https://").or_else(|| address.strip_prefix("http://")).unwrap_or(address);
        let domain = match domain.split('/').next().unwrap_or(domain) {
            "" | "docker.io" | "index.docker.io" => DEFAULT_REGISTRY,
            domain => domain,
        };
        // Names follow the same grammar here as in front of an image.
        let reference: Reference =
            format!("{}/login", if domain == DEFAULT_REGISTRY { "docker.io" } else { domain })
                .parse()
                .ok()
                .filter(|reference: &Reference| reference.path() == "login" || domain == DEFAULT_REGISTRY)
                .ok_or_else(|| {
                    Error::invalid(format!("unable to parse server address: `{address}` names no registry"))
                })?;
        let repository = self.open(domain, &reference, credentials.clone(), None).await?;
        repository.login().await
    }
}

impl Repository {
    async fn login(&self) -> Result<Option<Secret>> {
        let mut url = self.base_url().map_err(|failure| self.push_error(failure))?;
        url.set_path("/v2/");
        let response = self.send(|| Ok(self.client.get(url.clone()).timeout(SMALL_TIMEOUT))).await;
        let response = response.map_err(|failure| match failure {
            Failure::Refused(refusal) => {
                Error::new(refusal.plainly().kind(), format!("Get \"{url}\": {}", refusal.text()))
            }
            other => self.push_error(other),
        })?;
        match response.status() {
            StatusCode::OK => Ok(self.authority.refresh_token().await),
            status => Err(Error::new(
                if status == StatusCode::UNAUTHORIZED { Kind::Unauthorized } else { Kind::Unavailable },
                format!("login attempt to {url} failed with status: {status}"),
            )),
        }
    }
}

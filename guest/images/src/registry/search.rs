//! Searching an index (the one thing that is left of the registry protocol's first version).

use reqwest::header::AUTHORIZATION;
use serde::{Deserialize, Serialize};

use super::{Registries, SMALL_TIMEOUT, client::bounded};
use crate::{Credentials, Error, Kind, Reference, Result, image::nullable};

const INDEX: &str = "index.docker.io";
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// One repository that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchResult {
    /// How many like it.
    #[serde(deserialize_with = "nullable")]
    pub star_count: i64,
    /// Whether it is one of Docker's own.
    #[serde(deserialize_with = "nullable")]
    pub is_official: bool,
    /// Its name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Always false: the index no longer knows.
    #[serde(deserialize_with = "nullable")]
    pub is_automated: bool,
    /// What it is, in its owner's words.
    #[serde(deserialize_with = "nullable")]
    pub description: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Found {
    #[serde(deserialize_with = "nullable")]
    results: Vec<SearchResult>,
}

impl Registries {
    /// Asks the index that `term` begins with (`registry.example:5000/word`), or Docker Hub's.
    pub(crate) async fn search(
        &self,
        term: &str,
        limit: u32,
        credentials: &Credentials,
    ) -> Result<Vec<SearchResult>> {
        if term.contains("://") {
            return Err(Error::invalid(format!(
                "invalid repository name: repository name ({term}) should not have a scheme"
            )));
        }
        let (domain, words) = match term.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
            _ => (INDEX, term),
        };
        let (domain, words) = match domain {
            INDEX | "docker.io" => (INDEX, words.strip_prefix("library/").unwrap_or(words)),
            other => (other, words),
        };
        let reference: Reference = format!("{domain}/search")
            .parse()
            .map_err(|_| Error::invalid(format!("invalid index name ({domain})")))?;
        let repository = self.open(domain, &reference, Credentials::Anonymous, None).await?;
        let mut url = repository.base_url().map_err(|failure| repository.push_error(failure))?;
        url.set_path("/v1/search");
        url.query_pairs_mut().append_pair("q", words).append_pair("n", &limit.to_string());
        let mut request = repository.client.get(url).timeout(SMALL_TIMEOUT);
        if let Credentials::Basic { username, password } = credentials
            && let Some(header) = super::authority::basic(username, password)
        {
            request = request.header(AUTHORIZATION, header);
        }
        let unreachable = |source: reqwest::Error| {
            Error::because(
                Kind::Unavailable,
                format!(
                    "the image index `{domain}` cannot be reached: images can be pulled by name from any registry that can"
                ),
                source.without_url(),
            )
        };
        let response = request.send().await.map_err(unreachable)?;
        if !response.status().is_success() {
            return Err(Error::new(
                Kind::Unavailable,
                format!(
                    "Unexpected status code {} from the image index `{domain}`",
                    response.status().as_u16()
                ),
            ));
        }
        let bytes = bounded(response, ANSWER_BYTES_MAX).await.map_err(|_| {
            Error::new(Kind::Unavailable, format!("the image index `{domain}` broke off, or answered with more than {ANSWER_BYTES_MAX} bytes"))
        })?;
        let found: Found = serde_json::from_slice(&bytes).map_err(|source| {
            Error::because(
                Kind::Unavailable,
                format!("error decoding registry search results of `{domain}`"),
                source,
            )
        })?;
        let plain = |result: SearchResult| SearchResult { is_automated: false, ..result };
        Ok(found.results.into_iter().map(plain).collect())
    }
}

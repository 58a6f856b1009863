//! Questions to registries: login, search, what a name stands for.

use guest_api::image::AuthConfig;
use guest_api::manifest::{Descriptor, OciPlatform};
use guest_api::registry::{AuthAnswer, DistributionInspect, SearchResult};
use guest_api::{ErrorKind, Filters};
use guest_images::{AnyReference, Platform};

use super::convert;
use super::service::ImagesService;
use super::transfer::credentials;
use crate::failure::Failure;

const SEARCH_LIMIT: i64 = 25;
const SEARCH_LIMIT_MAX: i64 = 100;

/// The query of a search.
#[derive(Clone, Debug, Default)]
pub struct SearchQuery {
    pub term: String,
    /// Results wanted; 0 means as many as usual.
    pub limit: Option<i64>,
    pub filters: Filters,
}

impl ImagesService {
    /// Checks credentials with their registry. They are not kept.
    pub async fn login(&self, auth: AuthConfig) -> Result<AuthAnswer, Failure> {
        let address = auth.serveraddress.clone();
        let token = self.images.login(&address, &credentials(auth)).await;
        let token = token.map_err(|error| convert::failure(&error))?;
        Ok(AuthAnswer {
            identity_token: token.map(|token| token.reveal().to_owned()).unwrap_or_default(),
            status: "Login Succeeded".to_owned(),
        })
    }

    /// Asks an index.
    pub async fn search(&self, query: &SearchQuery, auth: AuthConfig) -> Result<Vec<SearchResult>, Failure> {
        const KEYS: [&str; 3] = ["is-automated", "is-official", "stars"];
        if let Some(unknown) = query.filters.keys().find(|key| !KEYS.contains(key)) {
            return Err(Failure::invalid(format!("invalid filter '{unknown}'")));
        }
        let limit = match query.limit {
            None | Some(0) => SEARCH_LIMIT,
            Some(limit) => limit,
        };
        let limit =
            u32::try_from(limit).ok().filter(|limit| (1..=SEARCH_LIMIT_MAX).contains(&i64::from(*limit)));
        let limit = limit.ok_or_else(|| {
            let given = query.limit.unwrap_or_default();
            Failure::invalid(format!("limit {given} is outside the range of [1, {SEARCH_LIMIT_MAX}]"))
        })?;
        let official = truth(&query.filters, "is-official")?;
        let stars = least_stars(&query.filters)?;
        if truth(&query.filters, "is-automated")? == Some(true) {
            return Ok(Vec::new());
        }
        let found = self.images.search(&query.term, limit, &credentials(auth)).await;
        let found = found.map_err(|error| convert::failure(&error))?.into_iter().map(|result| SearchResult {
            star_count: result.star_count,
            is_official: result.is_official,
            name: result.name,
            is_automated: result.is_automated,
            description: result.description,
        });
        let wanted = |result: &SearchResult| {
            official.is_none_or(|official| official == result.is_official) && result.star_count >= stars
        };
        Ok(found.filter(wanted).collect())
    }

    /// What a name stands for at its registry.
    pub async fn inspect_remote(&self, name: &str, auth: AuthConfig) -> Result<DistributionInspect, Failure> {
        let reference =
            match AnyReference::parse(name).map_err(|error| Failure::invalid(error.to_string()))? {
                AnyReference::Named(reference) => reference,
                AnyReference::Id(_) => {
                    return Err(Failure::new(ErrorKind::Internal, "no manifest found for full image ID"));
                }
            };
        let found = self.images.remote(&reference, &credentials(auth)).await;
        let found = found.map_err(|error| convert::failure(&error))?;
        let platform = |platform: Platform| OciPlatform {
            architecture: platform.architecture,
            os: platform.os,
            variant: platform.variant,
            ..OciPlatform::default()
        };
        let platforms: Vec<OciPlatform> = found.platforms.into_iter().map(platform).collect();
        Ok(DistributionInspect {
            descriptor: Descriptor {
                media_type: found.media_type,
                digest: found.digest.to_string(),
                size: i64::try_from(found.size).unwrap_or(i64::MAX),
                ..Descriptor::default()
            },
            platforms: (!platforms.is_empty()).then_some(platforms),
        })
    }
}

/// A filter that is true or false; `None` when it is not there.
fn truth(filters: &Filters, key: &str) -> Result<Option<bool>, Failure> {
    let Some(values) = filters.get(key) else { return Ok(None) };
    let is = |wanted: &[&str]| values.iter().all(|value| wanted.contains(&value.as_str()));
    if values.is_empty() {
        Ok(None)
    } else if is(&["1", "true"]) {
        Ok(Some(true))
    } else if is(&["0", "false"]) {
        Ok(Some(false))
    } else {
        let given: Vec<&str> = values.iter().map(String::as_str).collect();
        Err(Failure::invalid(format!("invalid filter '{key}={}'", given.join(","))))
    }
}

fn least_stars(filters: &Filters) -> Result<i64, Failure> {
    let mut least = 0;
    for value in filters.get("stars").into_iter().flatten() {
        let stars: i64 =
            value.parse().map_err(|_| Failure::invalid(format!("invalid filter 'stars={value}'")))?;
        least = least.max(stars);
    }
    Ok(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_of_a_search_are_checked() {
        let filters = Filters::parse(r#"{"is-official":["true"],"stars":["3","10"]}"#).unwrap();
        assert_eq!(
            (truth(&filters, "is-official").unwrap(), truth(&filters, "is-automated").unwrap()),
            (Some(true), None)
        );
        assert_eq!(least_stars(&filters).unwrap(), 10);
        let wrong = Filters::parse(r#"{"is-official":["maybe"],"stars":["many"]}"#).unwrap();
        assert_eq!(truth(&wrong, "is-official").unwrap_err().message, "invalid filter 'is-official=maybe'");
        assert_eq!(least_stars(&wrong).unwrap_err().message, "invalid filter 'stars=many'");
    }
}

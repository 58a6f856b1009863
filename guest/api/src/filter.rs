//! The `filters` query parameter: `{"key":{"value":true}}` from Go clients, `{"key":["value"]}` from docker-py.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Filters by key. Values of one key are alternatives; keys all have to match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filters(BTreeMap<String, BTreeSet<String>>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Values {
    Map(BTreeMap<String, bool>),
    List(Vec<String>),
}

impl Filters {
    /// Reads the parameter; an empty text has no filters.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let raw: BTreeMap<String, Values> = serde_json::from_str(text)?;
        Ok(Self(
            raw.into_iter()
                .map(|(key, values)| {
                    let values = match values {
                        Values::Map(map) => {
                            map.into_iter().filter(|(_, on)| *on).map(|(value, _)| value).collect()
                        }
                        Values::List(list) => list.into_iter().collect(),
                    };
                    (key, values)
                })
                .collect(),
        ))
    }

    /// Writes the parameter as Go clients do.
    #[must_use]
    pub fn encode(&self) -> String {
        let map: BTreeMap<_, BTreeMap<_, bool>> = self
            .0
            .iter()
            .map(|(key, values)| (key, values.iter().map(|value| (value, true)).collect()))
            .collect();
        serde_json::to_string(&map).unwrap_or_default()
    }

    /// Adds an alternative for a key.
    pub fn add(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.0.entry(key.into()).or_default().insert(value.into());
    }

    /// Whether there is nothing to filter by.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The keys in use.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The alternatives of a key; `None` when the key is not used or has no value.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&BTreeSet<String>> {
        self.0.get(key).filter(|values| !values.is_empty())
    }

    /// Whether the key is unused or one of its values satisfies `matches`.
    pub fn allows(&self, key: &str, matches: impl Fn(&str) -> bool) -> bool {
        self.get(key).is_none_or(|values| values.iter().any(|value| matches(value)))
    }

    /// Whether every `label` / `key=value` filter is met by `labels`. Unlike other keys, labels all have to match.
    #[must_use]
    pub fn allows_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        self.get("label").is_none_or(|wanted| {
            wanted.iter().all(|filter| match filter.split_once('=') {
                Some((key, value)) => labels.get(key).is_some_and(|actual| actual == value),
                None => labels.contains_key(filter),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_mean_the_same() {
        let go = Filters::parse(r#"{"name":{"web":true,"off":false},"status":{"running":true}}"#).unwrap();
        let python = Filters::parse(r#"{"name":["web"],"status":["running"]}"#).unwrap();
        assert_eq!(go, python);
        assert!(Filters::parse("").unwrap().is_empty());
        assert!(Filters::parse("[]").is_err());
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut filters = Filters::default();
        filters.add("label", "a=b");
        filters.add("label", "c");
        assert_eq!(Filters::parse(&filters.encode()).unwrap(), filters);
    }

    #[test]
    fn labels_all_have_to_match_and_other_keys_any() {
        let filters = Filters::parse(r#"{"label":["a=1","b"],"name":["x","y"]}"#).unwrap();
        let labels =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        assert!(filters.allows_labels(&labels(&[("a", "1"), ("b", "")])));
        assert!(!filters.allows_labels(&labels(&[("a", "1")])));
        assert!(!filters.allows_labels(&labels(&[("a", "2"), ("b", "")])));
        assert!(filters.allows("name", |name| name == "y"));
        assert!(!filters.allows("name", |name| name == "z"));
        assert!(filters.allows("unused", |_| false));
    }
}

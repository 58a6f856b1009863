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
        self.get("label").is_none_or(|wanted| has_all(labels, wanted))
    }

    /// The same with `label!`, which a prune takes too: what has all of those is spared.
    #[must_use]
    pub fn prunes_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        self.allows_labels(labels) && self.get("label!").is_none_or(|spared| !has_all(labels, spared))
    }

    /// Refuses a key that is not among `known`.
    pub fn expect_keys(&self, known: &[&str]) -> Result<(), InvalidFilter> {
        match self.keys().find(|key| !known.contains(key)) {
            Some(key) => Err(InvalidFilter { key: key.to_owned(), values: None }),
            None => Ok(()),
        }
    }

    /// A key whose one value is a truth: `1`, `true`, `0` or `false`.
    pub fn boolean(&self, key: &str, default: bool) -> Result<bool, InvalidFilter> {
        let Some(values) = self.0.get(key) else { return Ok(default) };
        let has = |words: [&str; 2]| words.iter().any(|word| values.contains(*word));
        match (has(["1", "true"]), has(["0", "false"])) {
            (true, false) => Ok(true),
            (false, true) => Ok(false),
            _ if values.is_empty() => Err(InvalidFilter { key: key.to_owned(), values: None }),
            _ => Err(InvalidFilter { key: key.to_owned(), values: Some(values.iter().cloned().collect()) }),
        }
    }
}

/// Ports as the filters `publish` and `expose` name them: `80`, `8000-8080/udp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortFilter {
    first: u16,
    last: u16,
    protocol: String,
}

impl PortFilter {
    /// `None` for what names no port.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (numbers, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (first, last) = numbers.split_once('-').unwrap_or((numbers, numbers));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last && ["tcp", "udp", "sctp"].contains(&protocol)).then(|| Self {
            first,
            last,
            protocol: protocol.to_owned(),
        })
    }

    /// Whether this port is among them.
    #[must_use]
    pub fn has(&self, number: u16, protocol: &str) -> bool {
        (self.first..=self.last).contains(&number) && self.protocol == protocol
    }
}

fn has_all(labels: &BTreeMap<String, String>, wanted: &BTreeSet<String>) -> bool {
    wanted.iter().all(|filter| match filter.split_once('=') {
        Some((key, value)) => labels.get(key).is_some_and(|actual| actual == value),
        None => labels.contains_key(filter),
    })
}

/// A filter that cannot be, as dockerd says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidFilter {
    /// The key.
    pub key: String,
    /// Its values, when it is they that are wrong.
    pub values: Option<Vec<String>>,
}

impl std::fmt::Display for InvalidFilter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.values {
            None => write!(formatter, "invalid filter '{}'", self.key),
            Some(values) => write!(formatter, "invalid filter '{}=[{}]'", self.key, values.join(" ")),
        }
    }
}

impl std::error::Error for InvalidFilter {}

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
    fn ports_are_one_or_a_range() {
        let has =
            |text: &str, number: u16, protocol: &str| PortFilter::parse(text).unwrap().has(number, protocol);
        assert!(has("80", 80, "tcp") && !has("80", 80, "udp") && !has("80", 81, "tcp"));
        assert!(has("80-90/udp", 90, "udp") && !has("80-90/udp", 91, "udp"));
        for none in ["", "x", "80/", "90-80", "80-", "65536", "80/icmp"] {
            assert_eq!(PortFilter::parse(none), None, "{none}");
        }
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

    #[test]
    fn a_prune_spares_what_has_all_of_the_labels_named() {
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned())]);
        let prunes = |text: &str| Filters::parse(text).unwrap().prunes_labels(&labels);
        assert!(prunes("{}") && prunes(r#"{"label":["a=1"]}"#) && !prunes(r#"{"label":["b"]}"#));
        assert!(!prunes(r#"{"label!":["a"]}"#) && prunes(r#"{"label!":["a=2"]}"#));
        assert!(prunes(r#"{"label!":["a","b"]}"#));
    }

    #[test]
    fn truths_are_one_word_and_keys_are_known() {
        let filters = |text: &str| Filters::parse(text).unwrap();
        let boolean = |text: &str| filters(text).boolean("x", true).map_err(|error| error.to_string());
        assert_eq!(boolean("{}"), Ok(true));
        assert_eq!(boolean(r#"{"x":["false"]}"#), Ok(false));
        assert_eq!(boolean(r#"{"x":{"1":true}}"#), Ok(true));
        assert_eq!(boolean(r#"{"x":["0","1"]}"#), Err("invalid filter 'x=[0 1]'".to_owned()));
        assert_eq!(boolean(r#"{"x":["maybe"]}"#), Err("invalid filter 'x=[maybe]'".to_owned()));
        assert_eq!(boolean(r#"{"x":[]}"#), Err("invalid filter 'x'".to_owned()));
        assert!(filters(r#"{"x":["1"]}"#).expect_keys(&["x"]).is_ok());
        let error = filters(r#"{"x":["1"],"y":["1"]}"#).expect_keys(&["x"]).unwrap_err();
        assert_eq!(error.to_string(), "invalid filter 'y'");
    }
}

//! Which volumes filters let through, by dockerd's rules.

use guest_api::Filters;
use guest_api::volume::ANONYMOUS_LABEL;

use super::record::{DRIVER, VolumeRecord};
use crate::failure::Failure;

const LIST_KEYS: [&str; 4] = ["dangling", "driver", "label", "name"];
const PRUNE_KEYS: [&str; 3] = ["all", "label", "label!"];

fn check_keys(filters: &Filters, known: &[&str]) -> Result<(), Failure> {
    match filters.keys().find(|key| !known.contains(key)) {
        Some(unknown) => Err(Failure::invalid(format!("invalid filter '{unknown}'"))),
        None => Ok(()),
    }
}

fn values(filters: &Filters, key: &str) -> Vec<String> {
    filters.get(key).into_iter().flatten().cloned().collect()
}

/// A checked query of a listing.
pub struct Listing<'a> {
    filters: &'a Filters,
    /// Only those that nobody uses, or only those that somebody does.
    dangling: Option<bool>,
    names: Vec<regex::Regex>,
}

impl<'a> Listing<'a> {
    pub fn new(filters: &'a Filters) -> Result<Self, Failure> {
        check_keys(filters, &LIST_KEYS)?;
        let given = values(filters, "dangling");
        let has = |words: [&str; 2]| given.iter().any(|value| words.contains(&value.as_str()));
        let dangling = match (filters.get("dangling"), has(["1", "true"]), has(["0", "false"])) {
            (None, ..) => None,
            (_, true, false) => Some(true),
            (_, false, true) => Some(false),
            _ => return Err(Failure::invalid(format!("invalid filter 'dangling=[{}]'", given.join(" ")))),
        };
        // One that is no expression matches only a name that is the same.
        let names = values(filters, "name").iter().filter_map(|name| regex::Regex::new(name).ok()).collect();
        Ok(Self { filters, dangling, names })
    }

    pub fn shows(&self, record: &VolumeRecord, used: bool) -> bool {
        self.dangling.is_none_or(|dangling| dangling != used)
            && self.filters.allows("driver", |driver| driver == DRIVER)
            && (self.filters.allows("name", |name| name == record.name)
                || self.names.iter().any(|pattern| pattern.is_match(&record.name)))
            && self.filters.allows_labels(&record.labels.clone().unwrap_or_default())
    }
}

/// A checked query of a prune.
pub struct Pruning {
    filters: Filters,
    /// Named ones too.
    all: bool,
}

impl Pruning {
    /// `all`: older clients expect that named volumes go too.
    pub fn new(filters: &Filters, all: bool) -> Result<Self, Failure> {
        check_keys(filters, &PRUNE_KEYS)?;
        let given = values(filters, "all");
        let given = match given.as_slice() {
            [] => None,
            [one] => Some(match one.as_str() {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
                "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
                other => {
                    return Err(Failure::invalid(format!(
                        "invalid filter 'all': strconv.ParseBool: parsing {other:?}: invalid syntax"
                    )));
                }
            }),
            several => {
                return Err(Failure::invalid(format!(
                    "invalid filter 'all=[{}]': only one value is expected",
                    several.join(" ")
                )));
            }
        };
        Ok(Self { filters: filters.clone(), all: all || given == Some(true) })
    }

    pub fn takes(&self, record: &VolumeRecord) -> bool {
        let labels = record.labels.clone().unwrap_or_default();
        let unwanted = |filter: &String| match filter.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|actual| actual == value),
            None => labels.contains_key(filter),
        };
        !record.has_options()
            && (self.all || labels.contains_key(ANONYMOUS_LABEL))
            && self.filters.allows_labels(&labels)
            && !self.filters.get("label!").is_some_and(|filters| filters.iter().all(unwanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, labels: &[(&str, &str)]) -> VolumeRecord {
        VolumeRecord {
            name: name.to_owned(),
            created: "2026-01-02T03:04:05Z".parse().unwrap(),
            labels: Some(labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()),
            options: None,
            owner: None,
        }
    }

    fn listed(filters: &str) -> Result<Vec<String>, String> {
        let filters = Filters::parse(filters).unwrap();
        let query = Listing::new(&filters).map_err(|failure| failure.message)?;
        let all = [(record("data", &[("a", "1")]), true), (record("old-data", &[]), false)];
        Ok(all
            .iter()
            .filter(|(record, used)| query.shows(record, *used))
            .map(|(r, _)| r.name.clone())
            .collect())
    }

    #[test]
    fn listings_are_filtered() {
        let is =
            |filters: &str, expected: &[&str]| assert_eq!(listed(filters).unwrap(), expected, "{filters}");
        is("", &["data", "old-data"]);
        is(r#"{"name":["data"]}"#, &["data", "old-data"]);
        is(r#"{"name":["^data$"]}"#, &["data"]);
        is(r#"{"name":["old|nothing"]}"#, &["old-data"]);
        is(r#"{"name":["("]}"#, &[]);
        is(r#"{"dangling":["true"]}"#, &["old-data"]);
        is(r#"{"dangling":["0"]}"#, &["data"]);
        is(r#"{"label":["a=1"]}"#, &["data"]);
        is(r#"{"driver":["local"]}"#, &["data", "old-data"]);
        is(r#"{"driver":["nfs"]}"#, &[]);
    }

    #[test]
    fn wrong_filters_are_refused_with_dockerds_sentences() {
        assert_eq!(listed(r#"{"foo":["x"]}"#).unwrap_err(), "invalid filter 'foo'");
        assert_eq!(listed(r#"{"dangling":["maybe"]}"#).unwrap_err(), "invalid filter 'dangling=[maybe]'");
        assert!(listed(r#"{"dangling":["true","false"]}"#).is_err());
        let pruning = |filters: &str| {
            Pruning::new(&Filters::parse(filters).unwrap(), false)
                .map(|_| ())
                .map_err(|failure| failure.message)
        };
        assert_eq!(pruning(r#"{"dangling":["true"]}"#).unwrap_err(), "invalid filter 'dangling'");
        assert_eq!(
            pruning(r#"{"all":["x"]}"#).unwrap_err(),
            "invalid filter 'all': strconv.ParseBool: parsing \"x\": invalid syntax"
        );
        assert_eq!(
            pruning(r#"{"all":["0","1"]}"#).unwrap_err(),
            "invalid filter 'all=[0 1]': only one value is expected"
        );
    }

    #[test]
    fn only_anonymous_volumes_are_pruned_unless_asked() {
        let takes = |filters: &str, all: bool, record: &VolumeRecord| {
            Pruning::new(&Filters::parse(filters).unwrap(), all).unwrap().takes(record)
        };
        let named = record("named", &[("keep", "1")]);
        let anonymous = record("abc", &[(ANONYMOUS_LABEL, "")]);
        assert!(takes("", false, &anonymous) && !takes("", false, &named));
        assert!(takes("", true, &named) && takes(r#"{"all":["true"]}"#, false, &named));
        assert!(!takes(r#"{"all":["false"]}"#, false, &named));
        assert!(
            takes(r#"{"label":["keep"]}"#, true, &named) && !takes(r#"{"label":["keep=2"]}"#, true, &named)
        );
        assert!(!takes(r#"{"label!":["keep"]}"#, true, &named));
        assert!(takes(r#"{"label!":["keep=2"]}"#, true, &named));
        let mut mounted = anonymous;
        mounted.options = Some([("type".to_owned(), "tmpfs".to_owned())].into());
        assert!(!takes("", true, &mounted));
    }
}

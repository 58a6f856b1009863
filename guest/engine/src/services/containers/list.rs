//! `ps`: which containers, and what is shown of each.

use guest_api::container::{HostConfigSummary, MountPoint, NetworkSettingsSummary};
use guest_api::filter::PortFilter;
use guest_api::health::HealthStatus;
use guest_api::{ContainerSummary, Filters};
use jiff::Timestamp;
use regex::Regex;

use super::record::{Record, View};
use super::status::status;
use super::table::Phase;
use crate::failure::Failure;
use crate::services::networks::Networks;

/// The query of a listing.
#[derive(Clone, Debug, Default)]
pub struct ListQuery {
    pub all: bool,
    /// Only so many newest ones, running or not.
    pub limit: Option<usize>,
    pub filters: Filters,
}

const KEYS: [&str; 16] = [
    "ancestor",
    "before",
    "exited",
    "expose",
    "health",
    "id",
    "is-task",
    "isolation",
    "label",
    "name",
    "network",
    "publish",
    "since",
    "status",
    "volume",
    "removing",
];

/// The ports that a filter names.
pub fn ports(filters: &Filters, key: &str) -> Result<Vec<PortFilter>, Failure> {
    let parse = |text: &String| {
        PortFilter::parse(text)
            .ok_or_else(|| Failure::invalid(format!("error while looking up for {key} {text}: invalid port")))
    };
    filters.get(key).into_iter().flatten().map(parse).collect()
}

/// The containers to show, newest first. `ancestor` tells whether a container's image is, or stands on, the image
/// named.
pub fn select(
    mut views: Vec<View>,
    query: &ListQuery,
    ancestor: impl Fn(&Record, &str) -> bool,
) -> Result<Vec<View>, Failure> {
    let filters = &query.filters;
    if let Some(unknown) = filters.keys().find(|key| !KEYS.contains(key)) {
        return Err(Failure::invalid(format!("invalid filter '{unknown}'")));
    }
    for state in filters.get("status").into_iter().flatten() {
        if !["created", "running", "paused", "restarting", "removing", "exited", "dead"]
            .contains(&state.as_str())
        {
            return Err(Failure::invalid(format!("invalid filter 'status={state}'")));
        }
    }
    for status in filters.get("health").into_iter().flatten() {
        if HealthStatus::parse(status).is_none() {
            return Err(Failure::invalid(format!(
                "invalid filter 'health={status}': invalid value for health ({status}): must be one of none, starting, \
                 healthy, unhealthy"
            )));
        }
    }
    for code in filters.get("exited").into_iter().flatten() {
        if code.parse::<i32>().is_err() {
            return Err(Failure::invalid(format!("invalid filter 'exited={code}'")));
        }
    }
    let tasks = filters.boolean("is-task", false).map_err(|error| Failure::invalid(error.to_string()))?;
    let exposed = ports(filters, "expose")?;
    views.sort_by(|a, b| b.record.created.cmp(&a.record.created).then_with(|| a.record.id.cmp(&b.record.id)));
    let created_of = |wanted: &str| {
        let bare = wanted.trim_start_matches('/');
        let by_name = views.iter().find(|view| view.record.name == bare);
        by_name
            .or_else(|| views.iter().find(|view| view.record.id.starts_with(bare)))
            .map(|view| view.record.created)
            .ok_or_else(|| Failure::not_found(guest_api::error::no_such_container(wanted)))
    };
    let bound = |key: &str| -> Result<Option<Timestamp>, Failure> {
        filters.get(key).and_then(|values| values.iter().next()).map(|wanted| created_of(wanted)).transpose()
    };
    let (before, since) = (bound("before")?, bound("since")?);
    let everything = query.all
        || query.limit.is_some()
        || before.is_some()
        || since.is_some()
        || filters.get("status").is_some()
        || filters.get("exited").is_some();
    let shown = |view: &View| {
        let record = &view.record;
        (everything || view.phase.is_live() || view.phase == Phase::Restarting)
            && before.is_none_or(|before| record.created < before)
            && since.is_none_or(|since| record.created > since)
            && filters.allows("id", |id| record.id.starts_with(id))
            && filters.allows("name", |name| name_matches(&record.name, name))
            && filters.allows("status", |state| state == view.phase.word())
            && filters.allows("exited", |code| {
                view.phase == Phase::Exited && code == record.last.exit_code.to_string()
            })
            && filters.allows("ancestor", |image| ancestor(record, image))
            && filters.allows("volume", |volume| record.mounts.iter().any(|mount| mount.is_called(volume)))
            && (exposed.is_empty() || exposes_any(record, &exposed))
            // No container is.
            && !tasks
            && filters.allows("health", |wanted| {
                let health = record.last.health.as_ref().map_or(HealthStatus::None, |health| health.status);
                HealthStatus::parse(wanted) == Some(health)
            })
            && filters.allows_labels(&record.config.labels)
    };
    let mut chosen: Vec<View> = views.iter().filter(|view| shown(view)).cloned().collect();
    if let Some(limit) = query.limit {
        chosen.truncate(limit);
    }
    Ok(chosen)
}

fn exposes_any(record: &Record, wanted: &[PortFilter]) -> bool {
    record.config.exposed_ports.iter().flatten().any(|(port, _)| {
        let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
        number.parse().is_ok_and(|number| wanted.iter().any(|wanted| wanted.has(number, protocol)))
    })
}

/// Docker takes a regular expression, of the name with its slash or without; one that is none has to be the name.
fn name_matches(name: &str, pattern: &str) -> bool {
    match Regex::new(pattern) {
        Ok(pattern) => pattern.is_match(name) || pattern.is_match(&format!("/{name}")),
        Err(_) => name == pattern,
    }
}

/// One line.
pub fn summary(view: &View, networks: &Networks, now: Timestamp) -> ContainerSummary {
    let record = &view.record;
    ContainerSummary {
        id: record.id.clone(),
        names: vec![format!("/{}", record.name)],
        image: record.config.image.clone(),
        image_id: record.image_id.clone(),
        command: shown(&record.command()),
        created: record.created.as_second(),
        ports: networks.port_summaries(view),
        size_rw: None,
        size_root_fs: None,
        labels: record.config.labels.clone(),
        state: view.phase.word().to_owned(),
        status: status(view, now),
        host_config: HostConfigSummary { network_mode: record.host.network_mode.clone() },
        network_settings: NetworkSettingsSummary { networks: networks.endpoints(view) },
        mounts: mounts(record),
    }
}

/// What is mounted into it.
pub fn mounts(record: &Record) -> Vec<MountPoint> {
    record.mounts.iter().map(super::mounts::MountPoint::shown).collect()
}

/// A command as one text: arguments with spaces in them are quoted, the program never.
fn shown(command: &[impl AsRef<str>]) -> String {
    let quoted = command.iter().enumerate().map(|(at, word)| match word.as_ref() {
        word if at > 0 && word.contains(' ') => format!("'{word}'"),
        word => word.to_owned(),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::record::tests::record;
    use super::*;

    fn view(name: &str, second: i64, phase: Phase, exit_code: i32) -> View {
        let mut record = record();
        record.name = name.to_owned();
        record.id = format!("{name:x<64}");
        record.created = Timestamp::from_second(second).unwrap();
        record.last.exit_code = exit_code;
        record.config.labels.insert("tier".into(), name.into());
        View { record: Arc::new(record), phase, live: None, runs_ended: 0, removed: false }
    }

    fn names(filters: &str, all: bool, limit: Option<usize>) -> Vec<String> {
        let views = vec![
            view("web", 1, Phase::Running, 0),
            view("db", 3, Phase::Exited, 7),
            view("webcache", 2, Phase::Paused, 0),
        ];
        let query = ListQuery { all, limit, filters: Filters::parse(filters).unwrap() };
        let chosen = select(views, &query, |record, image| record.config.image == image).unwrap();
        chosen.iter().map(|view| view.record.name.clone()).collect()
    }

    #[test]
    fn arguments_with_spaces_are_quoted() {
        assert_eq!(shown(&["sh", "-c", "echo a"]), "sh -c 'echo a'");
        assert_eq!(shown(&["a b"]), "a b");
    }

    #[test]
    fn newest_first_and_only_live_ones_unless_asked() {
        assert_eq!(names("", false, None), ["webcache", "web"]);
        assert_eq!(names("", true, None), ["db", "webcache", "web"]);
        assert_eq!(names("", false, Some(1)), ["db"]);
    }

    #[test]
    fn filters_select() {
        assert_eq!(names(r#"{"status":["exited"]}"#, false, None), ["db"]);
        assert_eq!(names(r#"{"exited":["7"]}"#, false, None), ["db"]);
        assert_eq!(names(r#"{"exited":["1"]}"#, false, None), [""; 0]);
        assert_eq!(names(r#"{"name":["web"]}"#, true, None), ["webcache", "web"]);
        assert_eq!(names(r#"{"name":["^/web$"]}"#, true, None), ["web"]);
        assert_eq!(names(r#"{"name":["^(db|web)$"]}"#, true, None), ["db", "web"]);
        assert_eq!(names(r#"{"label":["tier=db"]}"#, true, None), ["db"]);
        assert_eq!(names(r#"{"before":["webcache"]}"#, false, None), ["web"]);
        assert_eq!(names(r#"{"since":["web"]}"#, false, None), ["db", "webcache"]);
        assert_eq!(names(r#"{"ancestor":["busybox"]}"#, false, None), ["webcache", "web"]);
        assert_eq!(names(r#"{"id":["dbx"]}"#, true, None), ["db"]);
    }

    #[test]
    fn unknown_filters_and_values_are_refused() {
        let refusal = |filters: &str| {
            let query = ListQuery { filters: Filters::parse(filters).unwrap(), ..ListQuery::default() };
            select(Vec::new(), &query, |_, _| false).err().unwrap().message
        };
        assert_eq!(refusal(r#"{"colour":["red"]}"#), "invalid filter 'colour'");
        assert_eq!(refusal(r#"{"status":["tired"]}"#), "invalid filter 'status=tired'");
        assert_eq!(refusal(r#"{"before":["ghost"]}"#), "No such container: ghost");
        assert_eq!(refusal(r#"{"is-task":["x"]}"#), "invalid filter 'is-task=[x]'");
        assert_eq!(refusal(r#"{"expose":["x"]}"#), "error while looking up for expose x: invalid port");
    }
}

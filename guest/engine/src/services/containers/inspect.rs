//! `inspect`: everything about one container.

use guest_api::container::{GraphDriver, State};
use guest_api::{ContainerInspect, HostConfig};
use jiff::Timestamp;

use super::list::mounts;
use super::logging;
use super::network;
use super::record::View;
use super::run::Context;
use super::spec;
use super::table::Phase;

/// Go's zero time: what dockerd shows for "never".
pub const NEVER: &str = "0001-01-01T00:00:00Z";

/// Everything about the container. `execs`: ids of the processes run in it.
pub fn inspect(context: &Context, view: &View, execs: Vec<String>) -> ContainerInspect {
    let record = &view.record;
    let mut command = record.command();
    let path = if command.is_empty() { String::new() } else { command.remove(0) };
    let data = context.data_folder(&record.id);
    let file = |name: &str| {
        // dockerd shows them once the container has been started.
        if record.last.started_at.is_some() { data.join(name).display().to_string() } else { String::new() }
    };
    let logs = record.host.log_config.kind == "json-file" && record.last.started_at.is_some();
    ContainerInspect {
        id: record.id.clone(),
        created: format!("{:.9}", record.created),
        path,
        args: command,
        state: state(view),
        image: record.image_id.clone(),
        resolv_conf_path: file("resolv.conf"),
        hostname_path: file("hostname"),
        hosts_path: file("hosts"),
        log_path: if logs {
            logging::json_path(&data, &record.id).display().to_string()
        } else {
            String::new()
        },
        name: format!("/{}", record.name),
        restart_count: i64::from(record.restarts),
        driver: "overlay2".to_owned(),
        platform: "linux".to_owned(),
        exec_ids: Some(execs).filter(|execs| !execs.is_empty()),
        app_armor_profile: spec::security(&record.host).map(|security| security.apparmor).unwrap_or_default(),
        host_config: HostConfig {
            links: network::shown_links(&context.index, record),
            ..record.host.clone()
        },
        graph_driver: GraphDriver { data: graph_data(context, view), name: "overlay2".to_owned() },
        mounts: mounts(record),
        config: record.config.clone(),
        network_settings: context.networks.settings(view),
        ..ContainerInspect::default()
    }
}

fn graph_data(context: &Context, view: &View) -> Option<std::collections::BTreeMap<String, String>> {
    let mounts = context.images.snapshotter().mounts(&view.record.id).ok()?;
    let lower: Vec<String> = mounts.lower.iter().map(|path| path.display().to_string()).collect();
    let pairs = [
        ("LowerDir", lower.join(":")),
        ("MergedDir", context.rootfs(&view.record.id).display().to_string()),
        ("UpperDir", mounts.upper.display().to_string()),
        ("WorkDir", mounts.work.display().to_string()),
    ];
    Some(pairs.map(|(key, value)| (key.to_owned(), value)).into())
}

fn state(view: &View) -> State {
    let last = &view.record.last;
    let time = |at: Option<Timestamp>| at.map_or_else(|| NEVER.to_owned(), |at| format!("{at:.9}"));
    let restarting = view.phase == Phase::Restarting;
    State {
        status: view.phase.word().to_owned(),
        running: view.phase.is_live() || restarting,
        paused: view.phase == Phase::Paused,
        restarting,
        oom_killed: last.oom_killed,
        dead: view.phase == Phase::Dead,
        pid: view.live.as_ref().map_or(0, |live| i64::from(live.pid)),
        exit_code: if view.live.is_some() { 0 } else { i64::from(last.exit_code) },
        error: last.error.clone(),
        started_at: time(view.live.as_ref().map(|live| live.started_at).or(last.started_at)),
        finished_at: time(last.finished_at),
        health: last.health.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::record::{Live, tests::record};
    use super::*;

    #[test]
    fn a_state_is_told_as_dockerds() {
        let mut record = record();
        record.last.exit_code = 7;
        let mut view = View {
            record: Arc::new(record),
            phase: Phase::Created,
            live: None,
            runs_ended: 0,
            removed: false,
        };
        let created = state(&view);
        assert_eq!((created.status.as_str(), created.started_at.as_str()), ("created", NEVER));
        let started_at = "2026-01-02T03:04:05.6Z".parse().unwrap();
        view.phase = Phase::Paused;
        view.live = Some(Live { pid: 42, started_at });
        let paused = state(&view);
        assert!(paused.running && paused.paused);
        assert_eq!((paused.pid, paused.exit_code), (42, 0));
        assert_eq!(paused.started_at, "2026-01-02T03:04:05.600000000Z");
        view.phase = Phase::Restarting;
        view.live = None;
        let restarting = state(&view);
        assert!(restarting.running && restarting.restarting);
        assert_eq!(restarting.exit_code, 7);
    }
}

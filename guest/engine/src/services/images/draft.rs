//! The configuration of an image that is made from a container, by dockerd's rules.

use guest_api::ContainerConfig;
use guest_images::{Config, Healthcheck};

/// What of a container's settings an image remembers.
pub fn image_config(config: &ContainerConfig) -> Config {
    let keys = |set: &Option<guest_api::KeySet>| {
        set.iter().flatten().map(|(key, _)| (key.clone(), serde_json::json!({}))).collect()
    };
    Config {
        user: config.user.clone(),
        exposed_ports: keys(&config.exposed_ports),
        env: config.env.clone().unwrap_or_default(),
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        args_escaped: config.args_escaped,
        volumes: keys(&config.volumes),
        working_dir: config.working_dir.clone(),
        labels: config.labels.clone(),
        stop_signal: config.stop_signal.clone(),
        stop_timeout: config.stop_timeout,
        on_build: config.on_build.clone().unwrap_or_default(),
        shell: config.shell.clone().unwrap_or_default(),
        healthcheck: config.healthcheck.as_ref().map(|check| Healthcheck {
            test: check.test.clone().unwrap_or_default(),
            interval: check.interval,
            timeout: check.timeout,
            start_period: check.start_period,
            start_interval: check.start_interval,
            retries: check.retries,
        }),
    }
}

/// Fills what `wanted` leaves open from the container it is made from.
pub fn merge(wanted: &mut Config, container: &Config) {
    let text = |wanted: &mut String, other: &String| {
        if wanted.is_empty() {
            wanted.clone_from(other);
        }
    };
    text(&mut wanted.user, &container.user);
    text(&mut wanted.working_dir, &container.working_dir);
    text(&mut wanted.stop_signal, &container.stop_signal);
    for (port, value) in &container.exposed_ports {
        wanted.exposed_ports.entry(port.clone()).or_insert_with(|| value.clone());
    }
    for (volume, value) in &container.volumes {
        wanted.volumes.entry(volume.clone()).or_insert_with(|| value.clone());
    }
    for (label, value) in &container.labels {
        wanted.labels.entry(label.clone()).or_insert_with(|| value.clone());
    }
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    for entry in &container.env {
        if !wanted.env.iter().any(|known| name(known) == name(entry)) {
            wanted.env.push(entry.clone());
        }
    }
    let is_empty = |words: &Option<Vec<String>>| words.as_ref().is_none_or(Vec::is_empty);
    if is_empty(&wanted.entrypoint) {
        if is_empty(&wanted.cmd) {
            wanted.cmd.clone_from(&container.cmd);
        }
        if wanted.entrypoint.is_none() {
            wanted.entrypoint.clone_from(&container.entrypoint);
        }
    }
    match (&mut wanted.healthcheck, &container.healthcheck) {
        (wanted @ None, theirs) => wanted.clone_from(theirs),
        (Some(wanted), Some(theirs)) => {
            if wanted.test.is_empty() {
                wanted.test.clone_from(&theirs.test);
            }
            let number = |wanted: &mut i64, other: i64| {
                if *wanted == 0 {
                    *wanted = other;
                }
            };
            number(&mut wanted.interval, theirs.interval);
            number(&mut wanted.timeout, theirs.timeout);
            number(&mut wanted.start_period, theirs.start_period);
            number(&mut wanted.start_interval, theirs.start_interval);
            number(&mut wanted.retries, theirs.retries);
        }
        (Some(_), None) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Option<Vec<String>> {
        Some(words.iter().map(|word| (*word).to_owned()).collect())
    }

    #[test]
    fn what_is_left_open_comes_from_the_container() {
        let container = Config {
            user: "app".into(),
            env: vec!["A=1".into(), "B=2".into()],
            cmd: words(&["run"]),
            entrypoint: words(&["/init"]),
            labels: [("x".to_owned(), "old".to_owned())].into(),
            ..Config::default()
        };
        let mut wanted = Config { env: vec!["A=9".into()], ..Config::default() };
        merge(&mut wanted, &container);
        assert_eq!(wanted.env, ["A=9", "B=2"]);
        assert_eq!((wanted.cmd, wanted.entrypoint), (words(&["run"]), words(&["/init"])));
        assert_eq!((wanted.user.as_str(), wanted.labels["x"].as_str()), ("app", "old"));

        let mut wanted = Config { entrypoint: words(&["new"]), ..Config::default() };
        merge(&mut wanted, &container);
        assert_eq!(
            (wanted.cmd, wanted.entrypoint),
            (None, words(&["new"])),
            "another entry point, no command"
        );
    }
}

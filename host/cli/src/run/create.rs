//! What `engine run` means: `RawRunArgs` → `ContainerCreate`. Pure; the environment is passed in.

use super::raw::RawRunArgs;
use super::{publish, volume};
use anyhow::{Context, Result, bail};
use guest_api::container::RestartPolicy;
use guest_api::container::{DeviceMapping, LogConfig, Ulimit};
use guest_api::network::{EndpointIpam, EndpointSettings, NetworkingConfig};
use guest_api::{ContainerConfig, ContainerCreate, EmptyObject, HostConfig, KeySet};
use std::collections::BTreeMap;

/// The create body for `args`. `environment` looks up the caller's own variables, for `-e NAME`.
pub(crate) fn container_create(
    args: &RawRunArgs,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<ContainerCreate> {
    if args.image().starts_with('-') {
        bail!("unknown flag: {}", args.image());
    }
    let attach = !args.detach;
    let mut env = Vec::new();
    for file in &args.env_file {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the environment file `{}`", file.display()))?;
        env.extend(env_file(&text, &environment)?);
    }
    for variable in &args.env {
        env.extend(env_variable(variable, &environment)?);
    }
    let port_bindings = publish::bindings(&args.publish)?;
    let mut exposed: KeySet =
        port_bindings.keys().map(|port| (port.clone(), EmptyObject::default())).collect();
    for text in &args.expose {
        exposed.extend(publish::exposed(text)?.into_iter().map(|port| (port, EmptyObject::default())));
    }
    let folder = std::env::current_dir().context("cannot tell the current folder")?;
    let volumes = volume::volumes(&args.volume, &folder)?;
    let config = ContainerConfig {
        exposed_ports: (!exposed.is_empty()).then_some(exposed),
        volumes: (!volumes.anonymous.is_empty()).then_some(volumes.anonymous),
        hostname: args.hostname.clone(),
        user: args.user.clone(),
        attach_stdin: attach && args.interactive,
        attach_stdout: attach,
        attach_stderr: attach,
        tty: args.tty,
        open_stdin: args.interactive,
        stdin_once: attach && args.interactive,
        env: Some(env),
        cmd: (!args.command().is_empty()).then(|| args.command().to_vec()),
        image: args.image().to_owned(),
        working_dir: args.workdir.clone(),
        entrypoint: args.entrypoint.as_ref().map(|program| vec![program.clone()]),
        labels: args.label.iter().map(|label| key_value(label)).collect(),
        stop_signal: args.stop_signal.clone().unwrap_or_default(),
        stop_timeout: args.stop_timeout,
        ..ContainerConfig::default()
    };
    let network = args.network.clone().unwrap_or_else(|| "default".into());
    let host_config = HostConfig {
        network_mode: network.clone(),
        restart_policy: restart_policy(&args.restart)?,
        auto_remove: args.rm,
        cap_add: list(&args.cap_add),
        cap_drop: list(&args.cap_drop),
        dns: list(&args.dns),
        dns_search: list(&args.dns_search),
        extra_hosts: list(&args.add_host),
        binds: list(&volumes.binds),
        volumes_from: list(&args.volumes_from),
        port_bindings: Some(port_bindings),
        publish_all_ports: args.publish_all,
        links: list(&args.link),
        group_add: list(&args.group_add),
        init: args.init.then_some(true),
        ipc_mode: args.ipc.clone().unwrap_or_default(),
        runtime: args.runtime.clone().unwrap_or_default(),
        shm_size: args.shm_size.as_deref().map(memory_bytes).transpose()?.unwrap_or(0),
        sysctls: (!args.sysctl.is_empty()).then(|| args.sysctl.iter().map(|text| key_value(text)).collect()),
        ulimits: (!args.ulimit.is_empty())
            .then(|| args.ulimit.iter().map(|text| ulimit(text)).collect::<Result<_>>())
            .transpose()?,
        devices: (!args.device.is_empty()).then(|| args.device.iter().map(|text| device(text)).collect()),
        log_config: LogConfig {
            kind: args.log_driver.clone().unwrap_or_default(),
            config: args.log_opt.iter().map(|text| key_value(text)).collect(),
        },
        pid_mode: args.pid.clone().unwrap_or_default(),
        privileged: args.privileged,
        readonly_rootfs: args.read_only,
        security_opt: list(&args.security_opt),
        tmpfs: (!args.tmpfs.is_empty()).then(|| args.tmpfs.iter().map(|mount| path_options(mount)).collect()),
        memory: args.memory.as_deref().map(memory_bytes).transpose()?.unwrap_or(0),
        nano_cpus: args.cpus.as_deref().map(nano_cpus).transpose()?.unwrap_or(0),
        pids_limit: args.pids_limit,
        memory_swappiness: Some(-1),
        ..HostConfig::default()
    };
    if args.rm && !host_config.restart_policy.name.is_empty() && host_config.restart_policy.name != "no" {
        bail!("conflicting options: cannot specify both --restart and --rm");
    }
    let address = EndpointIpam {
        ipv4_address: args.ip.clone().unwrap_or_default(),
        ipv6_address: args.ip6.clone().unwrap_or_default(),
        ..EndpointIpam::default()
    };
    let endpoint = EndpointSettings {
        ipam_config: (address != EndpointIpam::default()).then_some(address),
        aliases: list(&args.network_alias),
        links: list(&args.link),
        mac_address: args.mac_address.clone().unwrap_or_default(),
        ..EndpointSettings::default()
    };
    let networking_config = NetworkingConfig { endpoints_config: BTreeMap::from([(network, endpoint)]) };
    Ok(ContainerCreate { config, host_config, networking_config })
}

fn list(values: &[String]) -> Option<Vec<String>> {
    (!values.is_empty()).then(|| values.to_vec())
}

fn key_value(text: &str) -> (String, String) {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    (key.to_owned(), value.to_owned())
}

fn path_options(text: &str) -> (String, String) {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    (path.to_owned(), options.to_owned())
}

/// `nofile=1024` or `nofile=1024:2048`.
fn ulimit(text: &str) -> Result<Ulimit> {
    let invalid = || format!("invalid ulimit `{text}`: use NAME=SOFT[:HARD]");
    let (name, limits) = text.split_once('=').with_context(invalid)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let soft = soft.parse().ok().with_context(invalid)?;
    let hard = hard.parse().ok().with_context(invalid)?;
    Ok(Ulimit { name: name.to_owned(), soft, hard })
}

/// `/dev/a`, `/dev/a:/dev/b`, `/dev/a:rw` or all three.
fn device(text: &str) -> DeviceMapping {
    let mut parts = text.split(':');
    let on_host = parts.next().unwrap_or_default().to_owned();
    let is_mode = |part: &str| !part.is_empty() && part.chars().all(|letter| "rwm".contains(letter));
    let (mut inside, mut permissions) = (on_host.clone(), "rwm".to_owned());
    match (parts.next(), parts.next()) {
        (Some(mode), None) if is_mode(mode) => mode.clone_into(&mut permissions),
        (Some(path), mode) => {
            path.clone_into(&mut inside);
            mode.unwrap_or("rwm").clone_into(&mut permissions);
        }
        (None, _) => {}
    }
    DeviceMapping { path_on_host: on_host, path_in_container: inside, cgroup_permissions: permissions }
}

/// `NAME=value` as it is; `NAME` alone takes the caller's value, and nothing when the caller has none.
fn env_variable(text: &str, environment: impl Fn(&str) -> Option<String>) -> Result<Option<String>> {
    match text.split_once('=') {
        Some(("", _)) => bail!("invalid environment variable: {text}"),
        Some(_) => Ok(Some(text.to_owned())),
        None if text.is_empty() => bail!("invalid environment variable: it is empty"),
        None => Ok(environment(text).map(|value| format!("{text}={value}"))),
    }
}

/// One variable a line; blank lines and lines that begin with `#` do not count.
fn env_file(text: &str, environment: impl Fn(&str) -> Option<String>) -> Result<Vec<String>> {
    let mut variables = Vec::new();
    for line in text.lines().map(str::trim_start) {
        if !line.is_empty() && !line.starts_with('#') {
            variables.extend(env_variable(line, &environment)?);
        }
    }
    Ok(variables)
}

fn restart_policy(text: &str) -> Result<RestartPolicy> {
    let (name, count) = match text.split_once(':') {
        Some((name, count)) => {
            let count = count.parse().ok().filter(|count| *count >= 0);
            (
                name,
                count.with_context(|| {
                    format!("invalid restart policy format: `{text}` has no valid retry count")
                })?,
            )
        }
        None => (text, 0),
    };
    match name {
        "no" | "always" | "unless-stopped" if count > 0 => {
            bail!("invalid restart policy: maximum retry count can only be used with `on-failure`")
        }
        "no" | "always" | "unless-stopped" | "on-failure" => {
            Ok(RestartPolicy { name: name.to_owned(), maximum_retry_count: count })
        }
        _ => bail!(
            "invalid restart policy: unknown policy `{name}`; use no, on-failure[:COUNT], always or unless-stopped"
        ),
    }
}

/// `512m`, `1g`, `1.5GiB`, `1024`: powers of 1024, as Docker reads sizes of memory.
pub(crate) fn memory_bytes(text: &str) -> Result<i64> {
    let invalid = || format!("invalid size: `{text}`: use a number with b, k, m or g");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: f64 =
        digits.trim().parse().ok().filter(|number: &f64| *number >= 0.0).with_context(invalid)?;
    let shift = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => bail!(invalid()),
    };
    let bytes = number * f64::from(2u32).powi(shift);
    if bytes >= 9e18 {
        bail!(invalid());
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "bounded above, and fractions of a byte do not count"
    )]
    Ok(bytes as i64)
}

fn nano_cpus(text: &str) -> Result<i64> {
    let cpus: f64 = text
        .parse()
        .ok()
        .filter(|cpus: &f64| (0.0..1e6).contains(cpus))
        .with_context(|| format!("invalid number of CPUs: `{text}`"))?;
    #[expect(clippy::cast_possible_truncation, reason = "bounded above; billionths are the unit")]
    Ok((cpus * 1e9).round() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(change: impl FnOnce(&mut RawRunArgs)) -> RawRunArgs {
        let mut args =
            RawRunArgs { words: vec!["debian".into()], restart: "no".into(), ..RawRunArgs::default() };
        change(&mut args);
        args
    }

    fn create(change: impl FnOnce(&mut RawRunArgs)) -> ContainerCreate {
        container_create(&args(change), |name| (name == "HOME").then(|| "/home/ana".into())).unwrap()
    }

    #[test]
    fn attaching_follows_detach_and_interactive() {
        let config = create(|args| args.interactive = true).config;
        assert!(config.attach_stdin && config.attach_stdout && config.stdin_once && config.open_stdin);
        let config = create(|args| (args.interactive, args.detach) = (true, true)).config;
        assert!(!config.attach_stdin && !config.attach_stdout && !config.stdin_once && config.open_stdin);
    }

    #[test]
    fn a_variable_without_a_value_takes_the_callers() {
        let env = create(|args| args.env = vec!["A=b=c".into(), "HOME".into(), "NOT_SET".into()]).config.env;
        assert_eq!(env, Some(vec!["A=b=c".into(), "HOME=/home/ana".into()]));
        assert!(container_create(&args(|args| args.env = vec!["=x".into()]), |_| None).is_err());
    }

    #[test]
    fn environment_files_skip_comments() {
        let variables = env_file("# note\n\nA=1\n  B= 2\nHOME\n", |_| Some("/h".into())).unwrap();
        assert_eq!(variables, ["A=1", "B= 2", "HOME=/h"]);
    }

    #[test]
    fn no_command_means_the_images() {
        let config = create(|_| {}).config;
        assert_eq!((config.cmd, config.entrypoint), (None, None));
        let config = create(|args| args.entrypoint = Some(String::new())).config;
        assert_eq!(config.entrypoint, Some(vec![String::new()]), "an empty entry point clears the image's");
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in
            [("1024", 1024), ("512m", 512 << 20), ("1.5g", 3 << 29), ("2GiB", 2 << 30), ("1kb", 1024)]
        {
            assert_eq!(memory_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "m", "-1", "1x", "1e30g", "nan"] {
            assert!(memory_bytes(text).is_err(), "{text}");
        }
        assert_eq!(nano_cpus("1.5").unwrap(), 1_500_000_000);
        assert!(nano_cpus("-1").is_err());
    }

    #[test]
    fn restart_policies_are_checked() {
        assert_eq!(restart_policy("on-failure:3").unwrap().maximum_retry_count, 3);
        for text in ["sometimes", "always:2", "on-failure:x", "on-failure:-1"] {
            assert!(restart_policy(text).is_err(), "{text}");
        }
        let both = args(|args| (args.rm, args.restart) = (true, "always".into()));
        assert!(container_create(&both, |_| None).is_err());
    }
}

//! The process of a container or of an exec: who it is, what it gets, how it is confined.

use std::path::PathBuf;

use guest_api::HostConfig;
use guest_api::exec::ExecCreate;
use guest_runtime::defaults;
use oci_spec::runtime::{BoxBuilder, Capabilities, Process};

use super::super::record::Record;
use super::super::user::User;
use super::{Input, capabilities, rlimits, security};
use crate::config::ContainerDefaults;
use crate::failure::Failure;

/// `PATH` when nobody sets one.
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where `docker-init` is in a container.
pub const INIT_PATH: &str = "/sbin/docker-init";

/// Init, as the record asks.
pub fn init_process(input: &Input<'_>) -> Result<Process, Failure> {
    let Input { record, .. } = input;
    let (config, host) = (&record.config, &record.host);
    let mut process = base_process(host, input.user, input.grantable, host.privileged, input.defaults)?;
    let [height, width] = host.console_size;
    if config.tty && height > 0 && width > 0 {
        process.set_console_size(Some(console_box(height, width)?));
    }
    let oom =
        defaults::clamp_oom_score_adjust(i32::try_from(host.oom_score_adj).unwrap_or(0), input.grantable)
            .map_err(|error| {
                Failure::internal("cannot read the out-of-memory score of this process", &error)
            })?;
    process
        .set_terminal(Some(config.tty))
        .set_args(Some(arguments(input)))
        .set_env(Some(environment(record, &[], config.tty, &input.user.home)))
        .set_cwd(working_dir(&config.working_dir))
        .set_oom_score_adj(oom);
    Ok(process)
}

/// Whether the container's first process is `docker-init`. Where it is not the first, there is one already.
pub fn has_init(input: &Input<'_>) -> bool {
    let host = &input.record.host;
    host.init.unwrap_or(input.defaults.init) && matches!(host.pid_mode.as_str(), "" | "private")
}

fn arguments(input: &Input<'_>) -> Vec<String> {
    let mut arguments = input.record.command();
    if has_init(input) {
        arguments.splice(..0, [INIT_PATH.to_owned(), "--".to_owned()]);
    }
    arguments
}

/// The process of an exec in a running container.
pub fn exec_process(
    record: &Record,
    exec: &ExecCreate,
    user: &User,
    grantable: &Capabilities,
    settings: &ContainerDefaults,
) -> Result<Process, Failure> {
    let privileged = exec.privileged || record.host.privileged;
    let mut process = base_process(&record.host, user, grantable, privileged, settings)?;
    if let Some([height, width]) = exec.console_size.filter(|_| exec.tty) {
        process.set_console_size(Some(console_box(height, width)?));
    }
    let folder = if exec.working_dir.is_empty() { &record.config.working_dir } else { &exec.working_dir };
    process
        .set_terminal(Some(exec.tty))
        .set_args(exec.cmd.clone())
        .set_env(Some(environment(record, exec.env.as_deref().unwrap_or_default(), exec.tty, &user.home)))
        .set_cwd(working_dir(folder));
    Ok(process)
}

fn base_process(
    host: &HostConfig,
    user: &User,
    grantable: &Capabilities,
    privileged: bool,
    settings: &ContainerDefaults,
) -> Result<Process, Failure> {
    let granted = if privileged { grantable.clone() } else { capabilities(host, grantable)? };
    let mut sets = defaults::sets(&granted);
    if user.uid != 0 {
        // execve would drop them anyway; runc shows the same sets.
        sets.set_effective(Some(Capabilities::new())).set_permitted(Some(Capabilities::new()));
    }
    let mut limits = rlimits(host)?;
    defaults::clamp_rlimits(&mut limits, grantable);
    let mut oci_user = oci_spec::runtime::User::default();
    oci_user.set_uid(user.uid).set_gid(user.gid).set_additional_gids(Some(additional_groups(user)));
    let mut process = Process::default();
    process
        .set_user(oci_user)
        .set_capabilities(Some(sets))
        .set_rlimits(Some(limits).filter(|limits| !limits.is_empty()))
        .set_no_new_privileges(Some(security(host)?.no_new_privileges.unwrap_or(settings.no_new_privileges)))
        .set_apparmor_profile(None)
        .set_selinux_label(None);
    Ok(process)
}

/// The primary group is among the supplementary ones, as with Docker (CVE-2022-36109).
fn additional_groups(user: &User) -> Vec<u32> {
    let mut groups = vec![user.gid];
    groups.extend(&user.additional);
    groups
}

fn console_box(height: u16, width: u16) -> Result<oci_spec::runtime::Box, Failure> {
    let built = BoxBuilder::default().height(height).width(width).build();
    built.map_err(|error| Failure::internal("cannot describe the terminal", &error))
}

fn working_dir(configured: &str) -> PathBuf {
    if configured.is_empty() { PathBuf::from("/") } else { PathBuf::from(configured) }
}

/// The engine's variables, then the container's, then `extra`; the last of a name wins, in the place of the first.
fn environment(record: &Record, extra: &[String], tty: bool, home: &str) -> Vec<String> {
    let mut result = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={}", record.config.hostname)];
    if record.config.hostname.is_empty() {
        result.pop();
    }
    if tty {
        result.push("TERM=xterm".to_owned());
    }
    for entry in record.config.env.iter().flatten().chain(extra) {
        let name = entry.split_once('=').map_or(entry.as_str(), |(name, _)| name);
        let position =
            result.iter().position(|known| known.split_once('=').is_some_and(|(other, _)| other == name));
        match (position, entry.contains('=')) {
            (Some(position), true) => result[position].clone_from(entry),
            // A name alone removes.
            (Some(position), false) => _ = result.remove(position),
            (None, true) => result.push(entry.clone()),
            (None, false) => {}
        }
    }
    if !result.iter().any(|entry| entry.starts_with("HOME=")) {
        result.push(format!("HOME={home}"));
    }
    result
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::record::tests::record;
    use super::*;

    #[test]
    fn an_exec_takes_the_containers_environment_and_its_own_over_it() {
        let mut record = record();
        record.config.env = Some(vec!["A=1".into(), "B=2".into()]);
        record.config.working_dir = "/srv".into();
        let exec = ExecCreate {
            tty: true,
            console_size: Some([24, 80]),
            env: Some(vec!["A=9".into(), "B".into(), "PATH=/x".into()]),
            cmd: Some(vec!["sh".into()]),
            ..ExecCreate::default()
        };
        let user = User { uid: 33, gid: 34, additional: vec![], home: "/var/www".into() };
        let process =
            exec_process(&record, &exec, &user, &defaults::all_capabilities(), &ContainerDefaults::default())
                .unwrap();
        let json = serde_json::to_value(process).unwrap();
        assert_eq!(json["env"], json!(["PATH=/x", "TERM=xterm", "A=9", "HOME=/var/www"]));
        assert_eq!(json["cwd"], "/srv");
        assert_eq!(json["consoleSize"], json!({"height": 24, "width": 80}));
        assert_eq!(json["user"]["uid"], 33);
        assert_eq!(json["capabilities"]["effective"], json!([]));
    }
}

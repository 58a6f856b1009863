//! The verbs on existing containers: start, stop, restart, kill, wait, rm, logs, exec.

use crate::arguments::{CommitArgs, ContainersArgs, ExecArgs, KillArgs, LogsArgs, RmArgs, StopArgs};
use crate::docker::{Docker, Hijacked, encode};
use crate::output::{line, note, table, text};
use crate::run::join;
use crate::session::Failed;
use crate::streams::{End, copy_log};
use anyhow::{Context, Result, bail};
use guest_api::exec::{ExecCreate, ExecCreated, ExecInspect, ExecStart};
use guest_api::network::PortBinding;
use guest_api::{ContainerInspect, WaitResult};
use hyper::Method;
use std::io::IsTerminal;

/// Docker's exit code for "the engine could not" of exec.
const ENGINE_FAILED: u8 = 125;

/// Does `work` for every name; prints the names it worked for, and every failure. True when all went well.
pub(crate) async fn each<F>(names: &[String], work: impl Fn(String) -> F) -> Result<bool>
where
    F: Future<Output = Result<String>>,
{
    let mut all = true;
    for name in names {
        match work(name.clone()).await {
            Ok(text) => line(&text)?,
            Err(error) => {
                note(&format!("{error:#}"));
                all = false;
            }
        }
    }
    Ok(all)
}

pub(crate) async fn start(docker: &Docker, args: &ContainersArgs) -> Result<bool> {
    each(&args.containers, |name| async move {
        docker.post(&format!("/containers/{}/start", encode(&name))).await.map(|()| name)
    })
    .await
}

/// `stop` and `restart`.
pub(crate) async fn stop(docker: &Docker, verb: &str, args: &StopArgs) -> Result<bool> {
    let mut query = Vec::new();
    query.extend(args.timeout.map(|seconds| format!("t={seconds}")));
    query.extend(args.signal.as_ref().map(|signal| format!("signal={}", encode(signal))));
    let query = query.join("&");
    let query = &query;
    each(&args.on.containers, |name| async move {
        docker.post(&format!("/containers/{}/{verb}?{query}", encode(&name))).await.map(|()| name)
    })
    .await
}

pub(crate) async fn kill(docker: &Docker, args: &KillArgs) -> Result<bool> {
    let signal = args.signal.as_deref().unwrap_or("KILL");
    each(&args.on.containers, |name| async move {
        docker
            .post(&format!("/containers/{}/kill?signal={}", encode(&name), encode(signal)))
            .await
            .map(|()| name)
    })
    .await
}

pub(crate) async fn wait(docker: &Docker, args: &ContainersArgs) -> Result<bool> {
    each(&args.containers, |name| async move {
        let path = format!("/containers/{}/wait", encode(&name));
        let result: WaitResult = docker.post_json(&path, &serde_json::json!({})).await?;
        Ok(result.status_code.to_string())
    })
    .await
}

/// `pause` and `unpause`.
pub(crate) async fn signal_verb(docker: &Docker, verb: &str, args: &ContainersArgs) -> Result<bool> {
    each(&args.containers, |name| async move {
        docker.post(&format!("/containers/{}/{verb}", encode(&name))).await.map(|()| name)
    })
    .await
}

pub(crate) async fn rename(docker: &Docker, container: &str, name: &str) -> Result<()> {
    docker.post(&format!("/containers/{}/rename?name={}", encode(container), encode(name))).await
}

/// `80/tcp -> 0.0.0.0:8080`, or only the host's side of one port.
pub(crate) async fn port(docker: &Docker, container: &str, only: Option<&str>) -> Result<()> {
    let inspect: ContainerInspect = docker.get(&format!("/containers/{}/json", encode(container))).await?;
    let side = |binding: &PortBinding| match binding.host_ip.contains(':') {
        true => format!("[{}]:{}", binding.host_ip, binding.host_port),
        false => format!("{}:{}", binding.host_ip, binding.host_port),
    };
    let ports = &inspect.network_settings.ports;
    let Some(only) = only else {
        for (port, bindings) in ports {
            for binding in bindings.iter().flatten() {
                line(&format!("{port} -> {}", side(binding)))?;
            }
        }
        return Ok(());
    };
    let only = if only.contains('/') { only.to_owned() } else { format!("{only}/tcp") };
    let bindings = ports.get(&only).and_then(Option::as_ref).filter(|bindings| !bindings.is_empty());
    let bindings = bindings.with_context(|| format!("no public port '{only}' published for {container}"))?;
    bindings.iter().try_for_each(|binding| line(&side(binding)))?;
    Ok(())
}

/// The answer of `GET /containers/{id}/top`.
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Top {
    titles: Vec<String>,
    processes: Vec<Vec<String>>,
}

pub(crate) async fn top(docker: &Docker, words: &[String]) -> Result<()> {
    let (container, options) = words.split_first().context("name a container")?;
    let mut path = format!("/containers/{}/top", encode(container));
    if !options.is_empty() {
        path += &format!("?ps_args={}", encode(&options.join(" ")));
    }
    let top: Top = docker.get(&path).await?;
    let titles: Vec<&str> = top.titles.iter().map(String::as_str).collect();
    let columns = titles.len();
    let rows: Vec<Vec<String>> = top
        .processes
        .into_iter()
        .map(|mut row| {
            row.resize(columns, String::new());
            row
        })
        .collect();
    Ok(text(&table(&titles, &rows))?)
}

/// A file that a container has changed.
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Change {
    path: String,
    kind: u8,
}

pub(crate) async fn diff(docker: &Docker, container: &str) -> Result<()> {
    let changes: Option<Vec<Change>> =
        docker.get(&format!("/containers/{}/changes", encode(container))).await?;
    for change in changes.unwrap_or_default() {
        let letter = match change.kind {
            1 => 'A',
            2 => 'D',
            _ => 'C',
        };
        line(&format!("{letter} {}", change.path))?;
    }
    Ok(())
}

pub(crate) async fn commit(docker: &Docker, args: &CommitArgs) -> Result<()> {
    let mut path = format!("/commit?container={}", encode(&args.container));
    let image = args.image.as_deref().unwrap_or_default();
    // A colon before a slash is a registry's port.
    let (repository, tag) = match image.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (image, ""),
    };
    for (key, value) in [
        ("repo", repository),
        ("tag", tag),
        ("author", args.author.as_str()),
        ("comment", args.message.as_str()),
    ] {
        if !value.is_empty() {
            path += &format!("&{key}={}", encode(value));
        }
    }
    for change in &args.change {
        path += &format!("&changes={}", encode(change));
    }
    let created: ImageId = docker.post_json(&path, &serde_json::json!({})).await?;
    Ok(line(&created.id)?)
}

/// The answer of `POST /commit`.
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ImageId {
    id: String,
}

pub(crate) async fn rm(docker: &Docker, args: &RmArgs) -> Result<bool> {
    let query = format!("force={}&v={}", u8::from(args.force), u8::from(args.volumes));
    let query = &query;
    each(&args.on.containers, |name| async move {
        docker.delete(&format!("/containers/{}?{query}", encode(&name))).await.map(|_| name)
    })
    .await
}

pub(crate) async fn logs(docker: &Docker, args: &LogsArgs) -> Result<()> {
    let container: ContainerInspect =
        docker.get(&format!("/containers/{}/json", encode(&args.container))).await?;
    let flag = u8::from;
    let mut path = format!(
        "/containers/{}/logs?stdout=1&stderr=1&follow={}&timestamps={}&tail={}",
        container.id,
        flag(args.follow),
        flag(args.timestamps),
        encode(&args.tail)
    );
    for (key, moment) in [("since", &args.since), ("until", &args.until)] {
        if let Some(moment) = moment {
            path += &format!("&{key}={}", encode(&timestamp(moment, jiff::Timestamp::now())?));
        }
    }
    let response = docker.stream(Method::GET, &path, crate::docker::empty()).await?;
    copy_log(response.into_body(), !container.config.tty).await
}

/// A moment as the API takes it, seconds since the epoch with fraction: RFC 3339, seconds, or an age such as `10m`.
pub(crate) fn timestamp(text: &str, now: jiff::Timestamp) -> Result<String> {
    let nanos = |at: jiff::Timestamp| format!("{}.{:09}", at.as_second(), at.subsec_nanosecond());
    if text.split('.').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())) {
        return Ok(text.to_owned());
    }
    if let Ok(moment) = text.parse::<jiff::Timestamp>() {
        return Ok(nanos(moment));
    }
    let invalid = || {
        format!("`{text}` is no moment: use RFC 3339, seconds since 1970, or an age such as `10m` or `1h30m`")
    };
    let age: jiff::SignedDuration = text.parse().with_context(invalid)?;
    Ok(nanos(now.checked_sub(age).with_context(invalid)?))
}

/// Runs a command in a running container; the exit code for this process.
pub(crate) async fn exec(docker: &Docker, args: &ExecArgs) -> Result<u8> {
    if args.tty && args.interactive && !args.detach && !std::io::stdin().is_terminal() {
        bail!("the input device is not a TTY");
    }
    if args.container().starts_with('-') {
        return Err(Failed::code(ENGINE_FAILED)(anyhow::anyhow!("unknown flag: {}", args.container())));
    }
    let attach = !args.detach;
    let env: Vec<String> = args
        .env
        .iter()
        .filter_map(|variable| match variable.contains('=') {
            true => Some(variable.clone()),
            false => std::env::var(variable).ok().map(|value| format!("{variable}={value}")),
        })
        .collect();
    let create = ExecCreate {
        user: args.user.clone(),
        privileged: args.privileged,
        tty: args.tty,
        attach_stdin: attach && args.interactive,
        attach_stdout: attach,
        attach_stderr: attach,
        env: (!env.is_empty()).then_some(env),
        working_dir: args.workdir.clone(),
        cmd: Some(args.command().to_vec()),
        ..ExecCreate::default()
    };
    let path = format!("/containers/{}/exec", encode(args.container()));
    let created: ExecCreated = docker.post_json(&path, &create).await.map_err(Failed::code(1))?;
    let console_size = crate::terminal::size().filter(|_| args.tty).map(|(columns, rows)| [rows, columns]);
    let start = ExecStart { detach: args.detach, tty: args.tty, console_size };
    let start_path = format!("/exec/{}/start", created.id);
    let body = serde_json::to_vec(&start)?;
    if args.detach {
        docker.post_body(&start_path, &start).await.map_err(Failed::code(ENGINE_FAILED))?;
        return Ok(0);
    }
    let hijacked: Hijacked = docker.hijack(&start_path, Some(body)).await.map_err(|error| {
        let code = if format!("{error:#}").contains("executable file not found") { 127 } else { 126 };
        Failed::code(code)(error)
    })?;
    let resize = format!("/exec/{}/resize", created.id);
    match join(docker, hijacked, &resize, args.interactive, args.tty).await? {
        End::Detached => Ok(0),
        End::Output => {
            let ended: ExecInspect = docker.get(&format!("/exec/{}/json", created.id)).await?;
            Ok(u8::try_from(ended.exit_code.unwrap_or(0) & 0xff)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_in_three_ways() {
        let now = jiff::Timestamp::from_second(1_000_000).unwrap();
        let check = |text: &str| timestamp(text, now).unwrap();
        assert_eq!(check("1234"), "1234");
        assert_eq!(check("1234.5"), "1234.5");
        assert_eq!(check("10m"), "999400.000000000");
        assert_eq!(check("1970-01-02T00:00:00Z"), "86400.000000000");
        assert!(timestamp("yesterday", now).is_err());
    }
}

//! `engine run`: create (pulling first when the image is missing), attach, wait, start, join the streams. `engine attach` joins
//! those of a container that runs already.

pub(crate) mod create;
mod publish;
pub(crate) mod raw;
mod volume;

use crate::arguments::AttachArgs;
use crate::docker::{ApiError, Docker, Hijacked, encode};
use crate::session::{Failed, Session};
use crate::streams::{self, End, Input};
use crate::{pull, signals, terminal};
use anyhow::{Context, Result, anyhow, bail};
use guest_api::{ContainerCreate, ContainerCreated, ContainerInspect, WaitResult};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, Response, StatusCode};
use raw::{PullPolicy, RawRunArgs};
use std::io::IsTerminal;

/// Docker's exit code for "the engine could not".
const ENGINE_FAILED: u8 = 125;

/// Runs and returns the exit code for this process.
pub(crate) async fn run(session: &Session, args: &RawRunArgs) -> Result<u8> {
    let create = create::container_create(args, |name| std::env::var(name).ok())
        .map_err(Failed::code(ENGINE_FAILED))?;
    run_created(session, args, &create).await
}

/// `engine create`: the same up to the start; prints the id.
pub(crate) async fn create(session: &Session, args: &RawRunArgs) -> Result<()> {
    // Who starts it later may attach: the streams are those of a run in the foreground.
    let body = create::container_create(args, |name| std::env::var(name).ok())?;
    let id = created(&session.docker().await?, args, &body).await?;
    Ok(crate::output::line(&id)?)
}

/// The same for a body that was made elsewhere.
pub(crate) async fn run_created(
    session: &Session,
    args: &RawRunArgs,
    create: &ContainerCreate,
) -> Result<u8> {
    if args.tty && args.interactive && !args.detach && !std::io::stdin().is_terminal() {
        bail!("the input device is not a TTY");
    }
    let docker = session.docker().await.map_err(Failed::code(ENGINE_FAILED))?;
    let mut create = create.clone();
    if args.tty
        && let Some((columns, rows)) = terminal::size()
    {
        create.host_config.console_size = [rows, columns];
    }
    let id = created(&docker, args, &create).await.map_err(Failed::code(ENGINE_FAILED))?;
    if args.detach {
        start(&docker, &id).await?;
        crate::output::line(&id)?;
        return Ok(0);
    }
    attached(&docker, &id, args).await
}

async fn created(docker: &Docker, args: &RawRunArgs, create: &ContainerCreate) -> Result<String> {
    if args.pull == PullPolicy::Always {
        pull::pull(docker, args.image(), args.platform.as_deref(), args.quiet).await?;
    }
    let mut path = "/containers/create?".to_owned();
    if let Some(name) = &args.name {
        path += &format!("name={}&", encode(name));
    }
    if let Some(platform) = &args.platform {
        path += &format!("platform={}", encode(platform));
    }
    let path = path.trim_end_matches(['?', '&']);
    let created = match docker.post_json::<ContainerCreated>(path, create).await {
        Err(error) if args.pull == PullPolicy::Missing && image_is_missing(&error) => {
            if !args.quiet {
                crate::output::note(&format!("Unable to find image '{}' locally", args.image()));
            }
            pull::pull(docker, args.image(), args.platform.as_deref(), args.quiet).await?;
            docker.post_json(path, create).await?
        }
        result => result?,
    };
    for warning in &created.warnings {
        crate::output::note(&format!("WARNING: {warning}"));
    }
    Ok(created.id)
}

fn image_is_missing(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<ApiError>()
        .is_some_and(|error| error.status == StatusCode::NOT_FOUND && error.message.contains("No such image"))
}

async fn start(docker: &Docker, id: &str) -> Result<()> {
    docker.post(&format!("/containers/{id}/start")).await.map_err(|error| {
        let text = format!("{error:#}");
        let code = if ["executable file not found", "no such file or directory"]
            .iter()
            .any(|part| text.contains(part))
        {
            127
        } else if ["permission denied", "is a directory"].iter().any(|part| text.contains(part)) {
            126
        } else {
            ENGINE_FAILED
        };
        Failed::code(code)(error)
    })
}

/// `engine attach`: the streams of a container that runs; its exit code when it ends meanwhile.
pub(crate) async fn attach(docker: &Docker, args: &AttachArgs) -> Result<u8> {
    let container: ContainerInspect =
        docker.get(&format!("/containers/{}/json", encode(&args.container))).await?;
    let state = &container.state;
    match () {
        () if !state.running => bail!("cannot attach to a stopped container, start it first"),
        () if state.paused => bail!("cannot attach to a paused container, unpause it first"),
        () if state.restarting => bail!("cannot attach to a restarting container, wait until it is running"),
        () => {}
    }
    let (stdin, tty) = (!args.no_stdin && container.config.open_stdin, container.config.tty);
    if stdin && tty && !std::io::stdin().is_terminal() {
        bail!("the input device is not a TTY");
    }
    let attachment = Attachment::new(docker, &container.id, stdin, tty, "not-running").await?;
    attachment.join(docker, args.sig_proxy && !tty).await
}

async fn attached(docker: &Docker, id: &str, args: &RawRunArgs) -> Result<u8> {
    // Asked before the start, so that no exit is too quick to be seen.
    let condition = if args.rm { "removed" } else { "next-exit" };
    let attachment = Attachment::new(docker, id, args.interactive, args.tty, condition)
        .await
        .map_err(Failed::code(ENGINE_FAILED))?;
    start(docker, id).await?;
    attachment.join(docker, !args.tty).await
}

/// A container's streams, and its end being waited for.
struct Attachment {
    id: String,
    stdin: bool,
    tty: bool,
    streams: Hijacked,
    waiting: Response<Incoming>,
}

impl Attachment {
    async fn new(docker: &Docker, id: &str, stdin: bool, tty: bool, condition: &str) -> Result<Self> {
        let input = if stdin { "&stdin=1" } else { "" };
        let path = format!("/containers/{id}/attach?stream=1&stdout=1&stderr=1{input}");
        let streams = docker.hijack(&path, None).await?;
        let path = format!("/containers/{id}/wait?condition={condition}");
        let waiting = docker.stream(Method::POST, &path, crate::docker::empty()).await?;
        Ok(Self { id: id.to_owned(), stdin, tty, streams, waiting })
    }

    /// Until the output ends, or the user detaches; the exit code for this process.
    async fn join(self, docker: &Docker, pass_signals: bool) -> Result<u8> {
        let forwarding = pass_signals.then(|| signals::forward(docker.clone(), self.id.clone()));
        let resize = format!("/containers/{}/resize", self.id);
        let end = join(docker, self.streams, &resize, self.stdin, self.tty).await;
        if let Some(forwarding) = forwarding {
            forwarding.abort();
        }
        match end? {
            End::Detached => Ok(0),
            End::Output => exit_code(self.waiting).await,
        }
    }
}

/// Joins the streams; with a terminal also raw mode and its size, told to `resize_path`.
pub(crate) async fn join(
    docker: &Docker,
    hijacked: Hijacked,
    resize_path: &str,
    interactive: bool,
    tty: bool,
) -> Result<End> {
    let on_terminal = interactive && tty && std::io::stdin().is_terminal();
    let input = match (interactive, on_terminal) {
        (false, _) => Input::None,
        (true, false) => Input::Plain,
        (true, true) => Input::Terminal,
    };
    let raw = on_terminal
        .then(terminal::RawMode::enter)
        .transpose()
        .context("cannot put the terminal into raw mode")?;
    let resizing = tty.then(|| signals::follow_size(docker.clone(), resize_path.to_owned()));
    let end = streams::join(hijacked, input).await;
    if let Some(resizing) = resizing {
        resizing.abort();
    }
    drop(raw);
    end
}

async fn exit_code(waiting: Response<Incoming>) -> Result<u8> {
    let body = waiting
        .into_body()
        .collect()
        .await
        .context("lost the engine while waiting for the container")?
        .to_bytes();
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Failed::code(ENGINE_FAILED)(anyhow!("lost the engine while waiting for the container")));
    }
    let result: WaitResult = guest_api::decode(&body).context("the engine's answer is not understood")?;
    match result.error {
        Some(error) if !error.message.is_empty() => Err(Failed::code(ENGINE_FAILED)(anyhow!(error.message))),
        // As a shell sees it: the low byte.
        _ => Ok(u8::try_from(result.status_code & 0xff)?),
    }
}

/// The create body of `engine machine shell`: in the machine's own namespaces, with its root at /host.
pub(crate) fn machine_shell(image: &str, command: &[String]) -> Result<(RawRunArgs, ContainerCreate)> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let command = if command.is_empty() { vec!["sh".to_owned()] } else { command.to_vec() };
    let args = RawRunArgs {
        words: [vec![image.to_owned()], command].concat(),
        interactive: true,
        tty: terminal,
        rm: true,
        privileged: true,
        network: Some("host".into()),
        pid: Some("host".into()),
        restart: "no".into(),
        ..RawRunArgs::default()
    };
    let mut create = create::container_create(&args, |_| None)?;
    create.host_config.binds = Some(vec!["/:/host".into()]);
    Ok((args, create))
}

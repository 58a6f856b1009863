//! `engined`: one per user. Supervises the machine, admits Docker clients, answers `engine machine …`.
//!
//! It holds what must outlive a command and no more: the machine's state is the VM process itself, and when `engined`
//! dies the machine powers off, because the control channel closes.
#![forbid(unsafe_code)]

mod bounded_log;
mod control;
mod gate;
mod image;
mod leases;
mod lifecycle;
mod live;
mod session;
mod settings;
mod shares;
mod state_dir;
mod supervisor;
mod vmm_process;

use anyhow::{Context, Result};
use bounded_log::BoundedLog;
use clap::Parser;
use control::Control;
use host_api::Home;
use image::VmImage;
use state_dir::StateDir;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use supervisor::Supervisor;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

const DAEMON_LOG_BYTES_MAX: u64 = 1 << 20;

/// The daemon of engine. Usually started by `engine` itself.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Log into the state folder instead of to standard error, and say on standard output when the daemon is ready:
    /// one line, `ready`, `already running` or `error: …`.
    #[arg(long)]
    detached: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.detached) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error:#}"));
            warn!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One line for whoever started us; nobody may be listening.
#[expect(clippy::print_stdout, reason = "this line is the contract with the starter")]
fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

fn run(detached: bool) -> Result<()> {
    let home = Home::resolve(std::env::var_os("ENGINE_HOME"), std::env::var_os("HOME"))?;
    let state_dir = match StateDir::claim(home)? {
        Ok(state_dir) => Arc::new(state_dir),
        Err(state_dir::AlreadyRunning) => {
            say("already running");
            return Ok(());
        }
    };
    start_logging(detached.then(|| state_dir.home().daemon_log()))?;
    raise_file_limit();
    let program = std::env::current_exe().context("cannot find the folder of this program")?;
    let image_dir = VmImage::dir(std::env::var_os("ENGINE_IMAGE").map(PathBuf::from), &program);
    let programs = program.parent().context("this program is in no folder")?.to_path_buf();

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        let docker = listener(state_dir.bind_docker()?)?;
        let sockets = listener(state_dir.bind_control()?)?;
        let (supervisor, handle) = Supervisor::new(Arc::clone(&state_dir), programs, image_dir.clone());
        let (end, mut ended) = watch::channel(false);
        let control = Control {
            state_dir: Arc::clone(&state_dir),
            supervisor: handle.clone(),
            image_dir,
            changing: Arc::default(),
            end,
        };
        let tasks = [
            tokio::spawn(supervisor.run()),
            tokio::spawn(gate::serve(docker, handle.clone())),
            tokio::spawn(control.serve(sockets)),
        ];
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        info!(home = %state_dir.home().root().display(), "ready");
        say("ready");
        if detached {
            close_stdout()?;
        }
        tokio::select! {
            _ = terminate.recv() => info!("ending: SIGTERM"),
            _ = interrupt.recv() => info!("ending: SIGINT"),
            _ = ended.wait_for(|end| *end) => info!("ending: asked to"),
        }
        if let Err(why) = handle.stop().await {
            warn!(%why, "the machine was not stopped cleanly");
        }
        for task in tasks {
            task.abort();
            // An aborted task ends with a cancellation, which is what was asked for.
            let _ = task.await;
        }
        Ok(())
    })
}

/// Clients that wait for the machine to boot are a descriptor each; the usual soft limit of 1024 is soon reached.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "cannot raise the limit of open files");
    }
}

fn listener(listener: std::os::unix::net::UnixListener) -> Result<UnixListener> {
    listener.set_nonblocking(true)?;
    Ok(UnixListener::from_std(listener)?)
}

/// Whoever started us reads our standard output until its end: let go of it.
fn close_stdout() -> Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null").context("cannot open `/dev/null`")?;
    rustix::stdio::dup2_stdout(&null).context("cannot let go of standard output")?;
    Ok(())
}

fn start_logging(file: Option<PathBuf>) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("ENGINE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_target(false);
    match file {
        None => builder.with_writer(std::io::stderr).init(),
        Some(path) => {
            let log = BoundedLog::open(&path, DAEMON_LOG_BYTES_MAX)
                .with_context(|| format!("cannot write the log `{}`", path.display()))?;
            builder.with_writer(Mutex::new(log)).init();
        }
    }
    Ok(())
}

//! `init`: PID 1 of the machine.
//!
//! It mounts, brings disk and network up, sets the clock from the host, keeps the engine running, collects orphans,
//! and switches the machine off cleanly. It does not know what a container is: that is the engine's. It has no shell
//! and takes no commands but those of the control session.
//!
//! The start is one straight recipe ([`prepare`], then [`bring_up`]); after it everything is a task of its own on one
//! thread, and the main task waits for somebody to press the [`power::PowerSwitch`]. When PID 1 ends the kernel
//! panics, so it never does: a failure or a panic in here is named on the console and the machine switched off.
#![deny(unsafe_code)]

mod adapt;
mod backoff;
mod clock;
mod cmdline;
mod disk;
mod engine;
mod idle;
mod limits;
mod log;
mod machine;
mod modules;
mod mounts;
mod network;
mod power;
mod process;
mod processors;
mod session;
mod status;
mod swap;
#[expect(unsafe_code, reason = "the one place for calls without a safe wrapper")]
mod sys;

use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest_protocol::EngineState;
use rustix::system::RebootCommand;
use tokio::sync::watch;
use tokio::task::{LocalSet, spawn_blocking, spawn_local};
use tracing::{error, info, warn};

use cmdline::Options;
use log::Log;
use modules::Modules;
use power::{Haste, PowerSwitch};
use process::Processes;
use status::{Fault, Publisher, Status};

/// How long the engine waits for the network before it is started without. It would only fail to pull.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the engine waits for its settings. The host tells them as soon as the session is there; without a daemon
/// nobody does.
const SETTINGS_TIMEOUT: Duration = Duration::from_secs(10);

#[expect(
    clippy::print_stderr,
    reason = "outside of its machine this is an ordinary program with a usage error"
)]
fn main() -> ExitCode {
    if let Some(loaded) = modules::requested(std::env::args_os()) {
        return if loaded { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if std::process::id() != 1 {
        eprintln!(
            "error: this program is the first process of the engine's virtual machine and runs only there"
        );
        return ExitCode::from(125);
    }
    std::panic::set_hook(Box::new(|panic| {
        log::on_console(&format!("init: a fault in the agent itself; switching off: {panic}"));
        die();
    }));
    match run() {
        Ok(()) => log::on_console("init: the kernel did not switch off"),
        Err(error) => log::on_console(&format!("init: cannot go on; switching off: {error:#}")),
    }
    die();
    ExitCode::FAILURE
}

/// Switches off in whatever state the machine is.
fn die() {
    if let Err(error) = power::cut() {
        log::on_console(&format!("init: {error:#}"));
    }
}

fn run() -> Result<()> {
    let options = prepare()?;
    let log = Log::install(options.debug);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, supervise(options, log))
}

/// What needs no other task and no other process.
fn prepare() -> Result<Options> {
    mounts::leave_initramfs()?;
    mounts::mount_all()?;
    mounts::open_console()?;
    // Ctrl-Alt-Del is a signal to us instead of the kernel's own reset.
    rustix::system::reboot(RebootCommand::CadOff).context("cannot take over Ctrl-Alt-Del")?;
    let cmdline = std::fs::read_to_string("/proc/cmdline").context("cannot read the kernel command line")?;
    Ok(Options::parse(&cmdline))
}

/// The life of the machine, from here to power-off.
async fn supervise(options: Options, log: Log) -> Result<()> {
    info!(uptime_ms = machine::uptime_ms(), ?options, "agent started");
    let power = PowerSwitch::new();
    let mut orders = power.orders();
    let status = Publisher::new();
    let processes = Processes::default();
    keep("collecting processes", processes.clone().collect());
    keep("listening to signals", power::listen_to_signals(power.clone()));

    let settings = session::Settings::new(None);
    let supervisor = engine::Supervisor {
        processes: processes.clone(),
        log: log.clone(),
        status: status.clone(),
        launch: Rc::new({
            let told = settings.subscribe();
            move || engine::command(options.debug, told.borrow().as_ref())
        }),
    };
    let mut up = spawn_local(bring_up(supervisor, power, settings, options.quiet));
    let mut is_up = true;
    let order = loop {
        tokio::select! {
            order = power::ordered(&mut orders, Haste::Orderly) => break order,
            // Without an engine the machine stays, so that the host can read why.
            ended = &mut up, if is_up => {
                is_up = false;
                ended.context("the start was cut off")??;
            }
        }
    };
    info!(reason = order.reason, haste = ?order.haste, "switching off");
    status.powering_off();
    if is_up {
        up.await.context("the engine's supervisor was cut off")??;
    }
    power::off(&processes, &log, &orders).await
}

/// Brings everything up, then keeps the engine running until the machine is to be switched off. Ends early, without
/// an engine, on a fault that the user has to look at.
async fn bring_up(
    supervisor: engine::Supervisor,
    power: PowerSwitch,
    settings: session::Settings,
    quiet: Duration,
) -> Result<()> {
    let mut orders = power.orders();
    for problem in limits::apply() {
        warn!("{problem}");
    }
    let refused = mounts::set_up_cgroups()?;
    if !refused.is_empty() {
        warn!(?refused, "cgroup controllers that cannot be turned on");
    }
    let (devices, rest) = Modules::of_this_image();
    devices.load();
    let rest = spawn_blocking(|| {
        rest.load();
        match processors::turn_on() {
            Ok(0) => {}
            Ok(count) => info!(count, "processors turned on"),
            Err(error) => warn!("the machine runs with fewer processors than it has: {error:#}"),
        }
    });
    if let Err(error) = mounts::mount_shares() {
        warn!(error = format!("{error:#}"), "containers cannot bind folders of the host");
    }

    if !quiet.is_zero() {
        keep("letting go of caches", idle::keep(quiet));
    }
    spawn_local(turn_swap_on(supervisor.status.watch()));
    spawn_local(supervisor.log.clone().ship());
    let mut told = settings.subscribe();
    let processes = supervisor.processes.clone();
    let adapt = move |request| adapt::carry_out(request, processes.clone());
    spawn_local(session::keep(supervisor.status.watch(), power.clone(), settings, adapt));
    keep("listening on the power port", power::listen_to_host(power));
    let network_ready = watch::Sender::new(false);
    let mut network = network_ready.subscribe();
    keep("the network", network::run(network_ready));

    let start = async {
        if let Err(fault) = disk::bring_up(&supervisor.processes).await {
            return Ok(Err(fault));
        }
        info!(uptime_ms = machine::uptime_ms(), "data disk ready");
        rest.await.context("loading modules was cut off")?;
        info!(uptime_ms = machine::uptime_ms(), "modules loaded");
        // An error means that the network gave up, and has said why.
        let ready = tokio::time::timeout(NETWORK_TIMEOUT, network.wait_for(|ready| *ready)).await;
        if !matches!(ready, Ok(Ok(_))) {
            warn!("starting the engine without a network");
        }
        let told = tokio::time::timeout(SETTINGS_TIMEOUT, told.wait_for(Option::is_some)).await;
        if !matches!(told, Ok(Ok(_))) {
            warn!("starting the engine without the user's settings: the host does not tell them");
        }
        anyhow::Ok(Ok::<(), Fault>(()))
    };
    let started = tokio::select! {
        started = start => started?,
        // A tool at work on the disk ends with all other processes.
        _ = power::ordered(&mut orders, Haste::Orderly) => return Ok(()),
    };
    match started {
        Ok(()) => supervisor.run(orders).await,
        Err(fault) => {
            error!("{fault}");
            supervisor.status.fault(fault);
        }
    }
    Ok(())
}

/// Turns swap on once the engine answers, which need not wait for it. A machine without is short of memory sooner, and no more than
/// that.
async fn turn_swap_on(mut status: watch::Receiver<Status>) {
    if status.wait_for(|status| status.engine == EngineState::Ready).await.is_err() {
        return;
    }
    let began = Instant::now();
    match spawn_blocking(swap::turn_on).await {
        Ok(Ok(swap::Swap { bytes, memory_bytes })) => {
            info!(bytes, memory_bytes, took = ?began.elapsed(), "compressed swap turned on");
        }
        Ok(Err(error)) => warn!("the machine has no swap: {error:#}"),
        Err(cut) => error!("turning swap on was cut off: {cut}"),
    }
}

/// Runs a task for as long as the machine does. Its failure is worth a line, not the machine.
fn keep(what: &'static str, task: impl Future<Output = Result<()>> + 'static) {
    spawn_local(async move {
        if let Err(error) = task.await {
            error!("{what} failed: {error:#}");
        }
    });
}

//! Switching the machine off: who may ask, and what happens then.
//!
//! The order is: the engine stops containers and ends; whatever is left is asked to end, then made to; disk
//! synced and unmounted; power off. Every step has a limit, so the machine always goes off.

use std::time::Duration;

use anyhow::{Context, Result};
use guest_protocol::port;
use rustix::process::Signal;
use rustix::system::RebootCommand;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use tracing::{info, warn};

use crate::process::{Processes, Rest};
use crate::{disk, log, sys};

/// How long processes that are left after the engine may take to end by themselves, and then to be gone.
const LEFTOVERS_TIMEOUT: Duration = Duration::from_secs(2);

/// Whoever holds one may have the machine switched off.
#[derive(Clone, Debug)]
pub struct PowerSwitch(mpsc::Sender<String>);

/// A switch, and where the one who acts on it hears why it was pressed.
pub fn switch() -> (PowerSwitch, mpsc::Receiver<String>) {
    let (sender, receiver) = mpsc::channel(1);
    (PowerSwitch(sender), receiver)
}

impl PowerSwitch {
    /// Asks for power-off. The first reason counts.
    pub fn press(&self, reason: &str) {
        // Full means that it was pressed before.
        let _already_pressed = self.0.try_send(reason.to_owned());
    }
}

/// Presses the switch when the VM process connects to the power port. Nobody else reaches it: a container's
/// connections come from another context id, if its seccomp profile lets it have a vsock socket at all.
pub async fn listen_to_host(power: PowerSwitch) -> Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port::POWER))
        .with_context(|| format!("cannot listen on vsock port {}", port::POWER))?;
    loop {
        let (_stream, peer) = listener.accept().await.context("cannot accept on the power port")?;
        match peer.cid() {
            port::HOST_CID => power.press("the VM process asks for it"),
            cid => warn!(cid, "a connection to the power port that is not the host's"),
        }
    }
}

/// Presses the switch on the signals that mean power-off for PID 1: Ctrl-Alt-Del, a failing power supply, and TERM.
pub async fn listen_to_signals(power: PowerSwitch) -> Result<()> {
    const SIGPWR: i32 = 30;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut failing = signal(SignalKind::from_raw(SIGPWR))?;
    loop {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
            _ = failing.recv() => "SIGPWR",
        };
        power.press(&format!("{name} was received"));
    }
}

/// Ends everything and switches off. The engine has been stopped before. Never returns while the kernel does as it
/// is told.
pub async fn off(processes: &Processes, log: &log::Log) -> Result<()> {
    for signal in [Signal::TERM, Signal::KILL] {
        if processes.collect_now() == Rest::None {
            break;
        }
        sys::signal_all(signal).context("cannot end the processes that are left")?;
        let deadline = Instant::now() + LEFTOVERS_TIMEOUT;
        while processes.collect_now() == Rest::Alive && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    rustix::fs::sync();
    match disk::take_down() {
        Ok(busy) if busy.is_empty() => info!("data disk unmounted"),
        Ok(busy) => {
            warn!(?busy, "the data disk was still in use; it is synced, and checked on the next start")
        }
        Err(error) => warn!(%error, "cannot unmount the data disk"),
    }
    log.drain(Duration::from_millis(200)).await;
    cut()
}

/// Switches off now. What has been synced is safe; the disk's journal takes care of the rest.
pub fn cut() -> Result<()> {
    rustix::fs::sync();
    rustix::system::reboot(RebootCommand::PowerOff).context("the kernel does not switch off")
}

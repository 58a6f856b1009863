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
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use tracing::{info, warn};

use crate::process::{Processes, Rest};
use crate::{disk, log, sys};

/// How the machine is to be switched off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Why.
    pub reason: String,
    /// How much time there is.
    pub haste: Haste,
}

/// How much time there is for switching off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Haste {
    /// Containers get the time that `docker stop` gives them.
    Orderly,
    /// The VM process waits a few seconds, then it pulls the plug: what counts is the data disk.
    Now,
}

impl Haste {
    /// How long the engine may take to end. It stops its containers, each of which has ten seconds by default.
    pub fn engine_time_max(self) -> Duration {
        match self {
            Haste::Orderly => Duration::from_secs(11),
            Haste::Now => Duration::from_secs(2),
        }
    }

    /// How long processes that are left may take to end by themselves, and then to be gone.
    fn leftovers_time_max(self) -> Duration {
        match self {
            Haste::Orderly => Duration::from_secs(2),
            Haste::Now => Duration::from_millis(300),
        }
    }
}

/// Whoever holds one may have the machine switched off.
#[derive(Clone, Debug)]
pub struct PowerSwitch(watch::Sender<Option<Order>>);

/// Where an order to switch off is heard.
pub type Orders = watch::Receiver<Option<Order>>;

impl PowerSwitch {
    /// A switch that nobody has pressed.
    pub fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// Where to hear of it.
    pub fn orders(&self) -> Orders {
        self.0.subscribe()
    }

    /// Asks for power-off. The first reason counts, and the greatest haste.
    pub fn press(&self, reason: &str, haste: Haste) {
        self.0.send_if_modified(|order| match order {
            None => {
                *order = Some(Order { reason: reason.to_owned(), haste });
                true
            }
            Some(order) if order.haste < haste => {
                order.haste = haste;
                true
            }
            Some(_) => false,
        });
    }
}

/// Waits until the machine is to be switched off at least as hastily as `haste`.
pub async fn ordered(orders: &mut Orders, haste: Haste) -> Order {
    match orders.wait_for(|order| order.as_ref().is_some_and(|order| order.haste >= haste)).await.as_deref() {
        Ok(Some(order)) => order.clone(),
        // Nobody is left who could press it.
        _ => std::future::pending().await,
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
            port::HOST_CID => power.press("the VM process asks for it", Haste::Now),
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
        power.press(&format!("{name} was received"), Haste::Orderly);
    }
}

/// Ends everything and switches off. The engine has been stopped before. Never returns while the kernel does as it
/// is told.
pub async fn off(processes: &Processes, log: &log::Log, orders: &Orders) -> Result<()> {
    let haste = || orders.borrow().as_ref().map_or(Haste::Orderly, |order| order.haste);
    for signal in [Signal::TERM, Signal::KILL] {
        if processes.collect_now() == Rest::None {
            break;
        }
        sys::signal_all(signal).context("cannot end the processes that are left")?;
        let began = Instant::now();
        while processes.collect_now() == Rest::Alive && began.elapsed() < haste().leftovers_time_max() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_reason_counts_and_the_greatest_haste() {
        let power = PowerSwitch::new();
        let mut orders = power.orders();
        power.press("the host asks for it", Haste::Orderly);
        let order = ordered(&mut orders, Haste::Orderly).await;
        assert_eq!(order, Order { reason: "the host asks for it".into(), haste: Haste::Orderly });
        power.press("the VM process asks for it", Haste::Now);
        power.press("SIGTERM was received", Haste::Orderly);
        let order = ordered(&mut orders, Haste::Now).await;
        assert_eq!(order, Order { reason: "the host asks for it".into(), haste: Haste::Now });
    }

    /// The VM process waits five seconds for a machine whose daemon has died.
    #[test]
    fn haste_is_over_in_less_than_the_vm_process_waits() {
        let longest = Haste::Now.engine_time_max() + Haste::Now.leftovers_time_max() * 2;
        assert!(longest <= Duration::from_secs(3));
    }
}

//! Signals on their way to a container: the ones this process gets, and changes of the terminal's size.

use crate::docker::Docker;
use crate::terminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

/// Passes SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 on to the container until aborted.
pub(crate) fn forward(docker: Docker, id: String) -> JoinHandle<()> {
    tokio::spawn(async move {
        let listen = |kind| signal(kind).ok();
        let (mut int, mut term, mut hup, mut quit, mut usr1, mut usr2) = (
            listen(SignalKind::interrupt()),
            listen(SignalKind::terminate()),
            listen(SignalKind::hangup()),
            listen(SignalKind::quit()),
            listen(SignalKind::user_defined1()),
            listen(SignalKind::user_defined2()),
        );
        loop {
            let name = tokio::select! {
                () = next(&mut int) => "INT",
                () = next(&mut term) => "TERM",
                () = next(&mut hup) => "HUP",
                () = next(&mut quit) => "QUIT",
                () = next(&mut usr1) => "USR1",
                () = next(&mut usr2) => "USR2",
            };
            if let Err(error) = docker.post(&format!("/containers/{id}/kill?signal={name}")).await {
                crate::output::note(&format!("the signal {name} was not passed on: {error:#}"));
            }
        }
    })
}

async fn next(signal: &mut Option<tokio::signal::unix::Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Tells `path` the terminal's size now and whenever it changes, until aborted.
pub(crate) fn follow_size(docker: Docker, path: String) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut changed = signal(SignalKind::window_change()).ok();
        loop {
            if let Some((columns, rows)) = terminal::size() {
                // A container that has just ended has no terminal to resize.
                let _ = docker.post(&format!("{path}?h={rows}&w={columns}")).await;
            }
            next(&mut changed).await;
        }
    })
}

//! The one writer of the firewall: whoever changed something asks it to say what is true now and waits for that.
//! Requests that came while it was writing are answered by the next transaction together.

use std::sync::{Arc, Mutex, PoisonError};

use guest_network::{Firewall, Foreign, Incoming, Written};
use tokio::sync::{mpsc, oneshot};

use super::state::State;
use crate::failure::Failure;

/// Requests that may wait; more make their senders wait.
const WAITING_MAX: usize = 64;

/// The way to the writer, which ends with the last of these.
#[derive(Clone)]
pub struct FirewallWriter {
    firewall: Firewall,
    requests: mpsc::Sender<oneshot::Sender<Result<(), Failure>>>,
}

impl FirewallWriter {
    pub fn start(table: &str, state: Arc<Mutex<State>>) -> Self {
        let (requests, queue) = mpsc::channel(WAITING_MAX);
        let firewall = Firewall::new(table);
        tokio::spawn(write(firewall.clone(), state, queue));
        Self { firewall, requests }
    }

    /// Whether the table is there.
    pub async fn stands(&self) -> Result<bool, Failure> {
        let stands = self.firewall.stands().await;
        stands.map_err(|error| Failure::internal("cannot look at the firewall", &error))
    }

    /// The chain of another program that drops such packets, if one does.
    pub async fn dropped_by_others(&self, packet: &Incoming) -> Result<Option<Foreign>, Failure> {
        let found = self.firewall.dropped_by_others(packet).await;
        found.map_err(|error| Failure::internal("cannot look at the firewalls of others", &error))
    }

    /// Returns once the table says what is true now, or later.
    pub async fn refresh(&self) -> Result<(), Failure> {
        let gone = || Failure::broken("the engine is ending");
        let (reply, answer) = oneshot::channel();
        self.requests.send(reply).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

async fn write(
    firewall: Firewall,
    state: Arc<Mutex<State>>,
    mut queue: mpsc::Receiver<oneshot::Sender<Result<(), Failure>>>,
) {
    let mut last: Option<Written> = None;
    while let Some(first) = queue.recv().await {
        let mut waiting = vec![first];
        while let Ok(next) = queue.try_recv() {
            waiting.push(next);
        }
        let rules = state.lock().unwrap_or_else(PoisonError::into_inner).rules();
        let written = match last.take() {
            Some(last) => firewall.change(last, &rules).await,
            None => firewall.apply(&rules).await,
        };
        let written = written.map_err(|error| Failure::internal("cannot write the firewall", &error));
        let written = written.map(|written| last = Some(written));
        for reply in waiting {
            // One that was dropped while it waited needs no answer.
            let _ = reply.send(written.clone());
        }
    }
}

//! `/containers/{id}/attach`: the streams of a container's process, with what they said before.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::Services;
use super::hijack::{Client, hijack};
use super::request::Call;
use super::respond::Answer;
use crate::failure::Failure;
use crate::relay::{DetachKeys, End, relay};
use crate::services::containers::{Attachment, LogQuery, Streams, View, shim_failure};

pub async fn attach(services: &Arc<Services>, call: Call, id: &str) -> Answer {
    let session = Session::open(services, &call, id).await?;
    let tty = session.tty();
    Ok(hijack(&services.tasks, call, tty, move |client| async move {
        match client {
            Client::Upgraded(stream) => session.run(stream).await,
            Client::Body(stream) => session.run(stream).await,
        }
    }))
}

/// docker-py reads the head of the answer through a buffer that it then drops, with everything that came in the same
/// read. What a container said before is there at once, so it follows the head after a moment.
const READ_AHEAD: Duration = Duration::from_millis(20);

/// Where the live output comes from.
enum Live {
    Now(UnixStream),
    /// With the next start, or never.
    Later(oneshot::Receiver<UnixStream>),
}

/// One attached client.
pub struct Session {
    streams: Streams,
    live: Option<Live>,
    past: Option<mpsc::Receiver<std::io::Result<Bytes>>>,
    keys: Option<DetachKeys>,
    services: Arc<Services>,
    view: Arc<View>,
}

impl Session {
    /// What the query asks for. The output is kept from now on, though it is sent only when the session runs.
    pub async fn open(services: &Arc<Services>, call: &Call, id: &str) -> Result<Self, Failure> {
        let keys = DetachKeys::parse(call.query.text("detachKeys"))
            .map_err(|error| Failure::invalid(error.to_string()))?;
        let view = services.containers.view(id)?;
        let config = &view.record.config;
        let streams = Streams {
            stdin: call.query.flag("stdin") && config.open_stdin,
            stdout: call.query.flag("stdout"),
            stderr: call.query.flag("stderr"),
        };
        // The stream first, then the log up to now: what is written between is seen twice rather than never.
        let live = if call.query.flag("stream") {
            match services.containers.attach(id, streams).await? {
                Attachment::Later(stream) => Some(Live::Later(stream)),
                Attachment::Now(shim) => match shim.attach(None, streams).await {
                    Ok(stream) => Some(Live::Now(stream)),
                    Err(error) => {
                        // It may have ended in this moment: then there is nothing more to see.
                        let error = shim_failure(error);
                        tracing::debug!(container = view.record.short_id(), %error, "cannot attach");
                        None
                    }
                },
            }
        } else {
            None
        };
        let past = if call.query.flag("logs") {
            let query = LogQuery { stdout: streams.stdout, stderr: streams.stderr, ..LogQuery::default() };
            Some(services.containers.logs(id, query)?)
        } else {
            None
        };
        let keys = (config.tty && streams.stdin).then_some(keys);
        Ok(Self { streams, live, past, keys, services: services.clone(), view: view.clone() })
    }

    /// Whether its output is raw rather than frames.
    pub fn tty(&self) -> bool {
        self.view.record.config.tty
    }

    /// Serves the client until either side has ended.
    pub async fn run<C>(self, mut client: C)
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        let mut past = self.past;
        if past.is_some() {
            tokio::time::sleep(READ_AHEAD).await;
        }
        while let Some(Ok(batch)) = match &mut past {
            Some(past) => past.recv().await,
            None => None,
        } {
            if client.write_all(&batch).await.is_err() {
                return;
            }
        }
        let stream = match self.live {
            None => None,
            Some(Live::Now(stream)) => Some(stream),
            // Never started, or removed before: nothing comes.
            Some(Live::Later(stream)) => stream.await.ok(),
        };
        let Some(stream) = stream else {
            // The client may have gone.
            let _ = client.shutdown().await;
            return;
        };
        let end = relay(client, stream, self.streams.stdin, self.keys, std::future::ready(())).await;
        if end == End::Detached {
            let record = &self.view.record;
            self.services.events.publish("container", "detach", &record.id, record.event_attributes());
        }
    }
}

//! `/containers/{id}/exec` and `/exec/…`.

use std::sync::Arc;

use guest_api::exec::{ExecCreate, ExecCreated, ExecStart};
use guest_api::frame::{Header, Stream};
use tokio::io::AsyncWriteExt;

use super::Services;
use super::hijack::{Client, hijack};
use super::reframe::{Reframed, Shape};
use super::request::{Call, decode};
use super::respond::{self, Answer};
use crate::failure::Failure;
use crate::relay::{DetachKeys, End, relay};
use crate::services::exec::{Execs, Running};

pub async fn create(services: &Services, call: Call, container: &str) -> Answer {
    let config: ExecCreate = call.json().await?;
    let id = services.execs.create(container, config).await?;
    respond::json(201, &ExecCreated { id })
}

pub fn inspect(services: &Services, id: &str) -> Answer {
    respond::json(200, &services.execs.inspect(id)?)
}

pub async fn resize(services: &Services, call: &Call, id: &str) -> Answer {
    let (height, width) = super::containers::size(call)?;
    services.execs.resize(id, width, height).await?;
    Ok(respond::empty(200))
}

pub async fn start(services: &Arc<Services>, mut call: Call, id: &str) -> Answer {
    use http_body_util::BodyExt;
    // The body is read before the connection is taken over.
    let body = call.request.body_mut().collect().await;
    let body =
        body.map_err(|error| Failure::invalid(format!("cannot read the request body: {error}")))?.to_bytes();
    let start: ExecStart = decode(&body)?;
    let tty = services.execs.check_start(id)?;
    if start.detach {
        services.execs.start_detached(id).await?;
        return Ok(respond::empty(200));
    }
    let (_, keys) = services.execs.streams(id)?;
    let keys = DetachKeys::parse(&keys).map_err(|error| Failure::invalid(error.to_string()))?;
    let shape = match (tty, start.tty) {
        (true, false) => Shape::AddFrames,
        (false, true) => Shape::DropFrames,
        _ => Shape::AsItIs,
    };
    let (execs, id, raw) = (services.execs.clone(), id.to_owned(), start.tty);
    Ok(hijack(&services.tasks, call, raw, move |client| async move {
        let running = execs.start_attached(&id, start.console_size).await;
        match client {
            Client::Upgraded(stream) => attached(stream, shape, (&execs, &id), running, keys, raw).await,
            Client::Body(stream) => attached(stream, shape, (&execs, &id), running, keys, raw).await,
        }
    }))
}

/// Relays until the output has ended; the client hears of that only when the exit code is known.
async fn attached<C>(
    client: C,
    shape: Shape,
    (execs, id): (&Execs, &str),
    running: Result<Running, Failure>,
    keys: DetachKeys,
    raw: bool,
) where
    C: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    match running {
        Ok(running) => {
            let keys = (running.tty && running.stdin).then_some(keys);
            let client = Reframed::new(client, shape);
            let end = relay(client, running.stream, running.stdin, keys, running.end.known()).await;
            if end == End::Detached {
                execs.detached(id);
            }
        }
        Err(failure) => {
            // The connection is a stream already: the sentence goes into it, as dockerd does.
            let mut client = client;
            let text = format!("{}\r\n", failure.message);
            let header = Header { stream: Stream::Stdout, length: u32::try_from(text.len()).unwrap_or(0) };
            let frame = if raw { Vec::new() } else { header.encode().to_vec() };
            // The client may have gone.
            let _ = client.write_all(&[frame.as_slice(), text.as_bytes()].concat()).await;
            let _ = client.shutdown().await;
        }
    }
}

//! `/containers/{id}/attach/ws`: the same streams in binary frames of a websocket (RFC 6455), without Docker's own.

use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::Services;
use super::attach::Session;
use super::reframe::Unframer;
use super::request::Call;
use super::respond::{self, Answer};
use crate::failure::Failure;

/// Bytes between the session and the websocket, each way.
const PIPE_BYTES: usize = 64 << 10;

pub async fn attach(services: &Arc<Services>, call: Call, id: &str) -> Answer {
    let header =
        |name: &str| call.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let key = header("sec-websocket-key");
    if !header("upgrade").eq_ignore_ascii_case("websocket") || key.is_empty() {
        return Err(Failure::invalid("this request begins a websocket: it needs the headers of one"));
    }
    let accept = derive_accept_key(key.as_bytes());
    let session = Session::open(services, &call, id).await?;
    let tty = session.tty();
    let upgrade = hyper::upgrade::on(call.request);
    services.tasks.spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let socket =
                    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
                let (near, far) = tokio::io::duplex(PIPE_BYTES);
                // The end of either is the end of the other.
                tokio::join!(session.run(near), bridge(socket, far, tty));
            }
            // The client went before the answer reached it.
            Err(error) => tracing::debug!(%error, "a client left before its websocket began"),
        }
    });
    let mut response = respond::with_status(101, respond::empty_body());
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    let accept = HeaderValue::from_str(&accept)
        .map_err(|error| Failure::internal("cannot answer the websocket", &error))?;
    headers.insert("sec-websocket-accept", accept);
    Ok(response)
}

/// Copies between a websocket and a session.
async fn bridge<S>(socket: WebSocketStream<S>, session: DuplexStream, tty: bool)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (mut frames_out, mut frames_in) = socket.split();
    let (mut output, mut input) = tokio::io::split(session);
    let typed = async {
        while let Some(Ok(message)) = frames_in.next().await {
            let written = match &message {
                Message::Binary(bytes) => input.write_all(bytes).await,
                Message::Text(text) => input.write_all(text.as_bytes()).await,
                Message::Close(_) => break,
                // Pings are answered by the socket itself.
                _ => Ok(()),
            };
            if written.is_err() {
                break;
            }
        }
        // The session may have ended before its client.
        let _ = input.shutdown().await;
    };
    let shown = async {
        let mut unframer = Unframer::default();
        let mut buffer = vec![0; PIPE_BYTES];
        while let Ok(count @ 1..) = output.read(&mut buffer).await {
            let bytes = if tty { buffer[..count].to_vec() } else { unframer.payload(&buffer[..count]) };
            if !bytes.is_empty() && frames_out.send(Message::binary(bytes)).await.is_err() {
                return;
            }
        }
        // The client may have gone already.
        let _ = frames_out.close().await;
    };
    tokio::pin!(typed, shown);
    tokio::select! {
        () = &mut shown => {}
        () = &mut typed => shown.await,
    }
}

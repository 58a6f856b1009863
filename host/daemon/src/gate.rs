//! The gate: accepts Docker API connections, wakes the machine, and hands the very socket to the VM process.
//!
//! It never reads what the client says. When the machine cannot be had it answers for it: a Docker error with the
//! reason, so that any client prints the sentence.

use crate::supervisor::Handle;
use guest_protocol::port;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tracing::{debug, warn};

/// How long a client that is being refused may take to read why.
const REFUSAL_TIME_MAX: Duration = Duration::from_secs(5);
/// When accepting fails (no descriptors left), how long to wait before the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until the task is dropped.
pub(crate) async fn serve(listener: UnixListener, supervisor: Handle) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(admit(stream, supervisor.clone()));
            }
            Err(error) => {
                warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn admit(stream: UnixStream, supervisor: Handle) {
    match supervisor.ensure().await {
        Ok(()) => match stream.into_std() {
            Ok(stream) => supervisor.hand_over(port::API, OwnedFd::from(stream)).await,
            Err(error) => warn!(%error, "a connection cannot be handed over"),
        },
        Err(reason) => {
            let refused = tokio::time::timeout(REFUSAL_TIME_MAX, refuse(stream, &reason)).await;
            debug!(?refused, %reason, "a connection was refused");
        }
    }
}

/// Answers 503 with `reason`, then reads what the client still sends: closing at once would reset the connection and
/// take the answer with it.
async fn refuse(mut stream: UnixStream, reason: &str) -> std::io::Result<()> {
    let body =
        serde_json::json!({ "message": format!("the machine cannot be started: {reason}") }).to_string();
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await?;
    let mut rest = [0; 4096];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refused_client_reads_the_reason_as_a_docker_error() {
        let (mut client, gate) = UnixStream::pair().unwrap();
        let refusal = tokio::spawn(async move { refuse(gate, "there is no \"VM\" image").await });
        client.write_all(b"HEAD /_ping HTTP/1.1\r\nHost: docker\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        drop(client);
        refusal.await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.ends_with(r#"{"message":"the machine cannot be started: there is no \"VM\" image"}"#));
    }
}

//! The listener of one TCP port: accepts, and hands every connection on.

use std::time::Duration;

use guest_protocol::Transport;
use tokio::net::TcpListener;
use tracing::{debug, warn};

use crate::forwarder::{Origin, Sink};

/// How long a listener rests when the process is out of descriptors or memory: waiting is all that helps.
const REST: Duration = Duration::from_millis(100);

/// Accepts for ever.
pub(crate) async fn forward(listener: TcpListener, origin: Origin, sink: Sink) {
    let mut troubled = false;
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Once until it gets better: the loop would fill the log.
                if !std::mem::replace(&mut troubled, true) {
                    warn!(container = origin.container, %error, "connections to a published port cannot be accepted");
                }
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        troubled = false;
        // What goes through the machine has been gathered by its own TCP already.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%peer, %error, "a connection ended before it was handed on");
            continue;
        }
        match stream.into_std() {
            Ok(stream) => sink(origin.header(Transport::Tcp, peer), stream.into()),
            Err(error) => debug!(%peer, %error, "a connection ended before it was handed on"),
        }
    }
}

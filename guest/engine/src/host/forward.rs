//! Connections to published ports, as they come from the host: one stream each, with a header in front. Those that the
//! kernel knows the way of come by the machine's network and are nothing of ours.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use guest_protocol::Transport;
use guest_protocol::forward::Header;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpStream, UdpSocket};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_vsock::{VMADDR_CID_HOST, VsockListener};

use super::relay;

/// How long the host may take to send the header, which it sends at once.
const HEADER_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a container may take to accept: the kernel does it, unless its backlog is full.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(60);
/// Pause after a failed accept: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where a container is now.
pub trait Targets: Send + Sync + 'static {
    /// The address at which a container's port answers; `None` when it runs no more or is on no network.
    fn target(&self, container: &str, transport: Transport, container_port: u16) -> Option<SocketAddr>;
}

/// Takes connections until `stop`. Those that are open then belong to `tasks`.
pub async fn serve(
    listener: VsockListener,
    targets: Arc<dyn Targets>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                let (targets, stop) = (Arc::clone(&targets), stop.clone());
                tasks.spawn(async move {
                    let forwarded = tokio::select! {
                        forwarded = forward(stream, &*targets) => forwarded,
                        () = stop.cancelled() => return,
                    };
                    if let Err(error) = forwarded {
                        tracing::debug!("a forwarded connection ended: {error:#}");
                    }
                });
            }
            Ok((_, peer)) => tracing::warn!(cid = peer.cid(), "refused a connection that is not the host's"),
            Err(error) => {
                tracing::warn!(%error, "connections to published ports cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn forward<S>(mut stream: S, targets: &dyn Targets) -> anyhow::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let header = tokio::time::timeout(HEADER_TIME_MAX, read_header(&mut stream))
        .await
        .context("the host sent no header")??;
    let Header { container, transport, container_port, .. } = header;
    let target = targets.target(&container, transport, container_port).with_context(|| {
        format!("container {container} has no address for port {container_port}/{transport}")
    })?;
    match transport {
        Transport::Tcp => {
            let socket = tokio::time::timeout(CONNECT_TIME_MAX, TcpStream::connect(target))
                .await
                .map_err(io::Error::from)
                .flatten()
                .with_context(|| format!("cannot connect to {target} of container {container}"))?;
            socket.set_nodelay(true)?;
            relay::connection(stream, socket).await?;
        }
        Transport::Udp => {
            let any = match target {
                SocketAddr::V4(_) => "0.0.0.0:0",
                SocketAddr::V6(_) => "[::]:0",
            };
            let socket = UdpSocket::bind(any).await?;
            socket.connect(target).await?;
            relay::flow(stream, socket).await?;
        }
        Transport::Sctp => anyhow::bail!("sctp is not forwarded"),
    }
    Ok(())
}

async fn read_header(stream: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<Header> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let mut json = vec![0; Header::length(prefix)?];
    stream.read_exact(&mut json).await?;
    Ok(Header::decode(&json)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, UnixStream};

    struct One(SocketAddr);

    impl Targets for One {
        fn target(&self, container: &str, _: Transport, _: u16) -> Option<SocketAddr> {
            (container == "here").then_some(self.0)
        }
    }

    fn header(container: &str) -> Vec<u8> {
        let peer = "192.0.2.1:9".parse().unwrap();
        let header = Header {
            container: container.into(),
            transport: Transport::Tcp,
            container_port: 80,
            peer,
            landing: None,
        };
        header.encode().unwrap()
    }

    #[tokio::test]
    async fn the_header_finds_the_container_and_is_not_its_business() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let targets = One(listener.local_addr().unwrap());
        let (mut client, host) = UnixStream::pair().unwrap();
        let served = tokio::spawn(async move { forward(host, &targets).await });
        client.write_all(&header("here")).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        client.shutdown().await.unwrap();
        let (mut container, _) = listener.accept().await.unwrap();
        let mut said = String::new();
        container.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "hello");
        drop(container);
        served.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn strangers_and_nonsense_are_hung_up_on() {
        let targets = One("127.0.0.1:1".parse().unwrap());
        for (bytes, part) in [
            (header("elsewhere"), "no address for port 80/tcp"),
            (header("here"), "cannot connect to 127.0.0.1:1"),
            (b"GET / HTTP/1.1\r\n".to_vec(), "at most 1024"),
            (b"\x02\0\0\0{}".to_vec(), "something else than a header"),
        ] {
            let (mut client, host) = UnixStream::pair().unwrap();
            client.write_all(&bytes).await.unwrap();
            let error = format!("{:#}", forward(host, &targets).await.unwrap_err());
            assert!(error.contains(part), "{error}");
        }
    }
}

//! Copies between a stream from the host and a container's socket.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use guest_protocol::forward::{DatagramDecoder, encode_datagram};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UdpSocket};

/// Bytes moved at once.
const BUFFER_BYTES: usize = 64 << 10;
/// No datagram is longer.
const DATAGRAM_BYTES_MAX: usize = 65_536;

/// Copies both ways until both directions have ended. A half-close is passed on; so is a reset: to the container as one,
/// to the host by closing the stream in the middle.
pub async fn connection<S>(host: S, mut container: TcpStream) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut host = Frank { stream: host, finished: false };
    let copied = copy_bidirectional_with_sizes(&mut host, &mut container, BUFFER_BYTES, BUFFER_BYTES).await;
    if copied.is_err() {
        socket2::SockRef::from(&container).set_linger(Some(Duration::ZERO))?;
    }
    copied.map(drop)
}

/// A stream that tells a reset from an end. A vsock stream that the other side has reset reads as one that has ended;
/// but one that has ended still takes what is written.
struct Frank<S> {
    stream: S,
    /// Nothing more will be written.
    finished: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Frank<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() == before
            && !self.finished
            && let Poll::Ready(Err(_)) = Pin::new(&mut self.stream).poll_write(context, &[])
        {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Frank<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finished = true;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Copies datagrams both ways until the host hangs up: it keeps the time of silence.
pub async fn flow<S>(host: S, container: UdpSocket) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let (mut reader, mut writer) = tokio::io::split(host);
    let inward = async {
        let (mut decoder, mut buffer) = (DatagramDecoder::default(), vec![0; DATAGRAM_BYTES_MAX]);
        loop {
            let count = reader.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            decoder.push(&buffer[..count]);
            while let Some(datagram) = decoder.next_datagram() {
                lose(container.send(datagram).await)?;
            }
        }
    };
    let outward = async {
        let (mut buffer, mut output) = (vec![0; DATAGRAM_BYTES_MAX], Vec::new());
        loop {
            let Some(count) = lose(container.recv(&mut buffer).await)? else { continue };
            output.clear();
            encode_datagram(&buffer[..count], &mut output).map_err(io::Error::other)?;
            writer.write_all(&output).await?;
        }
    };
    tokio::select! {
        ended = inward => ended,
        ended = outward => ended,
    }
}

/// A datagram that finds nobody is lost, as on any network: the next one may find somebody.
fn lose<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, UnixStream};

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn an_answer_survives_the_half_close_of_the_question() {
        let (mut client, host) = UnixStream::pair().unwrap();
        let (container, mut server) = pair().await;
        let relayed = tokio::spawn(connection(host, container));
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut said = String::new();
        server.read_to_string(&mut said).await.unwrap();
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let mut heard = String::new();
        client.read_to_string(&mut heard).await.unwrap();
        assert_eq!((said.as_str(), heard.as_str()), ("question", "answer"));
        relayed.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_reset_of_the_container_ends_the_hosts_stream() {
        let (mut client, host) = UnixStream::pair().unwrap();
        let (container, server) = pair().await;
        let relayed = tokio::spawn(connection(host, container));
        socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
        drop(server);
        assert!(relayed.await.unwrap().is_err());
        assert_eq!(client.read(&mut [0; 8]).await.unwrap_or(0), 0);
    }

    #[tokio::test]
    async fn a_host_that_is_gone_is_a_reset_to_the_container() {
        let (mut client, host) = UnixStream::pair().unwrap();
        let (container, mut server) = pair().await;
        let relayed = tokio::spawn(connection(host, container));
        client.write_all(b"half a quest").await.unwrap();
        let mut heard = [0; 12];
        server.read_exact(&mut heard).await.unwrap();
        drop(client);
        let error = server.read(&mut heard).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(relayed.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_host_that_leaves_after_the_answer_is_none() {
        let (mut client, host) = UnixStream::pair().unwrap();
        let (container, mut server) = pair().await;
        let relayed = tokio::spawn(connection(host, container));
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        drop(client);
        assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
        relayed.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn datagrams_keep_their_edges() {
        let (client, host) = UnixStream::pair().unwrap();
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let container = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        container.connect(server.local_addr().unwrap()).await.unwrap();
        let relayed = tokio::spawn(flow(host, container));
        let (mut reader, mut writer) = client.into_split();
        let mut output = Vec::new();
        for datagram in [&b"one"[..], b"", b"three"] {
            encode_datagram(datagram, &mut output).unwrap();
        }
        writer.write_all(&output).await.unwrap();
        let mut buffer = [0; 64];
        for expected in [&b"one"[..], b"", b"three"] {
            let (count, peer) = server.recv_from(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..count], expected);
            server.send_to(&buffer[..count], peer).await.unwrap();
        }
        let mut back = vec![0; output.len()];
        reader.read_exact(&mut back).await.unwrap();
        assert_eq!(back, output);
        drop((reader, writer));
        relayed.await.unwrap().unwrap();
    }
}

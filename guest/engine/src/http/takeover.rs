//! Streams for clients that do not ask for an upgrade.
//!
//! Without `Upgrade`, dockerd answers an attach or an exec's start with `200 OK` and takes the connection over all the
//! same. hyper takes connections over with 101 only. So this sits between it and the socket: it adds the header to such
//! a request, and makes the 101 that comes back a 200. Only the first request of a connection is looked at: clients
//! that hijack use a fresh one.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use guest_api::frame::RAW;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest head of a request that is looked at.
const HEAD_MAX: usize = 16 << 10;

/// A connection whose first request may have to be changed.
pub struct Takeover<S> {
    stream: S,
    input: Input,
    output: Output,
}

enum Input {
    /// The head of the first request, as far as it has come.
    Head(Vec<u8>),
    /// To be handed on from this place.
    Ready(Vec<u8>, usize),
    Through,
}

enum Output {
    /// The head of the answer is to be changed; as far as it has come.
    Head(Vec<u8>),
    /// To be written from this place.
    Ready(Vec<u8>, usize),
    Through,
}

impl<S> Takeover<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, input: Input::Head(Vec::new()), output: Output::Through }
    }
}

/// Where a head ends, with its empty line.
fn head_length(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// Whether more of the head must be seen to decide.
fn undecided(bytes: &[u8]) -> bool {
    let start = b"POST ";
    bytes.len() < HEAD_MAX
        && head_length(bytes).is_none()
        && bytes.iter().zip(start).all(|(byte, wanted)| byte == wanted)
}

/// The request with the header added, if it is one that is taken over and has none. Fuzzed.
pub fn with_upgrade(bytes: &[u8]) -> Option<Vec<u8>> {
    let length = head_length(bytes)?;
    let head = std::str::from_utf8(&bytes[..length]).ok()?;
    let (line, headers) = head.split_once("\r\n")?;
    let mut words = line.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let path = target.split('?').next()?;
    let mut segments = path.rsplit('/');
    let streams = matches!(
        (segments.next()?, segments.next()?, segments.next()?),
        ("attach", _, "containers") | ("start", _, "exec")
    );
    let asks = headers
        .lines()
        .any(|header| header.split_once(':').is_some_and(|(name, _)| name.eq_ignore_ascii_case("upgrade")));
    if method != "POST" || version != "HTTP/1.1" || !streams || asks {
        return None;
    }
    let mut changed = bytes[..length - 2].to_vec();
    changed.extend_from_slice(b"Upgrade: tcp\r\n\r\n");
    changed.extend_from_slice(&bytes[length..]);
    Some(changed)
}

/// The answer as dockerd gives it to such a client; any other than a 101 stays as it is.
fn without_upgrade(bytes: &[u8]) -> Vec<u8> {
    let length = head_length(bytes).unwrap_or(bytes.len());
    let (head, rest) = bytes.split_at(length);
    if !head.starts_with(b"HTTP/1.1 101") {
        return bytes.to_vec();
    }
    let mut changed = b"HTTP/1.1 200 OK\r\n".to_vec();
    for line in String::from_utf8_lossy(head).split("\r\n").skip(1).filter(|line| !line.is_empty()) {
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        match name.as_str() {
            "connection" | "upgrade" => continue,
            "content-type" => changed.extend_from_slice(format!("Content-Type: {RAW}").as_bytes()),
            _ => changed.extend_from_slice(line.as_bytes()),
        }
        changed.extend_from_slice(b"\r\n");
    }
    changed.extend_from_slice(b"\r\n");
    changed.extend_from_slice(rest);
    changed
}

impl<S: AsyncRead + Unpin> AsyncRead for Takeover<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match &mut this.input {
                Input::Through => return Pin::new(&mut this.stream).poll_read(context, buffer),
                Input::Ready(bytes, at) => {
                    let count = buffer.remaining().min(bytes.len() - *at);
                    buffer.put_slice(&bytes[*at..*at + count]);
                    *at += count;
                    if *at == bytes.len() {
                        this.input = Input::Through;
                    }
                    return Poll::Ready(Ok(()));
                }
                Input::Head(head) => {
                    let mut space = [0; 4096];
                    let mut more = ReadBuf::new(&mut space);
                    ready!(Pin::new(&mut this.stream).poll_read(context, &mut more))?;
                    let ended = more.filled().is_empty();
                    head.extend_from_slice(more.filled());
                    if ended && head.is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                    if !ended && undecided(head) {
                        continue;
                    }
                    let head = std::mem::take(head);
                    this.input = match with_upgrade(&head) {
                        Some(changed) => {
                            this.output = Output::Head(Vec::new());
                            Input::Ready(changed, 0)
                        }
                        None => Input::Ready(head, 0),
                    };
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> Takeover<S> {
    /// Writes what was held back.
    fn poll_held(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Output::Ready(bytes, at) = &mut self.output {
            if *at == bytes.len() {
                self.output = Output::Through;
                break;
            }
            let count = ready!(Pin::new(&mut self.stream).poll_write(context, &bytes[*at..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *at += count;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Takeover<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Output::Head(head) = &mut this.output {
            head.extend_from_slice(bytes);
            if head_length(head).is_some() {
                let changed = without_upgrade(head);
                this.output = Output::Ready(changed, 0);
            }
            return Poll::Ready(Ok(bytes.len()));
        }
        ready!(this.poll_held(context))?;
        Pin::new(&mut this.stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_held(context))?;
        Pin::new(&mut this.stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_held(context))?;
        Pin::new(&mut this.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const ATTACH: &[u8] = b"POST /v1.40/containers/web/attach?stream=1 HTTP/1.1\r\nHost: x\r\n\r\ninput";

    #[test]
    fn only_streams_without_the_header_are_changed() {
        let changed = with_upgrade(ATTACH).unwrap();
        assert!(changed.ends_with(b"Host: x\r\nUpgrade: tcp\r\n\r\ninput"));
        assert_eq!(with_upgrade(&changed), None);
        assert!(with_upgrade(b"POST /exec/1/start HTTP/1.1\r\n\r\n").is_some());
        for other in
            ["GET /containers/web/attach", "POST /containers/web/start", "POST /containers/web/attach/ws"]
        {
            assert_eq!(with_upgrade(format!("{other} HTTP/1.1\r\n\r\n").as_bytes()), None, "{other}");
        }
        assert_eq!(with_upgrade(b"POST /containers/web/attach HTTP/1.0\r\n\r\n"), None);
    }

    #[test]
    fn the_answer_is_dockerds() {
        let answer = b"HTTP/1.1 101 UPGRADED\r\nconnection: Upgrade\r\nupgrade: tcp\r\ncontent-type: x\r\ndate: now\r\n\r\nout";
        let expected = format!("HTTP/1.1 200 OK\r\nContent-Type: {RAW}\r\ndate: now\r\n\r\nout");
        assert_eq!(without_upgrade(answer), expected.as_bytes());
        let refusal = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\n";
        assert_eq!(without_upgrade(refusal), refusal);
    }

    #[tokio::test]
    async fn a_connection_passes_through_both_ways() {
        let (near, mut far) = tokio::io::duplex(7);
        let mut takeover = Takeover::new(near);
        let client = tokio::spawn(async move {
            far.write_all(ATTACH).await.unwrap();
            let mut answer = vec![0; 70];
            far.read_exact(&mut answer).await.unwrap();
            (answer, far)
        });
        let mut request = vec![0; ATTACH.len() + 14];
        takeover.read_exact(&mut request).await.unwrap();
        assert_eq!(request, with_upgrade(ATTACH).unwrap());
        takeover.write_all(b"HTTP/1.1 101 UPGRADED\r\nupgrade: tcp\r\n").await.unwrap();
        takeover.write_all(b"content-type: y\r\n\r\nab").await.unwrap();
        takeover.flush().await.unwrap();
        let more = tokio::spawn(async move {
            takeover.write_all(b"cdefghijklm").await.unwrap();
            takeover.shutdown().await.unwrap();
        });
        let (mut answer, mut far) = client.await.unwrap();
        far.read_to_end(&mut answer).await.unwrap();
        more.await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n") && answer.ends_with(b"\r\n\r\nabcdefghijklm"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = with_upgrade(&bytes);
            let _ = without_upgrade(&bytes);
            let _ = undecided(&bytes);
        }
    }
}

//! Takes request targets as people type them: `curl 'http://…?filters={"status":["running"]}'` has quotes in it, which
//! Go's server takes and ours would refuse without a word. In the first line of a connection they are written as `%22`
//! and the like before anybody reads it. Clients that reuse a connection are programs, and programs encode.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest first line looked at; what is longer is refused by whoever reads it.
const LINE_MAX_BYTES: usize = 64 << 10;

/// A connection whose first line is made readable.
pub struct Lenient<S> {
    stream: S,
    line: Line,
}

enum Line {
    /// Its bytes so far, encoded.
    Reading {
        seen: usize,
        encoded: Vec<u8>,
    },
    /// What of it has not been read yet.
    Handing {
        encoded: Vec<u8>,
        at: usize,
    },
    Done,
}

impl<S> Lenient<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, line: Line::Reading { seen: 0, encoded: Vec::new() } }
    }
}

/// Adds bytes of the first line, up to its end; the rest as it is. Tells whether the end was among them.
fn encode(bytes: &[u8], encoded: &mut Vec<u8>) -> bool {
    let (line, rest) = match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => bytes.split_at(end),
        None => (bytes, &[][..]),
    };
    for &byte in line {
        match byte {
            b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' | 0x80.. => {
                encoded.extend_from_slice(format!("%{byte:02X}").as_bytes());
            }
            _ => encoded.push(byte),
        }
    }
    encoded.extend_from_slice(rest);
    !rest.is_empty()
}

impl<S: AsyncRead + Unpin> AsyncRead for Lenient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            match &mut this.line {
                Line::Done => return Pin::new(&mut this.stream).poll_read(cx, buf),
                Line::Handing { encoded, at } => {
                    let count = buf.remaining().min(encoded.len() - *at);
                    buf.put_slice(&encoded[*at..*at + count]);
                    *at += count;
                    if *at == encoded.len() {
                        this.line = Line::Done;
                    }
                    return Poll::Ready(Ok(()));
                }
                Line::Reading { seen, encoded } => {
                    let mut bytes = [0; 4096];
                    let mut chunk = ReadBuf::new(&mut bytes);
                    ready!(Pin::new(&mut this.stream).poll_read(cx, &mut chunk))?;
                    *seen += chunk.filled().len();
                    let ended = encode(chunk.filled(), encoded);
                    if ended || chunk.filled().is_empty() || *seen > LINE_MAX_BYTES {
                        this.line = Line::Handing { encoded: std::mem::take(encoded), at: 0 };
                    }
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Lenient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

impl<S: AsFd> AsFd for Lenient<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What is read of what a client writes in pieces.
    async fn read(pieces: &[&[u8]]) -> Vec<u8> {
        let (ours, mut theirs) = tokio::io::duplex(16);
        let writing = async {
            for piece in pieces {
                theirs.write_all(piece).await.unwrap();
            }
            drop(theirs);
        };
        let mut all = Vec::new();
        let mut lenient = Lenient::new(ours);
        let (_, read) = tokio::join!(writing, lenient.read_to_end(&mut all));
        read.unwrap();
        all
    }

    #[tokio::test]
    async fn only_the_first_line_is_encoded() {
        let all =
            read(&[b"GET /x?f={\"a\":[\"\xc3\xa9\"]} HTT", b"P/1.1\r\nA: \"b\"\r\n\r\n{\"body\"}\n"]).await;
        assert_eq!(all, b"GET /x?f=%7B%22a%22:[%22%C3%A9%22]%7D HTTP/1.1\r\nA: \"b\"\r\n\r\n{\"body\"}\n");
    }

    #[tokio::test]
    async fn a_line_without_end_is_handed_on() {
        assert_eq!(read(&[b"GET"]).await, b"GET");
        assert_eq!(read(&[]).await, b"");
        let long = vec![b'a'; LINE_MAX_BYTES * 2];
        assert_eq!(read(&[&long]).await.len(), long.len());
    }
}

//! Frames for a client that expects them where there are none, and none where there are some.
//!
//! Whether an exec's stream has frames is the client's word at its start, not the exec's own setting: docker-py starts
//! execs with a terminal without saying so again.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use guest_api::frame::{HEADER_LENGTH, Header, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is to be done to the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    AsItIs,
    AddFrames,
    DropFrames,
}

/// A client whose output is changed.
pub struct Reframed<C> {
    client: C,
    shape: Shape,
    unframer: Unframer,
    held: Vec<u8>,
    written: usize,
}

impl<C> Reframed<C> {
    pub fn new(client: C, shape: Shape) -> Self {
        Self { client, shape, unframer: Unframer::default(), held: Vec::new(), written: 0 }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Reframed<C> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().client).poll_read(context, buffer)
    }
}

impl<C: AsyncWrite + Unpin> Reframed<C> {
    /// Writes what is held.
    fn poll_held(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.held.len() {
            let count = ready!(Pin::new(&mut self.client).poll_write(context, &self.held[self.written..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        self.held.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Reframed<C> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_held(context))?;
        match this.shape {
            Shape::AsItIs => return Pin::new(&mut this.client).poll_write(context, bytes),
            Shape::AddFrames => {
                let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                this.held.extend_from_slice(&Header { stream: Stream::Stdout, length }.encode());
                this.held.extend_from_slice(bytes);
            }
            Shape::DropFrames => this.held = this.unframer.payload(bytes),
        }
        // What does not go out now goes with the next write or flush.
        if let Poll::Ready(Err(error)) = this.poll_held(context) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_held(context))?;
        Pin::new(&mut this.client).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_held(context))?;
        Pin::new(&mut this.client).poll_shutdown(context)
    }
}

/// Takes the headers out of a multiplexed stream, however it is cut.
#[derive(Default)]
pub struct Unframer {
    header: Vec<u8>,
    left: usize,
}

impl Unframer {
    /// What of these bytes is payload.
    pub fn payload(&mut self, mut bytes: &[u8]) -> Vec<u8> {
        let mut payload = Vec::with_capacity(bytes.len());
        while !bytes.is_empty() {
            if self.left > 0 {
                let (now, later) = bytes.split_at(bytes.len().min(self.left));
                payload.extend_from_slice(now);
                self.left -= now.len();
                bytes = later;
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(HEADER_LENGTH - self.header.len()));
            self.header.extend_from_slice(now);
            bytes = later;
            if let Ok(header) = <[u8; HEADER_LENGTH]>::try_from(self.header.as_slice()) {
                self.left = Header::decode(header).map_or(0, |header| header.length as usize);
                self.header.clear();
            }
        }
        payload
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    proptest! {
        #[test]
        fn payloads_come_out_whole_however_frames_are_cut(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..10),
            cut in 1_usize..20,
        ) {
            let mut stream = Vec::new();
            for part in &parts {
                let header = Header { stream: Stream::Stderr, length: part.len() as u32 };
                stream.extend_from_slice(&header.encode());
                stream.extend_from_slice(part);
            }
            let mut unframer = Unframer::default();
            let payload: Vec<u8> = stream.chunks(cut).flat_map(|chunk| unframer.payload(chunk)).collect();
            prop_assert_eq!(payload, parts.concat());
        }
    }

    #[tokio::test]
    async fn a_terminals_bytes_are_framed_for_a_client_that_expects_frames() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut client = Reframed::new(near, Shape::AddFrames);
        client.write_all(b"abc").await.unwrap();
        client.write_all(b"d").await.unwrap();
        client.shutdown().await.unwrap();
        let mut seen = Vec::new();
        far.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"\x01\0\0\0\0\0\0\x03abc\x01\0\0\0\0\0\0\x01d");
        let (near, mut far) = tokio::io::duplex(3);
        let reading = tokio::spawn(async move {
            let mut seen = Vec::new();
            far.read_to_end(&mut seen).await.unwrap();
            seen
        });
        let mut client = Reframed::new(near, Shape::DropFrames);
        client.write_all(b"\x01\0\0\0\0\0\0\x05hello").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(reading.await.unwrap(), b"hello");
    }
}

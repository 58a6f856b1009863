//! Archives on their way to a client: a writer whose bytes go out in pieces. It blocks while the client is slow, and fails
//! once it has gone.

use std::io::{self, Write};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

/// Pieces that may wait for a slow client.
pub const WAITING: usize = 4;

/// The client's end.
pub type Pieces = mpsc::Receiver<io::Result<Bytes>>;

/// Bytes of one piece: few wake-ups, and little in memory.
const PIECE_BYTES: usize = 256 << 10;

/// For threads outside of the runtime.
pub struct PieceWriter {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    buffer: BytesMut,
}

impl PieceWriter {
    pub fn new(pieces: mpsc::Sender<io::Result<Bytes>>) -> Self {
        Self { pieces, buffer: BytesMut::new() }
    }

    /// Breaks the stream off.
    pub fn fail(self, error: io::Error) {
        // The client may have gone: then there is nobody to tell.
        let _ = self.pieces.blocking_send(Err(error));
    }

    fn send(&mut self) -> io::Result<()> {
        let piece = self.buffer.split().freeze();
        self.pieces.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.capacity() == 0 {
            self.buffer.reserve(PIECE_BYTES);
        }
        let length = bytes.len().min(PIECE_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..length]);
        if self.buffer.len() >= PIECE_BYTES {
            self.send()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.send() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_arrives_in_pieces() {
        let (sender, mut pieces) = mpsc::channel(1);
        let data: Vec<u8> = (0..600 << 10).map(|index| (index % 251) as u8).collect();
        let expected = data.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let mut writer = PieceWriter::new(sender);
            writer.write_all(&data).unwrap();
            writer.flush().unwrap();
            writer.fail(io::Error::other("the end"));
        });
        let (mut arrived, mut failed) = (Vec::new(), false);
        while let Some(piece) = pieces.recv().await {
            match piece {
                Ok(piece) => arrived.extend_from_slice(&piece),
                Err(_) => failed = true,
            }
        }
        writer.await.unwrap();
        assert!(arrived == expected && failed);
    }

    #[tokio::test]
    async fn a_client_that_has_gone_ends_the_writing() {
        let (sender, pieces) = mpsc::channel(1);
        drop(pieces);
        let written = tokio::task::spawn_blocking(move || PieceWriter::new(sender).write_all(&[0; 1 << 20]));
        assert_eq!(written.await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}

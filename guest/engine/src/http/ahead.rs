//! The body of a request as a reader, for a thread outside of the runtime.
//!
//! Clients send pieces of some kilobytes. Handed over one by one, each would cost two switches of threads, which is more
//! than what is done with it: so the connection's side runs ahead, and the reader takes all that is there at once.

use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use hyper::body::Body;
use tokio::sync::Notify;

/// No further ahead than this many bytes, and one piece.
const AHEAD_MAX_BYTES: usize = 4 << 20;

/// Reads what a task has taken from the connection. It fails when the client goes before the end.
pub struct ReadAhead {
    shared: Arc<Shared>,
    /// Taken, and not yet read.
    taken: std::vec::IntoIter<Bytes>,
    piece: Bytes,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// For the reader: there is something, or the end.
    filled: Condvar,
    /// For the task: there is room, or nobody reads.
    emptied: Notify,
}

#[derive(Default)]
struct State {
    pieces: Vec<Bytes>,
    bytes: usize,
    end: Option<io::Result<()>>,
    reader_has_gone: bool,
}

impl Shared {
    /// Nothing can panic while it is held.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a piece as soon as there is room; false when nobody reads any more.
    async fn add(&self, piece: Bytes) -> bool {
        loop {
            {
                let mut state = self.state();
                if state.reader_has_gone {
                    return false;
                }
                if state.bytes < AHEAD_MAX_BYTES {
                    state.bytes += piece.len();
                    state.pieces.push(piece);
                    self.filled.notify_one();
                    return true;
                }
            }
            self.emptied.notified().await;
        }
    }

    fn end(&self, end: io::Result<()>) {
        self.state().end = Some(end);
        self.filled.notify_one();
    }
}

impl ReadAhead {
    /// Begins to take `body` from its connection. Must be called within the runtime.
    pub fn new<B>(mut body: B) -> Self
    where
        B: Body<Data = Bytes, Error: std::error::Error + Send + Sync> + Unpin + Send + 'static,
    {
        let shared = Arc::new(Shared::default());
        let pump = shared.clone();
        tokio::spawn(async move {
            while let Some(frame) = body.frame().await {
                match frame.map(hyper::body::Frame::into_data) {
                    Ok(Ok(data)) => {
                        if !pump.add(data).await {
                            return;
                        }
                    }
                    // Trailers mean nothing here.
                    Ok(Err(_)) => {}
                    Err(error) => return pump.end(Err(io::Error::other(error))),
                }
            }
            pump.end(Ok(()));
        });
        Self { shared, taken: Vec::new().into_iter(), piece: Bytes::new() }
    }

    /// All that has come, waiting for something to come; nothing at the end.
    fn take_all(&self) -> io::Result<Vec<Bytes>> {
        let mut state = self.shared.state();
        loop {
            if !state.pieces.is_empty() {
                state.bytes = 0;
                let pieces = std::mem::take(&mut state.pieces);
                self.shared.emptied.notify_one();
                return Ok(pieces);
            }
            match state.end.take() {
                Some(Ok(())) => {
                    state.end = Some(Ok(()));
                    return Ok(Vec::new());
                }
                Some(Err(error)) => {
                    state.end = Some(Err(io::Error::new(error.kind(), error.to_string())));
                    return Err(error);
                }
                None => state = self.shared.filled.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl Read for ReadAhead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            if let Some(piece) = self.taken.next() {
                self.piece = piece;
                continue;
            }
            let taken = self.take_all()?;
            if taken.is_empty() {
                return Ok(0);
            }
            self.taken = taken.into_iter();
        }
        let count = self.piece.len().min(buffer.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.shared.state().reader_has_gone = true;
        self.shared.emptied.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use futures_util::stream::{self, StreamExt};
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use proptest::prelude::*;

    use super::*;

    fn body<E>(pieces: Vec<Result<Bytes, E>>) -> impl Body<Data = Bytes, Error = E> + Unpin + Send + 'static
    where
        E: Send + 'static,
    {
        StreamBody::new(stream::iter(pieces).map(|piece| piece.map(Frame::data)))
    }

    proptest! {
        #[test]
        fn what_is_sent_is_read(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..20),
            step in 1_usize..20,
        ) {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
            let wanted = pieces.concat();
            let sent = pieces.into_iter().map(|piece| Ok::<_, Infallible>(Bytes::from(piece))).collect();
            let mut reader = { let _inside = runtime.enter(); ReadAhead::new(body(sent)) };
            let mut read = Vec::new();
            let mut buffer = vec![0; step];
            loop {
                match reader.read(&mut buffer).unwrap() {
                    0 => break,
                    count => read.extend_from_slice(&buffer[..count]),
                }
            }
            prop_assert_eq!(read, wanted);
            prop_assert_eq!(reader.read(&mut buffer).unwrap(), 0);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_broken_body_is_an_error_behind_what_came_before_it() {
        let sent = vec![Ok(Bytes::from_static(b"start")), Err(io::Error::other("gone"))];
        let mut reader = ReadAhead::new(body(sent));
        let (read, error) = tokio::task::spawn_blocking(move || {
            let mut read = Vec::new();
            let error = reader.read_to_end(&mut read).unwrap_err();
            (read, error)
        })
        .await
        .unwrap();
        assert_eq!((read.as_slice(), error.to_string().as_str()), (b"start".as_slice(), "gone"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn it_runs_ahead_so_far_and_ends_with_its_reader() {
        const PIECE_BYTES: usize = 1 << 20;
        let sent = Arc::new(AtomicUsize::new(0));
        let counted = sent.clone();
        let endless = stream::repeat_with(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Infallible>(Frame::data(Bytes::from(vec![0; PIECE_BYTES])))
        });
        let reader = ReadAhead::new(StreamBody::new(endless));
        let shared = Arc::downgrade(&reader.shared);
        let full = || shared.upgrade().is_some_and(|shared| shared.state().bytes >= AHEAD_MAX_BYTES);
        while !full() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(reader);
        while shared.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // One more than there is room for waits outside.
        assert!(sent.load(Ordering::SeqCst) <= AHEAD_MAX_BYTES / PIECE_BYTES + 1);
    }
}

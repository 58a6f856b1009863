//! Logs on their way home: lines of the engine and of the agent, kept in memory until the host takes them.
//!
//! The host's end may be away (before the session, while the daemon restarts); then the newest lines are kept, the
//! oldest dropped, and the gap is named. Warnings also go to the console, which the host keeps in a file, because it
//! works when nothing else does; it is slow, so little else does.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guest_protocol::port;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio_vsock::{VsockAddr, VsockStream};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::backoff::Backoff;

/// Bytes kept while nobody takes them: minutes of a busy engine, and nothing beside the machine's memory.
const CAPACITY: usize = 1 << 20;

/// A longer line is cut into several.
const LINE_MAX: usize = 8 << 10;

/// Lines in memory, oldest first.
#[derive(Debug, Default)]
struct Lines {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines dropped since the last take.
    lost: u64,
}

impl Lines {
    fn push(&mut self, line: Vec<u8>) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.bytes > CAPACITY {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes -= oldest.len();
            self.lost += 1;
        }
    }

    /// Some of the oldest lines, joined.
    fn take(&mut self) -> Option<Vec<u8>> {
        const CHUNK: usize = 32 << 10;
        let mut chunk = Vec::new();
        if self.lost > 0 {
            chunk.extend_from_slice(format!("({} lines were lost here)\n", self.lost).as_bytes());
            self.lost = 0;
        }
        while let Some(line) = self.lines.pop_front_if(|line| chunk.len() + line.len() <= CHUNK) {
            self.bytes -= line.len();
            chunk.extend_from_slice(&line);
        }
        (!chunk.is_empty()).then_some(chunk)
    }
}

/// The machine's log. Clones write to the same one.
#[derive(Clone, Debug, Default)]
pub struct Log {
    lines: Arc<Mutex<Lines>>,
    news: Arc<Notify>,
    /// What processes print goes to the console as well.
    echo: bool,
}

impl Log {
    /// A log that `tracing` writes to, as does the console from warnings on (from everything when `debug`).
    pub fn install(debug: bool) -> Self {
        let log = Self { echo: debug, ..Self::default() };
        let kept = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
        let shown = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
        // Other people's crates explain themselves at length.
        let ours = tracing_subscriber::filter::filter_fn(|event| {
            event.target().starts_with("init") || *event.level() <= tracing::Level::WARN
        });
        let journal = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(log.clone());
        let console = tracing_subscriber::fmt::layer().with_ansi(false).without_time().with_writer(Console);
        tracing_subscriber::registry()
            .with(ours)
            .with(journal.with_filter(kept))
            .with(console.with_filter(shown))
            .init();
        log
    }

    /// Adds a line, without its end.
    pub fn push(&self, line: &[u8]) {
        let mut owned = Vec::with_capacity(line.len() + 1);
        owned.extend_from_slice(line);
        owned.push(b'\n');
        self.lock().push(owned);
        self.news.notify_one();
    }

    /// Adds every line that comes through a pipe, until its last writer has gone. `each` sees them first.
    pub async fn follow(self, mut pipe: pipe::Receiver, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(LINE_MAX);
        loop {
            let ended = pipe.read_buf(&mut buffer).await? == 0;
            let mut rest = buffer.as_slice();
            while let Some((line, after)) = next_line(rest, ended) {
                each(line);
                self.push(line);
                if self.echo {
                    on_console(&String::from_utf8_lossy(line));
                }
                rest = after;
            }
            if ended {
                return Ok(());
            }
            let kept = rest.len();
            buffer.drain(..buffer.len() - kept);
        }
    }

    /// Sends lines to the host, for ever.
    pub async fn ship(self) {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        loop {
            // Why it cannot be reached is the session's to say, which has the same way to go.
            if let Ok(stream) = VsockStream::connect(VsockAddr::new(port::HOST_CID, port::LOG)).await {
                backoff.succeeded();
                self.ship_over(stream).await;
            }
            tokio::time::sleep(backoff.failed()).await;
        }
    }

    /// Sends lines until the stream fails. The chunk on its way then may be lost or cut: it is the host's process
    /// that has ended.
    async fn ship_over(&self, mut stream: impl AsyncWriteExt + Unpin) {
        loop {
            let chunk = self.lock().take();
            match chunk {
                Some(chunk) => {
                    if stream.write_all(&chunk).await.is_err() {
                        return;
                    }
                }
                None => self.news.notified().await,
            }
        }
    }

    /// Waits until everything has been handed to the stream, for at most `limit`.
    pub async fn drain(&self, limit: Duration) {
        let deadline = tokio::time::Instant::now() + limit;
        while !self.lock().lines.is_empty() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        // A panic powers the machine off; until then the lines are as good as before.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Splits the first line off; at the end of the stream the rest is one too.
fn next_line(bytes: &[u8], ended: bool) -> Option<(&[u8], &[u8])> {
    match bytes.iter().take(LINE_MAX).position(|byte| *byte == b'\n') {
        Some(end) => Some((&bytes[..end], &bytes[end + 1..])),
        None if bytes.len() >= LINE_MAX => Some(bytes.split_at(LINE_MAX)),
        None if ended && !bytes.is_empty() => Some((bytes, &[])),
        None => None,
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter(self)
    }
}

/// Takes one formatted event at a time, as `tracing` writes them.
#[derive(Debug)]
pub struct LineWriter<'a>(&'a Log);

impl Write for LineWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes.strip_suffix(b"\n").unwrap_or(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The console, opened for each message: it is whatever the kernel says it is now.
#[derive(Clone, Copy, Debug)]
struct Console;

impl MakeWriter<'_> for Console {
    type Writer = Box<dyn Write>;

    fn make_writer(&self) -> Box<dyn Write> {
        match File::options().write(true).open("/dev/console") {
            Ok(console) => Box::new(console),
            Err(_no_console) => Box::new(io::sink()),
        }
    }
}

/// Puts a line on the console: for what must be seen when the host cannot be told.
pub fn on_console(line: &str) {
    let mut console = Console.make_writer();
    // There is nobody left to tell that this failed.
    let _unseen = writeln!(console, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_and_long_ones_cut() {
        assert_eq!(next_line(b"a\nb", false), Some((&b"a"[..], &b"b"[..])));
        assert_eq!(next_line(b"b", false), None);
        assert_eq!(next_line(b"b", true), Some((&b"b"[..], &b""[..])));
        assert_eq!(next_line(b"", true), None);
        assert_eq!(next_line(b"\n", false), Some((&b""[..], &b""[..])));
        let long = vec![b'x'; LINE_MAX + 5];
        assert_eq!(next_line(&long, false), Some(long.split_at(LINE_MAX)));
    }

    #[test]
    fn the_newest_lines_are_kept_and_the_gap_is_named() {
        let mut lines = Lines::default();
        let line = |number: usize| format!("{number:0>1023}\n").into_bytes();
        for number in 0..CAPACITY / 1024 + 3 {
            lines.push(line(number));
        }
        assert!(lines.bytes <= CAPACITY);
        let first = lines.take().unwrap();
        let expected = [b"(3 lines were lost here)\n".to_vec(), line(3)].concat();
        assert!(first.starts_with(&expected), "{}", String::from_utf8_lossy(&first[..60]));
        let mut all = first;
        while let Some(chunk) = lines.take() {
            all.extend(chunk);
        }
        assert!(all.ends_with(&line(CAPACITY / 1024 + 2)));
        assert_eq!((lines.bytes, lines.lost), (0, 0));
    }

    #[tokio::test]
    async fn what_comes_through_a_pipe_arrives_at_the_host_whole() {
        let log = Log::default();
        let (mut sender, receiver) = pipe::pipe().unwrap();
        let follower = tokio::spawn(log.clone().follow(receiver, |_| {}));
        sender.write_all(b"one\ntwo\nthr").await.unwrap();
        sender.write_all(b"ee").await.unwrap();
        drop(sender);
        follower.await.unwrap().unwrap();
        let (host, guest) = tokio::io::duplex(4);
        let shipper = tokio::spawn(async move { log.ship_over(guest).await });
        let mut text = [0; 14];
        let mut host = host;
        host.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"one\ntwo\nthree\n");
        shipper.abort();
    }
}

//! Joins a hijacked connection, or a log body, with this process's standard streams.

use crate::docker::Hijacked;
use crate::output;
use crate::terminal::DetachKeys;
use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes, BytesMut};
use guest_api::frame::{HEADER_LENGTH, Header, Stream};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::io::Write;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;

/// A frame of a Docker stream larger than this is no frame.
const FRAME_BYTES_MAX: u32 = 64 << 20;
const BUFFER_BYTES: usize = 64 * 1024;

/// What to do with this process's standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// Not attached: the write side is closed at once.
    None,
    /// Piped through; its end closes the write side.
    Plain,
    /// From a terminal, watched for the detach keys.
    Terminal,
}

/// How an attached session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The other side closed.
    Output,
    /// The user typed the detach keys.
    Detached,
}

/// Copies both ways until the container's output ends or the user detaches.
pub(crate) async fn join(hijacked: Hijacked, input: Input) -> Result<End> {
    let Hijacked { stream, read_ahead, multiplexed } = hijacked;
    let (mut reader, writer) = stream.into_split();
    let mut detached = tokio::spawn(copy_input(writer, input));
    let mut input_open = true;
    let mut output = Output::new(multiplexed);
    output.take(&read_ahead)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        tokio::select! {
            read = reader.read(&mut buffer) => match read {
                Ok(0) => break,
                Ok(count) => output.take(&buffer[..count])?,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                Err(error) => return Err(error).context("lost the connection to the container"),
            },
            ended = &mut detached, if input_open => {
                input_open = false;
                if ended.context("reading standard input failed")?? {
                    return Ok(End::Detached);
                }
            }
        }
    }
    detached.abort();
    output.finish()?;
    Ok(End::Output)
}

/// Copies the body of a log to the standard streams.
pub(crate) async fn copy_log(mut body: Incoming, multiplexed: bool) -> Result<()> {
    let mut output = Output::new(multiplexed);
    while let Some(frame) = body.frame().await {
        let frame = frame.context("lost the connection to the engine")?;
        if let Ok(data) = frame.into_data() {
            output.take(&data)?;
        }
    }
    output.finish()
}

/// Copies standard input to the container; true when the user typed the detach keys.
async fn copy_input(mut writer: OwnedWriteHalf, input: Input) -> Result<bool> {
    if input == Input::None {
        writer.shutdown().await.ok();
        return Ok(false);
    }
    let mut keys = DetachKeys::default();
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = stdin.read(&mut buffer).await.context("cannot read standard input")?;
        if count == 0 {
            break;
        }
        let written = if input == Input::Terminal {
            let (typed, detach) = keys.filter(&buffer[..count]);
            if detach {
                return Ok(true);
            }
            writer.write_all(&typed).await
        } else {
            writer.write_all(&buffer[..count]).await
        };
        // The container has closed its input or is gone; its output tells the rest.
        if written.is_err() {
            return Ok(false);
        }
    }
    writer.shutdown().await.ok();
    Ok(false)
}

/// Takes a container's output apart and writes it out.
struct Output {
    /// `None` for raw output.
    frames: Option<Frames>,
}

#[derive(Default)]
struct Frames {
    pending: BytesMut,
    /// The frame in hand, and how much of it is still to come.
    current: Option<(Stream, usize)>,
}

impl Output {
    fn new(multiplexed: bool) -> Self {
        Self { frames: multiplexed.then(Frames::default) }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.frames {
            None => write_out(Stream::Stdout, bytes)?,
            Some(frames) => {
                frames.pending.extend_from_slice(bytes);
                while let Some((stream, data)) = frames.next()? {
                    write_out(stream, &data)?;
                }
            }
        }
        Ok(output::stdout().flush()?)
    }

    fn finish(&self) -> Result<()> {
        match &self.frames {
            Some(frames) if frames.current.is_some() || !frames.pending.is_empty() => {
                bail!("the container's output broke off in the middle of a frame")
            }
            _ => Ok(()),
        }
    }
}

impl Frames {
    /// The next piece of output; pieces may be smaller than frames.
    fn next(&mut self) -> Result<Option<(Stream, Bytes)>> {
        loop {
            if let Some((stream, left)) = self.current {
                if left == 0 {
                    self.current = None;
                    continue;
                }
                let count = left.min(self.pending.len());
                if count == 0 {
                    return Ok(None);
                }
                self.current = Some((stream, left - count));
                return Ok(Some((stream, self.pending.split_to(count).freeze())));
            }
            if self.pending.len() < HEADER_LENGTH {
                return Ok(None);
            }
            let mut header = [0; HEADER_LENGTH];
            self.pending.copy_to_slice(&mut header);
            let header = Header::decode(header)?;
            if header.length > FRAME_BYTES_MAX {
                bail!("the container's output holds a frame of {} bytes, which cannot be", header.length);
            }
            self.current = Some((header.stream, usize::try_from(header.length)?));
        }
    }
}

fn write_out(stream: Stream, bytes: &[u8]) -> std::io::Result<()> {
    match stream {
        Stream::Stdin | Stream::Stdout => output::stdout().write_all(bytes),
        Stream::Stderr | Stream::SystemError => output::stderr().write_all(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(stream: Stream, text: &str) -> Vec<u8> {
        let header = Header { stream, length: u32::try_from(text.len()).unwrap() };
        [&header.encode()[..], text.as_bytes()].concat()
    }

    #[test]
    fn frames_are_found_however_they_are_cut() {
        let bytes =
            [frame(Stream::Stdout, "out"), frame(Stream::Stderr, ""), frame(Stream::Stderr, "err")].concat();
        for cut in 1..bytes.len() {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            for chunk in bytes.chunks(cut) {
                frames.pending.extend_from_slice(chunk);
                while let Some((stream, data)) = frames.next().unwrap() {
                    seen.push((stream, String::from_utf8(data.to_vec()).unwrap()));
                }
            }
            let text = |wanted| {
                seen.iter().filter(|(s, _)| *s == wanted).map(|(_, t)| t.as_str()).collect::<String>()
            };
            assert_eq!(
                (text(Stream::Stdout).as_str(), text(Stream::Stderr).as_str()),
                ("out", "err"),
                "cut {cut}"
            );
        }
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        let mut frames = Frames::default();
        frames.pending.extend_from_slice(b"HTTP/1.1 200");
        assert!(frames.next().is_err());
        let mut frames = Frames::default();
        frames.pending.extend_from_slice(&Header { stream: Stream::Stdout, length: u32::MAX }.encode());
        assert!(frames.next().is_err());
    }
}

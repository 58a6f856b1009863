//! The engine's one copy loop: between a hijacked client connection and a shim's stream.
//!
//! The two directions are independent. A client's end of input is passed on and nothing more: its output goes on.
//! The shim's end of output ends the relay. Client input is dropped when nobody asked for it.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// Bytes moved at once.
const BUFFER_BYTES: usize = 64 << 10;

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The process's output has ended.
    Drained,
    /// The client typed the keys that detach.
    Detached,
    /// The client has gone.
    ClientGone,
}

/// Copies until one of [`End`] happens, then shuts the client's side down; after the end of the output only when
/// `before_end` is done too, so that a client that sees the end finds the exit code.
///
/// `keys`: the client's input is looked through for them (with a terminal). `input`: the client's input is passed on.
pub async fn relay<C>(
    client: C,
    shim: UnixStream,
    input: bool,
    keys: Option<DetachKeys>,
    before_end: impl Future<Output = ()>,
) -> End
where
    C: AsyncRead + AsyncWrite,
{
    let (client_read, mut client_write) = tokio::io::split(client);
    let (mut shim_read, shim_write) = shim.into_split();
    let end = {
        let mut upward = std::pin::pin!(feed(client_read, shim_write, input, keys));
        let mut downward = std::pin::pin!(drain(&mut shim_read, &mut client_write));
        let mut feeding = true;
        loop {
            tokio::select! {
                end = &mut downward => break end,
                detached = &mut upward, if feeding => {
                    if detached {
                        break End::Detached;
                    }
                    feeding = false;
                }
            }
        }
    };
    if end == End::Drained {
        before_end.await;
    }
    // The client may have gone already.
    let _ = client_write.shutdown().await;
    end
}

async fn drain(shim: &mut (impl AsyncRead + Unpin), client: &mut (impl AsyncWrite + Unpin)) -> End {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        // A shim that died has no more output either.
        let count = shim.read(&mut buffer).await.unwrap_or(0);
        if count == 0 {
            return End::Drained;
        }
        let written = async {
            client.write_all(&buffer[..count]).await?;
            client.flush().await
        };
        if written.await.is_err() {
            return End::ClientGone;
        }
    }
}

/// Copies input until its end; true when it held the keys that detach.
async fn feed(
    mut client: impl AsyncRead + Unpin,
    mut shim: impl AsyncWrite + Unpin,
    input: bool,
    mut keys: Option<DetachKeys>,
) -> bool {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut passed = Vec::new();
    loop {
        let count = match client.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        if !input {
            continue;
        }
        let bytes = match &mut keys {
            None => &buffer[..count],
            Some(keys) => {
                passed.clear();
                if keys.filter(&buffer[..count], &mut passed) {
                    return true;
                }
                &passed
            }
        };
        if shim.write_all(bytes).await.is_err() {
            // The process reads no more; go on reading so that the client does not block.
            let _: io::Result<u64> = tokio::io::copy(&mut client, &mut tokio::io::sink()).await;
            return false;
        }
    }
    // The end of input; the process may have gone.
    let _ = shim.shutdown().await;
    false
}

/// Looks for the key sequence that detaches in what a client types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetachKeys {
    keys: Vec<u8>,
    matched: usize,
}

impl Default for DetachKeys {
    /// ctrl-p, ctrl-q.
    fn default() -> Self {
        Self { keys: vec![0x10, 0x11], matched: 0 }
    }
}

/// A key sequence that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Invalid detach keys ({0}) provided")]
pub struct BadKeys(String);

impl DetachKeys {
    /// `ctrl-p,ctrl-q`, `a,b`, …; empty is the default.
    pub fn parse(text: &str) -> Result<Self, BadKeys> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let key = |word: &str| match word.as_bytes() {
            [single] => Some(*single),
            [b'c', b't', b'r', b'l', b'-', letter] => match letter.to_ascii_lowercase() {
                letter @ b'a'..=b'z' => Some(letter - b'a' + 1),
                b'@' => Some(0),
                b'[' => Some(27),
                b'\\' => Some(28),
                b']' => Some(29),
                b'^' => Some(30),
                b'_' => Some(31),
                _ => None,
            },
            _ => None,
        };
        let keys: Option<Vec<u8>> = text.split(',').map(key).collect();
        keys.map(|keys| Self { keys, matched: 0 }).ok_or_else(|| BadKeys(text.to_owned()))
    }

    /// Passes on what is not part of the sequence; true when the sequence is complete.
    fn filter(&mut self, input: &[u8], output: &mut Vec<u8>) -> bool {
        for byte in input {
            if *byte == self.keys[self.matched] {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    self.matched = 0;
                    return true;
                }
                continue;
            }
            // It was not the sequence after all: what was held back goes out.
            output.extend_from_slice(&self.keys[..self.matched]);
            self.matched = usize::from(*byte == self.keys[0]);
            if self.matched == 0 {
                output.push(*byte);
            } else if self.keys.len() == 1 {
                self.matched = 0;
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &str, chunks: &[&[u8]]) -> (bool, Vec<u8>) {
        let mut keys = DetachKeys::parse(keys).unwrap();
        let mut output = Vec::new();
        let detached = chunks.iter().any(|chunk| keys.filter(chunk, &mut output));
        (detached, output)
    }

    #[test]
    fn the_sequence_is_found_across_chunks() {
        assert_eq!(typed("", &[b"ls\n\x10", b"\x11"]), (true, b"ls\n".to_vec()));
        assert_eq!(typed("ctrl-a,d", &[b"x\x01dy"]), (true, b"x".to_vec()));
        assert_eq!(typed("q", &[b"abq"]), (true, b"ab".to_vec()));
    }

    #[test]
    fn half_a_sequence_is_passed_on_when_it_does_not_go_on() {
        assert_eq!(typed("", &[b"\x10a"]), (false, b"\x10a".to_vec()));
        assert_eq!(typed("", &[b"\x10\x10\x11"]), (true, b"\x10".to_vec()));
    }

    #[test]
    fn unknown_keys_are_named() {
        assert_eq!(
            DetachKeys::parse("ctrl-?").unwrap_err().to_string(),
            "Invalid detach keys (ctrl-?) provided"
        );
        assert!(DetachKeys::parse("alt-x").is_err());
    }

    #[tokio::test]
    async fn a_client_that_ends_its_input_still_gets_all_output() {
        let (client, mut person) = tokio::io::duplex(16);
        let (shim, mut process) = UnixStream::pair().unwrap();
        let relaying = tokio::spawn(relay(client, shim, true, None, std::future::ready(())));
        person.write_all(b"in").await.unwrap();
        person.shutdown().await.unwrap();
        let mut input = Vec::new();
        process.read_to_end(&mut input).await.unwrap();
        assert_eq!(input, b"in");
        process.write_all(&[7; 1000]).await.unwrap();
        drop(process);
        let mut output = Vec::new();
        person.read_to_end(&mut output).await.unwrap();
        assert_eq!(output, vec![7; 1000]);
        assert_eq!(relaying.await.unwrap(), End::Drained);
    }

    #[tokio::test]
    async fn a_client_that_goes_ends_the_relay() {
        let (client, person) = tokio::io::duplex(16);
        let (shim, mut process) = UnixStream::pair().unwrap();
        drop(person);
        process.write_all(b"anyone?").await.unwrap();
        assert_eq!(relay(client, shim, true, None, std::future::ready(())).await, End::ClientGone);
    }
}

//! How a connection to a published port begins, and how datagrams ride on a stream.
//!
//! A TCP connection that has a [`crate::Landing`] comes through the machine's network, and nothing of this is in it. For
//! others the host opens one stream to [`crate::port::FORWARD`] for each TCP connection and each flow of datagrams. Its first
//! bytes are a frame ([`crate::frame`]) with a [`Header`] as JSON. Behind it, a TCP connection's bytes follow as they
//! are; datagrams follow each as a big-endian `u16` length and that many bytes ([`encode_datagram`],
//! [`DatagramDecoder`]), in both directions.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

use crate::frame::{self, TooLong};
use crate::lease::Transport;

/// The longest JSON of a header.
pub const HEADER_LENGTH_MAX: usize = 1024;

/// Whom a stream is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The id of the container that holds the lease.
    pub container: String,
    /// The protocol.
    pub transport: Transport,
    /// The container's port.
    pub container_port: u16,
    /// Who connected to the host.
    pub peer: SocketAddr,
    /// Where the connection enters the guest by its network, if it can. The guest never sees this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub landing: Option<SocketAddr>,
}

/// A header that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It is longer than any header.
    #[error(
        "a forwarded connection begins with a header of {0} bytes: at most {HEADER_LENGTH_MAX} are allowed"
    )]
    TooLong(usize),
    /// It is no header.
    #[error("a forwarded connection begins with something else than a header")]
    Malformed(#[source] serde_json::Error),
}

impl Header {
    /// The stream's first bytes.
    pub fn encode(&self) -> Result<Vec<u8>, TooLong> {
        let mut bytes = Vec::new();
        // A struct of strings and numbers always has a JSON form; if not, an empty frame is refused by its reader.
        frame::encode(&serde_json::to_vec(self).unwrap_or_default(), &mut bytes)?;
        Ok(bytes)
    }

    /// The length of the JSON, from the frame's header.
    pub fn length(prefix: [u8; frame::HEADER_LENGTH]) -> Result<usize, HeaderError> {
        match u32::from_le_bytes(prefix) as usize {
            length if length > HEADER_LENGTH_MAX => Err(HeaderError::TooLong(length)),
            length => Ok(length),
        }
    }

    /// Reads the JSON.
    pub fn decode(json: &[u8]) -> Result<Self, HeaderError> {
        serde_json::from_slice(json).map_err(HeaderError::Malformed)
    }
}

/// Appends one datagram. Longer than 65,535 bytes there is none.
pub fn encode_datagram(datagram: &[u8], output: &mut Vec<u8>) -> Result<(), TooLong> {
    let length = u16::try_from(datagram.len()).map_err(|_| TooLong { length: datagram.len() })?;
    output.extend_from_slice(&length.to_be_bytes());
    output.extend_from_slice(datagram);
    Ok(())
}

/// Turns a stream back into datagrams. Holds at most one unfinished datagram and the piece just pushed.
#[derive(Debug, Default)]
pub struct DatagramDecoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl DatagramDecoder {
    /// Adds bytes as they came. Call [`Self::next_datagram`] until it is empty before the next push.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole datagram, if it has arrived.
    pub fn next_datagram(&mut self) -> Option<&[u8]> {
        let (length, rest) = self.buffer[self.consumed..].split_first_chunk()?;
        let datagram = rest.get(..usize::from(u16::from_be_bytes(*length)))?;
        self.consumed += 2 + datagram.len();
        Some(datagram)
    }
}

/// Takes foreign bytes through both parsers: what the fuzz target calls.
pub fn exercise(bytes: &[u8]) {
    if let Some((prefix, json)) = bytes.split_first_chunk()
        && let Ok(length) = Header::length(*prefix)
        && let Ok(header) = Header::decode(&json[..length.min(json.len())])
        && let Ok(encoded) = header.encode()
    {
        let again = Header::decode(&encoded[frame::HEADER_LENGTH..]);
        assert!(again.is_ok_and(|again| again == header), "a header changes on the way");
    }
    let mut decoder = DatagramDecoder::default();
    let mut taken = 0;
    for piece in bytes.chunks(7) {
        decoder.push(piece);
        while let Some(datagram) = decoder.next_datagram() {
            taken += 2 + datagram.len();
        }
    }
    assert!(taken <= bytes.len(), "more bytes came out than went in");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_comes_back() {
        let header = Header {
            container: "0".repeat(64),
            transport: Transport::Tcp,
            container_port: 80,
            peer: "[::1]:5".parse().unwrap(),
            landing: Some("[fdc7::3]:65535".parse().unwrap()),
        };
        let bytes = header.encode().unwrap();
        let (prefix, json) = bytes.split_first_chunk().unwrap();
        assert_eq!(Header::length(*prefix).unwrap(), json.len());
        assert_eq!(Header::decode(json).unwrap(), header);
        assert!(json.len() < HEADER_LENGTH_MAX);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(matches!(Header::length([0xff; 4]), Err(HeaderError::TooLong(_))));
        assert!(matches!(Header::decode(b"GET / HTTP/1.1"), Err(HeaderError::Malformed(_))));
        assert!(encode_datagram(&[0; 65_536], &mut Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn datagrams_come_back_whole(
            datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..20),
            step in 1..50usize,
        ) {
            let mut stream = Vec::new();
            for datagram in &datagrams {
                encode_datagram(datagram, &mut stream).unwrap();
            }
            let (mut decoder, mut seen) = (DatagramDecoder::default(), Vec::new());
            for piece in stream.chunks(step) {
                decoder.push(piece);
                while let Some(datagram) = decoder.next_datagram() {
                    seen.push(datagram.to_vec());
                }
            }
            prop_assert_eq!(seen, datagrams);
        }

        #[test]
        fn foreign_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            exercise(&bytes);
        }
    }
}

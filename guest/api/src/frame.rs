//! The multiplexed stream of attach, exec and logs: an eight byte header, then the payload.
//!
//! `stream kind, 0, 0, 0, length (u32, big endian)`. With a terminal there are no frames: raw bytes both ways.

/// Length of a frame header.
pub const HEADER_LENGTH: usize = 8;
/// Content type of frames (from API 1.42).
pub const MULTIPLEXED: &str = "application/vnd.docker.multiplexed-stream";
/// Content type of raw terminal bytes, and of both before API 1.42.
pub const RAW: &str = "application/vnd.docker.raw-stream";

/// Which stream a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Never sent by a server.
    Stdin,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The server's own error text, sent before it closes.
    SystemError,
}

/// The stream byte is not 0 to 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownStream(pub u8);

impl std::fmt::Display for UnknownStream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "unknown stream {} in a multiplexed frame", self.0)
    }
}

impl std::error::Error for UnknownStream {}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where the payload belongs.
    pub stream: Stream,
    /// Payload bytes that follow.
    pub length: u32,
}

impl Header {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_LENGTH] {
        let kind = match self.stream {
            Stream::Stdin => 0,
            Stream::Stdout => 1,
            Stream::Stderr => 2,
            Stream::SystemError => 3,
        };
        let [a, b, c, d] = self.length.to_be_bytes();
        [kind, 0, 0, 0, a, b, c, d]
    }

    /// Reads the bytes on the wire.
    pub fn decode(bytes: [u8; HEADER_LENGTH]) -> Result<Self, UnknownStream> {
        let stream = match bytes[0] {
            0 => Stream::Stdin,
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            3 => Stream::SystemError,
            other => return Err(UnknownStream(other)),
        };
        Ok(Self { stream, length: u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_back_as_written() {
        let header = Header { stream: Stream::Stderr, length: 0x0102_0304 };
        assert_eq!(header.encode(), [2, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(Header::decode(header.encode()), Ok(header));
        assert_eq!(Header::decode([9, 0, 0, 0, 0, 0, 0, 0]), Err(UnknownStream(9)));
    }
}

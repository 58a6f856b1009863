//! Frames: a length as little-endian `u32`, then that many bytes.
//!
//! [`Decoder`] takes bytes in whatever pieces a stream delivers and gives whole frames back. It never holds more
//! than one unfinished frame plus the piece just pushed, and refuses a length above [`LENGTH_MAX`] as soon as the
//! length has arrived, before anything is allocated for it.

/// The longest payload of a frame. Control messages are a few hundred bytes; the bound is there for peers that
/// have gone wrong, and leaves room for a list of everything a busy engine holds.
pub const LENGTH_MAX: usize = 1 << 20;

/// Bytes of the length in front of each payload.
pub const HEADER_LENGTH: usize = 4;

/// A frame that may not be sent or received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {length} bytes is longer than the limit of {LENGTH_MAX}")]
pub struct TooLong {
    /// The length asked for.
    pub length: usize,
}

/// Appends one frame to `output`, or nothing if the payload is too long.
pub fn encode(payload: &[u8], output: &mut Vec<u8>) -> Result<(), TooLong> {
    let too_long = TooLong { length: payload.len() };
    if payload.len() > LENGTH_MAX {
        return Err(too_long);
    }
    let length = u32::try_from(payload.len()).map_err(|_| too_long)?;
    output.extend_from_slice(&length.to_le_bytes());
    output.extend_from_slice(payload);
    Ok(())
}

/// Turns a byte stream back into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that have been given out already.
    consumed: usize,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they came from the stream. Call [`Decoder::next_frame`] until it is empty before the next push.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame's payload, if it has arrived. After an error the stream has lost its rhythm and every
    /// further call fails alike.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, TooLong> {
        let rest = &self.buffer[self.consumed..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_LENGTH>() else { return Ok(None) };
        let length = u32::from_le_bytes(*header) as usize;
        if length > LENGTH_MAX {
            return Err(TooLong { length });
        }
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        self.consumed += HEADER_LENGTH + length;
        Ok(Some(payload))
    }

    /// Bytes held that belong to a frame which has not fully arrived.
    pub fn unfinished(&self) -> usize {
        self.buffer.len() - self.consumed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_length_above_the_limit_is_refused_before_its_payload_arrives() {
        let mut decoder = Decoder::new();
        let length = LENGTH_MAX + 1;
        decoder.push(&u32::try_from(length).unwrap().to_le_bytes());
        assert_eq!(decoder.next_frame(), Err(TooLong { length }));
        decoder.push(&[0; 100]);
        assert_eq!(decoder.next_frame(), Err(TooLong { length }));
    }

    #[test]
    fn the_longest_frame_passes_and_one_byte_more_does_not() {
        let mut wire = Vec::new();
        encode(&vec![7; LENGTH_MAX], &mut wire).unwrap();
        let length = LENGTH_MAX + 1;
        assert_eq!(encode(&vec![7; length], &mut wire), Err(TooLong { length }));
        let mut decoder = Decoder::new();
        decoder.push(&wire);
        assert_eq!(decoder.next_frame().unwrap().map(<[u8]>::len), Some(LENGTH_MAX));
        assert_eq!(decoder.next_frame(), Ok(None));
    }

    proptest! {
        #[test]
        fn frames_survive_any_splitting(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..20),
            cuts in prop::collection::vec(1_usize..64, 1..200),
        ) {
            let mut wire = Vec::new();
            for payload in &payloads {
                encode(payload, &mut wire).unwrap();
            }
            let mut decoder = Decoder::new();
            let mut seen: Vec<Vec<u8>> = Vec::new();
            let mut rest = wire.as_slice();
            let mut cuts = cuts.iter().cycle();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame.to_vec());
                }
                rest = after;
            }
            prop_assert_eq!(seen, payloads);
            prop_assert_eq!(decoder.unfinished(), 0);
        }
    }
}

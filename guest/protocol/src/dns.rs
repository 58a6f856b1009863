//! The question of a DNS message (RFC 1035, section 4.1.2), which the name servers of both halves have to read.
//!
//! Its name cannot be compressed: nothing it could refer to comes before it.

use std::fmt::Write as _;

/// Bytes of a message before its question.
pub const HEADER_BYTES: usize = 12;
/// Longest name on the wire (RFC 1035, section 2.3.4).
pub const NAME_BYTES_MAX: usize = 255;

/// What a message asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question<'a> {
    /// Without the final dot, as the client wrote it. Bytes that are no visible characters, and dots inside a label, are
    /// written `\DDD`: they are not the dots between labels.
    pub name: String,
    /// The type of record, `QTYPE`.
    pub kind: u16,
    /// `QCLASS`, which is 1 on the Internet.
    pub class: u16,
    /// The question as it was sent.
    pub wire: &'a [u8],
}

impl<'a> Question<'a> {
    /// Reads the question at the start of `bytes`: what follows a message's header. `None` when it makes no sense.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        let (mut at, mut name) = (0, String::new());
        loop {
            let length = usize::from(*bytes.get(at)?);
            at += 1;
            match length {
                0 => break,
                1..=63 => {
                    let label = bytes.get(at..at + length)?;
                    if !name.is_empty() {
                        name.push('.');
                    }
                    for byte in label {
                        match byte {
                            b'!'..=b'~' if *byte != b'.' && *byte != b'\\' => name.push(char::from(*byte)),
                            // Writing to a string cannot fail.
                            _ => _ = write!(name, "\\{byte:03}"),
                        }
                    }
                    at += length;
                }
                // A reference to something before, where there is nothing.
                _ => return None,
            }
            if at > NAME_BYTES_MAX {
                return None;
            }
        }
        let [kind_high, kind_low, class_high, class_low] = *bytes.get(at..at + 4)?.first_chunk()?;
        Some(Self {
            name,
            kind: u16::from_be_bytes([kind_high, kind_low]),
            class: u16::from_be_bytes([class_high, class_low]),
            wire: &bytes[..at + 4],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_question_is_read_as_it_was_asked() {
        let bytes = b"\x03WeB\x05front\x00\x00\x1c\x00\x01rest";
        let question = Question::read(bytes).unwrap();
        assert_eq!((question.name.as_str(), question.kind, question.class), ("WeB.front", 28, 1));
        assert_eq!(question.wire, &bytes[..15]);
        assert_eq!(Question::read(b"\x00\x00\x02\x00\x01").unwrap().name, "", "the root");
    }

    #[test]
    fn bytes_that_are_no_characters_are_written_as_numbers() {
        let question = Question::read(b"\x04a.\\\xff\x00\x00\x01\x00\x01").unwrap();
        assert_eq!(question.name, "a\\046\\092\\255");
    }

    #[test]
    fn nonsense_is_no_question() {
        let long: Vec<u8> =
            std::iter::repeat_n([b"\x3f".as_slice(), &[b'x'; 63]].concat(), 5).flatten().collect();
        for bytes in [b"".as_slice(), b"\xc0\x0c", b"\x03we", b"\x03web\x00\x00\x01\x00", b"\x40x", &long] {
            assert_eq!(Question::read(bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Some(question) = Question::read(&bytes) {
                prop_assert!(bytes.starts_with(question.wire) && question.name.len() <= 4 * NAME_BYTES_MAX);
            }
        }
    }
}

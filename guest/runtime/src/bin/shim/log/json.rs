//! Docker's `json-file` entries, byte for byte: `{"log":"…\n","stream":"stdout","time":"…Z"}`.
//!
//! Escapes and times are those of moby's `jsonlog` encoder: `<`, `>`, `&` and control characters as `\u00XX` (but `\n`
//! and `\r`), bytes that are not UTF-8 as `\ufffd`, trailing zeros of the fraction cut.

/// What an entry begins with.
pub const HEAD: &[u8; 8] = br#"{"log":""#;

/// Whether a byte cannot stand for itself. Without a branch, so that the compiler compares many at once.
const fn is_special(byte: u8) -> bool {
    // As signed numbers, those above ASCII are below it. One bit apart: `<` and `>`, `"` and `&`.
    ((byte as i8) < 0x20) | (byte | 2 == b'>') | (byte | 4 == b'&') | (byte == b'\\')
}

/// Bytes looked at together: as many as a register holds.
const PIECE_LEN: usize = 16;

/// Whether all stand for themselves.
fn is_plain(piece: &[u8; PIECE_LEN]) -> bool {
    !piece.iter().fold(false, |special, &byte| special | is_special(byte))
}

/// Where the next byte is that cannot stand for itself, from a position on.
fn next_special(bytes: &[u8], mut position: usize) -> Option<usize> {
    while let Some(piece) = bytes[position..].first_chunk::<PIECE_LEN>() {
        if !is_plain(piece) {
            break;
        }
        position += PIECE_LEN;
    }
    // Fewer are left at the end: once more with some before them.
    let rest = &bytes[position..];
    if rest.len() < PIECE_LEN && bytes.last_chunk().is_some_and(is_plain) {
        return None;
    }
    rest.iter().position(|byte| is_special(*byte)).map(|len| position + len)
}

/// Appends bytes as the inside of a JSON string.
pub fn escape(bytes: &[u8], output: &mut Vec<u8>) {
    let mut position = 0;
    while let Some(special) = next_special(bytes, position) {
        output.extend_from_slice(&bytes[position..special]);
        position = special + escape_special(&bytes[special..], output);
    }
    output.extend_from_slice(&bytes[position..]);
}

/// Appends the special bytes at the start, one of ASCII or all above it, and answers how many there were.
fn escape_special(bytes: &[u8], output: &mut Vec<u8>) -> usize {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let byte = bytes[0];
    match byte {
        b'"' | b'\\' => output.extend_from_slice(&[b'\\', byte]),
        b'\n' => output.extend_from_slice(br"\n"),
        b'\r' => output.extend_from_slice(br"\r"),
        0..0x80 => {
            output.extend_from_slice(br"\u00");
            output.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
        _ => {
            let len = bytes.iter().position(u8::is_ascii).unwrap_or(bytes.len());
            for chunk in bytes[..len].utf8_chunks() {
                for text in chunk.valid().split_inclusive(['\u{2028}', '\u{2029}']) {
                    match text.strip_suffix(['\u{2028}', '\u{2029}']) {
                        None => output.extend_from_slice(text.as_bytes()),
                        Some(before) => {
                            output.extend_from_slice(before.as_bytes());
                            let last = if text.ends_with('\u{2028}') { br"\u2028" } else { br"\u2029" };
                            output.extend_from_slice(last);
                        }
                    }
                }
                chunk.invalid().iter().for_each(|_| output.extend_from_slice(br"\ufffd"));
            }
            return len;
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_is_escaped_as_json_says(text in "(.|[\"\\\\<>&\n\r\t\u{2028}]){0,80}") {
            let mut output = b"\"".to_vec();
            escape(text.as_bytes(), &mut output);
            output.push(b'"');
            prop_assert!(output.iter().all(|byte| *byte >= 0x20 && !b"<>&".contains(byte)));
            prop_assert_eq!(serde_json::from_slice::<String>(&output).unwrap(), text);
        }

        #[test]
        fn the_next_special_byte_is_found(bytes in prop::collection::vec(any::<u8>(), 0..70), dense: bool, from in 0_usize..70) {
            let plain = |(index, byte): (usize, u8)| if dense || index % 23 == 0 { byte } else { b'x' };
            let bytes: Vec<u8> = bytes.into_iter().enumerate().map(plain).collect();
            let from = from.min(bytes.len());
            let found = (from..bytes.len()).find(|index| is_special(bytes[*index]));
            prop_assert_eq!(next_special(&bytes, from), found);
        }
    }

    #[test]
    fn special_bytes_are_those_of_docker() {
        let special: Vec<u8> = (0x20..0x80).filter(|byte| is_special(*byte)).collect();
        assert_eq!(special, b"\"&<>\\");
        assert!((0..0x20).chain(0x80..=0xff).all(is_special));
    }

    #[test]
    fn bytes_that_are_not_text_are_replaced_one_by_one() {
        let mut output = Vec::new();
        escape(b"\xff\xc3(\xe2\x82", &mut output);
        assert_eq!(output, br"\ufffd\ufffd(\ufffd\ufffd");
    }
}

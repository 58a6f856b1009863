//! Docker's `json-file` entries, byte for byte: `{"log":"…\n","stream":"stdout","time":"…Z"}`.
//!
//! Escapes and times are those of moby's `jsonlog` encoder: `<`, `>`, `&` and control characters as `\u00XX` (but `\n`
//! and `\r`), bytes that are not UTF-8 as `\ufffd`, trailing zeros of the fraction cut.

/// Bytes that cannot stand for themselves.
const SPECIAL: [bool; 256] = {
    let mut special = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        special[byte] =
            byte < 0x20 || byte >= 0x80 || matches!(byte as u8, b'"' | b'\\' | b'<' | b'>' | b'&');
        byte += 1;
    }
    special
};

/// Bytes looked at together: as many as a register holds.
const PIECE_LEN: usize = 16;

/// Whether all stand for themselves. Without a branch, so that the compiler compares them at once.
fn is_plain(piece: &[u8; PIECE_LEN]) -> bool {
    let special = piece.iter().fold(false, |special, &byte| {
        special
            | !(0x20..0x80).contains(&byte)
            | (byte == b'"')
            | (byte == b'\\')
            | (byte == b'<')
            | (byte == b'>')
            | (byte == b'&')
    });
    !special
}

/// Appends bytes as the inside of a JSON string.
pub fn escape(bytes: &[u8], output: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut plain = 0;
    let mut position = 0;
    while position < bytes.len() {
        if let Some(piece) = bytes[position..].first_chunk::<PIECE_LEN>()
            && is_plain(piece)
        {
            position += PIECE_LEN;
            continue;
        }
        let byte = bytes[position];
        if !SPECIAL[usize::from(byte)] {
            position += 1;
            continue;
        }
        let len = if byte < 0x80 { 1 } else { character_len(&bytes[position..]) };
        if len > 1 && !matches!(&bytes[position..position + len], [0xe2, 0x80, 0xa8 | 0xa9]) {
            position += len;
            continue;
        }
        output.extend_from_slice(&bytes[plain..position]);
        match byte {
            b'"' | b'\\' => output.extend_from_slice(&[b'\\', byte]),
            b'\n' => output.extend_from_slice(br"\n"),
            b'\r' => output.extend_from_slice(br"\r"),
            0..0x80 => {
                output.extend_from_slice(br"\u00");
                output.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
            }
            _ if len > 1 => {
                output.extend_from_slice(br"\u202");
                output.push(HEX[usize::from(bytes[position + 2] & 15)]);
            }
            _ => output.extend_from_slice(br"\ufffd"),
        }
        position += len.max(1);
        plain = position;
    }
    output.extend_from_slice(&bytes[plain..]);
}

/// The length of the character at the start, or 0 when there is none.
fn character_len(bytes: &[u8]) -> usize {
    let len = match bytes[0] {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => return 0,
    };
    if bytes.get(..len).is_some_and(|character| std::str::from_utf8(character).is_ok()) { len } else { 0 }
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
        fn whole_pieces_are_plain_when_each_byte_is(bytes: [u8; PIECE_LEN]) {
            prop_assert_eq!(is_plain(&bytes), bytes.iter().all(|byte| !SPECIAL[usize::from(*byte)]));
            let plain = bytes.map(|byte| if SPECIAL[usize::from(byte)] { b'x' } else { byte });
            prop_assert!(is_plain(&plain));
        }
    }

    #[test]
    fn bytes_that_are_not_text_are_replaced_one_by_one() {
        let mut output = Vec::new();
        escape(b"\xff\xc3(\xe2\x82", &mut output);
        assert_eq!(output, br"\ufffd\ufffd(\ufffd\ufffd");
    }
}

//! Docker's `local` entries: a big-endian length, a protocol buffer (`LogEntry` of moby's plugin API), the length again,
//! so that the file can be read from its end.

use jiff::Timestamp;

use super::{End, Stream};

/// Appends one entry. The text comes in pieces, without its newline.
pub fn encode(stream: Stream, pieces: &[&[u8]], end: End, time: Timestamp, output: &mut Vec<u8>) {
    let start = output.len();
    output.extend_from_slice(&[0; 4]);
    field(1, stream.name().len(), output);
    output.extend_from_slice(stream.name().as_bytes());
    output.push(2 << 3);
    varint(u64::try_from(time.as_nanosecond()).unwrap_or(0), output);
    field(3, pieces.iter().map(|piece| piece.len()).sum(), output);
    pieces.iter().for_each(|piece| output.extend_from_slice(piece));
    if end == End::Split {
        output.extend_from_slice(&[4 << 3, 1]);
    }
    let length = u32::try_from(output.len() - start - 4).unwrap_or(u32::MAX).to_be_bytes();
    output[start..start + 4].copy_from_slice(&length);
    output.extend_from_slice(&length);
}

/// The beginning of a field of bytes.
fn field(number: u8, length: usize, output: &mut Vec<u8>) {
    output.push((number << 3) | 2);
    varint(length as u64, output);
}

fn varint(mut value: u64, output: &mut Vec<u8>) {
    while value >= 0x80 {
        output.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    output.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_laid_out_as_dockerds() {
        let mut output = Vec::new();
        let time = Timestamp::from_nanosecond(300).unwrap();
        encode(Stream::Stderr, &[b"a", b"b"], End::Split, time, &mut output);
        let body = b"\x0a\x06stderr\x10\xac\x02\x1a\x02ab\x20\x01";
        let length = (body.len() as u32).to_be_bytes();
        assert_eq!(output, [&length[..], body, &length[..]].concat());
    }
}

//! One entry of a log, of either format. Entries of the usual shape are taken apart by hand, without an allocation:
//! reading back a log is as fast as this.

use std::borrow::Cow;
use std::collections::BTreeMap;

use guest_api::frame::Stream;
use jiff::Timestamp;
use memchr::{memchr, memchr2, memrchr};
use serde::Deserialize;

/// What an entry says.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    pub stream: Stream,
    pub text: Text<'a>,
    pub time: Time<'a>,
    pub attributes: BTreeMap<String, String>,
}

/// The output itself.
#[derive(Debug, PartialEq, Eq)]
pub enum Text<'a> {
    /// As it is, then a newline or not.
    Plain(&'a [u8], bool),
    /// The inside of a JSON string.
    Escaped(&'a [u8]),
    Owned(Vec<u8>),
}

/// When it was written.
#[derive(Debug, PartialEq, Eq)]
pub enum Time<'a> {
    /// RFC 3339 in UTC, as far as anybody looked.
    Text(&'a str),
    Known(Timestamp),
}

impl Time<'_> {
    pub fn moment(&self) -> Option<Timestamp> {
        match self {
            Time::Known(time) => Some(*time),
            Time::Text(text) => text.parse().ok(),
        }
    }

    /// With nine decimals, as `logs` shows it.
    pub fn stamp(&self) -> Option<String> {
        self.moment().map(|time| format!("{time:.9} "))
    }
}

impl Text<'_> {
    /// Appends the output.
    pub fn append_to(&self, output: &mut Vec<u8>) {
        match self {
            Text::Plain(bytes, newline) => {
                output.extend_from_slice(bytes);
                if *newline {
                    output.push(b'\n');
                }
            }
            Text::Owned(bytes) => output.extend_from_slice(bytes),
            Text::Escaped(bytes) => unescape(bytes, output),
        }
    }
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default)]
    log: Cow<'a, str>,
    #[serde(borrow, default)]
    stream: Cow<'a, str>,
    time: Timestamp,
    #[serde(default)]
    attrs: BTreeMap<String, String>,
}

/// Reads a `json-file` line; `None` when it is none. Fuzzed.
pub fn parse_json(line: &[u8]) -> Option<Entry<'_>> {
    if let Some(entry) = parse_usual(line) {
        return Some(entry);
    }
    let line: Line<'_> = serde_json::from_slice(line).ok()?;
    Some(Entry {
        stream: if line.stream == "stderr" { Stream::Stderr } else { Stream::Stdout },
        text: Text::Owned(line.log.as_bytes().to_vec()),
        time: Time::Known(line.time),
        attributes: line.attrs,
    })
}

/// Reads a line exactly as the shim writes one without attributes.
fn parse_usual(line: &[u8]) -> Option<Entry<'_>> {
    let rest = line.strip_prefix(br#"{"log":""#)?;
    // The end of a line has a fixed shape: look for it from there.
    let rest = rest.strip_suffix(b"\n").unwrap_or(rest).strip_suffix(b"\"}")?;
    let at = memrchr(b'"', rest)? + 1;
    let (head, time) = rest.split_at(at);
    let head = head.strip_suffix(br#","time":""#)?;
    let (stream, text) = match head.strip_suffix(br#","stream":"stdout""#) {
        Some(text) => (Stream::Stdout, text),
        None => (Stream::Stderr, head.strip_suffix(br#","stream":"stderr""#)?),
    };
    let text = text.strip_suffix(b"\"")?;
    // A quote of the text is escaped; one that is not means another shape.
    let mut first_escape = None;
    let mut at = 0;
    while let Some(found) = memchr2(b'\\', b'"', text.get(at..)?) {
        if text[at + found] == b'"' {
            return None;
        }
        first_escape.get_or_insert(at + found);
        at += found + 2;
    }
    let text = match (first_escape, text.strip_suffix(br"\n")) {
        (None, _) => Text::Plain(text, false),
        (Some(at), Some(bare)) if at == bare.len() => Text::Plain(bare, true),
        _ => Text::Escaped(text),
    };
    Some(Entry {
        stream,
        text,
        time: Time::Text(std::str::from_utf8(time).ok()?),
        attributes: BTreeMap::new(),
    })
}

/// Appends what the inside of a JSON string stands for. What is no escape stands for itself.
fn unescape(bytes: &[u8], output: &mut Vec<u8>) {
    let mut rest = bytes;
    while let Some(at) = memchr(b'\\', rest) {
        output.extend_from_slice(&rest[..at]);
        let plain = match rest.get(at + 1) {
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(b'u') => {
                let number = rest.get(at + 2..at + 6).and_then(|digits| std::str::from_utf8(digits).ok());
                let letter = number.and_then(|digits| char::from_u32(u32::from_str_radix(digits, 16).ok()?));
                let letter = letter.unwrap_or(char::REPLACEMENT_CHARACTER);
                output.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes());
                rest = rest.get(at + 6..).unwrap_or_default();
                continue;
            }
            Some(other) => *other,
            None => b'\\',
        };
        output.push(plain);
        rest = rest.get(at + 2..).unwrap_or_default();
    }
    output.extend_from_slice(rest);
}

/// Reads the body of a `local` entry (`LogEntry` of moby's plugin API); `None` when it is none. Fuzzed.
pub fn parse_local(body: &[u8]) -> Option<Entry<'_>> {
    let mut rest = body;
    let (mut stream, mut line, mut time, mut partial) = (Stream::Stdout, &[][..], 0_u64, false);
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        match (key >> 3, key & 7) {
            (number, 2) => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                let (value, later) = rest.split_at_checked(length)?;
                rest = later;
                match number {
                    1 if value == b"stderr" => stream = Stream::Stderr,
                    3 => line = value,
                    _ => {}
                }
            }
            (number, 0) => {
                let value = varint(&mut rest)?;
                match number {
                    2 => time = value,
                    4 => partial = value != 0,
                    _ => {}
                }
            }
            _ => return None,
        }
    }
    let time = Timestamp::from_nanosecond(i128::from(time)).ok()?;
    let text = Text::Plain(line, !partial);
    Some(Entry { stream, text, time: Time::Known(time), attributes: BTreeMap::new() })
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, later) = rest.split_first()?;
        *rest = later;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(entry: &Entry<'_>) -> Vec<u8> {
        let mut text = Vec::new();
        entry.text.append_to(&mut text);
        text
    }

    #[test]
    fn usual_and_unusual_lines_say_the_same() {
        let usual =
            br#"{"log":"a \"b\" \\ \u003cc\u003e\n","stream":"stderr","time":"2026-01-02T03:04:05.1Z"}"#;
        let unusual =
            br#"{"time":"2026-01-02T03:04:05.1Z", "log":"a \"b\" \\ \u003cc\u003e\n","stream":"stderr"}"#;
        assert!(parse_usual(usual).is_some() && parse_usual(unusual).is_none());
        let (one, two) = (parse_json(usual).unwrap(), parse_json(unusual).unwrap());
        assert_eq!(text(&one), b"a \"b\" \\ <c>\n");
        assert_eq!(text(&one), text(&two));
        assert_eq!((one.stream, one.time.stamp()), (two.stream, two.time.stamp()));
        assert_eq!(one.time.stamp().unwrap(), "2026-01-02T03:04:05.100000000Z ");
    }

    #[test]
    fn attributes_are_read() {
        let line = br#"{"log":"x","stream":"stdout","attrs":{"a":"1"},"time":"2026-01-02T03:04:05Z"}"#;
        assert_eq!(parse_json(line).unwrap().attributes["a"], "1");
    }

    #[test]
    fn a_local_entry_is_read() {
        let entry = parse_local(b"\x0a\x06stderr\x10\xac\x02\x1a\x02ab\x20\x01").unwrap();
        assert_eq!((entry.stream, text(&entry)), (Stream::Stderr, b"ab".to_vec()));
        assert_eq!(entry.time.moment().unwrap().as_nanosecond(), 300);
        assert_eq!(text(&parse_local(b"\x1a\x02ab").unwrap()), b"ab\n");
        assert_eq!(parse_local(b"\x1a\xff"), None);
    }

    proptest! {
        #[test]
        fn every_line_of_the_encoder_is_read_by_hand(log in ".{0,80}") {
            let log = serde_json::to_string(&log).unwrap();
            let line = format!("{{\"log\":{log},\"stream\":\"stdout\",\"time\":\"2026-01-02T03:04:05Z\"}}\n");
            let expected: serde_json::Value = serde_json::from_str(&line).unwrap();
            let entry = parse_usual(line.as_bytes());
            prop_assert!(entry.is_some());
            prop_assert_eq!(text(&entry.unwrap()), expected["log"].as_str().unwrap().as_bytes());
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_local(&bytes);
            let _ = parse_json(&bytes);
            let line = [br#"{"log":""#, &bytes[..], br#"","stream":"stdout","time":"x"}"#].concat();
            if let Some(entry) = parse_json(&line) { text(&entry); }
        }
    }
}

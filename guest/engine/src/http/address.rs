//! Paths and queries of requests, as text. Fuzzed: nothing here knows the rest of the engine.

use std::collections::HashMap;

use jiff::Timestamp;

/// The path without empty segments, `.` and `..`; `None` when it is that already.
pub fn cleaned(path: &str) -> Option<String> {
    let mut kept: Vec<&str> = Vec::new();
    let decoded = |part: &str| percent_decode(part, false);
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let last = parts.len().saturating_sub(1);
    for (at, part) in parts.iter().copied().enumerate() {
        match decoded(part).as_str() {
            // The end of `/containers/` stays.
            "" if at == last => kept.push(""),
            "" | "." => {}
            ".." => drop(kept.pop()),
            _ => kept.push(part),
        }
    }
    let clean = format!("/{}", kept.join("/"));
    (clean != path).then_some(clean)
}

/// What an escaped text stands for; what is no escape stands for itself.
pub fn percent_decode(text: &str, plus_is_space: bool) -> String {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                at += 3;
                continue;
            }
            (b'+', ..) if plus_is_space => decoded.push(b' '),
            (byte, ..) => decoded.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// The values of a query by their names, in order.
pub fn pairs(text: &str) -> HashMap<String, Vec<String>> {
    let mut values: HashMap<String, Vec<String>> = HashMap::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        values.entry(percent_decode(name, true)).or_default().push(percent_decode(value, true));
    }
    values
}

/// A moment as unix seconds with up to nine decimals, or in words; `None` when there is none, or 0.
pub fn moment(text: &str) -> Result<Option<Timestamp>, ()> {
    if text.is_empty() || text == "0" {
        return Ok(None);
    }
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(Some(moment));
    }
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.len() > 9 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(());
    }
    let nanoseconds: i32 = format!("{fraction:0<9}").parse().map_err(|_| ())?;
    let seconds: i64 = seconds.parse().map_err(|_| ())?;
    Timestamp::new(seconds, nanoseconds).map(Some).map_err(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_nine_decimals() {
        assert_eq!(moment("0"), Ok(None));
        assert_eq!(moment("1700000000.5").unwrap().unwrap().as_nanosecond(), 1_700_000_000_500_000_000);
        assert_eq!(moment("1700000000").unwrap().unwrap().as_second(), 1_700_000_000);
        assert_eq!(moment("2026-01-02T03:04:05Z").unwrap().unwrap().to_string(), "2026-01-02T03:04:05Z");
        assert!(moment("yesterday").is_err());
        assert!(moment("1.0000000001").is_err());
    }

    #[test]
    fn paths_are_cleaned_like_gos() {
        assert_eq!(cleaned("/containers/json"), None);
        assert_eq!(cleaned("/containers/"), None);
        assert_eq!(cleaned("/"), None);
        assert_eq!(cleaned("//info").as_deref(), Some("/info"));
        assert_eq!(cleaned("/containers//json").as_deref(), Some("/containers/json"));
        assert_eq!(cleaned("/containers/%2e%2e/json").as_deref(), Some("/json"));
        assert_eq!(cleaned("/containers/a%2Fb/json"), None);
    }
}

//! Moments as clients write them in `until` and `since` filters: how long ago (Go's durations), a date with or without time
//! and zone, or unix seconds.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::failure::Failure;

/// What `text` means, seen from `now`. Without a zone it is the engine's own.
pub fn parse(text: &str, now: Timestamp) -> Result<Timestamp, Failure> {
    let refused = || Failure::invalid(format!("failed to parse value as time or duration: \"{text}\""));
    if text != "0"
        && let Some(ago) = duration(text)
    {
        // dockerd counts whole seconds here.
        let then = now.checked_sub(ago).map_err(|_| refused())?;
        return Timestamp::from_second(then.as_second()).map_err(|_| refused());
    }
    // Moments without minutes or seconds, as Go's layouts allow them.
    for tail in ["", ":00", ":00:00"] {
        let (local, zone) = split_zone(text);
        if tail.is_empty() || local.contains('T') {
            let whole = format!("{local}{tail}");
            let moment = match zone {
                "" => whole
                    .parse::<DateTime>()
                    .ok()
                    .and_then(|at| at.to_zoned(TimeZone::system()).ok().map(|zoned| zoned.timestamp())),
                zone if whole.contains('T') => format!("{whole}{zone}").parse().ok(),
                zone => format!("{whole}T00:00:00{zone}").parse().ok(),
            };
            if let Some(moment) = moment {
                return Ok(moment);
            }
        }
    }
    unix(text).ok_or_else(refused)
}

/// The end of `2026-01-02T03:04:05+01:00` that names a zone.
fn split_zone(text: &str) -> (&str, &str) {
    if text.ends_with(['z', 'Z']) {
        return text.split_at(text.len() - 1);
    }
    // A date has two dashes; a third, or a plus, begins a zone.
    let dash = text.match_indices('-').nth(2).map(|(at, _)| at);
    match text.find('+').or(dash) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    }
}

/// Seconds with up to nine decimals; more are cut off.
fn unix(text: &str) -> Option<Timestamp> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanoseconds = format!("{fraction:0<9}")[..9].parse().ok()?;
    Timestamp::new(seconds.parse().ok()?, nanoseconds).ok()
}

/// Go's durations: `1h30m`, `1.5s`, `-2m`.
fn duration(text: &str) -> Option<SignedDuration> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(SignedDuration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut nanoseconds: i128 = 0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit = rest[number..]
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .map_or(rest.len(), |at| number + at);
        let scale: i128 = match &rest[number..unit] {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = rest[..number].split_once('.').unwrap_or((&rest[..number], ""));
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let digits = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<i128>().ok() };
        // Beyond eighteen digits nothing is left of a nanosecond.
        let fraction = &fraction[..fraction.len().min(18)];
        let part = digits(fraction)?.checked_mul(scale)? / 10_i128.pow(u32::try_from(fraction.len()).ok()?);
        nanoseconds = nanoseconds.checked_add(digits(whole)?.checked_mul(scale)?)?.checked_add(part)?;
        rest = &rest[unit..];
    }
    let nanoseconds = i64::try_from(if negative { -nanoseconds } else { nanoseconds }).ok()?;
    Some(SignedDuration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-02T03:04:05.5Z".parse().unwrap()
    }

    fn read(text: &str) -> Option<String> {
        parse(text, now()).ok().map(|moment| moment.to_string())
    }

    #[test]
    fn durations_are_gos_and_count_back_from_now() {
        for (text, moment) in [
            ("10s", "2026-01-02T03:03:55Z"),
            ("1h30m", "2026-01-02T01:34:05Z"),
            ("1.5h", "2026-01-02T01:34:05Z"),
            ("-1m", "2026-01-02T03:05:05Z"),
            ("24h0m0s", "2026-01-01T03:04:05Z"),
        ] {
            assert_eq!(read(text).as_deref(), Some(moment), "{text}");
        }
    }

    #[test]
    fn moments_may_have_a_zone_and_may_be_unix_seconds() {
        for (text, moment) in [
            ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
            ("2026-01-01T02:00:00.25+02:00", "2026-01-01T00:00:00.25Z"),
            ("2026-01-01T02:00-02:00", "2026-01-01T04:00:00Z"),
            ("2026-01-01T02Z", "2026-01-01T02:00:00Z"),
            ("2026-01-01Z", "2026-01-01T00:00:00Z"),
            ("1767225600", "2026-01-01T00:00:00Z"),
            ("1767225600.5", "2026-01-01T00:00:00.5Z"),
            ("0", "1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(read(text).as_deref(), Some(moment), "{text}");
        }
        assert!(read("2026-01-01").is_some() && read("2026-01-01T02:03").is_some());
    }

    #[test]
    fn nonsense_is_refused_with_dockerds_words() {
        for text in ["", "yesterday", "1x", "h", "1h-", "2026-13-01", "9e9"] {
            let message = parse(text, now()).unwrap_err().message;
            assert_eq!(message, format!("failed to parse value as time or duration: \"{text}\""));
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in ".{0,40}") {
            // Refused or not: without a panic.
            let _ = parse(&text, now());
        }

        #[test]
        fn seconds_ago_are_subtracted(seconds in 1_i64..1_000_000) {
            let moment = parse(&format!("{seconds}s"), now()).unwrap();
            prop_assert_eq!(moment.as_second(), now().as_second() - seconds);
        }
    }
}

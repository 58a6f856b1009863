//! Signals by name or number.

use crate::failure::Failure;

/// Largest signal number on Linux (`SIGRTMAX`).
const SIGNAL_MAX: i32 = 64;
/// First real-time signal as glibc shows it.
const REAL_TIME_MIN: i32 = 34;

pub const SIGKILL: i32 = 9;
pub const SIGTERM: i32 = 15;

const NAMES: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// `SIGTERM`, `term`, `15`, `RTMIN+3`.
pub fn parse(text: &str) -> Result<i32, Failure> {
    let invalid = || Failure::invalid(format!("invalid signal: {text}"));
    if let Ok(number) = text.parse::<i32>() {
        return match number {
            1..=SIGNAL_MAX => Ok(number),
            0 => Err(invalid()),
            _ => Err(Failure::invalid(format!("the linux daemon does not support signal {number}"))),
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let offset =
        |rest: &str| if rest.is_empty() { Ok(0) } else { rest[1..].parse::<i32>().map_err(|_| invalid()) };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) if rest.is_empty() || rest.starts_with('+') => {
            REAL_TIME_MIN.checked_add(offset(rest)?)
        }
        (_, Some(rest)) if rest.is_empty() || rest.starts_with('-') => SIGNAL_MAX.checked_sub(offset(rest)?),
        _ => None,
    };
    number.filter(|number| (REAL_TIME_MIN..=SIGNAL_MAX).contains(number)).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_read() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("rtmin", 34),
            ("winch", 28),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
    }

    #[test]
    fn others_are_refused_by_name() {
        for text in ["65", "-1"] {
            let refusal = format!("the linux daemon does not support signal {text}");
            assert_eq!(parse(text).unwrap_err().message, refusal);
        }
        for text in ["", "0", "SIGNOPE", "RTMIN+99", "RTMIN-1", "RTMAX+1", "SIGRTMIN+é"] {
            assert_eq!(parse(text).unwrap_err().message, format!("invalid signal: {text}"));
        }
    }
}

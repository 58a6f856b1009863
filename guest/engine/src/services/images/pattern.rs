//! Go's `path.Match`, which `reference` filters are written for.

/// The pattern cannot be: a bracket is not closed, a range is empty, or it ends in a backslash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("syntax error in pattern")]
pub struct BadPattern;

/// One element of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    /// `*`: any run without a slash.
    Star,
    /// `?`: one character but a slash.
    Any,
    /// `[a-c]`, `[^x]`: one character of these, or none of these.
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
    Literal(char),
}

/// A pattern, taken apart once and matched against many names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<Piece>);

impl Pattern {
    pub fn parse(text: &str) -> Result<Self, BadPattern> {
        let mut pieces = Vec::new();
        let mut rest = text.chars().peekable();
        while let Some(next) = rest.next() {
            pieces.push(match next {
                '*' => Piece::Star,
                '?' => Piece::Any,
                '\\' => Piece::Literal(rest.next().ok_or(BadPattern)?),
                '[' => {
                    let negated = rest.next_if_eq(&'^').is_some();
                    let mut ranges = Vec::new();
                    loop {
                        if !ranges.is_empty() && rest.next_if_eq(&']').is_some() {
                            break;
                        }
                        let low = class_character(&mut rest)?;
                        let high =
                            if rest.next_if_eq(&'-').is_some() { class_character(&mut rest)? } else { low };
                        ranges.push((low, high));
                    }
                    Piece::Class { negated, ranges }
                }
                literal => Piece::Literal(literal),
            });
        }
        Ok(Self(pieces))
    }

    /// Steps back to the last star only, so it is linear enough for any pattern.
    pub fn matches(&self, text: &str) -> bool {
        let text: Vec<char> = text.chars().collect();
        let (mut at, mut in_pattern) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while at < text.len() {
            match self.0.get(in_pattern) {
                Some(Piece::Star) => {
                    star = Some((at, in_pattern));
                    in_pattern += 1;
                }
                Some(piece) if piece.takes(text[at]) => {
                    at += 1;
                    in_pattern += 1;
                }
                _ => match star {
                    Some((from, place)) if text[from] != '/' => {
                        star = Some((from + 1, place));
                        at = from + 1;
                        in_pattern = place + 1;
                    }
                    _ => return false,
                },
            }
        }
        self.0[in_pattern..].iter().all(|piece| *piece == Piece::Star)
    }
}

impl Piece {
    fn takes(&self, character: char) -> bool {
        match self {
            Self::Star => false,
            Self::Any => character != '/',
            // As in Go, a class may take a slash.
            Self::Class { negated, ranges } => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&character)) != *negated
            }
            Self::Literal(literal) => *literal == character,
        }
    }
}

fn class_character(rest: &mut std::iter::Peekable<std::str::Chars>) -> Result<char, BadPattern> {
    match rest.next() {
        None | Some('-' | ']') => Err(BadPattern),
        Some('\\') => rest.next().ok_or(BadPattern),
        Some(character) => Ok(character),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_are_gos() {
        // The table of Go's own test of `path.Match`, where no error is expected.
        for (pattern, text, expected) in [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "a", true),
            ("a*", "ab/c", false),
            ("a*/b", "abc/b", true),
            ("a*/b", "a/c/b", false),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[e-g]", "abc", false),
            ("ab[^c]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a?b", "a☺b", true),
            ("a[^a]b", "a☺b", true),
            ("[a-ζ]*", "α", true),
            ("*[a-ζ]", "A", false),
            ("a?b", "a/b", false),
            ("a*b", "a/b", false),
            ("[\\]a]", "]", true),
            ("[x\\-]", "-", true),
            ("*x", "xxx", true),
            ("*a*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(Pattern::parse(pattern).map(|parsed| parsed.matches(text)), Ok(expected), "{pattern}");
        }
        for bad in ["[]a]", "[-]", "[x-]", "[-x]", "\\", "[a-b-c]", "[", "[^", "[^bc", "a["] {
            assert_eq!(Pattern::parse(bad), Err(BadPattern), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_text_matches_itself(text in "[a-z0-9/:@._-]{0,40}") {
            prop_assert!(Pattern::parse(&text).unwrap().matches(&text));
        }

        #[test]
        fn no_pattern_is_too_strange(pattern in ".{0,30}", text in ".{0,30}") {
            if let Ok(pattern) = Pattern::parse(&pattern) {
                pattern.matches(&text);
            }
        }
    }
}

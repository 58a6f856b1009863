//! Words of an instruction: split at blanks outside of quotes, then unquoted and expanded.

use crate::{Error, Result};

/// How deep words within words go at most: `${A:-${B:-…}}`.
const DEPTH_MAX: usize = 16;

/// Splits at blanks that are neither quoted nor escaped. Quotes stay.
pub(super) fn fields(text: &str) -> Result<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (letter, quote) {
            ('\\', None | Some('"')) => {
                word.push(letter);
                word.extend(letters.next());
            }
            ('"' | '\'', None) => {
                quote = Some(letter);
                word.push(letter);
            }
            (_, Some(open)) if letter == open => {
                quote = None;
                word.push(letter);
            }
            (_, None) if letter.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            _ => word.push(letter),
        }
    }
    if quote.is_some() {
        return Err(Error::invalid(format!(
            "unexpected end of statement while looking for matching quote in `{text}`"
        )));
    }
    if !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

/// Takes quotes and escapes away and puts values in.
pub(super) fn expand(text: &str, env: &[String]) -> Result<String> {
    Expansion { rest: text.chars().peekable(), env }.until(None, 0)
}

struct Expansion<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    env: &'a [String],
}

impl Expansion<'_> {
    /// Up to `end`, or up to the end of the text.
    fn until(&mut self, end: Option<char>, depth: usize) -> Result<String> {
        if depth > DEPTH_MAX {
            return Err(Error::invalid(format!("values are nested deeper than {DEPTH_MAX} times")));
        }
        let mut word = String::new();
        while let Some(letter) = self.rest.next() {
            match letter {
                _ if Some(letter) == end => return Ok(word),
                '\\' => word.extend(self.rest.next()),
                '\'' => self.single_quoted(&mut word)?,
                '"' => self.double_quoted(&mut word, depth)?,
                '$' => word.push_str(&self.value(depth)?),
                _ => word.push(letter),
            }
        }
        match end {
            Some(end) => Err(Error::invalid(format!("syntax error: missing `{end}`"))),
            None => Ok(word),
        }
    }

    fn single_quoted(&mut self, word: &mut String) -> Result<()> {
        for letter in self.rest.by_ref() {
            if letter == '\'' {
                return Ok(());
            }
            word.push(letter);
        }
        Err(unmatched("single"))
    }

    fn double_quoted(&mut self, word: &mut String, depth: usize) -> Result<()> {
        while let Some(letter) = self.rest.next() {
            match letter {
                '"' => return Ok(()),
                '$' => word.push_str(&self.value(depth)?),
                '\\' => match self.rest.next() {
                    Some(escaped @ ('"' | '$' | '\\')) => word.push(escaped),
                    Some(other) => word.extend(['\\', other]),
                    None => return Err(unmatched("double")),
                },
                _ => word.push(letter),
            }
        }
        Err(unmatched("double"))
    }

    /// What stands behind a dollar sign.
    fn value(&mut self, depth: usize) -> Result<String> {
        if self.rest.next_if_eq(&'{').is_none() {
            let name = self.name();
            return Ok(if name.is_empty() {
                "$".to_owned()
            } else {
                self.get(&name).unwrap_or_default().to_owned()
            });
        }
        let name = self.name();
        let bad = || Error::invalid("syntax error: bad substitution");
        if name.is_empty() {
            return Err(bad());
        }
        match self.rest.next() {
            Some('}') => Ok(self.get(&name).unwrap_or_default().to_owned()),
            Some(':') => {
                let modifier = self.rest.next();
                let word = self.until(Some('}'), depth + 1)?;
                let value = self.get(&name).filter(|value| !value.is_empty());
                match modifier {
                    Some('-') => Ok(value.map_or(word, str::to_owned)),
                    Some('+') => Ok(value.map(|_| word).unwrap_or_default()),
                    Some('?') => {
                        value.map(str::to_owned).ok_or_else(|| Error::invalid(format!("{name}: {word}")))
                    }
                    _ => Err(Error::invalid("unsupported modifier in substitution")),
                }
            }
            _ => Err(bad()),
        }
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(letter) = self.rest.next_if(|letter| letter.is_ascii_alphanumeric() || *letter == '_')
        {
            // `$1x` is the parameter 1 and an `x`.
            let is_parameter = name.is_empty() && letter.is_ascii_digit();
            name.push(letter);
            if is_parameter {
                break;
            }
        }
        name
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.env.iter().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
    }
}

fn unmatched(kind: &str) -> Error {
    Error::invalid(format!("unexpected end of statement while looking for matching {kind}-quote"))
}

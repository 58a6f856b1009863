//! What a registry asks for when it answers 401: the `WWW-Authenticate` header (RFC 9110, section 11).

use crate::Digest;

/// Parameters read from one challenge at most.
const PARAMETERS_MAX: usize = 32;

/// `Bearer realm="…",service="…",scope="…"`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    /// In lower case.
    pub(super) scheme: String,
    pub(super) realm: String,
    pub(super) service: Option<String>,
    pub(super) scope: Option<String>,
}

impl Challenge {
    /// Reads the first challenge of a header.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let mut challenge = Self { scheme: scheme.to_ascii_lowercase(), ..Self::default() };
        for _ in 0..PARAMETERS_MAX {
            let Some((name, after)) = rest.trim_start_matches([' ', ',']).split_once('=') else { break };
            let value;
            (value, rest) = match after.strip_prefix('"') {
                Some(quoted) => unquote(quoted)?,
                None => {
                    let end = after.find(',').unwrap_or(after.len());
                    (after[..end].trim().to_owned(), &after[end..])
                }
            };
            match name.trim().to_ascii_lowercase().as_str() {
                "realm" => challenge.realm = value,
                "service" => challenge.service = Some(value),
                "scope" => challenge.scope = Some(value),
                _ => {}
            }
        }
        Some(challenge)
    }
}

/// The text up to the closing quote, and what follows it. `None` when there is none.
fn unquote(quoted: &str) -> Option<(String, &str)> {
    let (mut text, mut characters) = (String::new(), quoted.char_indices());
    while let Some((index, character)) = characters.next() {
        match character {
            '"' => return Some((text, &quoted[index + 1..])),
            '\\' => text.extend(characters.next().map(|(_, escaped)| escaped)),
            other => text.push(other),
        }
    }
    None
}

/// The first number of `bytes 5-9/10`.
pub(super) fn range_start(text: &str) -> Option<u64> {
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

/// How many bytes an upload has, from `0-9` (or `bytes=0-9`): ten. An empty upload says `0-0`, which is taken for nothing.
pub(super) fn range_length(text: &str) -> Option<u64> {
    let (first, last) = text.trim().trim_start_matches("bytes=").split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    (first == 0).then(|| if last == 0 { 0 } else { last.saturating_add(1) })
}

/// Where the next page of a list is, from `Link: </v2/…>; rel="next"`.
pub(super) fn next_page(link: &str) -> Option<&str> {
    let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
    parameters.split(';').any(|part| matches!(part.trim(), "rel=\"next\"" | "rel=next")).then_some(target)
}

/// Fuzz entry: reads arbitrary bytes as every header that registries answer with.
pub fn fuzz(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _challenge = Challenge::parse(text);
    let _range = (range_start(text), range_length(text), next_page(text));
    let _digest = text.parse::<Digest>();
    let _refusal = super::refusal::Refusal::read(401, bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges_are_read() {
        let challenge = Challenge::parse(
            r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push""#,
        );
        let expected = Challenge {
            scheme: "bearer".to_owned(),
            realm: "https://auth.example/token".to_owned(),
            service: Some("registry.example".to_owned()),
            scope: Some("repository:a/b:pull,push".to_owned()),
        };
        assert_eq!(challenge, Some(expected));
        assert_eq!(
            Challenge::parse("Basic realm=x").map(|challenge| challenge.scheme),
            Some("basic".to_owned())
        );
        assert_eq!(Challenge::parse(r#"Bearer realm="unfinished"#), None);
    }

    #[test]
    fn ranges_and_links_are_read() {
        assert_eq!(range_start("bytes 5-9/10"), Some(5));
        assert_eq!(range_start("5-9"), None);
        assert_eq!(
            (range_length("0-9"), range_length("bytes=0-9"), range_length("0-0")),
            (Some(10), Some(10), Some(0))
        );
        assert_eq!((range_length("5-9"), range_length("x")), (None, None));
        assert_eq!(
            next_page("</v2/x/tags/list?last=b&n=2>; rel=\"next\""),
            Some("/v2/x/tags/list?last=b&n=2")
        );
        assert_eq!(next_page("</v2/x>; rel=\"prev\""), None);
    }

    proptest! {
        #[test]
        fn arbitrary_headers_do_not_panic(text in "\\PC{0,80}") {
            fuzz(text.as_bytes());
        }
    }
}

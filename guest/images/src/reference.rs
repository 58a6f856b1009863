//! Names of images, by Docker's rules (the `distribution/reference` grammar).
//!
//! ```text
//! reference := name [ ":" tag ] [ "@" digest ]
//! name      := [ domain "/" ] component [ "/" component ]…
//! ```
//!
//! A name without a domain belongs to Docker Hub: `debian` is `docker.io/library/debian`. The familiar form is the
//! shortest that means the same. The texts of the errors are Docker's, because people search for them.

use std::{fmt, str::FromStr};

use crate::{Digest, DigestError};

const DEFAULT_DOMAIN: &str = "docker.io";
const LEGACY_DOMAIN: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
const PATH_LENGTH_MAX: usize = 255;
const TAG_LENGTH_MAX: usize = 128;

/// The name of an image, normalised. Two names that mean the same are equal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// It does not follow the grammar.
    #[error("invalid reference format")]
    Format,
    /// Nothing before the tag.
    #[error("repository name must have at least one component")]
    Empty,
    /// Capital letters in the repository.
    #[error("invalid reference format: repository name ({0}) must be lowercase")]
    Uppercase(String),
    /// It would be taken for an image id.
    #[error("invalid repository name ({0}), cannot specify 64-byte hexadecimal strings")]
    Identifier(String),
    /// Longer than 255 bytes.
    #[error("repository name must not be more than {PATH_LENGTH_MAX} characters")]
    Long,
    /// What follows `@`.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

/// A name, or the id of an image spelled in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnyReference {
    /// A name.
    Named(Reference),
    /// 64 digits, with or without `sha256:`.
    Id(Digest),
}

impl AnyReference {
    /// Parses what a person may type for an image.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if let Ok(digest) = Digest::from_hex(text) {
            return Ok(Self::Id(digest));
        }
        if let Ok(digest) = text.parse() {
            return Ok(Self::Id(digest));
        }
        Ok(Self::Named(text.parse()?))
    }
}

impl Reference {
    /// The registry (`docker.io`, `localhost:5000`).
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository within the registry (`library/debian`).
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag, when there is one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, when there is one.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Domain and path (`docker.io/library/debian`).
    pub fn name(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The name as people write it (`debian`, `localhost:5000/x`).
    ///
    /// Unlike Docker's it always means the same when read again: `docker.io/localhost/x` stays as it is.
    pub fn familiar_name(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.name();
        }
        let short = match self.path.strip_prefix(OFFICIAL) {
            Some(rest) if !rest.contains('/') => rest,
            _ => &self.path,
        };
        let same = |again: Self| again.domain == self.domain && again.path == self.path;
        if short.parse().is_ok_and(same) { short.to_owned() } else { self.name() }
    }

    /// The whole reference as people write it (`debian:latest`).
    pub fn familiar(&self) -> String {
        self.suffixed(self.familiar_name())
    }

    /// Whether it belongs to Docker Hub, which is what a name without a registry means.
    pub fn is_default_domain(&self) -> bool {
        self.domain == DEFAULT_DOMAIN
    }

    /// With the tag `latest` if it has neither a tag nor a digest.
    pub fn with_default_tag(mut self) -> Self {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some("latest".to_owned());
        }
        self
    }

    /// The same repository with this tag and no digest.
    pub fn with_tag(&self, tag: &str) -> Result<Self, ReferenceError> {
        if !is_tag(tag) {
            return Err(ReferenceError::Format);
        }
        Ok(Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }

    /// The same repository with this digest and no tag.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    fn suffixed(&self, mut text: String) -> String {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
        text
    }
}

impl fmt::Display for Reference {
    /// The canonical form, with domain.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.suffixed(self.name()))
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if Digest::from_hex(text).is_ok() {
            return Err(ReferenceError::Identifier(text.to_owned()));
        }
        let (domain, rest) = split_domain(text);
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (rest, None),
        };
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        // `library/` is only ours to add when there is a name to add it to.
        let path = if domain == DEFAULT_DOMAIN && !path.contains('/') && !path.is_empty() {
            format!("{OFFICIAL}{path}")
        } else {
            path.to_owned()
        };
        if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(ReferenceError::Uppercase(path));
        }
        if !is_domain(&domain) || !path.split('/').all(is_component) || !tag.is_none_or(is_tag) {
            return Err(ReferenceError::Format);
        }
        if path.len() > PATH_LENGTH_MAX {
            return Err(ReferenceError::Long);
        }
        let digest = match digest {
            Some(digest) if is_digest_shaped(digest) => Some(digest.parse()?),
            Some(_) => return Err(ReferenceError::Format),
            None => None,
        };
        Ok(Self { domain, path, tag: tag.map(str::to_owned), digest })
    }
}

/// Splits the registry off. The first part is one when it could not be a repository: it has a dot, a colon or a
/// capital letter, or is `localhost`.
fn split_domain(text: &str) -> (String, &str) {
    match text.split_once('/') {
        Some((LEGACY_DOMAIN, rest)) => (DEFAULT_DOMAIN.to_owned(), rest),
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.chars().any(char::is_uppercase) =>
        {
            (first.to_owned(), rest)
        }
        _ => (DEFAULT_DOMAIN.to_owned(), text),
    }
}

fn is_domain(text: &str) -> bool {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else { return false };
        if address.is_empty() || !address.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':') {
            return false;
        }
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return false,
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(text), None),
        }
    };
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.is_none_or(|host| host.split('.').all(label))
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Lower-case letters and digits, joined by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let mut separator = String::new();
    let mut started = false;
    for character in text.chars() {
        match character {
            'a'..='z' | '0'..='9' => {
                let joins = separator.is_empty()
                    || matches!(separator.as_str(), "." | "_" | "__")
                    || separator.bytes().all(|byte| byte == b'-');
                if !joins || (!started && !separator.is_empty()) {
                    return false;
                }
                started = true;
                separator.clear();
            }
            '.' | '_' | '-' => separator.push(character),
            _ => return false,
        }
    }
    started && separator.is_empty()
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut bytes = text.bytes();
    bytes.next().is_some_and(word)
        && bytes.all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
        && text.len() <= TAG_LENGTH_MAX
}

/// `algorithm:hex` with at least 32 digits; anything else is a bad reference, not a bad digest.
fn is_digest_shaped(text: &str) -> bool {
    let Some((algorithm, digits)) = text.split_once(':') else { return false };
    let algorithm_part = |part: &str| {
        part.starts_with(|first: char| first.is_ascii_alphabetic())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    algorithm.split(['-', '_', '+', '.']).all(algorithm_part)
        && digits.len() >= 32
        && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Fuzz entry: parses arbitrary bytes and checks that what parses survives being printed.
///
/// # Panics
/// When a parsed reference does not read back as itself.
pub fn fuzz(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(reference) = text.parse::<Reference>() else { return };
    assert_eq!(reference.to_string().parse().as_ref(), Ok(&reference));
    assert_eq!(reference.familiar().parse().as_ref(), Ok(&reference));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, canonical: &str, familiar: &str) {
        let reference: Reference = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(reference.to_string(), canonical);
        assert_eq!(reference.familiar(), familiar);
    }

    fn refused(text: &str) -> String {
        text.parse::<Reference>().expect_err(text).to_string()
    }

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_normalised_as_docker_does() {
        check("debian", "docker.io/library/debian", "debian");
        check("debian:12", "docker.io/library/debian:12", "debian:12");
        check("docker.io/debian", "docker.io/library/debian", "debian");
        check("docker.io/library/debian", "docker.io/library/debian", "debian");
        check("index.docker.io/library/debian", "docker.io/library/debian", "debian");
        check("library/debian", "docker.io/library/debian", "debian");
        check("ana/shop", "docker.io/ana/shop", "ana/shop");
        check("library/a/b", "docker.io/library/a/b", "library/a/b");
        check("localhost/x", "localhost/x", "localhost/x");
        check("localhost:5000/x:y", "localhost:5000/x:y", "localhost:5000/x:y");
        check("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b");
        check("[::1]:5000/a", "[::1]:5000/a", "[::1]:5000/a");
        check("ghcr.io/a/b", "ghcr.io/a/b", "ghcr.io/a/b");
        check("docker.io/localhost/x", "docker.io/localhost/x", "docker.io/localhost/x");
        let hex = format!("docker.io/library/{}", "9".repeat(64));
        check(&hex, &hex, &hex);
        check("Registry/a", "Registry/a", "Registry/a");
        check("a__b/c-d---e.f", "docker.io/a__b/c-d---e.f", "a__b/c-d---e.f");
        check(&format!("x@{DIGEST}"), &format!("docker.io/library/x@{DIGEST}"), &format!("x@{DIGEST}"));
        check(&format!("x:y@{DIGEST}"), &format!("docker.io/library/x:y@{DIGEST}"), &format!("x:y@{DIGEST}"));
    }

    #[test]
    fn bad_names_are_refused_with_dockers_words() {
        let format = "invalid reference format";
        for text in [
            "-x",
            "x-",
            "a//b",
            "a..b",
            "a___b",
            "a._b",
            ":x",
            "x:",
            "x:-y",
            "a b",
            "x@",
            "x@y",
            "../x",
            "/x",
            "x/",
            "é",
            "a.b:port/x",
            "-a.b/x",
            "[::1/x",
            "docker.io/",
        ] {
            assert_eq!(refused(text), format, "{text}");
        }
        assert_eq!(refused(&format!("x:{}", "t".repeat(129))), format);
        assert_eq!(
            refused("Debian"),
            "invalid reference format: repository name (library/Debian) must be lowercase"
        );
        assert_eq!(refused("a/B:c"), "invalid reference format: repository name (a/B) must be lowercase");
        assert_eq!(refused(""), "repository name must have at least one component");
        assert_eq!(refused(&"a".repeat(300)), "repository name must not be more than 255 characters");
        assert_eq!(
            refused(&"a".repeat(64)),
            format!(
                "invalid repository name ({}), cannot specify 64-byte hexadecimal strings",
                "a".repeat(64)
            )
        );
        assert_eq!(refused(&format!("x@sha512:{}", "a".repeat(128))), "unsupported digest algorithm");
        assert_eq!(refused(&format!("x@sha256:{}", "a".repeat(40))), "invalid checksum digest length");
    }

    #[test]
    fn the_default_tag_is_only_added_where_there_is_nothing() {
        let tagged = |text: &str| text.parse::<Reference>().expect("a name").with_default_tag().familiar();
        assert_eq!(tagged("x"), "x:latest");
        assert_eq!(tagged("x:y"), "x:y");
        assert_eq!(tagged(&format!("x@{DIGEST}")), format!("x@{DIGEST}"));
    }

    #[test]
    fn ids_in_full_are_not_names() {
        let digest = DIGEST.parse::<Digest>().expect("a digest");
        assert_eq!(AnyReference::parse(DIGEST), Ok(AnyReference::Id(digest)));
        assert_eq!(AnyReference::parse(&digest.hex()), Ok(AnyReference::Id(digest)));
        assert!(matches!(AnyReference::parse("e3b0"), Ok(AnyReference::Named(_))));
    }

    proptest! {
        #[test]
        fn anything_that_parses_reads_back_as_itself(text in "\\PC{0,60}") {
            fuzz(text.as_bytes());
        }

        #[test]
        fn likely_texts_read_back_as_themselves(text in "([a-zA-Z0-9.:-]{0,12}/)?[a-z0-9._/-]{0,20}(:[a-zA-Z0-9._-]{0,8})?") {
            fuzz(text.as_bytes());
        }

        #[test]
        fn every_name_the_grammar_makes_is_accepted(
            domain in "(localhost|[a-z]{1,5}\\.[a-z]{1,3})(:[0-9]{1,5})?",
            path in "[a-z0-9]{1,8}((\\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}(/[a-z0-9]{1,8}){0,2}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
        ) {
            let mut text = format!("{domain}/{path}");
            if let Some(tag) = tag { text = format!("{text}:{tag}"); }
            prop_assert!(text.parse::<Reference>().is_ok(), "{}", text);
        }
    }
}

//! API versions and the window the server speaks.

use std::fmt;
use std::str::FromStr;

/// An API version such as `1.44`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApiVersion {
    /// The first number; always 1 so far.
    pub major: u32,
    /// The second number.
    pub minor: u32,
}

/// The newest version spoken; also the meaning of a path without a version.
pub const NEWEST: ApiVersion = ApiVersion::new(1, 51);
/// The oldest version spoken.
pub const OLDEST: ApiVersion = ApiVersion::new(1, 24);

impl ApiVersion {
    /// `major.minor`.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }
}

impl fmt::Display for ApiVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)
    }
}

/// The text is not `<number>.<number>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotAVersion;

impl fmt::Display for NotAVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("not an API version")
    }
}

impl std::error::Error for NotAVersion {}

impl FromStr for ApiVersion {
    type Err = NotAVersion;

    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        let number = |part: &str| -> Result<u32, NotAVersion> {
            if part.is_empty() || part.len() > 4 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(NotAVersion);
            }
            part.parse().map_err(|_| NotAVersion)
        };
        let (major, minor) = text.split_once('.').ok_or(NotAVersion)?;
        Ok(Self { major: number(major)?, minor: number(minor)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert!(ApiVersion::from_str("1.9").unwrap() < ApiVersion::from_str("1.24").unwrap());
        assert_eq!("1.51".parse(), Ok(NEWEST));
        assert!("1.".parse::<ApiVersion>().is_err());
        assert!("1.x".parse::<ApiVersion>().is_err());
        assert!("1.99999999999".parse::<ApiVersion>().is_err());
    }
}

//! Operating system and processor: which of an index's manifests fits.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Error, image::nullable};

/// The architectures that may be named without a system.
const ARCHITECTURES: [&str; 16] = [
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64", "ppc64le",
    "riscv64", "s390", "s390x", "sparc64", "wasm",
];

/// A platform, in Go's words (`linux/arm64/v8`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// `linux`.
    #[serde(deserialize_with = "nullable")]
    pub os: String,
    /// `amd64`, `arm64`, …
    #[serde(deserialize_with = "nullable")]
    pub architecture: String,
    /// `v7`, `v8`, …; empty when there is one only.
    #[serde(deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

impl Platform {
    /// The platform of this machine.
    pub fn host() -> Self {
        Self {
            os: "linux".to_owned(),
            architecture: normal_architecture(std::env::consts::ARCH).0.to_owned(),
            variant: String::new(),
        }
    }

    /// How well an image of `candidate` runs where `self` is wanted; `None` when it does not. Higher is better.
    pub fn fit(&self, candidate: &Self) -> Option<u32> {
        let (wanted, offered) = (self.normal(), candidate.normal());
        if wanted.os != offered.os || wanted.architecture != offered.architecture {
            return None;
        }
        if wanted.variant == offered.variant {
            return Some(1000);
        }
        // An older variant of the same architecture runs on a newer one.
        match (level(&wanted.variant), level(&offered.variant)) {
            (Some(most), Some(level)) if level <= most => Some(level),
            _ => None,
        }
    }

    /// With the usual synonyms resolved and the variant that an architecture has when none is given.
    fn normal(&self) -> Self {
        let (architecture, implied) = normal_architecture(&self.architecture);
        let variant = match (architecture, self.variant.as_str()) {
            (_, "") if !implied.is_empty() => implied,
            ("amd64", "") => "v1",
            ("arm", "") => "v7",
            ("arm64", "") => "v8",
            (_, variant) => variant,
        };
        let variant = if variant.starts_with(|first: char| first.is_ascii_digit()) {
            format!("v{variant}")
        } else {
            variant.to_owned()
        };
        Self { os: self.os.to_ascii_lowercase(), architecture: architecture.to_owned(), variant }
    }
}

/// Go's name of an architecture, and the variant that the given name implies.
fn normal_architecture(name: &str) -> (&str, &'static str) {
    match name {
        "x86_64" | "x86-64" | "AMD64" => ("amd64", ""),
        "aarch64" | "ARM64" => ("arm64", ""),
        "armhf" => ("arm", "v7"),
        "armel" => ("arm", "v6"),
        "i386" | "i686" | "x86" => ("386", ""),
        "powerpc64" => ("ppc64le", ""),
        "loongarch64" => ("loong64", ""),
        other => (other, ""),
    }
}

/// `v8` is 8; `v8.1` is 8 as well.
fn level(variant: &str) -> Option<u32> {
    let digits = variant.strip_prefix('v')?;
    digits.split('.').next()?.parse().ok()
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(formatter, "/{}", self.variant)?;
        }
        Ok(())
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// `os/architecture[/variant]`, or one word: `linux`, or an architecture.
    fn from_str(text: &str) -> Result<Self, Error> {
        let parts: Vec<&str> = text.split('/').collect();
        let word = |part: &&str| {
            !part.is_empty()
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
        };
        if parts.len() > 3 || !parts.iter().all(word) {
            return Err(Error::invalid(format!(
                "`{text}` is an invalid platform: it is written os/architecture[/variant], for example linux/amd64"
            )));
        }
        let host = Self::host();
        let (os, architecture, variant) = match parts[..] {
            ["linux"] => ("linux", host.architecture.as_str(), ""),
            [architecture] if ARCHITECTURES.contains(&normal_architecture(architecture).0) => {
                ("linux", architecture, "")
            }
            [_] => {
                return Err(Error::invalid(format!(
                    "invalid platform: \"{text}\": unknown operating system or architecture"
                )));
            }
            [os, architecture] => (os, architecture, ""),
            [os, architecture, variant] => (os, architecture, variant),
            _ => unreachable!("one to three parts were checked above"),
        };
        Ok(Self {
            os: os.to_ascii_lowercase(),
            architecture: normal_architecture(architecture).0.to_owned(),
            variant: variant.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(wanted: &str, offered: &str) -> Option<u32> {
        let wanted: Platform = wanted.parse().expect("wanted");
        let offered: Platform = offered.parse().expect("offered");
        wanted.fit(&offered)
    }

    #[test]
    fn a_platform_fits_itself_and_older_variants() {
        assert!(fit("linux/amd64", "linux/amd64").is_some());
        assert!(fit("linux/amd64", "linux/x86_64").is_some());
        assert!(fit("linux/arm64", "linux/arm64/v8").is_some());
        assert!(fit("linux/arm/v7", "linux/arm/v6") < fit("linux/arm/v7", "linux/arm/v7"));
        assert_eq!(fit("linux/arm/v6", "linux/arm/v7"), None);
        assert_eq!(fit("linux/amd64", "linux/amd64/v3"), None);
        assert_eq!(fit("linux/amd64", "linux/arm64"), None);
        assert_eq!(fit("linux/amd64", "unknown/unknown"), None);
        assert_eq!(fit("linux/amd64", "windows/amd64"), None);
    }

    #[test]
    fn bad_platforms_are_refused_with_the_value() {
        for text in ["", "a/b/c/d", "linux/", "linux/am d64", "/", "foobar"] {
            let error = text.parse::<Platform>().expect_err(text).to_string();
            assert!(error.contains("invalid platform") && error.contains(text), "{error}");
        }
    }
}

//! The sha256 of something, and the chain of layers that such digests make.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A sha256, written `sha256:<64 lower-case hexadecimal digits>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// Why a text is no digest; the texts are those of Docker's digest library.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Not `algorithm:hex`.
    #[error("invalid checksum digest format")]
    Format,
    /// Another algorithm than sha256.
    #[error("unsupported digest algorithm")]
    Algorithm,
    /// Not 64 digits.
    #[error("invalid checksum digest length")]
    Length,
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The 64 digits without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first 12 digits, as Docker shows layers and images.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }

    /// From 64 lower-case hexadecimal digits.
    pub fn from_hex(text: &str) -> Result<Self, DigestError> {
        if text.len() != 64 {
            return Err(DigestError::Length);
        }
        if !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(DigestError::Format);
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| DigestError::Format)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let (algorithm, digits) = text.split_once(':').ok_or(DigestError::Format)?;
        match algorithm {
            "sha256" => Self::from_hex(digits),
            "" => Err(DigestError::Format),
            _ => Err(DigestError::Algorithm),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A running sha256.
#[derive(Debug, Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes taken.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// The name of a stack of layers (OCI image specification, layer ChainID): it depends on every diff id below.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChainId(Digest);

impl ChainId {
    /// The chain of one layer on top of `parent`.
    pub fn next(parent: Option<Self>, diff_id: Digest) -> Self {
        match parent {
            None => Self(diff_id),
            Some(parent) => Self(Digest::of(format!("{} {}", parent.0, diff_id).as_bytes())),
        }
    }

    /// The chain of every layer, bottom first.
    pub fn all(diff_ids: &[Digest]) -> Vec<Self> {
        let mut parent = None;
        diff_ids
            .iter()
            .map(|diff_id| {
                let chain = Self::next(parent, *diff_id);
                parent = Some(chain);
                chain
            })
            .collect()
    }

    /// As a digest.
    pub fn digest(&self) -> &Digest {
        &self.0
    }
}

impl From<Digest> for ChainId {
    fn from(digest: Digest) -> Self {
        Self(digest)
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, formatter)
    }
}

impl fmt::Debug for ChainId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_checked() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(empty.parse(), Ok(Digest::of(b"")));
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(Digest::of(b"").short(), "e3b0c44298fc");
        assert_eq!("sha256".parse::<Digest>(), Err(DigestError::Format));
        assert_eq!("sha512:00".parse::<Digest>(), Err(DigestError::Algorithm));
        assert_eq!("sha256:00".parse::<Digest>(), Err(DigestError::Length));
        assert_eq!(
            empty.to_uppercase().replace("SHA256", "sha256").parse::<Digest>(),
            Err(DigestError::Format)
        );
        assert_eq!(
            "sha256:../../../../../../../../../../../../../../../../../../../../../x".parse::<Digest>(),
            Err(DigestError::Format)
        );
    }

    #[test]
    fn a_chain_is_the_digest_of_its_parent_and_its_layer() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let chain = ChainId::all(&[a, b]);
        assert_eq!(chain[0].digest(), &a);
        assert_eq!(chain[1].digest(), &Digest::of(format!("{a} {b}").as_bytes()));
        assert!(ChainId::all(&[]).is_empty());
    }
}

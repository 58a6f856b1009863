//! Registries: credentials in headers, `/auth`, `/images/search`, `/distribution/…`, and the result of a push.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::{Deserialize, Serialize};

use crate::image::AuthConfig;
use crate::manifest::{Descriptor, OciPlatform};

/// base64 for URLs; clients disagree about the padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The credentials in `X-Registry-Auth`. What cannot be read counts as none, as with dockerd: whether that is enough is for
/// the registry to say.
#[must_use]
pub fn decode_auth(header: &[u8]) -> AuthConfig {
    decode(header).unwrap_or_default()
}

/// Credentials as `X-Registry-Auth` carries them: what [`decode_auth`] reads.
pub fn encode_auth(auth: &AuthConfig) -> Result<String, serde_json::Error> {
    Ok(BASE64.encode(serde_json::to_vec(auth)?))
}

/// The credentials in `X-Registry-Config`, by registry.
#[must_use]
pub fn decode_auths(header: &[u8]) -> BTreeMap<String, AuthConfig> {
    decode(header).unwrap_or_default()
}

fn decode<T: serde::de::DeserializeOwned>(header: &[u8]) -> Option<T> {
    let text: Vec<u8> = header
        .trim_ascii()
        .iter()
        // Some clients use the alphabet that is not for URLs.
        .map(|byte| match byte {
            b'+' => b'-',
            b'/' => b'_',
            byte => *byte,
        })
        .collect();
    crate::decode(&BASE64.decode(text).ok()?).ok()
}

/// Answer of `POST /auth`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AuthAnswer {
    /// A token to use instead of the password.
    pub identity_token: String,
    /// `Login Succeeded`.
    pub status: String,
}

impl std::fmt::Debug for AuthAnswer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("AuthAnswer").field("status", &self.status).finish_non_exhaustive()
    }
}

/// One repository that a search found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchResult {
    /// How many like it.
    pub star_count: i64,
    /// Whether it is one of Docker's own.
    pub is_official: bool,
    /// Its name.
    pub name: String,
    /// Always false.
    pub is_automated: bool,
    /// What it is.
    pub description: String,
}

/// Answer of `GET /distribution/{name}/json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DistributionInspect {
    /// What the name stands for.
    pub descriptor: Descriptor,
    /// What it runs on; null when that is not known.
    pub platforms: Option<Vec<OciPlatform>>,
}

/// The last line of a push, as its `aux`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PushResult {
    /// The tag.
    pub tag: String,
    /// The manifest's digest.
    pub digest: String,
    /// The manifest's size in bytes.
    pub size: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_come_with_and_without_padding() {
        // {"username":"me","password":"p?>"}
        let padded = "eyJ1c2VybmFtZSI6Im1lIiwicGFzc3dvcmQiOiJwPz4ifQ==";
        for text in [padded, padded.trim_end_matches('=')] {
            let auth = decode_auth(text.as_bytes());
            assert_eq!((auth.username.as_str(), auth.password.as_str()), ("me", "p?>"));
        }
        assert_eq!(decode_auth(b"e30="), AuthConfig::default());
        // {"r:5000":{"username":"me"}}
        let all = decode_auths(b"eyJyOjUwMDAiOnsidXNlcm5hbWUiOiJtZSJ9fQ");
        assert_eq!(all["r:5000"].username, "me");
    }

    #[test]
    fn nonsense_counts_as_nothing() {
        for text in [&b""[..], b"!!!", b"c2VjcmV0", b"\xff\xfe", b"bnVsbA"] {
            assert_eq!(decode_auth(text), AuthConfig::default());
            assert!(decode_auths(text).is_empty());
        }
    }

    #[test]
    fn answers_are_dockers() {
        let answer = AuthAnswer { identity_token: "marker".into(), status: "Login Succeeded".into() };
        assert!(!format!("{answer:?}").contains("marker"));
        assert_eq!(
            serde_json::to_string(&PushResult { tag: "latest".into(), digest: "sha256:0".into(), size: 7 })
                .unwrap(),
            r#"{"Tag":"latest","Digest":"sha256:0","Size":7}"#
        );
        let inspect = serde_json::to_value(DistributionInspect::default()).unwrap();
        assert!(inspect["Platforms"].is_null() && inspect["Descriptor"]["digest"] == "");
    }
}

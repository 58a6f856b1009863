//! What a registry is shown. Lives as long as the request that brought it: never stored, never printed.

use std::fmt;

/// A password or a token. Nothing prints it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("…")
    }
}

/// What a registry is shown. `Debug` never prints the secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing.
    #[default]
    Anonymous,
    /// A name and a password.
    Basic {
        /// The name.
        username: String,
        /// The password or access token.
        password: Secret,
    },
    /// A refresh token (`identitytoken` in Docker's configuration).
    IdentityToken(Secret),
    /// A bearer token to send as it is (`registrytoken`).
    RegistryToken(Secret),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_printed() {
        let all = [
            Credentials::Basic { username: "ana".to_owned(), password: Secret::new("marker") },
            Credentials::IdentityToken(Secret::new("marker")),
            Credentials::RegistryToken(Secret::new("marker")),
        ];
        assert!(!format!("{all:#?}").contains("marker"));
    }
}

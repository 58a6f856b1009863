//! Why a service refused: a kind and the sentence the client prints. Only `http` turns kinds into numbers.

use guest_api::ErrorKind;

/// A refusal or failure of a service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What sort of failure.
    pub kind: ErrorKind,
    /// The sentence.
    pub message: String,
}

impl Failure {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Conflict, message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub fn not_modified() -> Self {
        Self::new(ErrorKind::NotModified, "")
    }

    pub fn not_implemented(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotImplemented, message)
    }

    /// A failure of our own: what was tried, and the whole chain of causes.
    pub fn internal(what: impl std::fmt::Display, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(ErrorKind::Internal, format!("{what}: {}", chain(error)))
    }

    /// An invariant of ours is broken.
    pub fn broken(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, what)
    }
}

impl From<guest_api::InvalidFilter> for Failure {
    fn from(error: guest_api::InvalidFilter) -> Self {
        Self::invalid(error.to_string())
    }
}

/// An error and its causes, joined by colons. A cause that the text before it repeats already is left out.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open `x`")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn the_whole_chain_is_told_once() {
        let error = Outer(std::io::Error::from_raw_os_error(2));
        let failure = Failure::internal("cannot start container 3f2a", &error);
        assert_eq!(
            failure.message,
            "cannot start container 3f2a: cannot open `x`: No such file or directory (os error 2)"
        );
    }
}

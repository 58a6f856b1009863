//! What can go wrong, as kinds that an API maps to status codes, each with a sentence.
//!
//! The sentences that Docker's clients match on are spelled as dockerd spells them.

use std::{io, path::Path, sync::Arc};

use rustix::io::Errno;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it is. Services map it to a status code in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No such image, tag, repository, layer or snapshot (404).
    NotFound,
    /// The state of something else forbids it: an image in use, a key taken (409).
    Conflict,
    /// What was given cannot be right: a bad name, a hostile or truncated archive, a digest that does not match (400).
    Invalid,
    /// The registry wants credentials, or refuses these (401).
    Unauthorized,
    /// Not with these credentials, or not at all (403).
    Forbidden,
    /// A registry cannot be reached, or does not answer as one (503, 500 from dockerd).
    Unavailable,
    /// The disk is full (507, 500 from dockerd).
    NoSpace,
    /// Something this crate had stored is damaged or gone (500).
    Corrupt,
    /// The operating system refused something that should work (500).
    Internal,
}

/// A failure: its kind, a sentence, and the cause where there is one.
///
/// It is cheap to clone, because several pulls may wait for one download.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
    #[source]
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn because(
        kind: Kind,
        message: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(Arc::new(source)) }
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(Kind::Conflict, message)
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, message)
    }

    /// A failed system call on `path`; a full disk becomes its own kind, with a sentence saying where.
    pub(crate) fn io(action: &str, path: &Path, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        if is_no_space(&source) {
            return Self::because(
                Kind::NoSpace,
                format!(
                    "no space left on the disk that holds `{}`: could not {action}; remove unused images or containers, or give the disk more room",
                    path.display()
                ),
                source,
            );
        }
        Self::because(Kind::Internal, format!("could not {action} `{}`", path.display()), source)
    }

    /// The same failure as another sort.
    pub(crate) fn with_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sentence and every cause after it, joined by colons.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

/// Whether the disk, or the quota on it, is full.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(Errno::NOSPC.raw_os_error())
        || code == Some(Errno::DQUOT.raw_os_error())
        || error.kind() == io::ErrorKind::StorageFull
}

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for Error {
            fn from(source: $error) -> Self {
                let source = redb::Error::from(source);
                let kind = match &source {
                    redb::Error::Io(error) if is_no_space(error) => Kind::NoSpace,
                    redb::Error::Corrupted(_) => Kind::Corrupt,
                    _ => Kind::Internal,
                };
                Self::because(kind, "the engine's database could not be used", source)
            }
        }
    )*};
}
from_redb!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::SetDurabilityError
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_a_kind_and_says_where() {
        let error = Error::io("write", Path::new("/data/blobs/x"), Errno::NOSPC);
        assert_eq!(error.kind(), Kind::NoSpace);
        assert!(error.to_string().contains("/data/blobs/x"), "{error}");
        assert_eq!(Error::io("write", Path::new("/x"), Errno::ACCESS).kind(), Kind::Internal);
    }

    #[test]
    fn the_chain_holds_every_cause() {
        let error = Error::io("open", Path::new("/x"), Errno::NOENT);
        assert!(error.chain().starts_with("could not open `/x`: "), "{}", error.chain());
    }
}

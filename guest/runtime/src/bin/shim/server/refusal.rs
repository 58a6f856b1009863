//! Why a request was not done.

use std::io;

use guest_runtime::shim::{ErrorKind, ProcessId, Reply};
use thiserror::Error;

use crate::container::RuntimeError;

/// A refusal on its way to becoming a reply.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("failed to initialize logging driver")]
    Log {
        #[source]
        source: io::Error,
    },
    #[error("{message}")]
    State { kind: ErrorKind, message: String },
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot {step}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        let kind = match &refusal {
            Refusal::State { kind, .. } => *kind,
            Refusal::Runtime(error) => error.kind(),
            Refusal::Io { .. } | Refusal::Log { .. } => ErrorKind::Other,
        };
        Self::Error { kind, message: crate::trace::chain(&refusal) }
    }
}

pub(super) fn conflict(message: String) -> Refusal {
    Refusal::State { kind: ErrorKind::Conflict, message }
}

/// How a process is called in a sentence.
pub(super) fn name_of(id: &ProcessId) -> &str {
    id.as_deref().unwrap_or("init")
}

//! Fault points: named moments at which a test may have the program killed, as a power cut would.
//!
//! They exist only in builds with debug assertions: a release has none. `tests/run native` builds the programs that
//! way too, and kills them at every point.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

/// Ends the process here and now, without a chance to tidy, when the environment variable `ENGINE_FAULT` holds `name`.
#[cfg(debug_assertions)]
pub fn point(name: &str) {
    static WANTED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let wanted = WANTED.get_or_init(|| std::env::var("ENGINE_FAULT").ok());
    if wanted.as_deref() == Some(name) {
        std::process::abort();
    }
}

/// Nothing: releases have no fault points.
#[cfg(not(debug_assertions))]
#[inline]
pub fn point(_name: &str) {}

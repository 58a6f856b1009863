//! Fault points: named moments at which a test may have the program killed, as a power cut would. Not in releases.

/// Ends the process here and now when the environment variable `ENGINE_FAULT` holds this name.
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

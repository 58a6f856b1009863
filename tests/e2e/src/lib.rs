//! End-to-end scenarios.
#![forbid(unsafe_code)]

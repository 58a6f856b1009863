//! Import rules.
#![forbid(unsafe_code)]

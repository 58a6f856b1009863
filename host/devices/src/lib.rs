//! Device models.
#![forbid(unsafe_code)]

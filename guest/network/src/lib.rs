//! Networks.
#![forbid(unsafe_code)]

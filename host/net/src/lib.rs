//! User-space NAT.
#![forbid(unsafe_code)]

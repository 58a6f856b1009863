//! The contract between host and guest.
#![forbid(unsafe_code)]

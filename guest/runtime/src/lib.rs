//! OCI spec to process.
#![forbid(unsafe_code)]

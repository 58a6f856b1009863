//! Control messages of the host daemon: types only.
#![forbid(unsafe_code)]

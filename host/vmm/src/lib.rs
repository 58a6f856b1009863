//! Machines.
#![forbid(unsafe_code)]

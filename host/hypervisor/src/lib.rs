//! Hypervisor back ends.
#![forbid(unsafe_code)]

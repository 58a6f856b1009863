//! Docker API wire types.
#![forbid(unsafe_code)]

//! The networks containers can be on: the default bridge, the host's own, and none.

mod routes;
mod service;

pub use service::{Networks, Place};

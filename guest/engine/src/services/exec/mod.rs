//! Processes run inside running containers.

mod service;

pub use service::{Execs, Running};

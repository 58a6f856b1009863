//! Processes run inside running containers.

mod keep;
mod service;

pub use service::{Execs, Running, told};

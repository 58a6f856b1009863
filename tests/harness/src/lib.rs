//! What end-to-end tests and benchmarks stand on: a private engine in a temporary home, natively or in a VM, test images
//! made from Debian's static busybox, a real registry on loopback, and commands with deadlines.
//!
//! The same scenario runs in every [`Stage`]. A failure carries the logs of all processes involved. Nothing is left
//! behind: every process is found by the temporary home in its environment or arguments, and [`Engine::finish`] reports
//! what should not be there.
#![forbid(unsafe_code)]

mod command;
mod engine;
mod image;
mod namespace;
mod processes;
mod registry;
mod usage;
mod world;

pub use command::{Finished, PATIENCE, Running, Timed, run, wait_until};
pub use engine::{Engine, IMAGE, Stage, Wishes};
pub use image::{Layer, TestImage};
pub use namespace::enter_private_namespaces;
pub use processes::Processes;
pub use registry::Registry;
pub use usage::Usage;
pub use world::World;

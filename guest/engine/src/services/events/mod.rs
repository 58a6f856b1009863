//! What happened, to whoever listens, with the last records kept for `since`.

mod filter;
mod service;

pub use filter::EventFilter;
pub use service::Events;

//! What the engine can do, one folder a subject. Services own their state, return kinds of failure, and know no HTTP.

pub mod containers;
pub mod events;
pub mod exec;
pub mod images;
pub mod networks;
pub mod prune;
pub mod system;
pub mod volumes;

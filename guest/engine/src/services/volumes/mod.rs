//! Volumes: data that outlives containers. One driver, `local`, whose folders [`guest_volumes`] keeps.
//!
//! A volume is its record in the store; who uses it follows from the containers' records and is held in memory. A volume
//! in use is never removed.

mod list;
mod record;
mod service;
#[cfg(test)]
mod tests;

pub use record::VolumeRecord;
pub use service::Volumes;

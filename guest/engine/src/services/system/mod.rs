//! What this engine is: `/version` and `/info`.

mod cgroups;
mod info;
mod service;
mod usage;

pub use service::System;
pub use usage::UsageQuery;

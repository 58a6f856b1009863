//! What this engine is: `/version` and `/info`.

mod service;

pub use service::System;

//! Images, as the API shows them: a thin layer over `guest-images`, which owns the store.

mod convert;
mod list;
mod pattern;
mod prune;
mod service;

pub use convert::{container_config, failure};
pub use list::{ImagesQuery, Shared};
pub use service::{ImagesService, PullQuery};

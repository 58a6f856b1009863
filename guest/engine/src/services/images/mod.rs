//! Images, as the API shows them: a thin layer over `guest-images`, which owns the store.

mod convert;
mod draft;
mod files;
mod list;
mod pattern;
mod prune;
mod registry;
mod service;
mod transfer;

pub use convert::{container_config, error_line, failure};
pub use draft::{image_config, merge};
pub use files::{ImportQuery, LoadQuery, new_name};
pub use list::{ImagesQuery, Shared};
pub use registry::SearchQuery;
pub use service::ImagesService;
pub use transfer::{Line, PullQuery, PushQuery, platform};

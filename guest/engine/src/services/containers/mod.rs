//! Containers: what they are ([`record`]), which request is legal when ([`table`]), the task that drives each
//! ([`driver`]), and what it takes to run one ([`run`], [`spec`]).
//!
//! The service keeps an index of drivers and hands requests to them; lists and inspections read published views and
//! never wait for a driver. It does not own images, networks or processes: those have owners of their own.

mod archive;
mod capacity;
mod commit;
mod create;
mod driver;
mod follow;
mod health;
mod index;
mod inspect;
mod list;
mod log;
mod logging;
mod mounts;
mod names;
mod network;
mod peers;
mod process;
mod prune;
mod record;
mod rootfs;
mod run;
mod runtime;
mod service;
mod shim;
mod signal;
mod spec;
mod stats;
mod status;
mod table;
mod top;
mod update;
mod usage;
mod user;

pub use archive::ExtractQuery;
pub use capacity::Capacity;
pub use commit::CommitQuery;
pub use create::for_version;
pub use driver::Attachment;
pub use health::end as end_process;
pub use inspect::NEVER;
pub use list::ListQuery;
pub use log::LogQuery;
pub use network::{NetworkChange, link_targets};
pub use process::{describe, exec_failure, user_of};
#[cfg(test)]
pub use record::tests::record as test_record;
pub use record::{Record, View};
pub use run::{Context, shim_failure};
pub use service::{Containers, RemoveQuery, WaitCondition};
pub use shim::{Shim, Streams};
pub use signal::parse as parse_signal;
pub use table::{Phase, Request, Verdict, admit};
pub use usage::StatsMode;

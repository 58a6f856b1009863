//! The networks containers can be on.
//!
//! The service owns them ([`record`], stored) and which running container is where ([`state`], with a file each so
//! that an engine that is started again knows). `create` and `options` read what clients ask, purely; `attach` puts
//! containers onto networks and takes them off; `settle` ends what a killed engine left half done; `listening` leads the
//! computer around the machine to those that use the machine's own network; `firewall` is the one writer of the rules;
//! `show` is what clients see, and `why` what is in the way of a port.
//!
//! On a host the default bridge and the firewall are made when the first container needs them, so that an engine whose
//! containers use no network touches nothing; in the machine they are made at once, beside everything else.

mod attach;
mod create;
mod firewall;
mod foreign;
mod landings;
mod listening;
mod names;
mod options;
mod pools;
mod ports;
mod publish;
mod raise;
mod record;
mod routes;
mod service;
mod settle;
mod show;
mod state;
mod unfinished;
mod vlan;
mod why;

pub use attach::{Attached, lookup_key};
pub use ports::{check as check_ports, parse as parse_port};
pub use service::Networks;

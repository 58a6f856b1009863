//! The control session against a peer that sends anything.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| guest_protocol::session::exercise(bytes));

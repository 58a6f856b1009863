//! The first bytes of a forwarded connection, and framed datagrams, from a peer that sends anything.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| guest_protocol::forward::exercise(bytes));

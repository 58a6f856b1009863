//! The user-space NAT against frames a hostile guest might send, and events of the host in between.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| host_net::fuzz_nat_frames(data));

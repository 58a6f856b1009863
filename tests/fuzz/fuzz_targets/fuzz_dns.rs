//! DNS queries of containers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest_network::dns::read_hostile(bytes));

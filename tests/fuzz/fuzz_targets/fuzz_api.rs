//! Docker API bodies, filters, versions and stream frames.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest_api::read_hostile(bytes));

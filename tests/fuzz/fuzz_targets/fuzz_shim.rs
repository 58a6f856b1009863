//! Requests to a shim, from bytes of a foreign client.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| guest_runtime::shim::wire::decode_requests(bytes));

//! The console against a guest that makes any rings.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_devices::fuzz::console(bytes));

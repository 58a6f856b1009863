//! The balloon against a guest that reports anything.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_devices::fuzz::balloon(bytes));

//! Devices restored from any state.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_devices::fuzz::saved(bytes));

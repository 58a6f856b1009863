//! The socket device against a guest that sends any packets, or makes any rings.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_devices::fuzz::vsock(bytes));

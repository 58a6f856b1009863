//! The network card against a guest that makes any rings, and a NAT that sends any frames.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_devices::fuzz::net(bytes));

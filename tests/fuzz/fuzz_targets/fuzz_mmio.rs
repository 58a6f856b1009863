//! The registers of virtio-mmio against a driver that does anything.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_devices::fuzz::mmio(bytes));

//! Memory that comes and goes against a guest that plugs and unplugs anything.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_devices::fuzz::mem(bytes));

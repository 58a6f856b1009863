//! The server of shared folders against a guest that says anything.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_fs::fuzz::in_scratch(|folder| host_fs::fuzz::requests(folder, bytes)));

//! The server of shared folders restored from any state.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| host_fs::fuzz::in_scratch(|folder| host_fs::fuzz::saved(folder, bytes)));

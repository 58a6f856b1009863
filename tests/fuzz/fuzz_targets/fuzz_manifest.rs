//! Manifests, indexes, configurations and the tables of archives.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| guest_images::manifest::fuzz(bytes));

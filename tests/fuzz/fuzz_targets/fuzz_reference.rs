//! Names of images: what parses must survive being printed.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| guest_images::reference::fuzz(bytes));

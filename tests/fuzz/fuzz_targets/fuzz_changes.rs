//! Instructions of `commit --change` and `import --change`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| guest_images::instructions::fuzz(bytes));

//! Seccomp profiles as users write them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest_runtime::seccomp_profile::read_hostile(bytes));

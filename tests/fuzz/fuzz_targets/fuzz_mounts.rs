//! Mounts in both spellings, driver options and words of a tmpfs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest_volumes::read_hostile(bytes));

//! Kernels, as arm64 Images.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| host_hypervisor::arch::aarch64::boot::load_hostile(bytes));

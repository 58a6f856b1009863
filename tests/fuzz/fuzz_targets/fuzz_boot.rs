//! Kernels for x86-64, as ELF files and as bzImages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| host_hypervisor::arch::x86_64::boot::load_hostile(bytes));

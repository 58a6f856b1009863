//! Changes in shared folders, as the guest reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _changes = guest_protocol::changes::decode(bytes);
});

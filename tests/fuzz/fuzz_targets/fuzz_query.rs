//! Paths and queries of API requests.
#![no_main]

#[path = "../../../guest/engine/src/http/address.rs"]
#[allow(dead_code, reason = "a part of another program")]
mod address;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some(clean) = address::cleaned(text) {
        assert!(clean.starts_with('/'));
        assert_eq!(address::cleaned(&clean), None, "{text:?} is cleaned at once");
    }
    for values in address::pairs(text).values() {
        for value in values {
            let _ = address::moment(value);
            let _ = guest_api::Filters::parse(value);
        }
    }
});

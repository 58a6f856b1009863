//! What registries answer with (challenges, ranges, links, refusals) and the credentials that clients send in headers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    guest_images::fuzz_registry_answer(bytes);
    let _credentials = (guest_api::registry::decode_auth(bytes), guest_api::registry::decode_auths(bytes));
});

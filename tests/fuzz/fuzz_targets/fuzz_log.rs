//! Entries of container logs, of either format, as a damaged disk or another program left them.
#![no_main]

#[path = "../../../guest/engine/src/services/containers/log/entry.rs"]
#[allow(dead_code, reason = "a part of another program")]
mod entry;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for entry in [entry::parse_json(bytes), entry::parse_local(bytes)].into_iter().flatten() {
        let mut text = Vec::new();
        entry.text.append_to(&mut text);
        // An escape of six bytes stands for three at most; a partial line's end is added.
        assert!(text.len() <= bytes.len() + 1, "{} of {}", text.len(), bytes.len());
        let _ = (entry.time.stamp(), entry.time.moment());
    }
});

//! The engine's settings file: `engine.toml` or `daemon.json`, as a user or another program wrote it.
#![no_main]

#[path = "../../../guest/engine/src/config/file.rs"]
#[allow(dead_code, reason = "a part of another program")]
mod file;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for format in [file::Format::Json, file::Format::Toml] {
        if let Ok(file) = file::parse(bytes, format) {
            assert!(file.given.len() <= bytes.len());
        }
    }
});

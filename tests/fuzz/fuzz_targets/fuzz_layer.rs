//! Layers: plain, gzip or zstd tars, unpacked into a scratch folder under small limits.
#![no_main]

use std::{fs, path::Path};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Memory, where there is some for files: a layer is mostly file creation.
    let memory = Path::new("/dev/shm");
    let within = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let scratch = within.join(format!("engine-fuzz-layer-{}", std::process::id()));
    let marker = scratch.join("beside");
    let layer = scratch.join("layer");
    fs::create_dir_all(&layer).expect("a scratch folder");
    fs::write(&marker, "untouched").expect("a file beside the layer");
    guest_images::unpack::fuzz(bytes, &layer);
    assert_eq!(fs::read(&marker).expect("the file beside the layer"), b"untouched");
    assert_eq!(fs::read_dir(&scratch).expect("the scratch folder").count(), 2, "something appeared beside the layer");
    fs::remove_dir_all(&scratch).expect("the scratch folder can be removed");
});

//! Archives that are copied into a container: nothing may appear beside its root.
#![no_main]

use std::{fs, path::Path};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let memory = Path::new("/dev/shm");
    let within = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let scratch = within.join(format!("engine-fuzz-archive-{}", std::process::id()));
    let (marker, root) = (scratch.join("beside"), scratch.join("root"));
    fs::create_dir_all(root.join("into/folder")).expect("a root");
    std::os::unix::fs::symlink("../../..", root.join("into/up")).expect("a link that leads up");
    fs::write(root.join("into/file"), "old").expect("a file");
    fs::write(&marker, "untouched").expect("a file beside the root");
    guest_images::archive::fuzz(bytes, &root);
    assert_eq!(fs::read(&marker).expect("the file beside the root"), b"untouched");
    assert_eq!(fs::read_dir(&scratch).expect("the scratch folder").count(), 2, "something appeared beside the root");
    fs::remove_dir_all(&scratch).expect("the scratch folder can be removed");
});

//! The server of shared folders restored from any state: nothing may change beside what is shared.
#![no_main]

use std::{fs, path::Path};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let memory = Path::new("/dev/shm");
    let within = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let scratch = within.join(format!("engine-fuzz-fs-saved-{}", std::process::id()));
    let (canary, shared) = (scratch.join("canary"), scratch.join("shared"));
    fs::create_dir_all(shared.join("folder")).expect("a folder to share");
    std::os::unix::fs::symlink(&scratch, shared.join("up")).expect("a link that leads up");
    fs::write(shared.join("file"), "inside").expect("a file");
    fs::write(&canary, "outside").expect("a file beside what is shared");
    host_fs::fuzz::saved(&shared, bytes);
    assert_eq!(fs::read(&canary).expect("the file outside"), b"outside");
    assert_eq!(fs::read_dir(&scratch).expect("the scratch folder").count(), 2, "something appeared outside");
    fs::remove_dir_all(&scratch).expect("the scratch folder can be removed");
});

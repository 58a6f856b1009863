//! Two kinds of broken pipe: who reads the output has seen enough, which is nobody's failure; who was asked is gone, which
//! is never a success.
#![forbid(unsafe_code)]

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Each is decided by which side is quicker.
const TRIES: usize = 25;

fn engine() -> Command {
    Command::new(env!("CARGO_BIN_EXE_engine"))
}

/// A folder of its own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("engine-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(path.join("run")).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Takes every connection, and hangs up.
fn hang_up_on_everyone(socket: &Path) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
}

fn expect_told(output: &Output, code: i32) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.starts_with("error: "), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn output_that_nobody_reads_ends_a_command_quietly() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = engine().args(["completion", "bash"]).stdout(writer).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_daemon_that_hangs_up_is_a_failure() {
    let home = Folder::new("daemon");
    hang_up_on_everyone(&home.0.join("run/engined.sock"));
    for _ in 0..TRIES {
        let run = engine().env("ENGINE_HOME", &home.0).args(["run", "-d", "busybox"]).output().unwrap();
        expect_told(&run, 125);
        let ps = engine().env("ENGINE_HOME", &home.0).arg("ps").output().unwrap();
        expect_told(&ps, 1);
    }
}

#[test]
fn an_engine_that_hangs_up_is_a_failure() {
    let folder = Folder::new("engine");
    let socket = folder.0.join("engine.sock");
    hang_up_on_everyone(&socket);
    for _ in 0..TRIES {
        let host = format!("unix://{}", socket.display());
        let run = engine().args(["--host", &host, "run", "-d", "busybox"]).output().unwrap();
        expect_told(&run, 125);
        let ps = engine().args(["--host", &host, "ps"]).output().unwrap();
        expect_told(&ps, 1);
    }
}

//! What a confined thread can and cannot do. Rights are never given back, so each check has a thread of its own, and what
//! ends the process has a process.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::*;

const CLASSES: [Class; 5] = [Class::Device, Class::Network, Class::Files, Class::Processor, Class::Driver];

/// Runs `body` confined, on a thread of its own.
fn confined<T: Send>(confinement: &Confinement, body: impl FnOnce() -> T + Send) -> T {
    confinement.run(body, || {}).unwrap()
}

fn denied<T>(result: std::io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

#[test]
fn a_device_opens_its_folder_and_nothing_else() {
    let (ours, others) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let other = others.path().join("file");
    std::fs::write(&other, "secret").unwrap();
    let inside = ours.path().join("disk.raw");
    let confinement = Confinement { class: Class::Device, files: Files::default().writing(ours.path()) };
    confined(&confinement, || {
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(&inside).unwrap();
        file.set_len(4096).unwrap();
        file.write_all(b"x").unwrap();
        std::fs::rename(&inside, ours.path().join("disk.old")).unwrap();
        for forbidden in ["/etc/passwd", "/proc/self/maps", "/dev/kvm", "/bin/sh", "/"] {
            assert!(denied(File::open(forbidden)), "{forbidden} can be opened");
        }
        assert!(denied(File::open(&other)) && denied(File::create(others.path().join("new"))));
        assert!(denied(std::fs::remove_file(&other)));
        // A thread that it starts has no more.
        let more = std::thread::spawn(|| denied(File::open("/etc/passwd")));
        assert!(more.join().unwrap());
    });
    // The others are as they were.
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "secret");
    assert!(File::open("/etc/passwd").is_ok());
}

#[test]
fn a_read_only_share_is_read_and_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "text").unwrap();
    let files = Files::default().sharing(folder.path(), true);
    confined(&Confinement { class: Class::Files, files }, || {
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "text");
        assert!(denied(File::options().write(true).open(&path)));
        assert!(denied(File::create(folder.path().join("new"))));
    });
}

#[test]
fn the_network_connects_and_does_not_listen() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    confined(&Confinement::without_files(Class::Network), || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream.write_all(b"x").unwrap();
        assert!(denied(File::open("/etc/resolv.conf")));
    });
    let mut byte = [0];
    listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
}

#[test]
fn every_class_computes_waits_and_starts_threads() {
    for class in CLASSES {
        let sum = confined(&Confinement::without_files(class), || {
            let (sender, receiver) = std::sync::mpsc::channel();
            let threads: Vec<_> = (0..4_u64)
                .map(|number| {
                    let sender = sender.clone();
                    std::thread::spawn(move || {
                        std::thread::sleep(std::time::Duration::from_millis(1));
                        sender.send(vec![number; 100_000].iter().sum::<u64>()).unwrap();
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            receiver.try_iter().sum::<u64>()
        });
        assert_eq!(sum, 600_000, "{class:?}");
    }
}

#[test]
fn who_waits_for_a_confined_thread_is_called_meanwhile() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let body = move || receiver.recv().is_ok();
    let mut sender = Some(sender);
    let heard = Confinement::without_files(Class::Device)
        .run(body, || {
            if let Some(sender) = sender.take() {
                sender.send(()).unwrap();
            }
        })
        .unwrap();
    assert!(heard);
}

/// Set in a process that is to do what ends it.
const DEED: &str = "ENGINE_TEST_DEED";

/// This very test, in a process of its own, where it does the deed.
fn ends_by_sigsys(test: &str, deed: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let status = command.args(["--exact", test]).env(DEED, deed).output().unwrap().status;
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{deed}: {status}");
}

#[test]
fn a_forbidden_system_call_ends_the_process() {
    let test = "confine::tests::a_forbidden_system_call_ends_the_process";
    match std::env::var(DEED).as_deref() {
        Ok("execute") => {
            let run = || drop(Command::new("/bin/true").status());
            confined(&Confinement::without_files(Class::Device), run);
        }
        Ok("listen") => {
            let listen = || drop(TcpListener::bind("127.0.0.1:0"));
            confined(&Confinement::without_files(Class::Device), listen);
        }
        Ok("chroot") => {
            let confinement = Confinement { class: Class::Files, files: Files::default() };
            confined(&confinement, || rustix::process::chroot("/")).unwrap();
        }
        Ok(other) => panic!("`{other}` is no deed"),
        Err(_) => {
            ["execute", "listen", "chroot"].map(|deed| ends_by_sigsys(test, deed)).into_iter().collect()
        }
    }
}

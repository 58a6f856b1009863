//! QEMU as a provider of processors and memory.
//!
//! QEMU gets no device model that does I/O of ours: disk, vsock and network are served by host-devices and host-net
//! over sockets that QEMU inherits. What is left to it: instructions, memory and its balloon, interrupt controller,
//! PCI, the serial port and random numbers.

mod command;
mod monitor;
mod process;

pub use command::{Device, Machine, TCG_CMDLINE, arguments};
pub use monitor::{Monitor, MonitorEvent};
pub use process::{Exit, Killer, Launch, LaunchError, Meter, PassedFds, Process};

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Whether our command line describes a machine of this host's architecture.
pub const SUPPORTED: bool = cfg!(target_arch = "x86_64");
/// The program for x86-64 guests.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// QEMU is not installed.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{PROGRAM}` is not in PATH: install the package qemu-system-x86 (`sudo apt-get install qemu-system-x86`)"
)]
pub struct NotInstalled;

/// Finds QEMU in the folders of `PATH`.
pub fn find() -> Result<PathBuf, NotInstalled> {
    find_in(std::env::var_os("PATH").as_deref().unwrap_or_default())
}

/// Finds QEMU in a list of folders as `PATH` has it.
pub fn find_in(path: &OsStr) -> Result<PathBuf, NotInstalled> {
    let executable = |file: &Path| {
        std::fs::metadata(file).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let mut files = std::env::split_paths(path).map(|folder| folder.join(PROGRAM));
    files.find(|file| executable(file)).ok_or(NotInstalled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_is_found_in_the_path_or_its_package_is_named() {
        let [empty, other] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let path = std::env::join_paths([empty.path(), other.path()]).unwrap();
        let sentence = find_in(&path).unwrap_err().to_string();
        assert!(sentence.contains("apt-get install qemu-system-x86"), "{sentence}");
        let program = other.path().join(PROGRAM);
        std::fs::write(&program, b"").unwrap();
        assert!(find_in(&path).is_err(), "a file that cannot be executed is not a program");
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(find_in(&path).unwrap(), program);
    }
}

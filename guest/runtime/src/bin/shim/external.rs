//! Containers that another runtime makes: its calls, with our ends of the streams.
//!
//! The runtime's own output is the process's, so what it complains about comes through the process's errors, and is taken
//! from there when its log says nothing.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::process::Stdio;

use guest_runtime::external::{External, ExternalError, Handed};
use guest_runtime::reap::{BUNDLE_DIR, RUNTIME_DIR};
use guest_runtime::shim::{ConsoleSize, record};
use oci_spec::runtime::{BoxBuilder, LinuxResources, Process};

use crate::container::{Made, RuntimeError, Wanted, setup};
use crate::program::Outcome;
use crate::streams::{ConsoleSocket, Pipes};

/// How much of a failed call's output is looked at.
const SAID_LEN_MAX: u64 = 4096;
const PROCESS_FILE: &str = "process.json";
const RESOURCES_FILE: &str = "resources.json";

/// Makes the container of the bundle in a shim's folder.
pub fn create(external: &External, dir: &Path, wanted: &Wanted, user: u32) -> Result<Made, RuntimeError> {
    let bundle = dir.join(BUNDLE_DIR);
    make(dir, wanted, user, |handed, console| external.create(&bundle, handed, console))
}

/// Makes and starts another process in it.
pub fn exec(
    external: &External,
    dir: &Path,
    process: &Process,
    wanted: &Wanted,
) -> Result<Made, RuntimeError> {
    let folder = dir.join(RUNTIME_DIR);
    let mut process = process.clone();
    // It runs before we have its terminal. (crun 1.8 takes no notice: its processes see the size a moment later.)
    let cells = |size: ConsoleSize| BoxBuilder::default().width(size.width).height(size.height).build();
    let size = wanted.size.map(cells).transpose().map_err(|error| RuntimeError::Runtime {
        step: "describe the terminal",
        reason: error.to_string(),
    })?;
    process.set_console_size(size);
    record::write(&folder, PROCESS_FILE, &process)?;
    let path = folder.join(PROCESS_FILE);
    let made =
        make(dir, wanted, process.user().uid(), |handed, console| external.exec(&path, handed, console));
    std::fs::remove_file(&path).map_err(setup("remove the description of a process"))?;
    made
}

/// Changes the container's limits.
pub fn update(external: &External, dir: &Path, resources: &LinuxResources) -> Result<(), RuntimeError> {
    let folder = dir.join(RUNTIME_DIR);
    record::write(&folder, RESOURCES_FILE, resources)?;
    let path = folder.join(RESOURCES_FILE);
    let updated = external.update(&path);
    std::fs::remove_file(&path).map_err(setup("remove the description of limits"))?;
    Ok(updated?)
}

fn make(
    dir: &Path,
    wanted: &Wanted,
    user: u32,
    call: impl FnOnce(Handed, Option<&Path>) -> Result<i32, ExternalError>,
) -> Result<Made, RuntimeError> {
    if wanted.terminal {
        let console =
            ConsoleSocket::listen(&dir.join(RUNTIME_DIR)).map_err(setup("listen for the terminal"))?;
        let said = tempfile_in_memory().map_err(setup("make a file in memory"))?;
        let handed = Handed {
            stdin: Stdio::null(),
            stdout: Stdio::null(),
            stderr: said.try_clone().map_err(setup("share a file in memory"))?.into(),
        };
        let pid = call(handed, Some(console.short_path())).map_err(|error| with_words(error, said))?;
        let streams = console.accept(user, wanted.size).map_err(setup("take the terminal"))?;
        return Ok(Made { pid, streams, outcome: executed()? });
    }
    let pipes = Pipes::new(wanted.stdin, user).map_err(setup("make the process's pipes"))?;
    let Pipes { stdin, stdout, stderr, streams } = pipes;
    let handed = Handed { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into() };
    let called = call(handed, None);
    match (called, streams) {
        (Ok(pid), streams) => Ok(Made { pid, streams, outcome: executed()? }),
        (Err(error), mut streams) => match streams.outputs[1].take() {
            Some(errors) => Err(with_words(error, File::from(errors))),
            None => Err(error.into()),
        },
    }
}

/// The runtime answers when the program runs, or has failed: there is nothing more to wait for.
fn executed() -> Result<Outcome, RuntimeError> {
    Outcome::executed().map_err(setup("make a pipe for the program's outcome"))
}

/// A failure that is no more than a status, with what was said on standard error.
fn with_words(error: ExternalError, mut said: File) -> RuntimeError {
    let bare = matches!(&error, ExternalError::Failed { message } if message.starts_with("exit status: "));
    let mut bytes = Vec::new();
    // Not blocking: an empty pipe says nothing.
    let _ = io::Seek::rewind(&mut said);
    let _ = (&said).take(SAID_LEN_MAX).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    if bare && !text.is_empty() { ExternalError::Failed { message: text }.into() } else { error.into() }
}

fn tempfile_in_memory() -> io::Result<File> {
    Ok(File::from(rustix::fs::memfd_create("said", rustix::fs::MemfdFlags::CLOEXEC)?))
}

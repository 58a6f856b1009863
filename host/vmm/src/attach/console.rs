//! The serial console: the machine's port on one end of a socket pair, the bounded log on the other.

use std::error::Error;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use host_hypervisor::qemu::Device;

use super::{Attached, Context, Plug};
use crate::confine::{Class, Confinement, Files};
use crate::console::ConsoleLog;
use crate::machine::Signal;

pub(super) struct Attachment {
    pub log: PathBuf,
}

struct Console {
    ours: UnixStream,
    thread: JoinHandle<()>,
}

/// Reads the console's last lines from any thread.
#[derive(Debug, Clone)]
pub(crate) struct ConsoleTail(Arc<Mutex<ConsoleLog>>);

impl ConsoleTail {
    pub(crate) fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).tail()
    }
}

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "console"
    }

    fn confinement(&self) -> Confinement {
        let folder = self.log.parent().unwrap_or(Path::new("/"));
        Confinement { class: Class::Device, files: Files::default().writing(folder) }
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let log = ConsoleLog::create(&self.log)
            .map_err(|error| format!("cannot create the console log `{}`: {error}", self.log.display()))?;
        let log = Arc::new(Mutex::new(log));
        let (ours, theirs) = UnixStream::pair()?;
        match &mut context.plug {
            Plug::Qemu(qemu) => {
                let fd = qemu.fds.pass(theirs);
                qemu.devices.push(Device::Serial { fd });
            }
            Plug::InProcess(machine) => machine.console = Some(Box::new(theirs)),
        }
        context.console = Some(ConsoleTail(log.clone()));
        let (stream, signals) = (ours.try_clone()?, context.signals.clone());
        let thread =
            std::thread::Builder::new().name("console".into()).spawn(move || keep(stream, &log, &signals))?;
        Ok(Box::new(Console { ours, thread }))
    }
}

/// Copies the console into the log until the machine closes it.
fn keep(mut stream: UnixStream, log: &Mutex<ConsoleLog>, signals: &Sender<Signal>) {
    let mut bytes = vec![0; 4096];
    loop {
        let count = match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::debug!(%error, "the console's connection ended");
                return;
            }
        };
        let panic = log.lock().unwrap_or_else(PoisonError::into_inner).write(&bytes[..count]);
        if let Some(line) = panic
            && signals.send(Signal::Panicked(line)).is_err()
        {
            return;
        }
    }
}

impl Attached for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn fault(&self) -> Option<String> {
        self.thread.is_finished().then(|| "its thread has ended".into())
    }

    fn detach(self: Box<Self>) {
        // Everything the guest wrote before its end is still read: that end is closed, so the thread comes to the end.
        // Should another process hold that end, the shutdown ends the wait.
        super::join("console", self.thread, || drop(self.ours.shutdown(std::net::Shutdown::Write)));
    }
}

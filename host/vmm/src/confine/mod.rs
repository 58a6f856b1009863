//! Confinement: what a guest that has taken over a device model could still do, which is little.
//!
//! Every thread that touches what a guest wrote gives up rights before it begins: files (Landlock: only those its device
//! needs, the rest of the tree is not there) and system calls (seccomp: only those of its [`Class`]). Both hold for the
//! threads it starts later, and nothing takes them back. The process as a whole cannot gain privileges by executing
//! something, and leaves no core dump ([`process`]).
//!
//! Who begins where:
//!
//! ```text
//! main ─┬─ attaches each device on a thread of that device's class ──▶ the device's own threads inherit it
//!       ├─ starts the processors on a thread of class Processor    ──▶ so do theirs
//!       ├─ starts QEMU, which is not confined: it is another program, with nothing of ours but sockets
//!       └─ is confined itself (class Driver), and so is every thread from then on
//! ```
//!
//! A forbidden file is an error like any other. A forbidden system call ends the process with `SIGSYS`, which the daemon
//! tells in a sentence. A kernel without Landlock leaves files to the user's own rights, and one line in the log.

mod calls;
mod files;

pub use calls::Class;
pub use files::Files;

/// A thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel does not take the list of system calls.
    #[error("cannot restrict the system calls of a thread ({class:?})")]
    Calls {
        /// The list.
        class: Class,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The kernel does not take the list of files.
    #[error("cannot restrict the files of a thread")]
    Files(#[source] landlock::RulesetError),
    /// The process could not give up privileges.
    #[error("cannot give up privileges")]
    Privileges(#[source] std::io::Error),
    /// There are no threads left.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// What is left to a thread.
#[derive(Debug, Clone)]
pub struct Confinement {
    /// The system calls.
    pub class: Class,
    /// The files, beside those that are open.
    pub files: Files,
}

impl Confinement {
    /// This class, and no file.
    pub fn without_files(class: Class) -> Self {
        Self { class, files: Files::default() }
    }

    /// Confines the calling thread and all threads it starts from now on.
    pub fn enter(&self) -> Result<(), ConfineError> {
        self.files.restrict()?;
        self.class.restrict()
    }

    /// Runs `body` on a thread that is confined first, and waits for it. Meanwhile `waiting` is called now and then on the
    /// calling thread.
    pub fn run<T: Send>(
        &self,
        body: impl FnOnce() -> T + Send,
        mut waiting: impl FnMut(),
    ) -> Result<T, ConfineError> {
        let (done, ended) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().name("start".into());
            let confined = move || {
                // Dropped at the end, whatever that is.
                let _done = done;
                self.enter().map(|()| body())
            };
            let thread = builder.spawn_scoped(scope, confined).map_err(ConfineError::Thread)?;
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = ended.recv_timeout(WAITING) {
                waiting();
            }
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Between two calls of what a waiting caller wants called.
const WAITING: std::time::Duration = std::time::Duration::from_millis(50);

/// Takes from this process, and all it starts, the gaining of privileges by executing; and core dumps, which would hold
/// what guests keep in memory.
pub fn process() -> Result<(), ConfineError> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    rustix::thread::set_no_new_privs(true)
        .and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable))
        .map_err(|error| ConfineError::Privileges(error.into()))
}

#[cfg(test)]
mod tests;

//! Whether a device's thread still does its work, for whoever runs the machine.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, OnceLock};

/// A device's thread, seen from outside. Clones see the same thread; asking neither blocks nor waits for it.
#[derive(Clone, Debug, Default)]
pub struct Life(Arc<OnceLock<String>>);

impl Life {
    /// Why the thread has ended, as a clause: `its thread panicked: …`. `None` while it works, and after the end that
    /// its owner asked for.
    pub fn failure(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// Runs the body of the thread. An error and a panic are failures; the panic goes on.
    pub(crate) fn live<E: Display>(&self, body: impl FnOnce() -> Result<(), E>) {
        // Nothing that the body holds is used after its panic: it goes with the thread.
        match catch_unwind(AssertUnwindSafe(body)) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.fail(format!("its thread cannot go on: {error}")),
            Err(panic) => {
                self.fail(format!("its thread panicked: {}", words(&*panic)));
                resume_unwind(panic);
            }
        }
    }

    fn fail(&self, reason: String) {
        // A thread has one end.
        let _first = self.0.set(reason);
    }
}

/// What a panic says.
fn words(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("for no reason that it tells")
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::thread;

    use super::*;

    fn after(body: impl FnOnce() -> io::Result<()> + Send + 'static) -> Option<String> {
        let life = Life::default();
        let inside = life.clone();
        assert_eq!(life.failure(), None);
        let joined = thread::spawn(move || inside.live(body)).join();
        assert_eq!(joined.is_err(), life.failure().is_some_and(|reason| reason.contains("panicked")));
        life.failure().map(str::to_owned)
    }

    #[test]
    fn an_end_that_was_asked_for_is_no_failure() {
        assert_eq!(after(|| Ok(())), None);
    }

    #[test]
    fn errors_and_panics_are_told() {
        let refused = after(|| Err(io::ErrorKind::OutOfMemory.into()));
        assert_eq!(refused.as_deref(), Some("its thread cannot go on: out of memory"));
        assert_eq!(after(|| panic!("a reason")).as_deref(), Some("its thread panicked: a reason"));
        let number = 7;
        assert_eq!(
            after(move || panic!("reason {number}")).as_deref(),
            Some("its thread panicked: reason 7")
        );
        let silent = after(|| std::panic::panic_any(7));
        assert_eq!(silent.as_deref(), Some("its thread panicked: for no reason that it tells"));
    }
}

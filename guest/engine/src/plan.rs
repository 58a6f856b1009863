//! Multi-step operations: each step that changes the world leaves its reverse in an [`Undo`], and a failure unwinds
//! them, newest first. Unwinding goes on past failures and collects them.

use std::future::Future;
use std::pin::Pin;

type Reverse = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>> + Send>;

/// The reverses of the steps done so far.
///
/// Dropping it undoes nothing: call [`Undo::unwind`] after a failure and [`Undo::commit`] after success.
#[derive(Default)]
pub struct Undo {
    steps: Vec<(&'static str, Reverse)>,
}

impl Undo {
    /// Records how to reverse the step just done. `what` names the reverse: `unmount the root file system`.
    pub fn push<F, R>(&mut self, what: &'static str, reverse: R)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
        R: FnOnce() -> F + Send + 'static,
    {
        self.steps.push((what, Box::new(move || Box::pin(reverse()))));
    }

    /// Runs all reverses, newest first, and returns what could not be undone.
    pub async fn unwind(self) -> Vec<anyhow::Error> {
        let mut failures = Vec::new();
        for (what, reverse) in self.steps.into_iter().rev() {
            if let Err(error) = reverse().await {
                failures.push(error.context(format!("cannot {what}")));
            }
        }
        failures
    }

    /// The operation is complete; nothing is to be undone any more.
    pub fn commit(self) {}
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn plan(log: &Arc<Mutex<Vec<&'static str>>>) -> Undo {
        let mut undo = Undo::default();
        for name in ["first", "second", "third"] {
            let log = log.clone();
            undo.push(name, move || async move {
                log.lock().unwrap().push(name);
                if name == "second" { Err(anyhow::anyhow!("stuck")) } else { Ok(()) }
            });
        }
        undo
    }

    #[tokio::test]
    async fn unwinding_goes_backwards_past_failures_and_tells_them() {
        let log = Arc::default();
        let failures = plan(&log).unwind().await;
        assert_eq!(*log.lock().unwrap(), ["third", "second", "first"]);
        assert_eq!(failures.len(), 1);
        assert_eq!(format!("{:#}", failures[0]), "cannot second: stuck");
    }

    #[tokio::test]
    async fn a_committed_plan_undoes_nothing() {
        let log = Arc::default();
        plan(&log).commit();
        assert!(log.lock().unwrap().is_empty());
    }
}

//! What the agent tells the host about the machine: one value with one publisher side and any number of watchers.

use guest_protocol::{EngineState, Notice};
use tokio::sync::watch;

/// How the machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// How the engine is.
    pub engine: EngineState,
    /// What only the user can put right.
    pub fault: Option<Fault>,
    /// The machine is being switched off.
    pub powering_off: bool,
}

/// Something broken that the agent will not repair by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {reason}")]
pub struct Fault {
    /// What is broken, in a few words.
    pub what: &'static str,
    /// What happened and what to do, as a sentence for the user.
    pub reason: String,
}

/// The side that publishes. Clones publish the same status.
#[derive(Clone, Debug)]
pub struct Publisher(watch::Sender<Status>);

impl Publisher {
    /// A machine whose engine has yet to be started.
    pub fn new() -> Self {
        let status = Status { engine: EngineState::Starting, fault: None, powering_off: false };
        Self(watch::Sender::new(status))
    }

    /// A watcher, which sees the newest status only.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.0.subscribe()
    }

    /// The engine's state changed.
    pub fn engine(&self, engine: EngineState) {
        self.0.send_modify(|status| status.engine = engine);
    }

    /// The machine is broken: there will be no engine.
    pub fn fault(&self, fault: Fault) {
        self.0.send_modify(|status| {
            status.engine = EngineState::Failed { reason: fault.to_string(), retry_in_ms: 0 };
            status.fault = Some(fault);
        });
    }

    /// The machine is being switched off.
    pub fn powering_off(&self) {
        self.0.send_modify(|status| status.powering_off = true);
    }
}

impl Status {
    /// What to say to a host that last heard `told`, or nothing at all yet.
    pub fn news(&self, told: Option<&Status>) -> Vec<Notice> {
        let mut notices = Vec::new();
        if let Some(fault) = &self.fault
            && told.is_none_or(|told| told.fault.as_ref() != Some(fault))
        {
            notices.push(Notice::Fault { what: fault.what.to_owned(), reason: fault.reason.clone() });
        }
        if told.is_none_or(|told| told.engine != self.engine) {
            notices.push(Notice::Engine(self.engine.clone()));
        }
        if self.powering_off && told.is_none_or(|told| !told.powering_off) {
            notices.push(Notice::PoweringOff);
        }
        notices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_hears_the_whole_story_once_and_then_changes() {
        let publisher = Publisher::new();
        let first = publisher.watch().borrow().clone();
        assert_eq!(first.news(None), [Notice::Engine(EngineState::Starting)]);
        assert_eq!(first.news(Some(&first)), []);

        publisher.engine(EngineState::Ready);
        let ready = publisher.watch().borrow().clone();
        assert_eq!(ready.news(Some(&first)), [Notice::Engine(EngineState::Ready)]);

        publisher.fault(Fault { what: "data disk", reason: "gone".into() });
        publisher.powering_off();
        let last = publisher.watch().borrow().clone();
        let failed = EngineState::Failed { reason: "data disk: gone".into(), retry_in_ms: 0 };
        let fault = Notice::Fault { what: "data disk".into(), reason: "gone".into() };
        let story = [fault, Notice::Engine(failed), Notice::PoweringOff];
        assert_eq!(last.news(Some(&ready)), story);
        assert_eq!(last.news(None), story);
    }
}

//! Which request is legal in which state of a container, and what follows: a pure table, separate from doing it.
//!
//! ```text
//!             start            pause
//!   Created ─────────▶ Running ─────▶ Paused
//!      │                │ ▲  ▲ ◀─────
//!      │            end │ │  └───────┐ start
//!      │                ▼ │ timer    │
//!      │      Restarting ─┘  Exited ─┘
//!      │          │ stop      │
//!      └──────────┴─── remove ┴──▶ Removing ──▶ (gone) or Dead
//! ```

use guest_api::ErrorKind;

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Created,
    Running,
    Paused,
    /// Ended; its policy starts it again after a pause.
    Restarting,
    Exited,
    Removing,
    /// Removing failed half way; only removing it again is possible.
    Dead,
}

/// What somebody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    Start,
    Stop,
    Kill,
    Pause,
    Unpause,
    Resize,
    Attach,
    Exec,
    Rename,
    Update,
    Remove { force: bool },
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Do it.
    Go,
    /// It is so already.
    Nothing,
    /// End it first, then do it.
    EndFirst,
    /// No.
    Refuse(ErrorKind, String),
}

/// What happened to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    Started,
    /// Its process has ended, and its policy starts it again or not.
    Ended {
        again: bool,
    },
    /// A restart by policy was called off or failed.
    GaveUp,
    Paused,
    Unpaused,
    RemovalBegan,
    RemovalFailed,
}

impl Phase {
    /// Docker's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Created => "created",
            Phase::Running => "running",
            Phase::Paused => "paused",
            Phase::Restarting => "restarting",
            Phase::Exited => "exited",
            Phase::Removing => "removing",
            Phase::Dead => "dead",
        }
    }

    /// Whether it has a process.
    pub fn is_live(self) -> bool {
        matches!(self, Phase::Running | Phase::Paused)
    }
}

/// Whether the request is legal now. `id` and `name` go into the sentences.
pub fn admit(phase: Phase, request: Request, id: &str, name: &str) -> Verdict {
    use Phase::*;
    let conflict = |text: String| Verdict::Refuse(ErrorKind::Conflict, text);
    let not_running = || conflict(guest_api::error::not_running(id));
    match (request, phase) {
        (_, Removing) => conflict(format!("removal of container {id} is already in progress")),
        (Request::Remove { .. }, Dead | Created | Exited) => Verdict::Go,
        (_, Dead) => conflict(format!("container {id} is marked for removal and cannot be used")),

        (Request::Start, Created | Exited) => Verdict::Go,
        (Request::Start, Running | Restarting) => Verdict::Nothing,
        (Request::Start, Paused) => {
            conflict("cannot start a paused container, try unpause instead".to_owned())
        }

        (Request::Stop, Running | Paused | Restarting) => Verdict::Go,
        (Request::Stop, Created | Exited) => Verdict::Nothing,

        (Request::Kill, Running | Paused | Restarting) => Verdict::Go,
        (Request::Kill, Created | Exited) => {
            conflict(format!("cannot kill container: {name}: {}", guest_api::error::not_running(id)))
        }

        (Request::Pause, Running) => Verdict::Go,
        (Request::Pause, Paused) => conflict(format!("Container {id} is already paused")),
        (Request::Pause, Restarting) => {
            conflict(format!("Container {id} is restarting, wait until the container is running"))
        }
        (Request::Unpause, Paused) => Verdict::Go,
        // dockerd has no kind for this one.
        (Request::Unpause, Running | Restarting) => {
            Verdict::Refuse(ErrorKind::Internal, format!("Container {id} is not paused"))
        }

        (Request::Resize | Request::Exec, Running) => Verdict::Go,
        (Request::Resize, Paused) => Verdict::Go,
        (Request::Exec, Paused) => {
            conflict(format!("Container {id} is paused, unpause the container before exec"))
        }
        (Request::Exec, Restarting) => {
            conflict(format!("Container {id} is restarting, wait until the container is running"))
        }

        (Request::Attach, Created | Running | Exited) => Verdict::Go,
        (Request::Attach, Paused) => {
            conflict(format!("container {id} is paused, unpause the container before attach"))
        }
        (Request::Attach, Restarting) => {
            conflict(format!("container {id} is restarting, wait until the container is running"))
        }

        (Request::Rename | Request::Update, _) => Verdict::Go,

        (Request::Remove { force: true }, Running | Paused | Restarting) => Verdict::EndFirst,
        (Request::Remove { force: false }, Running | Paused | Restarting) => conflict(format!(
            "cannot remove container \"/{name}\": container is {}: stop the container before removing or force remove",
            phase.word()
        )),

        (Request::Pause | Request::Unpause | Request::Resize | Request::Exec, _) => not_running(),
    }
}

/// The state after something happened; `None` when it cannot happen in this state.
pub fn after(phase: Phase, change: Change) -> Option<Phase> {
    use Phase::*;
    Some(match (phase, change) {
        (Created | Exited | Restarting, Change::Started) => Running,
        (Running | Paused, Change::Ended { again: true }) => Restarting,
        (Running | Paused, Change::Ended { again: false }) | (Restarting, Change::GaveUp) => Exited,
        (Running, Change::Paused) => Paused,
        (Paused, Change::Unpaused) => Running,
        (Created | Exited | Dead, Change::RemovalBegan) => Removing,
        (Removing, Change::RemovalFailed) => Dead,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REQUESTS: [Request; 12] = [
        Request::Start,
        Request::Stop,
        Request::Kill,
        Request::Pause,
        Request::Unpause,
        Request::Resize,
        Request::Attach,
        Request::Exec,
        Request::Rename,
        Request::Update,
        Request::Remove { force: false },
        Request::Remove { force: true },
    ];

    fn verdict(phase: Phase, request: Request) -> Verdict {
        admit(phase, request, "3f2a", "web")
    }

    /// What doing an admitted request leads to, as the driver does it.
    fn changes(phase: Phase, request: Request) -> Vec<Change> {
        let ended = if phase == Phase::Restarting { Change::GaveUp } else { Change::Ended { again: false } };
        match (request, verdict(phase, request)) {
            (Request::Start, Verdict::Go) => vec![Change::Started],
            (Request::Stop | Request::Kill, Verdict::Go) => vec![ended],
            (Request::Pause, Verdict::Go) => vec![Change::Paused],
            (Request::Unpause, Verdict::Go) => vec![Change::Unpaused],
            (Request::Remove { .. }, Verdict::Go) => vec![Change::RemovalBegan],
            (Request::Remove { .. }, Verdict::EndFirst) => vec![ended, Change::RemovalBegan],
            _ => Vec::new(),
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Ask(Request),
        End { again: bool },
        Timer { works: bool },
        RemovalFails,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..REQUESTS.len()).prop_map(|index| Step::Ask(REQUESTS[index])),
            1 => any::<bool>().prop_map(|again| Step::End { again }),
            1 => any::<bool>().prop_map(|works| Step::Timer { works }),
            1 => Just(Step::RemovalFails),
        ];
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn every_admitted_request_leads_somewhere_and_every_container_can_be_removed(steps in steps()) {
            let mut phase = Phase::Created;
            for step in steps {
                let happened = match step {
                    Step::Ask(request) => changes(phase, request),
                    Step::End { again } if phase.is_live() => vec![Change::Ended { again }],
                    Step::Timer { works: true } if phase == Phase::Restarting => vec![Change::Started],
                    Step::Timer { works: false } if phase == Phase::Restarting => vec![Change::GaveUp],
                    Step::RemovalFails if phase == Phase::Removing => vec![Change::RemovalFailed],
                    _ => Vec::new(),
                };
                for change in happened {
                    let next = after(phase, change);
                    prop_assert!(next.is_some(), "{phase:?} {change:?}");
                    phase = next.unwrap();
                }
                // Whatever happened before, a forced removal is possible or going on.
                let removal = verdict(phase, Request::Remove { force: true });
                prop_assert!(phase == Phase::Removing || matches!(removal, Verdict::Go | Verdict::EndFirst));
                // Only a live container takes processes.
                let exec = verdict(phase, Request::Exec);
                prop_assert_eq!(exec == Verdict::Go, phase == Phase::Running);
            }
        }
    }

    #[test]
    fn starting_twice_and_stopping_twice_change_nothing() {
        assert_eq!(verdict(Phase::Running, Request::Start), Verdict::Nothing);
        assert_eq!(verdict(Phase::Exited, Request::Stop), Verdict::Nothing);
    }

    #[test]
    fn refusals_are_conflicts_in_dockers_words() {
        let text = |phase, request| match verdict(phase, request) {
            Verdict::Refuse(ErrorKind::Conflict, text) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            text(Phase::Running, Request::Remove { force: false }),
            "cannot remove container \"/web\": container is running: stop the container before removing or force remove"
        );
        assert_eq!(
            text(Phase::Exited, Request::Kill),
            "cannot kill container: web: container 3f2a is not running"
        );
        assert_eq!(text(Phase::Created, Request::Exec), "container 3f2a is not running");
        assert!(text(Phase::Paused, Request::Exec).ends_with("unpause the container before exec"));
        assert!(text(Phase::Removing, Request::Start).contains("already in progress"));
    }
}

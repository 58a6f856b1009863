//! `Lifecycle`: which request is legal in which state of the machine, and what follows from it.
//!
//! ```text
//!             Ensure                    EngineReady
//!  Stopped ────────────▶ Starting ───────────────────▶ Running
//!     ▲                   │   │                          │
//!     │        VmmExited  │   │ Stop, Fault, Deadline,   │ Stop, Fault
//!     │◀──────────────────┘   ▼ EngineFailed too often   │
//!     │                    Stopping ◀────────────────────┘
//!     │◀──────────────────────┘
//!              VmmExited (and straight on to Starting when someone waits for a running machine)
//! ```
//!
//! A running machine whose session ends, or whose engine dies, is `Lost` until the engine answers again or the VM process
//! exits: callers wait for one or the other, and get a new machine in the second case.
//!
//! Pure: inputs and a clock in, actions out. The supervisor is the one task that feeds it and carries the actions out.
//! Rules: there is never more than one VM process; every ticket is answered exactly once.

use host_api::MachineState;
use std::collections::VecDeque;
use std::time::Duration;

/// A boot that takes longer than this has failed. A software CPU on a busy machine needs a good part of it.
pub(crate) const BOOT_TIME_MAX: Duration = Duration::from_secs(180);
/// A clean power-off that takes longer is ended by force: the guest gives its containers ten seconds.
pub(crate) const STOP_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a running guest may be without a control session. Its agent connects again within a second.
const LOST_TIME_MAX: Duration = Duration::from_secs(60);
/// An engine that fails this often before it ever answered will go on failing.
const ENGINE_FAILURES_MAX: u32 = 4;
/// How long a killed VM process may take to be gone before it is killed again.
const KILL_TIME_MAX: Duration = Duration::from_secs(5);

/// Someone who waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Ticket(pub(crate) u64);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// The ticket wants a machine that answers.
    Ensure(Ticket),
    /// The ticket wants no machine.
    Stop(Ticket),
    /// The VM process or the guest got further.
    Stage(String),
    /// The engine in the guest answers.
    EngineReady,
    /// The engine in the guest ended before it answered, and why; it is started again.
    EngineFailed(String),
    /// The control session has ended.
    SessionLost,
    /// The guest cannot go on, and why.
    Fault(String),
    /// What keeps the machine from its work now, a sentence; or nothing does any more.
    Trouble(Option<String>),
    /// The VM process is gone, and why when that was not a power-off.
    VmmExited(Option<String>),
    /// The moment named by [`Lifecycle::deadline`] has passed.
    Deadline,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start a VM process.
    Spawn,
    /// Ask the guest to power off.
    PowerOff,
    /// End the VM process by force.
    Kill,
    /// What the ticket wants is so.
    Grant(Ticket),
    /// What the ticket wants cannot be had, and why.
    Refuse(Ticket, String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Stopped {
        reason: Option<String>,
    },
    Starting {
        stage: String,
        until: Duration,
        engine_failures: u32,
    },
    Running {
        since_unix_s: u64,
    },
    /// It ran, and its session has ended or its engine has died: both are about to return, or the guest is dying.
    Lost {
        since_unix_s: u64,
        until: Duration,
    },
    Stopping {
        reason: Option<String>,
        until: Duration,
    },
}

#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: Phase,
    /// What keeps the machine from its work.
    trouble: Option<String>,
    /// Tickets that wait for a running machine.
    starters: Vec<Ticket>,
    /// Tickets that wait for a stopped one.
    stoppers: Vec<Ticket>,
    actions: VecDeque<Action>,
}

impl Lifecycle {
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::Stopped { reason: None },
            trouble: None,
            starters: Vec::new(),
            stoppers: Vec::new(),
            actions: VecDeque::new(),
        }
    }

    /// Takes one input at `now` (any monotonic clock); `unix_s` is the wall clock, only for display.
    pub(crate) fn handle(&mut self, input: Input, now: Duration, unix_s: u64) {
        match (input, &mut self.phase) {
            (Input::Ensure(ticket), Phase::Running { .. }) => self.actions.push_back(Action::Grant(ticket)),
            (Input::Ensure(ticket), Phase::Stopped { .. }) => {
                self.starters.push(ticket);
                self.spawn(now);
            }
            (Input::Ensure(ticket), Phase::Starting { .. } | Phase::Lost { .. } | Phase::Stopping { .. }) => {
                self.starters.push(ticket)
            }

            (Input::Stop(ticket), Phase::Stopped { .. }) => self.actions.push_back(Action::Grant(ticket)),
            (Input::Stop(ticket), Phase::Stopping { .. }) => self.stoppers.push(ticket),
            (Input::Stop(ticket), Phase::Starting { .. } | Phase::Running { .. } | Phase::Lost { .. }) => {
                self.stoppers.push(ticket);
                self.refuse_starters("the machine was stopped while it was starting");
                self.power_off(None, now);
            }

            (Input::Stage(text), Phase::Starting { stage, .. }) => *stage = text,
            (Input::Stage(_), _) => {}

            (Input::EngineReady, Phase::Starting { .. }) => {
                self.phase = Phase::Running { since_unix_s: unix_s };
                self.actions.extend(self.starters.drain(..).map(Action::Grant));
            }
            (Input::EngineReady, Phase::Lost { since_unix_s, .. }) => {
                self.phase = Phase::Running { since_unix_s: *since_unix_s };
                self.actions.extend(self.starters.drain(..).map(Action::Grant));
            }
            (Input::EngineReady, _) => {}

            (Input::SessionLost, Phase::Running { since_unix_s }) => {
                self.phase = Phase::Lost { since_unix_s: *since_unix_s, until: now + LOST_TIME_MAX };
            }
            (Input::SessionLost, _) => {}

            (Input::EngineFailed(why), Phase::Starting { stage, engine_failures, .. }) => {
                *engine_failures += 1;
                if *engine_failures < ENGINE_FAILURES_MAX {
                    *stage = "starting the engine again".into();
                } else {
                    let reason = format!("the engine in the machine does not start: {why}");
                    self.refuse_starters(&reason);
                    self.power_off(Some(reason), now);
                }
            }
            // Started again in a moment, while the containers go on.
            (Input::EngineFailed(_), Phase::Running { since_unix_s }) => {
                self.phase = Phase::Lost { since_unix_s: *since_unix_s, until: now + LOST_TIME_MAX };
            }
            (Input::EngineFailed(_), _) => {}

            (Input::Fault(reason), Phase::Starting { .. } | Phase::Running { .. } | Phase::Lost { .. }) => {
                self.refuse_starters(&reason);
                self.power_off(Some(reason), now);
            }
            (Input::Fault(_), _) => {}

            // A machine that is gone has none.
            (Input::Trouble(_), Phase::Stopped { .. }) => {}
            (Input::Trouble(trouble), _) => self.trouble = trouble,

            (Input::VmmExited(reason), _) => self.exited(reason, now),

            (Input::Deadline, Phase::Starting { stage, until, .. }) if *until <= now => {
                let why = self.trouble.as_ref().map(|trouble| format!(": {trouble}")).unwrap_or_default();
                let reason = format!(
                    "the machine did not get ready within {} seconds; it was still {stage}{why}",
                    BOOT_TIME_MAX.as_secs()
                );
                self.refuse_starters(&reason);
                self.kill(Some(reason), now);
            }
            (Input::Deadline, Phase::Lost { until, .. }) if *until <= now => {
                let silence = LOST_TIME_MAX.as_secs();
                self.kill(
                    Some(format!("the engine in the machine did not return within {silence} seconds")),
                    now,
                );
            }
            (Input::Deadline, Phase::Stopping { reason, until }) if *until <= now => {
                let reason = reason.take();
                self.kill(reason, now);
            }
            (Input::Deadline, _) => {}
        }
    }

    pub(crate) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call with [`Input::Deadline`].
    pub(crate) fn deadline(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Starting { until, .. } | Phase::Lost { until, .. } | Phase::Stopping { until, .. } => {
                Some(*until)
            }
            Phase::Stopped { .. } | Phase::Running { .. } => None,
        }
    }

    /// The state as others may see it.
    pub(crate) fn state(&self) -> MachineState {
        match &self.phase {
            Phase::Stopped { reason } => MachineState::Stopped { reason: reason.clone() },
            Phase::Starting { stage, .. } => MachineState::Starting { stage: stage.clone() },
            Phase::Running { since_unix_s } | Phase::Lost { since_unix_s, .. } => {
                MachineState::Running { since_unix_s: *since_unix_s, trouble: self.trouble.clone() }
            }
            Phase::Stopping { .. } => MachineState::Stopping,
        }
    }

    fn spawn(&mut self, now: Duration) {
        let stage = "starting the VM process".into();
        self.phase = Phase::Starting { stage, until: now + BOOT_TIME_MAX, engine_failures: 0 };
        self.actions.push_back(Action::Spawn);
    }

    fn power_off(&mut self, reason: Option<String>, now: Duration) {
        self.phase = Phase::Stopping { reason, until: now + STOP_TIME_MAX };
        self.actions.push_back(Action::PowerOff);
    }

    fn kill(&mut self, reason: Option<String>, now: Duration) {
        self.phase = Phase::Stopping { reason, until: now + KILL_TIME_MAX };
        self.actions.push_back(Action::Kill);
    }

    fn refuse_starters(&mut self, why: &str) {
        self.actions.extend(self.starters.drain(..).map(|ticket| Action::Refuse(ticket, why.to_owned())));
    }

    fn exited(&mut self, exit_reason: Option<String>, now: Duration) {
        self.trouble = None;
        let reason = match std::mem::replace(&mut self.phase, Phase::Stopped { reason: None }) {
            // Whoever stopped it knew why; how the process ended then says nothing more.
            Phase::Stopping { reason, .. } => {
                self.actions.extend(self.stoppers.drain(..).map(Action::Grant));
                if !self.starters.is_empty() {
                    return self.spawn(now);
                }
                reason
            }
            Phase::Starting { stage, .. } => {
                let why =
                    exit_reason.unwrap_or_else(|| format!("the machine powered itself off while {stage}"));
                self.refuse_starters(&why);
                Some(why)
            }
            // Whoever called while it was dying gets a new one.
            Phase::Lost { .. } if !self.starters.is_empty() => return self.spawn(now),
            Phase::Running { .. } | Phase::Lost { .. } => exit_reason,
            Phase::Stopped { reason } => reason,
        };
        self.phase = Phase::Stopped { reason };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn step(machine: &mut Lifecycle, input: Input) -> Vec<Action> {
        machine.handle(input, Duration::ZERO, 7);
        std::iter::from_fn(|| machine.next_action()).collect()
    }

    #[test]
    fn two_calls_at_once_boot_one_machine() {
        let mut machine = Lifecycle::new();
        assert_eq!(step(&mut machine, Input::Ensure(Ticket(1))), [Action::Spawn]);
        assert_eq!(step(&mut machine, Input::Ensure(Ticket(2))), []);
        let granted = step(&mut machine, Input::EngineReady);
        assert_eq!(granted, [Action::Grant(Ticket(1)), Action::Grant(Ticket(2))]);
        assert_eq!(machine.state(), MachineState::Running { since_unix_s: 7, trouble: None });
    }

    #[test]
    fn a_call_during_a_stop_boots_again_afterwards() {
        let mut machine = Lifecycle::new();
        step(&mut machine, Input::Ensure(Ticket(1)));
        step(&mut machine, Input::EngineReady);
        assert_eq!(step(&mut machine, Input::Stop(Ticket(2))), [Action::PowerOff]);
        assert_eq!(step(&mut machine, Input::Ensure(Ticket(3))), []);
        assert_eq!(step(&mut machine, Input::VmmExited(None)), [Action::Grant(Ticket(2)), Action::Spawn]);
        assert_eq!(step(&mut machine, Input::EngineReady), [Action::Grant(Ticket(3))]);
    }

    #[test]
    fn a_call_on_a_dying_machine_gets_a_new_one() {
        let mut machine = Lifecycle::new();
        step(&mut machine, Input::Ensure(Ticket(1)));
        step(&mut machine, Input::EngineReady);
        step(&mut machine, Input::SessionLost);
        assert_eq!(step(&mut machine, Input::Ensure(Ticket(2))), []);
        assert_eq!(step(&mut machine, Input::VmmExited(Some("killed".into()))), [Action::Spawn]);
        assert_eq!(step(&mut machine, Input::EngineReady), [Action::Grant(Ticket(2))]);
        // Or the guest was only away for a moment.
        step(&mut machine, Input::SessionLost);
        step(&mut machine, Input::Ensure(Ticket(3)));
        assert_eq!(step(&mut machine, Input::EngineReady), [Action::Grant(Ticket(3))]);
        step(&mut machine, Input::EngineFailed("killed".into()));
        assert_eq!(step(&mut machine, Input::Ensure(Ticket(4))), []);
        assert_eq!(step(&mut machine, Input::EngineReady), [Action::Grant(Ticket(4))]);
    }

    #[test]
    fn a_fault_refuses_with_its_sentence_and_is_remembered() {
        let mut machine = Lifecycle::new();
        step(&mut machine, Input::Ensure(Ticket(1)));
        let actions = step(&mut machine, Input::Fault("the data disk is damaged".into()));
        assert_eq!(actions, [Action::Refuse(Ticket(1), "the data disk is damaged".into()), Action::PowerOff]);
        step(&mut machine, Input::VmmExited(None));
        assert_eq!(
            machine.state(),
            MachineState::Stopped { reason: Some("the data disk is damaged".into()) }
        );
    }

    #[test]
    fn an_engine_that_keeps_failing_refuses_with_its_reason() {
        let mut machine = Lifecycle::new();
        step(&mut machine, Input::Ensure(Ticket(1)));
        for _ in 1..ENGINE_FAILURES_MAX {
            assert_eq!(step(&mut machine, Input::EngineFailed("no disk".into())), []);
        }
        let actions = step(&mut machine, Input::EngineFailed("no disk".into()));
        let reason = "the engine in the machine does not start: no disk".to_owned();
        assert_eq!(actions, [Action::Refuse(Ticket(1), reason), Action::PowerOff]);
    }

    #[test]
    fn a_power_off_that_hangs_is_ended_by_force() {
        let mut machine = Lifecycle::new();
        step(&mut machine, Input::Ensure(Ticket(1)));
        step(&mut machine, Input::Stop(Ticket(2)));
        machine.handle(Input::Deadline, STOP_TIME_MAX - Duration::from_millis(1), 0);
        assert_eq!(machine.actions.len(), 0);
        machine.handle(Input::Deadline, STOP_TIME_MAX, 0);
        assert_eq!(machine.next_action(), Some(Action::Kill));
    }

    #[test]
    fn a_machine_that_dies_while_starting_refuses_and_the_next_call_boots() {
        let mut machine = Lifecycle::new();
        step(&mut machine, Input::Ensure(Ticket(1)));
        let actions = step(&mut machine, Input::VmmExited(Some("QEMU was killed".into())));
        assert_eq!(actions, [Action::Refuse(Ticket(1), "QEMU was killed".into())]);
        assert_eq!(step(&mut machine, Input::Ensure(Ticket(2))), [Action::Spawn]);
    }

    #[test]
    fn trouble_is_told_as_long_as_it_lasts() {
        let full = || Input::Trouble(Some("the disk is full".into()));
        let trouble = |machine: &Lifecycle| match machine.state() {
            MachineState::Running { trouble, .. } => trouble,
            state => panic!("{state:?}"),
        };
        let mut machine = Lifecycle::new();
        step(&mut machine, Input::Ensure(Ticket(1)));
        step(&mut machine, Input::EngineReady);
        step(&mut machine, full());
        assert_eq!(trouble(&machine), Some("the disk is full".into()));
        step(&mut machine, Input::Trouble(None));
        assert_eq!(trouble(&machine), None);
        // It ends with the machine, and explains a boot that does not come to its end.
        step(&mut machine, full());
        step(&mut machine, Input::VmmExited(None));
        step(&mut machine, Input::Ensure(Ticket(2)));
        step(&mut machine, Input::EngineReady);
        assert_eq!(trouble(&machine), None);
        step(&mut machine, Input::VmmExited(None));
        step(&mut machine, Input::Ensure(Ticket(3)));
        step(&mut machine, full());
        machine.handle(Input::Deadline, BOOT_TIME_MAX, 0);
        let Some(Action::Refuse(Ticket(3), why)) = machine.next_action() else { panic!("a refusal") };
        assert!(why.ends_with(": the disk is full"), "{why}");
    }

    fn input() -> impl Strategy<Value = Option<Input>> {
        prop_oneof![
            Just(None),
            Just(Some(Input::Stage("booting".into()))),
            Just(Some(Input::EngineReady)),
            Just(Some(Input::SessionLost)),
            Just(Some(Input::EngineFailed("engine".into()))),
            Just(Some(Input::Fault("fault".into()))),
            Just(Some(Input::Trouble(Some("trouble".into())))),
            Just(Some(Input::Trouble(None))),
            Just(Some(Input::VmmExited(None))),
            Just(Some(Input::VmmExited(Some("killed".into())))),
            Just(Some(Input::Deadline)),
        ]
    }

    proptest! {
        /// Every ticket is answered once, and there is never a second VM process.
        #[test]
        fn tickets_and_processes_are_counted_right(
            steps in proptest::collection::vec((input(), any::<bool>(), 0u64..60), 1..200),
        ) {
            let mut machine = Lifecycle::new();
            let (mut processes, mut open, mut next, mut now) = (0i32, std::collections::BTreeSet::new(), 0, 0);
            for (input, start, seconds) in steps {
                now += seconds;
                let input = input.unwrap_or_else(|| {
                    next += 1;
                    open.insert(Ticket(next));
                    if start { Input::Ensure(Ticket(next)) } else { Input::Stop(Ticket(next)) }
                });
                // The world only reports what can happen: a process that does not exist cannot speak.
                let from_process = matches!(
                    input,
                    Input::VmmExited(_) | Input::EngineReady | Input::EngineFailed(_) | Input::Fault(_)
                );
                if from_process && processes == 0 { continue; }
                if matches!(input, Input::VmmExited(_)) { processes -= 1; }
                machine.handle(input, Duration::from_secs(now), now);
                while let Some(action) = machine.next_action() {
                    match action {
                        Action::Spawn => processes += 1,
                        Action::Grant(ticket) | Action::Refuse(ticket, _) => prop_assert!(open.remove(&ticket)),
                        Action::PowerOff | Action::Kill => prop_assert_eq!(processes, 1),
                    }
                }
                prop_assert!((0..=1).contains(&processes));
                let stopped = matches!(machine.state(), MachineState::Stopped { .. });
                prop_assert_eq!(stopped, processes == 0);
                prop_assert!(!stopped || open.is_empty());
            }
            while processes == 1 {
                machine.handle(Input::Stop(Ticket(0)), Duration::from_secs(now), now);
                machine.handle(Input::VmmExited(None), Duration::from_secs(now), now);
                processes -= 1;
                while let Some(action) = machine.next_action() {
                    match action {
                        Action::Spawn => processes += 1,
                        Action::Grant(ticket) | Action::Refuse(ticket, _) => { open.remove(&ticket); }
                        Action::PowerOff | Action::Kill => {}
                    }
                }
            }
            prop_assert!(open.is_empty());
        }
    }
}

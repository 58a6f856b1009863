//! The threads that run a machine's processors, and how they are held and ended at any moment.
//!
//! ```text
//!            resume                    pause
//!   Held ◀────────────▶ Run ─────────────────────▶ Held (all processors are at rest when `pause` returns)
//!     │                  │
//!     └───── stop ───────┴── stop, or the guest's own end ──▶ Stop: every thread ends
//! ```
//!
//! One wish is shared by all threads; each reads it when it starts and whenever it is kicked, and acknowledges a pause
//! itself. A kick that comes between reading the wish and entering the guest is not lost: that is [`Kick`]'s promise.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::vcpu::{Bus, End, Exit, Kick, Vcpu};

/// What all processors shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    Hold,
    Stop,
}

struct State {
    wish: Wish,
    /// Threads that have not ended.
    alive: usize,
    /// Threads that are at rest because of [`Wish::Hold`].
    held: usize,
    /// How the machine ended: the first to say so is right.
    end: Option<End>,
    kicks: Vec<Option<Box<dyn Kick>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the wish known to every thread, unless the machine is to stop already.
    fn wish(&self, wish: Wish, end: Option<End>) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        if state.end.is_none() {
            state.end = end;
        }
        if state.wish != Wish::Stop && state.wish != wish {
            state.wish = wish;
            state.kicks.iter().flatten().for_each(|kick| kick.kick());
            self.changed.notify_all();
        }
        state
    }
}

/// All processors of a machine, each on a thread of its own.
pub struct Threads {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

/// Holds, resumes and stops the processors, from any thread but theirs.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

impl Threads {
    /// Starts the processors. If a thread cannot be had, those already started are ended again.
    pub fn start<V: Vcpu>(vcpus: Vec<V>, bus: Arc<dyn Bus>) -> io::Result<Self> {
        let state = State {
            wish: Wish::Run,
            alive: 0,
            held: 0,
            end: None,
            kicks: vcpus.iter().map(|_| None).collect(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let mut threads = Self { shared, handles: Vec::with_capacity(vcpus.len()) };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let place = Place::take(&threads.shared, index);
            let bus = bus.clone();
            let body = move || place.run(vcpu, bus.as_ref());
            threads.handles.push(std::thread::Builder::new().name(format!("vcpu-{index}")).spawn(body)?);
        }
        Ok(threads)
    }

    /// What controls these processors.
    pub fn control(&self) -> Control {
        Control(self.shared.clone())
    }

    /// Waits until every thread has ended, and tells how the machine did.
    pub fn wait(mut self) -> End {
        self.join();
        self.shared.lock().end.clone().unwrap_or(End::Stopped)
    }

    fn join(&mut self) {
        for handle in self.handles.drain(..) {
            if handle.join().is_err() {
                tracing::error!("a processor's thread panicked");
            }
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if !self.handles.is_empty() {
            self.control().stop();
            self.join();
        }
    }
}

impl Control {
    /// Ends all processors soon. Does not wait for them; harmless when they have ended.
    pub fn stop(&self) {
        drop(self.0.wish(Wish::Stop, Some(End::Stopped)));
    }

    /// Holds all processors and returns when all are at rest. `false` when the machine has ended instead.
    pub fn pause(&self) -> bool {
        let state = self.0.wish(Wish::Hold, None);
        let resting = |state: &mut State| state.wish == Wish::Hold && state.held < state.alive;
        let state = self.0.changed.wait_while(state, resting).unwrap_or_else(PoisonError::into_inner);
        state.wish == Wish::Hold && state.alive > 0
    }

    /// Lets held processors go on.
    pub fn resume(&self) {
        drop(self.0.wish(Wish::Run, None));
    }
}

/// A thread's place among the others; giving it up says that the thread has ended.
struct Place {
    shared: Arc<Shared>,
    index: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            drop(self.shared.wish(Wish::Stop, Some(End::Failed("a processor's thread panicked".into()))));
        }
        let mut state = self.shared.lock();
        state.kicks[self.index] = None;
        state.alive -= 1;
        self.shared.changed.notify_all();
    }
}

impl Place {
    fn take(shared: &Arc<Shared>, index: usize) -> Self {
        shared.lock().alive += 1;
        Self { shared: shared.clone(), index }
    }

    fn run(self, mut vcpu: impl Vcpu, bus: &dyn Bus) {
        match vcpu.prepare() {
            Ok(kick) => self.shared.lock().kicks[self.index] = Some(kick),
            Err(error) => return self.end(End::Failed(format!("cannot prepare a processor: {error}"))),
        }
        while let Some(was_held) = self.obey() {
            if was_held {
                vcpu.resumed();
            }
            if let Some(end) = run_until_kicked(&mut vcpu, bus) {
                return self.end(end);
            }
        }
    }

    /// Waits out a pause; `None` when the thread is to end, else whether there was a pause.
    fn obey(&self) -> Option<bool> {
        let mut state = self.shared.lock();
        let was_held = state.wish == Wish::Hold;
        if was_held {
            state.held += 1;
            self.shared.changed.notify_all();
            let held = |state: &mut State| state.wish == Wish::Hold;
            state = self.shared.changed.wait_while(state, held).unwrap_or_else(PoisonError::into_inner);
            state.held -= 1;
        }
        (state.wish != Wish::Stop).then_some(was_held)
    }

    fn end(&self, end: End) {
        tracing::debug!(vcpu = self.index, ?end, "a processor ended the machine");
        drop(self.shared.wish(Wish::Stop, Some(end)));
    }
}

/// Runs the guest and answers its accesses; `None` when the wish is to be read again.
fn run_until_kicked(vcpu: &mut impl Vcpu, bus: &dyn Bus) -> Option<End> {
    loop {
        match vcpu.run() {
            Exit::Kicked => return None,
            Exit::PortRead(port, data) => bus.port_read(port, data),
            Exit::PortWrite(port, data) => {
                if let Some(end) = bus.port_write(port, data) {
                    return Some(end);
                }
            }
            Exit::MmioRead(address, data) => bus.mmio_read(address, data),
            Exit::MmioWrite(address, data) => bus.mmio_write(address, data),
            Exit::Reset => return Some(End::Reset),
            Exit::PowerOff => return Some(End::PoweredOff),
            Exit::Failed(reason) => return Some(End::Failed(format!("{reason} ({})", vcpu.describe()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// A processor without a hypervisor: each run waits for a kick or does one thing of its script.
    struct Fake {
        script: Vec<End>,
        kicked: Arc<(Mutex<bool>, Condvar)>,
        rounds: Arc<AtomicU64>,
        resumed: Arc<AtomicU64>,
    }

    struct FakeKick(Arc<(Mutex<bool>, Condvar)>);

    impl Kick for FakeKick {
        fn kick(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_all();
        }
    }

    impl Vcpu for Fake {
        fn prepare(&mut self) -> io::Result<Box<dyn Kick>> {
            Ok(Box::new(FakeKick(self.kicked.clone())))
        }

        fn run(&mut self) -> Exit<'_> {
            self.rounds.fetch_add(1, Ordering::SeqCst);
            match self.script.pop() {
                Some(End::PoweredOff) => return Exit::PortWrite(1, &[]),
                Some(End::Reset) => return Exit::Reset,
                Some(End::Failed(reason)) => return Exit::Failed(reason),
                Some(End::Stopped) | None => {}
            }
            let mut kicked =
                self.kicked.1.wait_while(self.kicked.0.lock().unwrap(), |kicked| !*kicked).unwrap();
            *kicked = false;
            Exit::Kicked
        }

        fn resumed(&mut self) {
            self.resumed.fetch_add(1, Ordering::SeqCst);
        }

        fn describe(&mut self) -> String {
            "nowhere".into()
        }
    }

    struct PowerBus;

    impl Bus for PowerBus {
        fn port_read(&self, _: u16, _: &mut [u8]) {}
        fn port_write(&self, _: u16, _: &[u8]) -> Option<End> {
            Some(End::PoweredOff)
        }
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }

    fn fake(script: Vec<End>) -> Fake {
        Fake { script, kicked: Arc::default(), rounds: Arc::default(), resumed: Arc::default() }
    }

    fn end_of(script: Vec<End>) -> End {
        let vcpus = vec![fake(Vec::new()), fake(script), fake(Vec::new())];
        Threads::start(vcpus, Arc::new(PowerBus)).unwrap().wait()
    }

    #[test]
    fn the_first_end_ends_all() {
        assert_eq!(end_of(vec![End::Reset]), End::Reset);
        assert_eq!(end_of(vec![End::PoweredOff]), End::PoweredOff);
        assert_eq!(end_of(vec![End::Failed("it broke".into())]), End::Failed("it broke (nowhere)".into()));
    }

    #[test]
    fn a_stop_at_any_moment_ends_all_threads() {
        for round in 0..200 {
            let threads =
                Threads::start((0..3).map(|_| fake(Vec::new())).collect(), Arc::new(PowerBus)).unwrap();
            let control = threads.control();
            if round % 3 == 1 {
                assert!(control.pause());
            }
            control.stop();
            control.stop();
            assert_eq!(threads.wait(), End::Stopped);
            assert!(!control.pause(), "an ended machine cannot be held");
            control.resume();
        }
    }

    #[test]
    fn held_processors_do_not_run() {
        let vcpus: Vec<_> = (0..3).map(|_| fake(Vec::new())).collect();
        let (rounds, resumed) = (vcpus[1].rounds.clone(), vcpus[1].resumed.clone());
        let threads = Threads::start(vcpus, Arc::new(PowerBus)).unwrap();
        let control = threads.control();
        for cycle in 0..1000 {
            assert!(control.pause());
            let before = rounds.load(Ordering::SeqCst);
            let held = threads.shared.lock().held;
            assert_eq!((held, rounds.load(Ordering::SeqCst)), (3, before), "cycle {cycle}");
            control.resume();
        }
        while resumed.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        drop(threads);
    }

    #[test]
    fn a_processor_that_cannot_be_prepared_ends_the_machine() {
        struct Broken;
        impl Vcpu for Broken {
            fn prepare(&mut self) -> io::Result<Box<dyn Kick>> {
                Err(io::ErrorKind::Unsupported.into())
            }
            fn run(&mut self) -> Exit<'_> {
                Exit::Kicked
            }
            fn resumed(&mut self) {}
            fn describe(&mut self) -> String {
                String::new()
            }
        }
        let end = Threads::start(vec![Broken], Arc::new(PowerBus)).unwrap().wait();
        assert_eq!(end, End::Failed("cannot prepare a processor: unsupported".into()));
    }
}

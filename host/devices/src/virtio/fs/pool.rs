//! The threads that serve slow requests.
//!
//! A panic while one is served is the device's: it goes on in the device's own thread, whose end is noticed and has a
//! reason ([`Life`](crate::virtio::Life)).

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use tracing::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Backend;
use crate::virtio::ring::OwnedChain;

/// A request on its way.
pub(super) struct Job {
    pub queue: usize,
    pub chain: OwnedChain,
}

/// A request that was served.
pub(super) struct Done {
    pub queue: usize,
    pub head: u16,
    pub length: u32,
}

/// A request that was served, or the panic that came of it.
type Outcome = Result<Done, Box<dyn Any + Send>>;

/// The threads, and the way there and back. Dropping it ends them.
pub(super) struct Pool {
    jobs: Option<Sender<Job>>,
    done: Receiver<Outcome>,
    wake: EventFd,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub fn new(threads: usize, backend: Arc<dyn Backend>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (finished, done) = mpsc::channel();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let queue = Arc::new(Mutex::new(queue));
        let mut pool = Self { jobs: Some(jobs), done, wake, threads: Vec::new() };
        for index in 0..threads {
            let (queue, backend) = (Arc::clone(&queue), Arc::clone(&backend));
            let (finished, wake) = (finished.clone(), pool.wake()?);
            let serve = move || {
                loop {
                    // The lock is held by the one that waits; it is let go before the work begins.
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(Job { queue, chain }) = job else { return };
                    let head = chain.head();
                    // After a panic nothing is asked of the back end any more: the device ends.
                    let served = catch_unwind(AssertUnwindSafe(|| serve(&*backend, &chain)));
                    // Guest memory is let go before anybody learns that the work is done.
                    drop(chain);
                    if finished.send(served.map(|length| Done { queue, head, length })).is_err() {
                        return;
                    }
                    // Full means that it is signalled already.
                    let _signalled = wake.write(1);
                }
            };
            pool.threads.push(thread::Builder::new().name(format!("fs-slow-{index}")).spawn(serve)?);
        }
        Ok(pool)
    }

    /// Readable when something is done.
    pub fn wake(&self) -> io::Result<EventFd> {
        self.wake.try_clone()
    }

    /// Gives a request away; gives it back when the threads have ended.
    pub fn submit(&self, job: Job) -> Result<(), Job> {
        match &self.jobs {
            Some(jobs) => jobs.send(job).map_err(|refused| refused.0),
            None => Err(job),
        }
    }

    /// What is done by now. Panics with the panic of a request.
    pub fn finished(&self) -> impl Iterator<Item = Done> {
        self.done.try_iter().map(done)
    }

    /// Waits for one; `None` when the threads have ended. Panics with the panic of a request.
    pub fn wait(&self) -> Option<Done> {
        self.done.recv().ok().map(done)
    }
}

fn done(outcome: Outcome) -> Done {
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                error!("a thread for slow requests panicked");
            }
        }
    }
}

/// Serves the request in a chain; returns how many bytes were written for the driver.
pub(super) fn serve(backend: &dyn Backend, chain: &OwnedChain) -> u32 {
    match chain.buffers() {
        Ok((readable, writable)) => backend.serve(readable, writable),
        // It was looked at before and made sense; the driver has changed it since, and gets nothing.
        Err(_) => 0,
    }
}

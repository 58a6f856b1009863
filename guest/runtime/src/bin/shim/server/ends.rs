//! Ends of processes, and deaths for want of memory: collected, and made known once.

use std::time::Instant;

use guest_runtime::shim::record::{self, EXIT_FILE};
use guest_runtime::shim::{Exit, Reply};
use guest_runtime::sys;
use rustix::process::WaitOptions;

use super::{INIT, Server, ServerError};
use crate::client::Mode;
use crate::report;

/// The exit status of a process nobody knows one of.
const STATUS_UNKNOWN: i32 = 255;

impl Server {
    /// Collects every child that has ended: processes of the container, libcontainer's helpers, and those of either that
    /// failed before this program knew them. One left would keep the container's pid namespace, and its init, from ending.
    pub(super) fn reap_children(&mut self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let pid = pid.as_raw_nonzero().get();
                    let mut alive = self.processes.iter_mut().flatten().filter(|one| one.is_alive());
                    if let Some(process) = alive.find(|one| one.pid == pid) {
                        process.end(status);
                    }
                }
                Err(rustix::io::Errno::CHILD) => {
                    // No child at all: whoever still counts as alive was collected by somebody else, as when this
                    // program was started with SIGCHLD ignored. The status is lost, the end is not.
                    let alive = self.processes.iter_mut().flatten().filter(|one| one.is_alive());
                    alive.for_each(|process| process.end_with(process.failed_code.unwrap_or(STATUS_UNKNOWN)));
                    break;
                }
                Ok(None) | Err(_) => break,
            }
        }
        let init_ended =
            self.processes[INIT].as_ref().is_some_and(|init| init.ended.is_some() && init.exit.is_none());
        if init_ended
            && !self.runtime.private_pids()
            && let Err(error) = self.runtime.kill_all()
        {
            report(&error);
        }
    }

    pub(super) fn settle_ended(&mut self) {
        let now = Instant::now();
        for index in 0..self.processes.len() {
            let due = self.processes[index].as_ref().is_some_and(|process| {
                process.exit.is_none()
                    && process.ended.is_some_and(|ended| process.is_drained() || now >= ended.drain_until)
            });
            if due {
                self.settle(index);
            }
        }
    }

    /// Makes an end known, once.
    pub(super) fn settle(&mut self, index: usize) {
        if index == INIT {
            self.out_of_memory();
        }
        // On version 1 the kernel tells before it kills, and whoever was told may be faster.
        let oom_killed = index == INIT && (self.ooms > 0 || self.runtime.oom_killed());
        let Some(process) = self.processes[index].as_mut().filter(|process| process.exit.is_none()) else {
            return;
        };
        let Some(ended) = process.ended else { return };
        if let Some(log) = &mut process.log
            && let Err(error) = log.finish(ended.finished_at)
        {
            report(&ServerError::Io { step: "write the container's log", source: error });
        }
        let exit = Exit { code: ended.code, finished_at: ended.finished_at, oom_killed };
        process.exit = Some(exit.clone());
        process.release();
        if index == INIT {
            self.paused = false;
            if let Err(error) = record::write(&self.dir, EXIT_FILE, &exit) {
                report(&error);
            }
        }
        for client in 0..self.clients.len() {
            let Some(mode) = self.clients[client].as_ref().map(|client| client.mode) else { continue };
            match mode {
                Mode::Attached(attachment) if attachment.process == index => {
                    self.set_mode(client, Mode::Closing)
                }
                Mode::Waiting(process) if process == index => {
                    self.set_mode(client, Mode::Control);
                    if let Some(one) = self.clients[client].as_mut() {
                        one.ooms = None;
                    }
                    self.answer(client, &Reply::Exited(exit.clone()));
                    self.serve_requests(client);
                }
                _ => {}
            }
        }
        sys::trim_heap();
    }

    /// Init's own death for want of memory is told by its end too; this tells the others', and both at once.
    pub(super) fn out_of_memory(&mut self) {
        let Some(memory) = &mut self.memory else { return };
        self.ooms = memory.take();
        for client in 0..self.clients.len() {
            self.tell_ooms(client);
        }
    }

    pub(super) fn tell_ooms(&mut self, client: usize) {
        let count = self.ooms;
        let Some(one) = self.clients[client].as_mut() else { return };
        if one.ooms.is_some_and(|told| told < count) {
            one.ooms = Some(count);
            self.answer(client, &Reply::OutOfMemory { count });
        }
    }
}

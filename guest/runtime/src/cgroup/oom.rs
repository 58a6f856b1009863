//! Being told when the kernel runs out of a group's memory.
//!
//! Version 2 makes `memory.events` ready for exceptional reading when a count in it changes; version 1 adds to an event
//! descriptor that was registered for `memory.oom_control`, before it kills (Documentation/admin-guide/cgroup-v1/memory.rst,
//! section 10). So the first is read for the number of kills, and of the second the events count.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{EventfdFlags, PollFlags, eventfd};

use super::{Cgroup, counter};

/// Watches one group.
#[derive(Debug)]
pub struct OomWatch {
    source: Source,
    /// Where the count is, on version 2; what is there as long as the group is, on version 1.
    path: PathBuf,
    count: u64,
}

#[derive(Debug)]
enum Source {
    Events(File),
    Descriptor { events: OwnedFd, _control: File },
}

impl OomWatch {
    /// Watches a group that exists; `None` where no hierarchy counts its memory.
    pub fn new(cgroup: &Cgroup) -> io::Result<Option<Self>> {
        for folder in cgroup.existing() {
            let name = if folder.unified { "memory.events" } else { "memory.oom_control" };
            let path = folder.root.join(name);
            if !path.exists() {
                continue;
            }
            let file = File::open(&path)?;
            let source = if folder.unified {
                Source::Events(file)
            } else {
                let events = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                let words = format!("{} {}", events.as_raw_fd(), file.as_raw_fd());
                fs::write(folder.root.join("cgroup.event_control"), words)?;
                Source::Descriptor { events, _control: file }
            };
            let mut watch = Self { source, path, count: 0 };
            // What a file held when it was opened is no news.
            watch.take();
            return Ok(Some(watch));
        }
        Ok(None)
    }

    /// What to poll the descriptor for.
    pub fn flags(&self) -> PollFlags {
        match self.source {
            Source::Events(_) => PollFlags::PRI,
            Source::Descriptor { .. } => PollFlags::IN,
        }
    }

    /// Takes note of what has happened, so that the descriptor is ready again only after more. How often it has by now.
    pub fn take(&mut self) -> u64 {
        match &self.source {
            // Reading at offset zero is what makes it wait again.
            Source::Events(file) => {
                let mut bytes = [0; 1024];
                let length = std::os::unix::fs::FileExt::read_at(file, &mut bytes, 0).unwrap_or(0);
                let text = String::from_utf8_lossy(&bytes[..length]);
                self.count = counter(&text, "oom_kill").unwrap_or(self.count);
            }
            Source::Descriptor { events, .. } => {
                let mut added = [0; 8];
                let read = rustix::io::read(events, &mut added) == Ok(8);
                // The removal of a group is told in the same way.
                if read && self.path.exists() {
                    self.count += u64::from_ne_bytes(added);
                }
            }
        }
        self.count
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.source {
            Source::Events(file) => file.as_fd(),
            Source::Descriptor { events, .. } => events.as_fd(),
        }
    }
}

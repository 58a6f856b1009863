//! What libcontainer says about a failure.
//!
//! Its errors from inside the container come back as one short word ("failed syscall"); the path and the error number
//! are only in `tracing` events, emitted in forked children. So error events go to a file in memory that parent and
//! children share.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Read, Seek, Write};

use rustix::fs::{MemfdFlags, memfd_create};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The events of libcontainer and its children.
pub struct Events {
    file: File,
}

/// Starts collecting.
pub fn install() -> io::Result<Events> {
    let file = File::from(memfd_create("events", MemfdFlags::CLOEXEC)?);
    let collector = Collector { file: file.try_clone()? };
    tracing::subscriber::set_global_default(collector).map_err(io::Error::other)?;
    Ok(Events { file })
}

impl Events {
    /// Forgets what was collected.
    pub fn clear(&mut self) {
        // A file in memory cannot fail to shrink; if it did, a message would be longer.
        let _ = self.file.set_len(0).and_then(|()| self.file.rewind());
    }

    /// The first event: the one nearest to the cause.
    pub fn cause(&mut self) -> Option<String> {
        let mut text = String::new();
        self.file.rewind().and_then(|()| self.file.read_to_string(&mut text)).ok()?;
        text.lines().next().map(str::to_owned)
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // libcontainer often repeats the cause in the message.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

struct Collector {
    file: File,
}

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let line = format!("{}{}\n", line.message, line.fields).replace("\n", " ");
        // Nothing better can be done about an event that cannot be kept.
        let _ = (&self.file).write_all(format!("{}\n", line.trim_end()).as_bytes());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, ", {} {value:?}", field.name())
        };
    }
}

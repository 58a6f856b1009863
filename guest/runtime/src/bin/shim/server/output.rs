//! Output: from a process to who watches it, and to the log.

use std::mem;

use jiff::Timestamp;

use super::{HEADER_LEN, Server, ServerError};
use crate::client::Mode;
use crate::log::Stream;
use crate::report;

impl Server {
    pub(super) fn pump(&mut self, index: usize, stream: Stream) {
        self.pump_once(index, stream);
    }

    /// Reads once and passes it on: to the clients first, then to the log. Whether there may be more.
    pub(super) fn pump_once(&mut self, index: usize, stream: Stream) -> bool {
        let mut buffer = mem::take(&mut self.buffer);
        let count = self.read_output(index, stream, &mut buffer[HEADER_LEN..]);
        let more = match count {
            Some(0) => {
                if let Some(process) = self.process(index) {
                    process.streams.outputs[stream.index()] = None;
                }
                false
            }
            Some(count) => {
                buffer[..HEADER_LEN].fill(0);
                buffer[0] = stream.number();
                buffer[4..HEADER_LEN].copy_from_slice(&(count as u32).to_be_bytes());
                self.pass_on(index, stream, &buffer[..HEADER_LEN + count]);
                true
            }
            None => false,
        };
        self.buffer = buffer;
        more
    }

    /// `Some(0)` at the end, `None` when there is nothing now.
    fn read_output(&mut self, index: usize, stream: Stream, buffer: &mut [u8]) -> Option<usize> {
        let output = self.process(index)?.streams.outputs[stream.index()].as_ref()?;
        match rustix::io::read(output, buffer) {
            Ok(count) => Some(count),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            // A terminal whose last user has gone gives EIO.
            Err(_) => Some(0),
        }
    }

    fn pass_on(&mut self, index: usize, stream: Stream, frame: &[u8]) {
        let Some(process) = self.processes[index].as_mut() else { return };
        let bytes = if process.terminal { &frame[HEADER_LEN..] } else { frame };
        for client in self.clients.iter_mut().flatten() {
            if client.wants(index, stream) && client.send(bytes).is_err() {
                client.mode = Mode::Closing;
            }
        }
        if let Some(log) = &mut process.log {
            let written = log.write(stream, &frame[HEADER_LEN..], Timestamp::now());
            // A full disk fails every write: say so when it begins.
            let failed_before = mem::replace(&mut process.log_fails, written.is_err());
            if let Err(error) = written
                && !failed_before
            {
                report(&ServerError::Io { step: "write the container's log", source: error });
            }
        }
    }
}

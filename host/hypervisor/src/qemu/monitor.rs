//! QEMU's monitor (QMP), as far as it is needed: when the machine is ready, and how it ended.
//!
//! One JSON object a line (QEMU's `docs/interop/qmp-spec`). QEMU greets as soon as it has read its command line; we
//! answer with `qmp_capabilities`, which it executes in its main loop: its answer says that every device is connected
//! and the processors run. After that it sends events.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use serde::Deserialize;
use serde::de::IgnoredAny;

/// QEMU's lines are some hundred bytes; its longest greeting is far below this.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// What QEMU tells about the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MonitorEvent {
    /// Devices are connected and the processors run.
    Ready,
    /// The guest switched the machine off.
    PoweredOff,
    /// The guest asked for a restart, which ends the machine as well.
    Reset,
    /// The machine ends for another reason, in QEMU's words (such as `host-signal`).
    Ended(String),
}

/// The reading end of a monitor connection.
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
}

#[derive(Debug, PartialEq)]
enum Line {
    Greeting,
    Event(MonitorEvent),
}

#[derive(Deserialize)]
struct RawLine {
    #[serde(rename = "QMP")]
    greeting: Option<IgnoredAny>,
    #[serde(rename = "return")]
    answer: Option<IgnoredAny>,
    event: Option<String>,
    data: Option<Data>,
    error: Option<Failure>,
}

#[derive(Deserialize)]
struct Data {
    reason: Option<String>,
}

#[derive(Deserialize)]
struct Failure {
    desc: String,
}

impl Monitor {
    /// Speaks over our end of the socket whose other end QEMU inherited.
    pub fn new(stream: UnixStream) -> Self {
        Self { reader: BufReader::new(stream) }
    }

    /// Waits for the next event; `None` when QEMU has closed the connection (it has ended).
    pub fn next_event(&mut self) -> Option<MonitorEvent> {
        loop {
            let mut line = Vec::new();
            match self.reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, "the monitor connection ended");
                    return None;
                }
            }
            match parse(&line) {
                Some(Line::Greeting) => self.answer_greeting(),
                Some(Line::Event(event)) => return Some(event),
                None => {}
            }
        }
    }

    fn answer_greeting(&mut self) {
        if let Err(error) = self.reader.get_mut().write_all(b"{\"execute\":\"qmp_capabilities\"}\n") {
            tracing::debug!(%error, "QEMU ended during the monitor's greeting");
        }
    }
}

/// The meaning of one line, if it is one we care about.
fn parse(line: &[u8]) -> Option<Line> {
    let line: RawLine = match serde_json::from_slice(line) {
        Ok(line) => line,
        Err(error) => {
            tracing::warn!(%error, "QEMU's monitor sent something that is not understood");
            return None;
        }
    };
    if let Some(failure) = line.error {
        tracing::warn!(error = failure.desc, "QEMU's monitor refused a command");
    }
    if line.greeting.is_some() {
        return Some(Line::Greeting);
    }
    // The only command is the one that answers the greeting.
    if line.answer.is_some() {
        return Some(Line::Event(MonitorEvent::Ready));
    }
    if line.event.as_deref() != Some("SHUTDOWN") {
        return None;
    }
    let reason = line.data.and_then(|data| data.reason).unwrap_or_default();
    Some(Line::Event(match reason.as_str() {
        "guest-shutdown" => MonitorEvent::PoweredOff,
        "guest-reset" => MonitorEvent::Reset,
        _ => MonitorEvent::Ended(reason),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_qemu_7() {
        let check = |line: &str, meaning: Option<Line>| assert_eq!(parse(line.as_bytes()), meaning, "{line}");
        check(
            r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#,
            Some(Line::Greeting),
        );
        check(r#"{"return": {}}"#, Some(Line::Event(MonitorEvent::Ready)));
        check(
            r#"{"timestamp": {"seconds": 1}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#,
            Some(Line::Event(MonitorEvent::PoweredOff)),
        );
        check(
            r#"{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}"#,
            Some(Line::Event(MonitorEvent::Reset)),
        );
        check(
            r#"{"event": "SHUTDOWN", "data": {"reason": "host-signal"}}"#,
            Some(Line::Event(MonitorEvent::Ended("host-signal".into()))),
        );
        check(r#"{"event": "NIC_RX_FILTER_CHANGED", "data": {"name": "n"}}"#, None);
        check(r#"{"error": {"class": "GenericError", "desc": "no"}}"#, None);
        check("nonsense", None);
    }

    #[test]
    fn the_greeting_is_answered_and_the_end_is_seen() {
        let (ours, mut qemu) = UnixStream::pair().unwrap();
        qemu.write_all(b"{\"QMP\": {}}\r\n{\"return\": {}}\r\n").unwrap();
        let mut monitor = Monitor::new(ours);
        assert_eq!(monitor.next_event(), Some(MonitorEvent::Ready));
        let mut answer = String::new();
        BufReader::new(&qemu).read_line(&mut answer).unwrap();
        assert_eq!(answer, "{\"execute\":\"qmp_capabilities\"}\n");
        drop(qemu);
        assert_eq!(monitor.next_event(), None);
    }
}
